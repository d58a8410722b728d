"""Run: python -m pytest tests/full/test_weights.py    (-m slow: the memory of a 1.4 GB load, one minute)"""
import argparse
import fnmatch
import io
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from common import config, files, lora
from common.config import UserError
from full import weights
from full.janus import Janus, JanusConfig
from full_size import key_table, make_random
from model import GPT, PRESETS, GPTConfig
from vqgan import VQGAN, VQConfig

TEXT = GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=96, vocab_size=24, block_size=256, cls_token_num=3,
                 caption_dim=10)
CLASSES = GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=96, vocab_size=24, block_size=256,
                    model_type="c2i", cls_token_num=1, num_classes=7)
TOKENIZER = VQConfig(codebook_size=20, codebook_embed_dim=4, ch=32, ch_mult=(1, 2), num_res_blocks=1,
                     z_channels=8)


def path_of(tmp_path, cfg, name="some_256.pt"):
    """Write a random file of `cfg` and return its path and its tensors."""
    path = str(tmp_path / name)
    make_random(cfg, path)
    return path, torch.load(path)["model"]


def same(module, state):
    ours = module.state_dict()
    return list(ours) == list(state) and all(torch.equal(ours[k], state[k]) for k in state)


def convert(path, target=None):
    """Run the command that converts `path`, and return the path of the new file."""
    target = target or os.path.join(os.path.dirname(path), "converted.pt")
    if os.path.exists(target):
        os.remove(target)
    weights.main([f"--convert={path}", f"--to={target}"])
    return target


def converted(path, **options):
    """Convert `path` and load the new file as a policy."""
    return GPT.from_pretrained(convert(path), **options)


def message(*args, load=GPT.from_pretrained, **options):
    """Return the message of the error that `load` must raise, which must be one line."""
    with pytest.raises(UserError) as error:
        load(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- tables --------------------------------------------------------------------------------------------

def test_key_table_is_that_of_the_released_files():
    """The table is written by hand from the description of the files: two layers of width 768."""
    D, F, V = 768, 2048, 16384
    expected = {"tok_embeddings.weight": (V, D), "cls_embedding.uncond_embedding": (120, 2048),
                "cls_embedding.cap_proj.fc1.weight": (D, 2048), "cls_embedding.cap_proj.fc2.weight": (D, D),
                "norm.weight": (D,), "output.weight": (V, D)}
    for i in (0, 1):
        expected |= {f"layers.{i}.{name}.weight": shape for name, shape in {
            "attention.wqkv": (3 * D, D), "attention.wo": (D, D), "attention_norm": (D,), "ffn_norm": (D,),
            "feed_forward.w1": (F, D), "feed_forward.w3": (F, D), "feed_forward.w2": (D, F)}.items()}
    assert key_table(GPTConfig(n_layer=2)) == expected
    classes = key_table(GPTConfig(n_layer=2, model_type="c2i", cls_token_num=1))
    captions = {key for key in expected if key.startswith("cls_embedding")}
    assert classes == {**{k: v for k, v in expected.items() if k not in captions},
                       "cls_embedding.embedding_table.weight": (1001, D)}


def test_key_table_of_the_tokenizer():
    """The table is written by hand: two levels of one ResNet block (two in the decoder)."""
    def conv(name, n_in, n_out, k):
        return {f"{name}.weight": (n_out, n_in, k, k), f"{name}.bias": (n_out,)}

    def norm(name, n):
        return {f"{name}.weight": (n,), f"{name}.bias": (n,)}

    def res(name, n_in, n_out):
        return {**norm(f"{name}.norm1", n_in), **conv(f"{name}.conv1", n_in, n_out, 3),
                **norm(f"{name}.norm2", n_out), **conv(f"{name}.conv2", n_out, n_out, 3),
                **(conv(f"{name}.nin_shortcut", n_in, n_out, 1) if n_in != n_out else {})}

    def attn(name, n):
        return {**norm(f"{name}.norm", n), **{k: v for part in ("q", "k", "v", "proj_out")
                                              for k, v in conv(f"{name}.{part}", n, n, 1).items()}}
    expected = {"quantize.embedding.weight": (20, 4),
                **conv("quant_conv", 8, 4, 1), **conv("post_quant_conv", 4, 8, 1),
                **conv("encoder.conv_in", 3, 32, 3), **res("encoder.conv_blocks.0.res.0", 32, 32),
                **conv("encoder.conv_blocks.0.downsample.conv", 32, 32, 3),
                **res("encoder.conv_blocks.1.res.0", 32, 64), **attn("encoder.conv_blocks.1.attn.0", 64),
                **norm("encoder.norm_out", 64), **conv("encoder.conv_out", 64, 8, 3),
                **conv("decoder.conv_in", 8, 64, 3),
                **res("decoder.conv_blocks.0.res.0", 64, 64), **attn("decoder.conv_blocks.0.attn.0", 64),
                **res("decoder.conv_blocks.0.res.1", 64, 64), **attn("decoder.conv_blocks.0.attn.1", 64),
                **conv("decoder.conv_blocks.0.upsample.conv", 64, 64, 3),
                **res("decoder.conv_blocks.1.res.0", 64, 32), **res("decoder.conv_blocks.1.res.1", 32, 32),
                **norm("decoder.norm_out", 32), **conv("decoder.conv_out", 32, 3, 3)}
    for side in ("encoder", "decoder"):
        mid = f"{side}.mid"
        expected |= {**res(f"{mid}.0", 64, 64), **attn(f"{mid}.1", 64), **res(f"{mid}.2", 64, 64)}
    assert key_table(TOKENIZER) == expected


@pytest.mark.parametrize("name, millions", [
    ("GPT-B", 111), ("GPT-L", 343), ("GPT-XL", 775), ("GPT-XXL", 1400), ("GPT-3B", 3100), ("GPT-XXXL", 3900)])
def test_parameters_of_the_presets_are_the_published_ones(name, millions):
    n_layer, n_head, dim = PRESETS[name]
    cfg = GPTConfig(dim=dim, n_layer=n_layer, n_head=n_head)
    assert weights.size(cfg, torch.bfloat16) / 2e6 == pytest.approx(millions, rel=.02)


def test_tokenizers_have_the_published_size():
    assert weights.size(weights.RELEASED["vq_ds16_t2i.pt"][0]) / 4e6 == pytest.approx(72, abs=.5)
    assert weights.size(weights.RELEASED["vq_ds8_c2i.pt"][0]) / 4e6 == pytest.approx(70, abs=.5)


def test_sizes_of_other_peoples_models_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")

    def count(make, cfg):
        with torch.device("meta"):
            return sum(p.numel() for p in make(cfg).parameters())
    t5 = transformers.T5Config(vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24,
                               num_heads=32, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    h, l = (transformers.CLIPConfig(
        projection_dim=d, text_config=dict(hidden_size=d, intermediate_size=4 * d, num_hidden_layers=m),
        vision_config=dict(hidden_size=w, intermediate_size=4 * w, num_hidden_layers=n, patch_size=14,
                                             num_attention_heads=16))
        for d, m, w, n in ((1024, 24, 1280, 32), (768, 12, 1024, 24)))
    assert weights.CLIP_H == count(transformers.CLIPModel, h)
    assert weights.CLIP_L == count(transformers.CLIPModel, l)
    # flan-t5 has a separate output matrix, but transformers 5 sets this option to True in any case.
    words, tied = 32128 * 2048, t5.tie_word_embeddings
    assert weights.T5_XL == count(transformers.T5ForConditionalGeneration, t5) + tied * words
    sizes = (768, 1024, 128, 64, 16, 1)
    assert weights.AESTHETIC == sum(sum(p.numel() for p in torch.nn.Linear(a, b).parameters())
                                    for a, b in zip(sizes, sizes[1:]))


def test_the_released_table():
    for name, (what, source, licence, purpose) in weights.RELEASED.items():
        assert licence and purpose and re.fullmatch(r"[\w.-]+/[\w.-]+|https://\S+", source)
        if isinstance(what, GPTConfig):
            kind, size, pixels = re.fullmatch(r"(t2i|c2i)_([XLB3]+)_(?:stage\d_)?(\d+)\.pt", name).groups()
            assert (what.n_layer, what.n_head, what.dim) == PRESETS["GPT-" + size] and what.model_type == kind
            assert what.block_size == {"256": 256, "384": 576, "512": 1024}[pixels]
            assert what.cls_token_num == (120 if kind == "t2i" else 1)


# ---- reading -------------------------------------------------------------------------------------------

def with_junk(state):
    """Return what trainers store beside weights: an optimizer, averaged weights, options."""
    return {"model": state, "ema": {k: v + 1 for k, v in state.items()}, "steps": 7,
            "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1e-4, model="GPT-XL", tags=["a", None])}


WRAPPINGS = {
    "model": lambda s: {"model": s}, "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s}, "flat": lambda s: s,
    "nested": lambda s: {"module": {"state_dict": s}}, "training": with_junk,
    "ema first": lambda s: dict(reversed(list(with_junk(s).items()))),
    "ddp": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}},
    "both": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "inside": lambda s: {"model": {re.sub(r"^(layers\.\d+|encoder)\.", r"\1._orig_mod.", k): v
                                   for k, v in s.items()}}}


@pytest.mark.parametrize("cfg", [TEXT, CLASSES, TOKENIZER], ids=["t2i", "c2i", "vq"])
@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_every_wrapping_gives_the_same_model_after_conversion(tmp_path, wrap, cfg):
    path, state = path_of(tmp_path, cfg)
    torch.save(WRAPPINGS[wrap](state), path)
    path = convert(path)
    if cfg is TOKENIZER:
        model = VQGAN.from_pretrained(path)
        assert model.config == cfg
    else:
        model = GPT.from_pretrained(path, n_head=2)
        assert model.config == cfg
    assert same(model, state) and not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("wrap", ["model", "flat", "training", "ema first"])
def test_the_released_layout_needs_no_conversion(tmp_path, wrap):
    path, state = path_of(tmp_path, TEXT)
    torch.save(WRAPPINGS[wrap](state), path)
    assert same(GPT.from_pretrained(path, n_head=2), state)


@pytest.mark.parametrize("wrap", ["module", "state_dict", "nested"])
def test_other_wrappers_are_refused_with_the_command_that_converts(tmp_path, wrap):
    path, state = path_of(tmp_path, TEXT)
    torch.save(WRAPPINGS[wrap](state), path)
    assert "--convert" in message(path, n_head=2)


def test_a_converted_file_keeps_what_no_shape_tells(tmp_path):
    """The fields come back from the entry "config", and an argument overrides them."""
    path, state = path_of(tmp_path, TEXT)
    told, told_path = {"n_head": 4, "norm_eps": 1e-6, "block_size": 64}, str(tmp_path / "told.pt")
    torch.save({"model": state, "config": told}, told_path)
    assert vars(GPT.from_pretrained(told_path).config).items() >= told.items()
    assert GPT.from_pretrained(told_path, n_head=2).config.n_head == 2
    stored = torch.load(convert(path), weights_only=True)
    assert stored["config"] == {"block_size": 256}          # as the name of the source tells


def test_buffers_that_are_not_needed_are_left_out_and_said(tmp_path, capsys):
    path, state = path_of(tmp_path, TEXT)
    torch.save({"model": {**state, "freqs_cis": torch.ones(3), "causal_mask": torch.ones(2),
                           "layers.0.attention.kv_cache.k_cache": torch.ones(1),
                           "layers.1.attention.kv_cache.v_cache": torch.ones(1)}}, path)
    assert same(GPT.from_pretrained(path, n_head=2), state)
    left_out, tokens = capsys.readouterr().out.splitlines()
    assert "left out 4 " in left_out
    assert "freqs_cis, causal_mask, layers.0.attention.kv_cache.k_cache" in left_out
    assert "256 image tokens" in tokens and "256 pixels" in tokens
    path, state = path_of(tmp_path, TOKENIZER, "vq.pt")
    torch.save({"model": {**state, "quantize.codebook_used": torch.zeros(65536)}, "optimizer": {},
                "discriminator": {"main.0.weight": torch.ones(1)}, "optimizer_disc": {}}, path)
    assert same(VQGAN.from_pretrained(path), state)
    assert "left out 4 " in capsys.readouterr().out


def test_a_file_of_the_model_alone_is_loaded_without_a_word(tmp_path, capsys):
    path, _ = path_of(tmp_path, TOKENIZER)
    VQGAN.from_pretrained(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, tokens", [
    ("t2i_XL_stage1_256.pt", 256), ("c2i_B_384.pt", 576), ("t2i_XL_stage2_512.pt", 1024),
    ("a_256_512.pt", 1024), ("model.pt", None), ("a_2560.pt", None), ("256.pt", None)])
def test_image_tokens_come_from_the_name(tmp_path, capsys, name, tokens):
    path, _ = path_of(tmp_path, TEXT, name)
    if tokens:
        assert GPT.from_pretrained(path, n_head=2).config.block_size == tokens
        assert f"{tokens} image tokens" in capsys.readouterr().out
    else:
        assert "block_size=" in message(path, n_head=2)
    assert GPT.from_pretrained(path, n_head=2, block_size=64).config.block_size == 64


def test_heads_come_from_the_published_sizes(tmp_path, monkeypatch):
    assert len({(n_layer, dim) for n_layer, _, dim in PRESETS.values()}) == len(PRESETS)       # so they can
    monkeypatch.setitem(PRESETS, "GPT-mini", (2, 4, 256))
    cfg = GPTConfig(dim=256, n_layer=2, n_head=4, vocab_size=8, caption_dim=4)
    path, state = path_of(tmp_path, cfg, "b_256.pt")
    assert GPT.from_pretrained(path).config == cfg             # 256 is also the multiple that fits the width
    assert GPT.from_pretrained(path, n_head=8).config.n_head == 8
    path, _ = path_of(tmp_path, TEXT)
    assert "n_head=" in message(path) and "2 layers of width 32" in message(path)


@pytest.mark.parametrize("options, parts", [
    (dict(n_heads=2), ["'n_heads'", "n_head"]), (dict(n_head=3), ["no such GPT"]),
    (dict(n_head=2, block_size=200), ["no such GPT", "square"]),
    (dict(n_head=2, dtype=torch.int8), ["dtype"]), (dict(n_head=2, dtype="fp8"), ["dtype", "'fp8'"]),
    (dict(n_head=2, dim=64), ["'layers.0.attention.wqkv.weight' should be [192, 64], but is [96, 32]"]),
    (dict(n_head="two"), ["no such GPT"]), (dict(n_head=0), ["no such GPT"])])
def test_overrides_are_checked(tmp_path, options, parts):
    path, _ = path_of(tmp_path, TEXT)
    text = message(path, **options)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", torch.bfloat16, "float16"])
def test_dtypes(tmp_path, stored, wanted):
    path, state = str(tmp_path / "h_256.pt"), None
    make_random(CLASSES, path, dtype=stored)
    state = torch.load(path)["model"]
    assert {t.dtype for t in state.values()} == {stored}
    model = GPT.from_pretrained(path, n_head=2, dtype=wanted)
    right = {"float32": torch.float32, "float16": torch.float16}.get(wanted, wanted)
    assert same(model, {k: v.to(right) for k, v in state.items()})
    assert {p.dtype for p in model.parameters()} == {right}


def test_loading_leaves_the_random_streams_alone_and_parameters_are_memory(tmp_path):
    """Nothing of the file is needed afterwards, and training may write to the parameters."""
    path, state = path_of(tmp_path, TEXT)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model = GPT.from_pretrained(path, n_head=2, token_dropout_p=0.0)
    assert torch.equal(before, torch.get_rng_state()) and model.config.token_dropout_p == 0
    os.remove(path)
    cond = torch.randn(2, 3, 10)
    model(torch.zeros(2, 5, dtype=torch.long), cond).logsumexp(2).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.output.weight, state["output.weight"])
    assert model.generate(cond).shape == (2, 256)


def test_differences_are_listed_eight_and_counted(tmp_path):
    path, state = path_of(tmp_path, TEXT)
    state["norm.weight"], state["layers.0.attention.lora"] = torch.ones(5), torch.ones(1)
    del state["layers.1.attention.wo.weight"]
    torch.save({"model": state}, path)
    text = message(path, n_head=2)
    assert text.endswith("in 3 places: 'layers.1.attention.wo.weight' should be [32, 32], but is absent; "
                         "'norm.weight' should be [32], but is [5]; "
                         "'layers.0.attention.lora' should be absent, but is [1]")
    torch.save({"model": {**state, **{f"x{i}": torch.ones(1) for i in range(20)}}}, path)
    text = message(path, n_head=2)
    assert "in 23 places" in text and text.count(" should be ") == 8 and text.endswith("; ...")


@pytest.mark.parametrize("content", [
    {"model": {}}, {}, {"a": torch.ones(1)}, {"tok_embeddings.weight": torch.ones(3)},
    {"tok_embeddings.weight": torch.ones(3, 4)}, {"model": {"steps": 3}}, [1, 2], torch.ones(3), "text",
    {"tok_embeddings.weight": 3, "layers.0.feed_forward.w1.weight": None}])
def test_other_things_are_refused_in_one_line(tmp_path, content):
    path = str(tmp_path / "x_256.pt")
    torch.save(content, path)
    for load in (GPT.from_pretrained, VQGAN.from_pretrained):
        assert path in message(path, load=load)


def test_files_of_the_other_kind_say_what_they_hold(tmp_path):
    vq, gpt = path_of(tmp_path, TOKENIZER)[0], path_of(tmp_path, TEXT, "gpt_256.pt")[0]
    text = message(vq)
    assert "GPTConfig" in text and "encoder.conv_in.weight" in text
    text = message(gpt, load=VQGAN.from_pretrained)
    assert "VQConfig" in text and "cls_embedding.uncond_embedding" in text


def test_missing_files_and_folders(tmp_path):
    for path in (str(tmp_path / "none_256.pt"), str(tmp_path)):
        for load in (GPT.from_pretrained, converted):
            assert path in message(path, load=load) and "python -m full.weights" in message(path, load=load)


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.path.join(os.environ["EVIL_DIR"], "ran"),)


def test_a_file_that_would_run_a_command_does_not(tmp_path, monkeypatch):
    """argparse.Namespace is the one class that is allowed, so a command is tried beside it and inside it."""
    monkeypatch.setenv("EVIL_DIR", str(tmp_path))
    for content in ({"model": {"x": Evil()}}, {"args": argparse.Namespace(lr=Evil())}):
        path = str(tmp_path / "evil_256.pt")
        torch.save(content, path)
        for load in (GPT.from_pretrained, converted):
            assert "damaged, or holds more than plain tensors" in message(path, load=load)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)                    # without weights_only the command does run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0, .01, .3, .9, .999])
def test_truncated_files(tmp_path, share):
    path, _ = path_of(tmp_path, TEXT)
    whole = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(whole[:int(share * len(whole))])
    assert "damaged" in message(path, n_head=2)


def test_old_format_of_torch(tmp_path):
    path, state = path_of(tmp_path, TEXT)
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert same(GPT.from_pretrained(path, n_head=2), state)


# ---- the Hugging Face port -----------------------------------------------------------------------------

def to_port(state, D=32):
    """Rename the tensors of the released layout to those of the port, by the port's description."""
    out = {}
    for key, value in state.items():
        if key.endswith("wqkv.weight"):
            i = key.split(".")[1]
            for part, rows in zip("qkv", (value[:D], value[D:2 * D], value[2 * D:])):
                out[f"model.layers.{i}.self_attn.{part}_proj.weight"] = rows.clone()
            out[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        elif key.startswith("layers."):
            _, i, *rest = key.split(".")
            out[f"model.layers.{i}." + {
                "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm",
                "ffn_norm": "post_attention_layernorm", "feed_forward.w1": "mlp.gate_proj",
                "feed_forward.w2": "mlp.down_proj",
                "feed_forward.w3": "mlp.up_proj"}[".".join(rest[:-1])] + ".weight"] = value
        else:
            out[{"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
                 "output.weight": "lm_head.weight"}.get(key, f"model.{key}")] = value
    return out


@pytest.fixture(params=["safetensors", "shards", "bin", "single safetensors", "single bin"])
def port(request, tmp_path):
    """Return (path to convert, its folder, the GPT that the port was made of)."""
    torch.manual_seed(0)
    gpt, folder = GPT(TEXT).eval(), tmp_path / "Port_256"
    torch.nn.init.normal_(gpt.output.weight)
    state = to_port(gpt.state_dict())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"num_attention_heads": 2, "rms_norm_eps": 1e-6, "hidden_size": 32}))
    if "bin" in request.param:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        torch_io = pytest.importorskip("safetensors.torch")
        keys, parts = list(state), 3 if request.param == "shards" else 1
        for i in range(parts):
            torch_io.save_file({k: state[k].contiguous() for k in keys[i::parts]},
                               folder / f"model-{i}-of-{parts}.safetensors")
    if "single" in request.param:
        (file,) = [name for name in os.listdir(folder) if name != "config.json"]
        return str(folder / file), folder, gpt
    return str(folder), folder, gpt


def test_port_computes_what_the_original_does(port, tmp_path, capsys):
    path, folder, gpt = port
    options = dict(block_size=256) if os.path.isfile(path) else {}
    ours = converted(path, **options)
    assert "left out 2 " in capsys.readouterr().out         # inv_freq of two layers
    assert ours.config.norm_eps == 1e-6 and ours.config.n_head == 2 and same(ours, gpt.state_dict())
    stored = torch.load(convert(path), weights_only=True)   # only the name of the folder tells the pixels
    assert stored["config"] == {"n_head": 2, "norm_eps": 1e-6} | (
        {} if os.path.isfile(path) else {"block_size": 256})
    new = convert(path, str(tmp_path / "new.pt"))
    ours = GPT.from_pretrained(new, norm_eps=1e-5, **options)
    for file in (*map(str, folder.iterdir()), new):         # parameters are memory, not views of a file
        with open(file, "r+b") as opened:
            opened.write(bytes(os.path.getsize(file)))
    tokens, cond = torch.randint(0, 24, (2, 20)), torch.randn(2, 3, 10)
    torch.testing.assert_close(ours(tokens, cond), gpt(tokens, cond), atol=1e-6, rtol=0)


def test_port_without_config_and_with_a_damaged_one(port, tmp_path):
    path, folder, _ = port
    new = str(tmp_path / "new.pt")
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in message(path, new, load=convert)
    (folder / "config.json").write_text('{"num_attention_heads": "two"}')
    assert "n_head must be of type int, got 'two'" in message(path, new, load=convert)
    os.remove(folder / "config.json")
    assert "n_head=" in message(convert(path, new))
    assert GPT.from_pretrained(convert(path, new), n_head=4, block_size=64).config.norm_eps == 1e-5
    for name in os.listdir(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:200])
    assert "damaged" in message(path, new, load=convert)


def test_port_that_lacks_a_key(tmp_path):
    path, state = path_of(tmp_path, TEXT)
    port = to_port(state)
    del port["model.layers.1.self_attn.k_proj.weight"]
    torch.save(port, path)
    text = message(convert(path), n_head=2)
    assert "'layers.1.attention.wqkv.weight' should be [96, 32], but is absent" in text
    assert text.count("should be absent") == 2              # q and v


# ---- parity with another implementation of the tokenizer -----------------------------------------------

def test_tokenizer_agrees_with_that_of_janus_in_transformers():
    """Janus uses LlamaGen's tokenizer. transformers has its own version of it, with other names.

    The `encode` of transformers takes the nearest code without normalizing z or the codes e. The codes of the
    test have length 1. Then distances have the order of cosines, because |z - e|^2 = |z|^2 + 1 - 2 z e.
    """
    janus = pytest.importorskip("transformers.models.janus")
    torch.manual_seed(0)
    oracle = janus.JanusVQVAE(janus.JanusVQVAEConfig(
        base_channels=32, channel_multiplier=[1, 1, 2], num_res_blocks=2, latent_channels=16, embed_dim=8,
        num_embeddings=64, num_patches=8)).double().eval()
    for name, p in oracle.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name and "weight" in name else 0.0, .05)
    codes = oracle.quantize.embedding.weight.data
    codes.copy_(torch.nn.functional.normalize(torch.randn_like(codes), dim=1))
    names = {".down.": ".conv_blocks.", ".up.": ".conv_blocks.", ".block.": ".res.",
             ".mid.block_1.": ".mid.0.", ".mid.attn_1.": ".mid.1.", ".mid.block_2.": ".mid.2."}
    state = {}
    for key, value in oracle.state_dict().items():
        for theirs, released in names.items():
            key = key.replace(theirs, released)
        state[key] = value
    ours = VQGAN(VQConfig(codebook_size=64, ch=32, ch_mult=(1, 1, 2), z_channels=16)).double().eval()
    ours.load_state_dict(state)
    images = torch.rand(2, 3, 32, 32, dtype=torch.double) * 2 - 1
    with torch.no_grad():
        tokens = oracle.encode(images).image_tokens.view(2, 64)
        assert torch.equal(ours.encode(images), tokens) and tokens.unique().numel() > 8
        expected = oracle.decode(tokens)
        assert .05 < expected.std() < 2
        torch.testing.assert_close(ours.decode(tokens), expected, atol=1e-12, rtol=0)


# ---- writing -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cfg", [TEXT, CLASSES, TOKENIZER], ids=["t2i", "c2i", "vq"])
def test_export_and_back_is_bit_exact_and_in_the_released_layout(tmp_path, cfg):
    torch.manual_seed(0)
    model, path = (VQGAN if cfg is TOKENIZER else GPT)(cfg), str(tmp_path / "new" / "mine_256.pt")
    weights.export(model, path)
    stored = torch.load(path, weights_only=True)
    assert list(stored) == ["model"] and list(stored["model"]) == list(key_table(cfg))
    back = VQGAN.from_pretrained(path) if cfg is TOKENIZER else GPT.from_pretrained(path, n_head=2)
    assert back.config == cfg and same(back, model.state_dict())
    weights.export(model.to(torch.bfloat16), path)          # fp32 unless asked otherwise
    assert {t.dtype for t in torch.load(path)["model"].values()} == {torch.float32}
    weights.export(model, path, dtype=torch.float16)
    assert {t.dtype for t in torch.load(path)["model"].values()} == {torch.float16}


def test_random_files_are_reproducible_and_sane(tmp_path):
    _, a = path_of(tmp_path, TEXT, "a_256.pt")
    _, b = path_of(tmp_path, TEXT, "b_256.pt")
    assert all(torch.equal(a[k], b[k]) for k in a)
    _, vq = path_of(tmp_path, TOKENIZER, "vq.pt")
    assert {k.rpartition(".")[2]: v.unique().tolist() for k, v in vq.items() if v.dim() == 1} == {
        "bias": [0], "weight": [1]}                         # of convolutions and norms
    make_random(TEXT, str(tmp_path / "c_256.pt"), seed=1, std=.2)
    model = GPT.from_pretrained(str(tmp_path / "c_256.pt"), n_head=2)
    model.requires_grad_(False)
    assert model.output.weight.std() == pytest.approx(.2, rel=.1) and (model.norm.weight == 1).all()
    logits = model(torch.randint(0, 24, (4, 30)), torch.randn(4, 3, 10))
    assert logits.std() == pytest.approx(.2 * 32 ** .5, rel=.3)              # std * sqrt(D)


# ---- finding -------------------------------------------------------------------------------------------

NAMES = ["t2i_XL_stage1_256.pt", "flan-t5-xl"]


def fill(folder, names=("config.json", "model.safetensors")):
    os.makedirs(folder)
    for name in names:
        open(os.path.join(folder, name), "w").close()


def test_find_what_is_there(tmp_path):
    open(tmp_path / NAMES[0], "w").close()
    fill(tmp_path / NAMES[1])
    assert weights.find(NAMES, str(tmp_path), download=False) == {n: str(tmp_path / n) for n in NAMES}


def test_find_lists_what_is_missing_with_all_that_is_needed(tmp_path):
    with pytest.raises(UserError) as error:
        weights.find([*NAMES, "sac+logos+ava1-l14-linearMSE.pth"], str(tmp_path), download=False)
    first, gpt, t5, head = str(error.value).splitlines()
    assert first == "3 of 3 files are missing"
    page = f"https://huggingface.co/peizesun/llamagen_t2i/resolve/main/{NAMES[0]}"
    assert gpt.split() == [NAMES[0], "3,112", "MB", "MIT", page, "to", str(tmp_path / NAMES[0])]
    page = "https://huggingface.co/google/flan-t5-xl"
    assert t5.split() == [NAMES[1], "11,399", "MB", "Apache-2.0", page, "to", str(tmp_path / NAMES[1])]
    assert "sac%2Blogos" in head and head.endswith("linearMSE.pth")


def test_find_takes_files_of_your_own_and_names_what_it_does_not_know(tmp_path, hub):
    inside, outside = tmp_path / "weights" / "mine_256.pt", tmp_path / "mine_512.pt"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_text("")
    folder = str(inside.parent)
    assert weights.find(["mine_256.pt", str(outside)], folder) == {
        "mine_256.pt": str(inside), str(outside): str(outside)}
    for name in ("gpt-5", str(tmp_path / "none.pt")):
        with pytest.raises(UserError) as error:
            weights.find([name, "vq_ds16_t2i.pt"], folder)
        assert name in str(error.value) and "t2i_XL_stage1_256.pt" in str(error.value)
    assert hub[1] == []                                     # nothing is fetched for a mistyped run


def test_a_folder_without_all_its_parts_is_missing(tmp_path):
    folder = tmp_path / "flan-t5-xl"
    fill(folder, ["config.json", "model-1.safetensors"])
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UserError):
        weights.find(["flan-t5-xl"], str(tmp_path), download=False)
    (folder / "model-2.safetensors").write_text("")
    assert weights.find(["flan-t5-xl"], str(tmp_path), download=False)
    os.remove(folder / "config.json")
    with pytest.raises(UserError):
        weights.find(["flan-t5-xl"], str(tmp_path), download=False)


@pytest.fixture
def hub(monkeypatch):
    """Replace huggingface_hub by a stand-in that records requests and writes empty files."""
    calls, module = [], types.ModuleType("huggingface_hub")

    def snapshot_download(repo, local_dir, allow_patterns, etag_timeout):
        assert etag_timeout <= 5
        calls.append((repo, allow_patterns))
        os.makedirs(local_dir, exist_ok=True)
        whole = "*.json" in allow_patterns
        for name in ("config.json", "model.safetensors") if whole else allow_patterns:
            open(os.path.join(local_dir, name), "w").close()
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module, calls


def test_find_downloads_only_what_is_missing(tmp_path, hub):
    open(tmp_path / "vq_ds16_t2i.pt", "w").close()
    paths = weights.find([*NAMES, "vq_ds16_t2i.pt"], str(tmp_path))
    assert all(os.path.exists(path) for path in paths.values())
    (gpt, gpt_files), (t5, t5_files) = hub[1]
    assert (gpt, gpt_files, t5) == ("peizesun/llamagen_t2i", [NAMES[0]], "google/flan-t5-xl")
    assert {"*.safetensors", "spiece.model"} < set(t5_files)
    assert not any(fnmatch.fnmatch(name, pattern) for pattern in t5_files for name in (
        "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md"))


def test_find_gives_up_at_the_first_failure(tmp_path, hub, monkeypatch):
    def fails(repo, **options):
        hub[1].append(repo)
        raise ConnectionError("no route\nto host")
    hub[0].snapshot_download = fails
    with pytest.raises(UserError) as error:
        weights.find(NAMES, str(tmp_path))
    assert len(hub[1]) == 1
    assert "2 of 2 files are missing (no download: ConnectionError, no route to host)" in str(error.value)
    hub[0].snapshot_download = lambda repo, **options: None  # as the hub does offline with a folder not empty
    with pytest.raises(UserError, match="2 of 2 files are missing .*no network"):
        weights.find(NAMES, str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)                # not installed
    with pytest.raises(UserError, match="requirements-full.txt"):
        weights.find(NAMES, str(tmp_path))


def test_find_fetches_from_github(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(url.encode()))
    name = "sac+logos+ava1-l14-linearMSE.pth"
    path = weights.find([name], str(tmp_path))[name]
    assert open(path).read() == weights.RELEASED[name][1] and os.listdir(tmp_path) == [name]


# ---- command line --------------------------------------------------------------------------------------

def test_command_line_table_export_and_convert(tmp_path, capsys, monkeypatch, mini_base):
    monkeypatch.setitem(weights.RELEASED, "vq_ds16_t2i.pt", (TOKENIZER, weights.T2I, "MIT", "tiny"))
    folder = f"--folder={tmp_path}"
    make_random(TOKENIZER, str(tmp_path / "vq_ds16_t2i.pt"))
    capsys.readouterr()
    weights.main([folder])
    title, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(weights.RELEASED)
    assert [line.split()[1] for line in lines if line.startswith("yes")] == ["vq_ds16_t2i.pt"]
    model = GPT(TEXT)
    files.save({"model": model.state_dict(), "config": {}}, str(tmp_path / "ckpt.pt"))
    weights.main([f"--export={tmp_path}/ckpt.pt", f"--to={tmp_path}/mine_256.pt"])
    assert same(GPT.from_pretrained(str(tmp_path / "mine_256.pt"), n_head=2), model.state_dict())
    for argv, part in (([f"--convert={tmp_path}/ckpt.pt"], "--convert needs --to"),
                       (["--convert=x", f"--to={tmp_path}/mine_256.pt"], "exists already"),
                       (["--export=x", f"--to={tmp_path}/mine_256.pt"], "exists already"),
                       (["--export=x", "--convert=x", f"--to={tmp_path}/y.pt"], "two tasks"),
                       ([f"--convert={tmp_path}/none", f"--to={tmp_path}/y.pt"], "no weights at"),
                       ([f"--export={mini_base}", f"--to={tmp_path}/y.pt"], "no checkpoint of a run")):
        with pytest.raises(UserError, match=part):
            weights.main(argv)
    help_text = config.help_text(weights.Config)
    assert all(f"--{name}=" in help_text for name in ("folder", "convert", "export", "to"))


def test_export_merges_adapters(tmp_path):
    torch.manual_seed(0)
    policy = lora.adapt(GPT(TEXT).eval(), 4)
    torch.nn.init.normal_(policy.output.weight)
    adapters = [module for module in policy.modules() if isinstance(module, lora.LowRank)]
    for module in adapters:
        torch.nn.init.normal_(module.b, std=.1)
    files.save({"model": policy.state_dict()}, str(tmp_path / "ckpt.pt"))
    weights.main([f"--export={tmp_path}/ckpt.pt", f"--to={tmp_path}/mine_256.pt"])
    merged = GPT.from_pretrained(str(tmp_path / "mine_256.pt"), n_head=2)
    batch = torch.randint(24, (2, 256)), torch.randn(2, 3, 10)
    assert len(adapters) == 2 * 5 and (policy(*batch) - merged(*batch)).abs().max() < .01
    for module in adapters:
        module.b.data.zero_()
    assert (policy(*batch) - merged(*batch)).abs().max() > .1


JANUS = JanusConfig(dim=8, n_layer=1, n_head=2, vocab_size=8, head_dim=8, words=9, pad_id=1)


@pytest.mark.parametrize("make, said", [
    (lambda: Janus(JANUS).state_dict(), "no run of LlamaGen"),
    (lambda: GPT(TEXT).state_dict() | {"layers.0.extra.weight": torch.zeros(1)}, "layers.0.extra.weight"),
    (lambda: {k: v for k, v in GPT(TEXT).state_dict().items() if "norm" not in k}, "norm.weight")])
def test_export_refuses_what_llamagen_would_not_load(make, said, tmp_path):
    files.save({"model": make()}, str(tmp_path / "ckpt.pt"))
    with pytest.raises(UserError, match=said) as error:
        weights.main([f"--export={tmp_path}/ckpt.pt", f"--to={tmp_path}/mine_256.pt"])
    print(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "mine_256.pt").exists()


# ---- memory --------------------------------------------------------------------------------------------

def status(field):
    """Return VmRSS, the memory now, or VmHWM, its peak, in bytes. (ru_maxrss includes the parent's peak.)"""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(field))


# The first module on the meta device makes torch import 75 MB of its own code. So key_table comes first.
CHILD = """
import sys; sys.path[:0] = [".", "tests/helpers", "tests/full"]
import test_weights as t
t.key_table(t.TEXT)
before = t.status("VmRSS")
path, n_head, kind = sys.argv[1:]
if kind == "safetensors":
    t.convert(path)
else:
    t.GPT.from_pretrained(path, n_head=int(n_head))
print((t.status("VmHWM") - before) / t.os.path.getsize(path))
"""


def peak(path, n_head, kind=""):
    """Return the rise of memory while a new process loads or converts a file, divided by the file's size."""
    done = subprocess.run([sys.executable, "-c", CHILD, path, str(n_head), kind], capture_output=True,
                          text=True, check=True, cwd=config.locate("."))
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_a_load_peaks_at_the_size_of_the_file(tmp_path):
    """The file has 160 MB, nearly all in three matrices."""
    path, state = path_of(tmp_path, GPTConfig(n_layer=1, model_type="c2i", cls_token_num=1,
                                              num_classes=12000))
    assert .7 < peak(path, 12) < 1.3 and os.path.getsize(path) > 1.5e8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "training", "safetensors"])
def test_a_big_load_peaks_at_the_size_of_the_file(tmp_path, kind):
    path, state = path_of(tmp_path, weights.RELEASED["c2i_L_256.pt"][0])
    if kind == "training":                                  # an optimizer stands beside the weights
        torch.save({"optimizer": {k: v.half() for k, v in state.items()}, "model": state}, path)
    if kind == "safetensors":
        torch_io = pytest.importorskip("safetensors.torch")
        os.remove(path)
        path = str(tmp_path / "port_256.safetensors")
        torch_io.save_file(to_port(state, 1024), path)
    ratio = peak(path, 16, kind)
    print(f"{kind}: {os.path.getsize(path) / 1e9:.2f} GB, peak {ratio:.2f} of it")
    assert os.path.getsize(path) > 1.3e9 and .9 < ratio < 1.3


def test_a_run_folder_is_exported_like_its_checkpoint(tmp_path):
    policy = GPT(TEXT)
    files.save({"model": policy.state_dict(), "step": 0}, str(tmp_path / "run" / "ckpt.pt"))
    for run in ("run", "run/ckpt.pt"):
        weights.main([f"--export={tmp_path / run}", f"--to={tmp_path / run.replace('/', '_')}.pt"])
    assert all((tmp_path / name).exists() for name in ("run.pt", "run_ckpt.pt.pt"))
