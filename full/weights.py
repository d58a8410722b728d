"""Released weights: which files there are, where to put them, and how they become our models.

    python weights.py                                   the table: is it there, size, licence, source
    python weights.py --make_random=t2i_XL_stage1_256.pt --folder=/tmp/random    to try the machinery
    python weights.py --export=out/run/ckpt.pt --to=weights/mine_256.pt          for LlamaGen's own sampler

    policy = GPT.from_pretrained("weights/t2i_XL_stage1_256.pt", dtype="bfloat16")

A weight file is a dict from names to tensors, and nothing in it says what model it belongs to. The shapes do:
the token table [V,D] gives V and D, the highest layer number gives the depth, and so on. The module of that
config is then built without memory (on torch's meta device), its names and shapes are laid beside those of
the file, and every difference is an error. (LlamaGen's scripts load with strict=False: a tensor under a wrong
name is passed over there, and the model keeps a random one.) What no shape tells:
 1. Heads: from the published sizes, or config.json, or n_head=.
 2. Image tokens: from config.json, else the file's name, where _256 means 256 pixels, so 16 x 16 tokens of
    VQ-16, or block_size=. With a wrong one everything loads, and the pictures look zoomed or torn.
 3. RMSNorm's eps: 1e-5, or from config.json, or norm_eps=. Groups of the tokenizer: 32, or num_groups=.

Memory: tensors stay where torch.load read them; for another dtype they are converted one by one. So a load
peaks at the size of the file, or of the model where that is larger (fp16 to fp32). The file is not mapped
(mmap): parameters to be trained would have to be copied. Nothing in it is ever run (weights_only=True).
Formats: LlamaGen's (arXiv 2406.06525, github.com/FoundationVision/LlamaGen), bare or as DDP, DeepSpeed, FSDP
and torch.compile wrap it, and its ports to Hugging Face's Llama layout (jadohu/LlamaGen-T2I).
"""
import argparse
import dataclasses
import glob
import json
import os
import re
import urllib.request

import torch

from common import files as checkpoint
from common import config
from common.config import UserError
from model import GPT, PRESETS, GPTConfig
from vqgan import VQGAN, VQConfig


def _gpt(preset, pixels, **more):
    n_layer, n_head, dim = PRESETS[f"GPT-{preset}"]
    return GPTConfig(dim=dim, n_layer=n_layer, n_head=n_head, block_size=(pixels // 16) ** 2, **more)


# Parameters of the others. CLIP, image width w, text width t: a layer has attention 4w^2 + 4w, MLP 8w^2 + 5w,
# two LayerNorms 4w; and there are patches 588w, 1 + 257 positions w, 4w of LayerNorms; 49408 words t, 77
# positions t, a LayerNorm 2t; projections wt + tt; a scale. T5, D = 2048: attention 4D^2, in a decoder twice,
# gated MLP 3 D 5120, norms D; 2 x 24 layers; 2 x 32 x 32 distances, 2 D of norms, 2 x 32128 words D.
# The aesthetic score: an MLP 768-1024-128-64-16-1, sum of (in + 1) out. Janus-Pro: as transformers counts it.
CLIP_L, CLIP_H, T5_XL, AESTHETIC = 427_616_513, 986_109_441, 2_849_757_184, 927_969
# VGG16: 13 convolutions, three matrices (arXiv 1409.1556 table 2). LPIPS: a number a channel of five layers.
JANUS_1B, JANUS_7B, VGG16 = 2_076_636_811, 7_407_773_323, 138_357_544
T2I, C2I = "peizesun/llamagen_t2i", "FoundationVision/LlamaGen"
RELEASED = {  # name (.pt, .pth, or a folder): (config of ours or bytes, repository, licence, use)
    "t2i_XL_stage1_256.pt": (_gpt("XL", 256), T2I, "MIT", "policy, captions to 256 pixels"),
    "t2i_XL_stage2_512.pt": (_gpt("XL", 512), T2I, "MIT", "policy, captions to 512 pixels"),
    "vq_ds16_t2i.pt": (VQConfig(), T2I, "MIT", "tokenizer of both, VQ-16"),
    **{f"c2i_{n}_{p}.pt": (_gpt(n, p, model_type="c2i", cls_token_num=1), C2I, "MIT", "policy, 1000 classes")
       for n, p in (("B", 256), ("L", 256), ("B", 384), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))},
    "vq_ds16_c2i.pt": (VQConfig(), C2I, "MIT", "tokenizer of the c2i policies, VQ-16"),
    "vq_ds8_c2i.pt": (VQConfig(ch_mult=(1, 2, 2, 4)), C2I, "MIT", "tokenizer VQ-8, 4 times the tokens"),
    "flan-t5-xl": (4 * T5_XL, "google/flan-t5-xl", "Apache-2.0", "caption features"),
    "HPS_v2.1_compressed.pt": (2 * CLIP_H, "xswu/HPSv2", "Apache-2.0", "reward HPSv2.1"),
    "clip-vit-large-patch14": (4 * CLIP_L, "openai/clip-vit-large-patch14", "MIT", "rewards: CLIP, tokens"),
    "Janus-Pro-1B": (2 * JANUS_1B, "deepseek-ai/Janus-Pro-1B", "DeepSeek", "policy and tokenizer (janus.py)"),
    "Janus-Pro-7B": (2 * JANUS_7B, "deepseek-ai/Janus-Pro-7B", "DeepSeek", "policy and tokenizer (janus.py)"),
    "PickScore_v1": (4 * CLIP_H, "yuvalkirstain/PickScore_v1", "see page", "reward PickScore"),
    "sac+logos+ava1-l14-linearMSE.pth": (
        4 * AESTHETIC, "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth", "see page", "reward: head of the aesthetic score"),
    "vgg16-397923af.pth": (4 * VGG16, "https://download.pytorch.org/models/vgg16-397923af.pth", "BSD-3",
                           "layers of LPIPS (vapi.py)"),
    "lpips_v0.1_vgg.pth": (4 * 1472, "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/"
                           "weights/v0.1/vgg.pth", "BSD-2", "their weights in LPIPS")}
FILES, FOLDER_FILES = (".pt", ".pth"), ["*.json", "*.txt", "spiece.model", "*.safetensors"]


MODELS = {GPTConfig: GPT, VQConfig: VQGAN}                 # janus.py adds its own


def _meta(cfg):
    with torch.device("meta"):                             # names and shapes without memory
        return MODELS[type(cfg)](cfg)


def key_table(cfg):
    """A GPTConfig or VQConfig -> {name: shape} of its tensors, in the order of the file."""
    return {key: tuple(tensor.shape) for key, tensor in _meta(cfg).state_dict().items()}


def size(cfg, dtype=torch.float32):
    """Bytes of all tensors of a GPTConfig or VQConfig in `dtype`."""
    return dtype.itemsize * sum(tensor.numel() for tensor in _meta(cfg).state_dict().values())


# ---- reading -------------------------------------------------------------------------------------------
WRAPPERS = ("model", "module", "state_dict")               # `model`, not `ema`: as the official sampler
PREFIX = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")    # of DDP and torch.compile, at the start or inside
DROPPED = re.compile(                                      # buffers that are made anew, or never used
    r"freqs_cis$|causal_mask$|layers\.\d+\.attention\.kv_cache\.|.*rotary_emb\.inv_freq$|"
    r"discriminator\.|optimizer_disc\.|quantize\.codebook_used$")
PORT_LAYERS = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",   # to released names
               "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
               "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
PORT = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "", **PORT_LAYERS}
PORT_CONFIG = {"num_attention_heads": "n_head", "rms_norm_eps": "norm_eps", "block_size": "block_size"}


def _read(file):
    """The dict in a file of torch's, safetensors' or JSON. UserError if it is damaged or not plain data."""
    try:
        if file.endswith(".json"):
            return dict(json.load(open(file, encoding="utf-8")))
        if file.endswith(".safetensors"):
            from safetensors import safe_open              # It maps the file, and what was read of it stays
            state = {key: safe_open(file, "pt").get_tensor(key).clone()    # in memory till it is closed: so
                     for key in safe_open(file, "pt").keys()}              # each tensor opens it anew.
            checkpoint.examine(state, file)                # (it has no checksums)
            return state
        # Trainers store their options too, an argparse.Namespace. It is plain: its fields are set, no more.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return checkpoint.load(file)
    except UserError:
        raise
    except ImportError:
        raise UserError(f"{file}: to read it, pip install -r requirements-full.txt") from None
    except Exception as error:                             # json and safetensors each raise their own kinds
        raise UserError(f"{file} is damaged, or holds more than plain tensors ({type(error).__name__}): "
                        f"fetch it again") from None


def gather(path):
    """(tensors by name, names of what was beside them) of a file, or of a folder's weight files."""
    names = glob.glob("*.safetensors", root_dir=path) or glob.glob("pytorch_model*.bin", root_dir=path)
    files = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in sorted(names)]
    if not files:
        raise UserError(f"no weights at {path}; `python weights.py` lists what there is, and its source")
    state, dropped = {key: value for file in files for key, value in _read(file).items()}, []
    while wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict) and state[w]), None):
        dropped += [str(key) for key in state if key != wrapper]
        state = state[wrapper]
    return {PREFIX.sub("", str(key)): value for key, value in state.items()}, dropped


def config_beside(path):
    """(path, content) of config.json in the folder `path`, or beside the file `path`; {} if there is none."""
    beside = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    return beside, _read(beside) if os.path.isfile(beside) else {}


def refuse_others(path, state, unused):
    """UserError unless `state`, but for what `unused` matches, is tensors of floating point numbers."""
    for key, value in state.items():
        if not key.isprintable() or not (unused.match(key) or isinstance(value, torch.Tensor)
                                         and value.is_floating_point()):
            raise UserError(f"{path}: {key!r:.99} is {getattr(value, 'dtype', type(value).__name__)}, not a "
                            f"tensor of floating point numbers: it is another kind of file")


def sift(path, state, dropped, unused):
    """`state` but for what `unused` matches, which is told with the `dropped` names."""
    dropped = dropped + [key for key in state if unused.match(key)]
    if dropped:
        print(f"{path}: left out {len(dropped)} that we do not need: {', '.join(dropped[:4])}"
              + ", ..." * (len(dropped) > 4))
    return {key: value for key, value in state.items() if not unused.match(key)}


def _state(path):
    """(tensors by released name, {field: value} of config.json) of a file, or of a folder's weight files."""
    (state, dropped), told = gather(path), {}
    refuse_others(path, state, DROPPED)
    if "model.embed_tokens.weight" in state:               # a port
        for key in [k for k in state if k.endswith("self_attn.q_proj.weight")]:
            qkv = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
            if all(k in state for k in qkv):               # else build says which one is missing
                # its RoPE is interleaved too, so no row moves
                joined = torch.cat([state.pop(k) for k in qkv])
                state[key.replace("self_attn.q_proj", "attention.wqkv")] = joined
        for theirs, ours in PORT.items():
            state = {key.replace(theirs, ours): value for key, value in state.items()}
        beside, told = config_beside(path)
    told = {ours: told[theirs] for theirs, ours in PORT_CONFIG.items() if theirs in told}
    if wrong := [k for k, v in told.items() if type(v) is not type(getattr(GPTConfig, k))]:
        raise UserError(f"{beside}: {wrong[0]} must be {type(getattr(GPTConfig, wrong[0])).__name__}, not "
                        f"{told[wrong[0]]!r:.99}")
    return sift(path, state, dropped, DROPPED), told


def layer_shapes(state, D):
    """The fields of a config that the layers of `state` tell, of width D."""
    hidden = len(state["layers.0.feed_forward.w1.weight"])
    # Any multiple that rounds 2/3 * 4D up to this width gives the same model; `hidden` itself always does.
    return dict(dim=D, n_layer=len({k.split(".")[1] for k in state if k.startswith("layers.")}),
                multiple_of=256 if -(-int(2 * 4 * D / 3) // 256) * 256 == hidden else hidden)


def _gpt_shapes(state):
    V, D = state["tok_embeddings.weight"].shape
    told = dict(vocab_size=V, **layer_shapes(state, D))
    if (rows := state.get("cls_embedding.embedding_table.weight")) is not None:     # the last is "no class"
        return dict(told, model_type="c2i", cls_token_num=1, num_classes=len(rows) - 1)
    L, C = state["cls_embedding.uncond_embedding"].shape
    return dict(told, model_type="t2i", cls_token_num=L, caption_dim=C)


def vq_shapes(state):
    ch, (V, width) = len(state["encoder.conv_in.weight"]), state["quantize.embedding.weight"].shape
    levels, blocks = (len({key.split(".")[place] for key in state if key.startswith(start)})
                      for place, start in ((2, "encoder.conv_blocks."), (4, "encoder.conv_blocks.0.res.")))
    widths = [len(state[f"encoder.conv_blocks.{i}.res.0.conv1.weight"]) for i in range(levels)]
    return dict(ch=ch, ch_mult=tuple(w // ch for w in widths), num_res_blocks=blocks, codebook_size=V,
                codebook_embed_dim=width, z_channels=len(state["encoder.conv_out.weight"]))


def examine(cls, shapes, path, overrides, read=_state):
    """(tensors by name, {field of the config `cls`: value}) from shapes, then config.json, then overrides."""
    names = [field.name for field in dataclasses.fields(cls)]
    if strange := [name for name in overrides if name not in names]:
        raise UserError(f"there is no option {strange[0]!r} here; there are: dtype, {', '.join(names)}")
    state, told = read(path)
    try:
        return state, {**shapes(state), **told, **overrides}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not look like a file for {cls.__name__} ({error}); of its {len(state)} "
                        f"entries, the first are {', '.join(list(state)[:3])}") from None


def build(cfg, state, dtype, path):
    """The module of `cfg`, taking over the tensors of `state` one by one. UserError if they do not fit."""
    if (kind := str(dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be float32, bfloat16 or float16, not {dtype!r}")
    try:
        module = _meta(cfg)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path}: no such model can be built: {str(error).splitlines()[0]}") from None
    want = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    have = {key: list(getattr(value, "shape", ())) for key, value in state.items()}
    if wrong := [f"{key} is {have.get(key, 'missing')}, not {want.get(key, 'known')}"
                 for key in {**want, **have} if have.get(key) != want.get(key)]:
        raise UserError(f"{path} differs from {type(cfg).__name__} in {len(wrong)} places: "
                        + "; ".join(wrong[:8]) + "; ..." * (len(wrong) > 8))
    module.load_state_dict({key: state.pop(key).to(getattr(torch, kind)) for key in want}, assign=True)
    return module.eval()


def load_gpt(path, dtype=torch.float32, **overrides):
    """A released or exported policy -> GPT on the CPU, in eval mode, its parameters in `dtype`.

    path: a file, or a Hugging Face folder. dtype: float32, bfloat16, float16, as text or torch's. overrides:
    fields of GPTConfig, whatever the file tells. UserError for a file that is missing, damaged or of another
    model, and where n_head= or block_size= has to be given."""
    state, told = examine(GPTConfig, _gpt_shapes, path, overrides)
    heads = {(n_layer, dim): n_head for n_layer, n_head, dim in PRESETS.values()}
    told = {"n_head": heads.get((told["n_layer"], told["dim"])), **told}
    if told["n_head"] is None:
        raise UserError(f"{path}: no tensor tells the number of heads, and {told['n_layer']} layers of width "
                        f"{told['dim']} are no published size: give n_head=")
    if "block_size" not in told:
        pixels = re.findall(r"_(256|384|512)(?!\d)", os.path.basename(os.path.abspath(path)))
        if not pixels:
            raise UserError(f"{path}: no tensor tells the number of image tokens, nor does the name: give "
                            f"block_size=, which is 256, 576, 1024 for pictures of 256, 384, 512 pixels")
        told["block_size"] = (int(pixels[-1]) // 16) ** 2
        print(f"{path}: {told['block_size']} image tokens, as its name says {pixels[-1]} pixels")
    return build(GPTConfig(**told), state, dtype, path)


def load_vq(path, dtype=torch.float32, **overrides):
    """A released or exported tokenizer -> VQGAN, the same way; overrides are fields of VQConfig."""
    state, told = examine(VQConfig, vq_shapes, path, overrides)
    return build(VQConfig(**told), state, dtype, path)


# ---- writing -------------------------------------------------------------------------------------------
def export(model, path, dtype=torch.float32):
    """Writes a GPT or VQGAN, or its state dict, as {"model": state dict in `dtype`}: whole or not at all, and
    readable for LlamaGen's own sampler. A name with _256 or _512 tells load_gpt the number of tokens."""
    state = model if isinstance(model, dict) else model.state_dict()
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    checkpoint.save({"model": {PREFIX.sub("", k): v.to("cpu", dtype) for k, v in state.items()}}, path)


def make_random(cfg, path, seed=0, dtype=torch.float32, std=0.02):
    """Writes a file of a GPTConfig or VQConfig in the released layout: norms 1, biases 0, the rest normal, of
    deviation `std`. So is output.weight, zero only in a fresh model: logits deviate by std * sqrt(D)."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for key, shape in key_table(cfg).items():
        state[key] = (torch.full(shape, float(key.endswith("weight")), dtype=dtype) if len(shape) == 1
                      else torch.empty(shape).normal_(0, std, generator=generator).to(dtype))
    export(state, path, dtype)


# ---- finding -------------------------------------------------------------------------------------------
def _is_there(path):
    """Is it a file, or a folder with config.json and all of its weights?"""
    kind = "model.safetensors" if glob.glob("*.safetensors", root_dir=path) else "pytorch_model.bin"
    index = os.path.join(path, kind + ".index.json")                       # lists all, should a download stop
    parts = (_read(index).get("weight_map", {}).values() if os.path.isfile(index) else
             glob.glob("*.safetensors", root_dir=path) or glob.glob("*.bin", root_dir=path))
    return os.path.isfile(path) or bool(parts) and all(
        os.path.isfile(os.path.join(path, part)) for part in {*parts, "config.json"})


def _line(name):
    what, source, licence, _ = RELEASED[name]
    megabytes = (size(what) if dataclasses.is_dataclass(what) else what) / 1e6
    page = f"https://huggingface.co/{source}" + f"/resolve/main/{name}" * name.endswith(FILES)
    return f"{name:34s} {megabytes:>8,.0f} MB  {licence:10s}  {source if '//' in source else page}"


def _download(name, path):
    source = RELEASED[name][1]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if source.startswith("https:"):
        with urllib.request.urlopen(source, timeout=5) as stream, open(f"{path}.tmp", "wb") as file:
            file.write(stream.read())
        return os.replace(f"{path}.tmp", path)
    from huggingface_hub import snapshot_download          # for a file too: hf_hub_download retries for long
    where, which = (os.path.dirname(path), [name]) if name.endswith(FILES) else (path, FOLDER_FILES)
    which = which + ["pytorch_model*.bin"] * name.startswith("Janus")      # the others have safetensors
    snapshot_download(source, local_dir=where, allow_patterns=which, etag_timeout=5)
    if not _is_there(path):    # offline, the hub is content with a folder that has anything in it
        raise FileNotFoundError("no network, or it is there no more")


def find(names, folder="weights", download=True):
    """Names of files in `folder` -> {name: path}. What is missing of RELEASED is downloaded, if it may and
    can be; else one UserError has a line for each: name, size, licence, source, and the path to put it at. A
    name may also be a file of your own, in `folder` or, as a path, elsewhere."""
    paths, why = {name: os.path.join(config.locate(folder), name) for name in names}, ""
    for name in names:
        if name not in RELEASED:
            paths[name] = paths[name] if os.path.exists(paths[name]) else name
            if not os.path.exists(paths[name]):
                raise UserError(f"there is no {name} here or in {folder}, and the table of released files "
                                f"has no such name; it has: {', '.join(RELEASED)}")
    try:
        for name, path in paths.items() if download else ():       # the first failure ends it: no network?
            if name in RELEASED and not _is_there(path):
                _download(name, path)
    except ImportError:
        why = " (to download them: pip install -r requirements-full.txt)"
    except Exception as error:                             # those of the hub have no common ancestor
        why = f" (no download: {type(error).__name__}, {' '.join(str(error).split())[:80]})"
    if missing := [f"\n  {_line(name)}  to {path}" for name, path in paths.items()
                  if name in RELEASED and not _is_there(path)]:
        raise UserError(f"{len(missing)} of {len(paths)} files are missing{why}{''.join(missing)}")
    return paths


@dataclasses.dataclass(frozen=True)
class Config:
    folder: str = "weights"            # where the files are, or go
    make_random: str = ""              # a name of the table: write such a file with random weights
    export: str = ""                   # a run's ckpt.pt: write its policy in LlamaGen's layout
    to: str = "weights/mine_256.pt"    # where --export writes


def check(cfg):
    config.named(cfg, folder="", to="")
    if cfg.make_random and not dataclasses.is_dataclass(RELEASED.get(cfg.make_random, [None])[0]):
        raise UserError(f"make_random must be a LlamaGen file of the table, not {cfg.make_random!r}")
    if cfg.make_random and cfg.export:
        raise UserError("make_random and export are two tasks: one at a time")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    folder = config.locate(cfg.folder)
    target = os.path.join(folder, cfg.make_random) if cfg.make_random else cfg.to
    if (cfg.make_random or cfg.export) and os.path.exists(target):
        raise UserError(f"{target} is there already: move it away first")
    if cfg.make_random:
        make_random(RELEASED[cfg.make_random][0], target)
        print(f"wrote {target}: random weights, right for timing, wrong for pictures")
    elif cfg.export:
        run = checkpoint.load(cfg.export)
        if not isinstance(run.get("model"), dict) or any(
                not isinstance(v, torch.Tensor) for v in run["model"].values()):
            raise UserError(f"{cfg.export} is no checkpoint of a run: it has no state dict under 'model'")
        export(run["model"], target)
        print(f"wrote {target}")
    else:
        print(f"files in {folder} (sizes of LlamaGen's in fp32):")
        for name in RELEASED:
            there = "yes" if _is_there(os.path.join(folder, name)) else "no "
            print(f"{there} {_line(name)}  {RELEASED[name][3]}")


if __name__ == "__main__":
    config.run(main)
