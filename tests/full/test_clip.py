"""python -m pytest tests/full/test_clip.py

Most tests need the package transformers (pip install -r requirements-full.txt). No test needs released
weights: every CLIP here is tiny and random.
"""
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from full import clip
from common.config import UserError

WORDS = ["<unk>", "a", "photo", "of", "red", "blue", "cat", "dog", "and", "small", "<start>", "<end>"]
PROMPTS = ["a red cat", "a photo of a dog", "small blue dog and a red cat and a small photo of a cat"]
MEAN = np.array([.48145466, .4578275, .40821073], np.float32).reshape(3, 1, 1)
STD = np.array([.26862954, .26130258, .27577711], np.float32).reshape(3, 1, 1)


def tiny_clip(**text):
    """Return a random CLIPModel with 2 layers per tower. text: overrides of its text_config."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)                       # cosines of both signs
    vision = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=40,
                  patch_size=14, image_size=28, hidden_act="gelu")
    text = {**dict(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48,
                   vocab_size=12, max_position_embeddings=8, hidden_act="gelu", bos_token_id=10,
                   eos_token_id=11), **text}
    model = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=24)).eval()
    with torch.no_grad():                      # the zeros and ones of a fresh model would hide mistakes
        for parameter in model.parameters():
            parameter += .2 * torch.randn_like(parameter)
    return model


def to_open_clip(model):
    """Return a CLIPModel's weights in open_clip's layout. The names are copied from open_clip's modules."""
    m = model.state_dict()
    out = {"logit_scale": m["logit_scale"], "text_projection": m["text_projection.weight"].t().contiguous(),
           "positional_embedding": m["text_model.embeddings.position_embedding.weight"],
           "token_embedding.weight": m["text_model.embeddings.token_embedding.weight"],
           "visual.class_embedding": m["vision_model.embeddings.class_embedding"],
           "visual.conv1.weight": m["vision_model.embeddings.patch_embedding.weight"],
           "visual.positional_embedding": m["vision_model.embeddings.position_embedding.weight"],
           "visual.proj": m["visual_projection.weight"].t().contiguous()}
    for part in ("weight", "bias"):
        out[f"visual.ln_pre.{part}"] = m[f"vision_model.pre_layrnorm.{part}"]
        out[f"visual.ln_post.{part}"] = m[f"vision_model.post_layernorm.{part}"]
        out[f"ln_final.{part}"] = m[f"text_model.final_layer_norm.{part}"]
        for tower, prefix in (("vision", "visual."), ("text", "")):
            for i in range(getattr(model.config, f"{tower}_config").num_hidden_layers):
                theirs, ours = f"{tower}_model.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
                out[f"{ours}.attn.in_proj_{part}"] = torch.cat(
                    [m[f"{theirs}.self_attn.{x}_proj.{part}"] for x in ("q", "k", "v")])
                out[f"{ours}.attn.out_proj.{part}"] = m[f"{theirs}.self_attn.out_proj.{part}"]
                out[f"{ours}.ln_1.{part}"] = m[f"{theirs}.layer_norm1.{part}"]
                out[f"{ours}.ln_2.{part}"] = m[f"{theirs}.layer_norm2.{part}"]
                out[f"{ours}.mlp.c_fc.{part}"] = m[f"{theirs}.mlp.fc1.{part}"]
                out[f"{ours}.mlp.c_proj.{part}"] = m[f"{theirs}.mlp.fc2.{part}"]
    return out


def open_clip_tower(state, prefix, x, heads, causal):
    """Run the blocks of an open_clip tower from its weights, with pre-norm and PyTorch's own attention."""
    width, length = x.shape[2], x.shape[1]
    mask = torch.triu(torch.full((length, length), -torch.inf), 1) if causal else None
    for i in range(2):
        p = {k.removeprefix(f"{prefix}transformer.resblocks.{i}."): v for k, v in state.items()}
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True).eval()
        attention.load_state_dict({k.removeprefix("attn."): v for k, v in p.items() if k.startswith("attn.")})
        h = F.layer_norm(x, (width,), p["ln_1.weight"], p["ln_1.bias"])
        x = x + attention(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = F.layer_norm(x, (width,), p["ln_2.weight"], p["ln_2.bias"])
        h = F.gelu(h @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
        x = x + h @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return x


@torch.no_grad()
def open_clip_image(state, pixels):
    s, width = state, (32,)
    patches = F.conv2d(pixels, s["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([s["visual.class_embedding"].expand(len(pixels), 1, -1), patches], 1)
    x = x + s["visual.positional_embedding"]
    x = F.layer_norm(x, width, s["visual.ln_pre.weight"], s["visual.ln_pre.bias"])
    x = open_clip_tower(s, "visual.", x, 2, causal=False)[:, 0]
    return F.layer_norm(x, width, s["visual.ln_post.weight"], s["visual.ln_post.bias"]) @ s["visual.proj"]


@torch.no_grad()
def open_clip_text(state, ids):
    """ids [B,8] are padded with 0, as open_clip pads them. The largest id is the end of text."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = open_clip_tower(state, "", x, 2, causal=True)
    x = F.layer_norm(x, (128,), state["ln_final.weight"], state["ln_final.bias"])
    return x[torch.arange(len(ids)), ids.argmax(1)] @ state["text_projection"]


def by_hand(prompts):
    """Return token ids as open_clip makes them: start, words, end, zeros. Long texts keep their end."""
    rows = [[10] + [WORDS.index(w) for w in p.split()][:6] + [11] for p in prompts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return paths of a tiny CLIP (a folder, an open_clip file), its tokenizer, and an aesthetic head."""
    transformers = pytest.importorskip("transformers")
    import tokenizers
    root, model = tmp_path_factory.mktemp("clip"), tiny_clip()
    out = {name: str(root / name) for name in ("folder", "legacy", "hps.pt", "tokenizer", "head.pth")}
    model.save_pretrained(out["folder"])
    tiny_clip(eos_token_id=2).save_pretrained(out["legacy"])
    torch.save({"state_dict": to_open_clip(model), "epoch": 3}, out["hps.pt"])
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 10), ("<end>", 11)])
    transformers.PreTrainedTokenizerFast(                                  # without a pad token
        tokenizer_object=words, bos_token="<start>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(out["tokenizer"])
    sizes, head = [24, 10, 6, 5, 3, 1], {}
    for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    torch.save(head, out["head.pth"])
    return out


@pytest.fixture
def make(files, monkeypatch):
    """Return build(name, key of a model in `files`, options), which builds tiny rewards."""
    monkeypatch.setitem(clip.HEADS, 32, 2)

    def build(name, model=None, **options):
        model = files[model or ("hps.pt" if name == "hps" else "folder")]
        other = {"head": files["head.pth"]} if name == "aesthetic" else {"tokenizer": files["tokenizer"]}
        return clip.Reward(name, {"model": model, **other}, **options)
    return build


def smooth_images(n, height=28, width=28, seed=0):
    """Return smooth images [n,3,height,width] that leave [-1,1] in places."""
    coarse = 1.5 * torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic")


def features(output):
    return getattr(output, "pooler_output", output)


# ---- names of weights


def test_open_clip_weights_give_the_features_of_the_clip_that_they_came_from(files, monkeypatch):
    monkeypatch.setitem(clip.HEADS, 32, 2)
    model, loaded = tiny_clip(), clip.load_clip(files["hps.pt"])
    state, pixels, ids = to_open_clip(model), torch.randn(3, 3, 28, 28), by_hand(PROMPTS)
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()}
    with torch.no_grad():
        ours = [features(m.get_image_features(pixel_values=pixels)) for m in (loaded, model)]
        texts = [features(m.get_text_features(input_ids=ids)) for m in (loaded, model)]
    for (a, b), c in ((ours, open_clip_image(state, pixels)), (texts, open_clip_text(state, ids))):
        assert a.shape == (3, 24) and a.std() > .1
        assert (a - b).abs().max() < 1e-5 and (a - c).abs().max() < 1e-5 * a.abs().max()


def test_the_full_size_is_vit_h_14():
    """The table has names and shapes of HPS_v2.1_compressed.pt, by ViT-H-14.json and the official code."""
    transformers = pytest.importorskip("transformers")
    shapes = {"logit_scale": (), "text_projection": (1024, 1024), "positional_embedding": (77, 1024),
              "token_embedding.weight": (49408, 1024), "visual.class_embedding": (1280,),
              "visual.conv1.weight": (1280, 3, 14, 14), "visual.positional_embedding": (16 * 16 + 1, 1280),
              "visual.proj": (1280, 1024)}
    for name, width in (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for prefix, width, layers in (("visual.", 1280, 32), ("", 1024, 24)):
        for i in range(layers):
            b = f"{prefix}transformer.resblocks.{i}."
            shapes |= {b + "attn.in_proj_weight": (3 * width, width), b + "attn.in_proj_bias": (3 * width,),
                       b + "attn.out_proj.weight": (width, width), b + "attn.out_proj.bias": (width,),
                       b + "mlp.c_fc.weight": (4 * width, width), b + "mlp.c_fc.bias": (4 * width,),
                       b + "mlp.c_proj.weight": (width, 4 * width), b + "mlp.c_proj.bias": (width,)}
            shapes |= {b + key: (width,) for key in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    with torch.device("meta"):                                             # shapes without memory
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        config = clip.open_clip_config(state)
        want = transformers.CLIPModel(config).state_dict()
    got = clip.from_open_clip(state)
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert sum(v.numel() for v in want.values()) == 986_109_441            # as open_clip says of ViT-H-14
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_attention_heads, vision.hidden_act) == (
        224, 14, 16, "gelu")
    assert (text.num_attention_heads, text.max_position_embeddings, text.eos_token_id, text.hidden_act) == (
        16, 77, 49407, "gelu")


# ---- preprocessing of images


def pil_resize(image, height, width):
    """Resize [3,H,W] in [0,1] by Pillow's bicubic, each channel as floats."""
    return torch.stack([torch.from_numpy(np.array(Image.fromarray(c.numpy()).resize(
        (width, height), Image.BICUBIC))) for c in image])


def test_hps_shows_the_whole_image_on_black():
    image = (smooth_images(1, 256, 256).clamp(-1, 1) + 1) / 2
    whole = clip.pad_square(image, 224)
    assert whole.shape == (1, 3, 224, 224)
    assert (whole[0] - pil_resize(image[0], 224, 224)).abs().max() < 2 / 255
    image = .5 + image[:, :, :200].repeat(1, 1, 1, 2)[..., :300] / 2       # 300 x 200, nowhere black
    wide, high = clip.pad_square(image, 224), clip.pad_square(image.transpose(2, 3), 224)
    # The image takes 200 * 224 / 300 = 149.3 lines. So 224 - 149 = 75 lines are padding: 37 above, 38 below.
    assert wide.shape == (1, 3, 224, 224) and (wide[:, :, :37] == 0).all() and (wide[:, :, 186:] == 0).all()
    assert (wide[0, :, 37:186] - pil_resize(image[0], 149, 224)).abs().max() < 2 / 255
    taller = clip.pad_square(torch.ones(1, 3, 202, 300), 224)              # 150.8 lines, so 151
    assert taller[0, 0, :, 5].gt(0).nonzero().flatten().tolist() == list(range(36, 36 + 151))
    assert (wide[:, :, 37:186] > .4).all() and torch.allclose(high, wide.transpose(2, 3), atol=1e-5)
    assert torch.equal(clip.pad_square(image[..., :224], 224)[:, :, 12:212], image[..., :224])   # departure 3


@pytest.mark.parametrize("height, width", [(256, 256), (200, 301), (320, 180)])
def test_usual_preprocessing_is_that_of_the_image_processor(height, width):
    processor = pytest.importorskip("transformers").CLIPImageProcessor()
    image = (255 * (smooth_images(1, height, width).clamp(-1, 1) + 1) / 2).round()[0]
    theirs = processor(images=Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8)),
                       return_tensors="np")["pixel_values"][0]
    ours = clip.crop_square(image[None] / 255, 224)[0].numpy()
    assert ours.shape == (3, 224, 224) and np.abs(ours - (theirs * STD + MEAN)).max() < 2 / 255
    assert ours.min() >= 0 and ours.max() <= 1 and ours.std() > .1


def test_what_the_towers_get(make):
    """Images are clamped to [0,1], made square, and then normalized. So the border is (0 - mean) / std."""
    for name in clip.FILES:
        reward, seen = make(name), []
        encode = reward.model.get_image_features
        reward.model.get_image_features = lambda pixel_values: seen.append(pixel_values) or encode(seen[0])
        reward.embed_images(torch.full((1, 3, 28, 56), 9.0))           # far too bright: white when clamped
        pixels = seen[0][0].numpy()
        assert pixels.shape == (3, 28, 28) and np.allclose(pixels[:, 14], ((1 - MEAN) / STD)[:, 0], atol=1e-4)
        border = (0 if name == "hps" else 1) - MEAN
        assert np.allclose(pixels[:, [0, 6, 21, 27]], border / STD, atol=1e-4)


# ---- rewards


def cosine(images, prompts):
    """Return the cosines [B] of images and prompts from the open_clip weights alone, without resizing."""
    state = to_open_clip(tiny_clip())
    pixels = (((images.clamp(-1, 1) + 1) / 2) - torch.from_numpy(MEAN)) / torch.from_numpy(STD)
    a, b = open_clip_image(state, pixels), open_clip_text(state, by_hand(prompts))
    return (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)


def test_rewards_are_functions_of_the_cosine(make):
    images, prompts = smooth_images(12), PROMPTS * 4
    want, scale = cosine(images, prompts), tiny_clip().logit_scale.exp().item()
    assert images.abs().max() > 1.5 and want.min() < -.05 and want.max() > .05 and scale > 5
    assert make("hps")(images, prompts).tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert make("hps", "folder")(images, prompts).tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert make("pickscore")(images, prompts).tolist() == pytest.approx((scale * want).tolist(), abs=1e-3)
    assert make("clipscore")(images, prompts).tolist() == pytest.approx(
        [100 * max(c, 0) for c in want.tolist()], abs=1e-3)


def test_aesthetic_runs_its_five_layers_and_ignores_prompts(make, files):
    reward, images = make("aesthetic"), smooth_images(4)
    state = torch.load(files["head.pth"], weights_only=True)
    rewards = reward(images, ["anything"] * 4)
    for vector, value in zip(reward.embed_images(images), rewards):
        x = vector.double()
        for i in (0, 2, 4, 6, 7):                                          # one layer after another
            w, b = state[f"layers.{i}.weight"].double(), state[f"layers.{i}.bias"].double()
            x = torch.stack([(row * x).sum() for row in w]) + b
        assert value.item() == pytest.approx(x.item(), rel=1e-4, abs=1e-4)
    assert rewards.std() > .1 and torch.equal(rewards, reward(images, PROMPTS + PROMPTS[:1]))


@pytest.mark.parametrize("name", clip.FILES)
def test_a_reward_depends_on_its_own_image_and_not_on_the_batch(make, name):
    images, prompts = smooth_images(5, 40, 30), PROMPTS + PROMPTS[:2]
    large, small, sizes = make(name), make(name, batch=2), []
    encode = small.model.get_image_features
    small.model.get_image_features = lambda **x: sizes.append(len(x["pixel_values"])) or encode(**x)
    rewards = large(images, prompts)
    assert rewards.shape == (5,) and rewards.dtype == torch.float32 and not rewards.requires_grad
    assert torch.allclose(small(images, prompts), rewards, atol=1e-4) and sizes == [2, 2, 1]
    assert torch.allclose(large(images[3:4], prompts[3:4]), rewards[3:4], atol=1e-4)
    vectors = small.embed_images(images)
    assert vectors.shape == (5, 24) and torch.allclose(vectors.norm(dim=1), torch.ones(5))
    assert not large.model.training and not any(p.requires_grad for p in large.model.parameters())
    with pytest.raises(ValueError, match="got 5 images, 1 prompts"):
        large(images, prompts[:1])


def test_a_prompt_is_encoded_once_for_its_whole_group(make):
    reward, rows = make("hps"), []
    encode = reward.model.get_text_features
    reward.model.get_text_features = lambda input_ids: rows.append(len(input_ids)) or encode(input_ids)
    images, prompts = smooth_images(9), [PROMPTS[i] for i in (0, 0, 1, 2, 2, 2, 1, 0, 0)]
    assert reward(images, prompts).tolist() == pytest.approx(cosine(images, prompts).tolist(), abs=1e-5)
    assert rows == [3]


def test_prompts_end_with_the_end_of_text_and_their_padding_does_not_matter(make):
    """open_clip pads with zeros to the full context. Ours repeats the end of text to the longest prompt."""
    reward, ids = make("clipscore"), by_hand(PROMPTS)
    assert reward._ids(PROMPTS[:2]).tolist() == [[10, 1, 4, 6, 11, 11, 11], [10, 1, 2, 3, 1, 7, 11]]
    assert reward._ids(PROMPTS)[2].tolist() == ids[2].tolist() and ids[2, -1] == 11          # keeps its end
    want = F.normalize(open_clip_text(to_open_clip(tiny_clip()), ids))
    alone = torch.cat([reward.embed_prompts([p]) for p in PROMPTS])
    legacy = make("clipscore", "legacy")                        # its config says that end of text is token 2
    assert legacy.model.config.text_config.eos_token_id == 2
    for got in (reward.embed_prompts(PROMPTS), alone, legacy.embed_prompts(PROMPTS)):
        assert torch.allclose(got, want, atol=1e-5)


def test_half_precision_weights_keep_rewards_in_fp32(make):
    images = smooth_images(3)
    full, half = make("pickscore"), make("pickscore", dtype=torch.bfloat16)
    assert next(half.model.parameters()).dtype == torch.bfloat16 and half.scale == full.scale
    a, b = full(images, PROMPTS), half(images, PROMPTS)
    assert b.dtype == torch.float32 and not torch.equal(a, b) and (a - b).abs().max() < .05 * full.scale


# ---- errors


def refused(message, name, files):
    with pytest.raises(UserError) as error:
        clip.Reward(name, files)
    assert "\n" not in str(error.value) and message in str(error.value), str(error.value)


@pytest.mark.parametrize("edit, message", [
    (lambda s: s.pop("ln_final.bias"), "1 weights do not fit, such as: missing text_model.final_layer"),
    (lambda s: s.pop("visual.transformer.resblocks.1.attn.in_proj_weight"), "3 weights do not fit"),
    (lambda s: s.update(extra=torch.zeros(2)), "1 weights do not fit, such as: unexpected extra"),
    (lambda s: s.update({"visual.ln_post.bias": torch.zeros(7)}), "vision_model.post_layernorm.bias"),
    (lambda s: s.pop("visual.conv1.weight"), "(KeyError: 'visual.conv1.weight')"),
    (lambda s: s.update({"visual.conv1.weight": 5}), "'visual.conv1.weight' is int, not a tensor"),
])
def test_weights_that_do_not_fit_are_named(make, files, tmp_path, edit, message):
    state, path = torch.load(files["hps.pt"], weights_only=True)["state_dict"], str(tmp_path / "changed.pt")
    edit(state)
    torch.save({"state_dict": state}, path)
    refused(message, "hps", {"model": path, "tokenizer": files["tokenizer"]})
    refused(path, "hps", {"model": path, "tokenizer": files["tokenizer"]})


def test_heads_are_not_guessed(files):
    refused("unknown number of heads at widths 32 and 128", "hps",
            {"model": files["hps.pt"], "tokenizer": files["tokenizer"]})


def test_wrong_files_are_refused_in_one_line(make, files, tmp_path):
    good = {"tokenizer": files["tokenizer"], "head": files["head.pth"]}
    missing, empty, page, other, wide = (str(tmp_path / x) for x in ("no", "empty", "page", "other", "wide"))
    os.mkdir(empty)
    with open(page, "w") as file:
        file.write("<!DOCTYPE html>")                                      # a failed download can leave this
    torch.save({"model": {}}, other)
    for path, message in ((missing, "no file"), (empty, "neither a folder"), (page, "damaged"),
                          (other, "'state_dict'"), (files["head.pth"], "'state_dict'")):
        refused(message, "hps", {"model": path, **good})
        refused(path, "pickscore", {"model": path, **good})
    for path in (missing, empty):
        refused(f"{path} is no folder of a tokenizer", "hps", {"model": files["hps.pt"], "tokenizer": path})
    torch.save({**torch.load(good["head"], weights_only=True), "layers.0.weight": torch.zeros(10, 768)}, wide)
    for path in (files["hps.pt"], page, missing, wide):
        refused(path, "aesthetic", {"model": files["folder"], "head": path})


def test_a_damaged_folder_is_refused(files, tmp_path):
    """transformers would fill missing weights with random numbers and continue."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder, weights = str(tmp_path / "folder"), str(tmp_path / "folder" / "model.safetensors")
    paths = {"model": folder, "tokenizer": files["tokenizer"]}
    shutil.copytree(files["folder"], folder)
    state = safetensors.load_file(weights)
    lost = state.pop("visual_projection.weight")
    safetensors.save_file(state, weights, {"format": "pt"})
    refused("missing visual_projection.weight", "clipscore", paths)
    state["visual_projection.weight"] = lost[:, :5].contiguous()
    safetensors.save_file(state, weights, {"format": "pt"})
    refused("mismatched", "clipscore", paths)
    os.truncate(weights, 1000)
    refused(folder, "clipscore", paths)


def test_a_tokenizer_of_another_model_is_refused(make, files, tmp_path):
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(files["tokenizer"])
    import tokenizers
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 10)])
    tokenizer.save_pretrained(tmp_path / "endless")
    refused("must end texts with token 11", "clipscore",
            {"model": files["folder"], "tokenizer": str(tmp_path / "endless")})


def test_a_missing_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)                 # importing it now fails
    refused("pip install -r requirements-full.txt", "hps", {"model": "x.pt", "tokenizer": "y"})
