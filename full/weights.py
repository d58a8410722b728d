"""The released weights: a table of the files, their download, and the conversion of other layouts.

    python -m full.weights                      print the table: which files are there, size, license, source
    python -m full.weights --export=out/run --to=weights/mine_256.pt      for LlamaGen's own sampler
    python -m full.weights --export=out/sd3_flow_grpo --to=out/lora       adapters, for diffusers
    python -m full.weights --convert=FILE_OR_FOLDER --to=weights/other_256.pt     into the released layout

The released layout of LlamaGen (arXiv 2406.06525, github.com/FoundationVision/LlamaGen) is one file with
{"model": {name: tensor}}. GPT.from_pretrained and VQGAN.from_pretrained read this layout and no other.
`--convert` writes it from files in these layouts:
 1. Wrappers: {"module": ...} of DeepSpeed, {"state_dict": ...}, a bare dict as FSDP writes it, and name
    prefixes of DDP and torch.compile. An optimizer, ema weights or discriminator beside a model is left out.
 2. Ports to Hugging Face's Llama layout, such as jadohu/LlamaGen-T2I: one or several files of safetensors or
    pytorch_model.bin, in a folder with config.json.
No tensor's shape tells n_head, norm_eps and block_size (the number of image tokens). So the conversion takes
them from config.json and from the name of the source, where _256 means 256 pixels, and writes them into the
new file under "config". LlamaGen's own sampler ignores that entry.
"""
import dataclasses
import glob
import json
import os
import re
import urllib.request

import torch

from common import config, files, lora, released
from common.config import UserError, option
from common.folder import checkpoint_of
from model import GPT, PRESETS, GPTConfig
from vqgan import VQGAN, VQConfig


def _gpt(preset, pixels, **more):
    n_layer, n_head, dim = PRESETS[f"GPT-{preset}"]
    return GPTConfig(dim=dim, n_layer=n_layer, n_head=n_head, block_size=(pixels // 16) ** 2, **more)


# Numbers of parameters of the models that are not ours.
# CLIP, with image width w and text width t. A layer has 4w^2 + 4w in the attention, 8w^2 + 5w in the MLP, and
# 4w in two LayerNorms. The image tower adds patches 588w, 1 + 257 positions w, and 4w in LayerNorms. The text
# tower adds 49408 words t, 77 positions t, and a LayerNorm 2t. Projections wt + tt and one scale complete it.
# T5, with D = 2048. An attention has 4D^2 and a decoder layer has two. The gated MLP has 3 D 5120, a norm D.
# There are 2 x 24 layers, 2 x 32 x 32 distances, 2 D in norms, and 2 x 32128 words D.
# The aesthetic reward is an MLP 768-1024-128-64-16-1, so the sum of (in + 1) out.
# Janus-Pro is counted by transformers. VGG16: 13 convolutions and three matrices (arXiv 1409.1556 table 2).
# LPIPS has one number per channel of five layers.
CLIP_L, CLIP_H, T5_XL, AESTHETIC = 427_616_513, 986_109_441, 2_849_757_184, 927_969
SD3_5, SANA = 16_270_000_000, 8_850_000_000            # bytes of files, as listed; most are text encoders
JANUS_1B, JANUS_7B, VGG16 = 2_076_636_811, 7_407_773_323, 138_357_544
T2I, C2I = "peizesun/llamagen_t2i", "FoundationVision/LlamaGen"
RELEASED = {  # name (.pt, .pth, or a folder): (our config or the bytes, repository or address, license, use)
    "t2i_XL_stage1_256.pt": (_gpt("XL", 256), T2I, "MIT", "policy, prompts to 256 pixels"),
    "t2i_XL_stage2_512.pt": (_gpt("XL", 512), T2I, "MIT", "policy, prompts to 512 pixels"),
    "vq_ds16_t2i.pt": (VQConfig(), T2I, "MIT", "tokenizer of both, VQ-16"),
    **{f"c2i_{n}_{p}.pt": (_gpt(n, p, model_type="c2i", cls_token_num=1), C2I, "MIT", "policy, 1000 classes")
       for n, p in (("B", 256), ("L", 256), ("B", 384), ("L", 384), ("XL", 384), ("XXL", 384), ("3B", 384))},
    "vq_ds16_c2i.pt": (VQConfig(), C2I, "MIT", "tokenizer of the c2i policies, VQ-16"),
    "vq_ds8_c2i.pt": (VQConfig(ch_mult=(1, 2, 2, 4)), C2I, "MIT", "tokenizer VQ-8, 4 times the tokens"),
    "flan-t5-xl": (4 * T5_XL, "google/flan-t5-xl", "Apache-2.0", "features of prompts"),
    "HPS_v2.1_compressed.pt": (2 * CLIP_H, "xswu/HPSv2", "Apache-2.0", "reward HPSv2.1"),
    "clip-vit-large-patch14": (4 * CLIP_L, "openai/clip-vit-large-patch14", "MIT", "rewards: CLIP, tokens"),
    "Janus-Pro-1B": (2 * JANUS_1B, "deepseek-ai/Janus-Pro-1B", "DeepSeek", "policy and tokenizer (janus.py)"),
    "Janus-Pro-7B": (2 * JANUS_7B, "deepseek-ai/Janus-Pro-7B", "DeepSeek", "policy and tokenizer (janus.py)"),
    "stable-diffusion-3.5-medium": (SD3_5, "stabilityai/stable-diffusion-3.5-medium", "Stability",
                                    "flow policy and all beside it (sd3.py); log in first"),
    "Sana_600M_512px_diffusers": (SANA, "Efficient-Large-Model/Sana_600M_512px_diffusers", "NVIDIA NC",
                                  "flow policy and all beside it (sd3.py)"),
    "PickScore_v1": (4 * CLIP_H, "yuvalkirstain/PickScore_v1", "see page", "reward PickScore"),
    "sac+logos+ava1-l14-linearMSE.pth": (
        4 * AESTHETIC, "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth", "see page", "reward: head of the aesthetic reward"),
    "vgg16-397923af.pth": (4 * VGG16, "https://download.pytorch.org/models/vgg16-397923af.pth", "BSD-3",
                           "layers of LPIPS (lpips.py)"),
    "lpips_v0.1_vgg.pth": (4 * 1472, "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/"
                           "weights/v0.1/vgg.pth", "BSD-2", "weights of these layers in LPIPS")}
FILES, FOLDER_FILES = (".pt", ".pth"), ["*.json", "*.txt", "spiece.model", "*.safetensors"]
# A folder of diffusers holds a folder for each model. The hub also has other versions of the same weights.
DIFFUSERS = ("stable-diffusion-3.5-medium", "Sana_600M_512px_diffusers")
DIFFUSERS_FILES = ["model_index.json", *(f"{part}{n}/*" for part in ("text_encoder", "tokenizer")
                                         for n in ("", "_2", "_3")), "transformer/*", "vae/*", "scheduler/*"]


def size(cfg, dtype=torch.float32):
    """Return the bytes of all tensors of a GPTConfig or VQConfig in `dtype`."""
    with torch.device("meta"):                             # shapes without memory
        module = (GPT if isinstance(cfg, GPTConfig) else VQGAN)(cfg)
    return dtype.itemsize * sum(tensor.numel() for tensor in module.state_dict().values())


# ---- finding and downloading ---------------------------------------------------------------------------
def _is_there(path):
    """Return whether `path` is a file, or a folder with config.json and all of its weight files, or a folder
    of diffusers whose models all are such folders."""
    if os.path.isfile(index := os.path.join(path, "model_index.json")):
        return all(_is_there(os.path.join(path, part)) for part, kind in _read(index).items()
                   if re.match("transformer|vae|text_encoder", part) and kind[0])
    kind = "model.safetensors" if glob.glob("*.safetensors", root_dir=path) else "pytorch_model.bin"
    index = os.path.join(path, kind + ".index.json")       # lists all parts, even if a download stopped
    parts = (_read(index).get("weight_map", {}).values() if os.path.isfile(index) else
             glob.glob("*.safetensors", root_dir=path) or glob.glob("*.bin", root_dir=path))
    return os.path.isfile(path) or bool(parts) and all(
        os.path.isfile(os.path.join(path, part)) for part in {*parts, "config.json"})


def _line(name):
    what, source, license, _ = RELEASED[name]
    megabytes = (size(what) if dataclasses.is_dataclass(what) else what) / 1e6
    page = f"https://huggingface.co/{source}" + f"/resolve/main/{name}" * name.endswith(FILES)
    return f"{name:34s} {megabytes:>8,.0f} MB  {license:10s}  {source if '//' in source else page}"


def _download(name, path):
    source = RELEASED[name][1]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if source.startswith("https:"):
        with urllib.request.urlopen(source, timeout=5) as stream, open(f"{path}.tmp", "wb") as file:
            file.write(stream.read())
        return os.replace(f"{path}.tmp", path)
    # This function serves single files too, because hf_hub_download retries for a long time.
    from huggingface_hub import snapshot_download
    where, which = (os.path.dirname(path), [name]) if name.endswith(FILES) else (path, FOLDER_FILES)
    which = which + ["pytorch_model*.bin"] * name.startswith("Janus")      # other folders have safetensors
    more = dict(ignore_patterns=["*.fp16*"]) if name in DIFFUSERS else {}
    which = DIFFUSERS_FILES if name in DIFFUSERS else which
    snapshot_download(source, local_dir=where, allow_patterns=which, etag_timeout=5, **more)
    if not _is_there(path):    # without a network the hub accepts any folder that is not empty
        raise FileNotFoundError("no network, or the file was removed")


def find(names, folder="weights", download=True):
    """Return {name: path} for names of RELEASED, and for files of your own, in `folder` or at that path.
    download: fetch the files of RELEASED that are missing. Raises UserError with one line for each that is
    still missing: its name, size, license, source, and the path to put it at."""
    paths, why = {name: os.path.join(config.locate(folder), name) for name in names}, ""
    for name in names:
        if name not in RELEASED and not os.path.exists(paths[name]):
            paths[name] = name
            if not os.path.exists(name):
                raise UserError(f"there is no file {name} here or in {folder}, and no released file has "
                                f"this name. The released files are: {', '.join(RELEASED)}")
    try:
        for name, path in paths.items() if download else ():       # stops at the first failure
            if name in RELEASED and not _is_there(path):
                _download(name, path)
    except ImportError:
        why = " (to download them: pip install -r requirements-full.txt)"
    except Exception as error:                             # the hub's exceptions have no common base class
        why = f" (no download: {type(error).__name__}, {' '.join(str(error).split())[:80]})"
    if missing := [f"\n  {_line(name)}  to {path}" for name, path in paths.items()
                   if name in RELEASED and not _is_there(path)]:
        raise UserError(f"{len(missing)} of {len(paths)} files are missing{why}{''.join(missing)}")
    return paths


# ---- reading any layout, writing the released one ------------------------------------------------------
WRAPPERS = ("model", "module", "state_dict")               # `model` and not `ema`, as in the official sampler
PREFIX = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")    # of DDP and torch.compile, at the start or inside
PORT_LAYERS = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",   # to released names
               "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
               "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
PORT = {"model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "", **PORT_LAYERS}
PORT_CONFIG = {"num_attention_heads": "n_head", "rms_norm_eps": "norm_eps", "block_size": "block_size"}


def _read(path):
    """Return the dict in a .json, .safetensors, .pt, .pth or .bin file. Raises UserError if it is damaged."""
    with files.explain(f"{path} is damaged, or holds more than plain tensors: fetch it again", text=False):
        if path.endswith(".json"):
            return dict(json.load(open(path, encoding="utf-8")))
        if not path.endswith(".safetensors"):
            return files.load(path)
        from safetensors import safe_open
        # An open file keeps in memory what was read of it. So the file is opened anew for each tensor.
        state = {key: safe_open(path, "pt").get_tensor(key).clone() for key in safe_open(path, "pt").keys()}
        files.examine(state, path)                         # safetensors has no checksums
        return state


def gather(path):
    """Return ({name: tensor}, names of other entries) of a file or folder, without wrappers and prefixes."""
    names = glob.glob("*.safetensors", root_dir=path) or glob.glob("pytorch_model*.bin", root_dir=path)
    parts = [path] if os.path.isfile(path) else [os.path.join(path, name) for name in sorted(names)]
    if not parts:
        raise UserError(f"there are no weights at {path}. `python -m full.weights` lists the released files.")
    state, beside = {key: value for part in parts for key, value in _read(part).items()}, []
    while wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict) and state[w]), None):
        beside += [str(key) for key in state if key != wrapper]
        state = state[wrapper]
    return {PREFIX.sub("", str(key)): value for key, value in state.items()}, beside


def config_beside(path):
    """Return the content of config.json in the folder `path` or beside the file `path`, or {} without one."""
    beside = os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "config.json")
    return _read(beside) if os.path.isfile(beside) else {}


def join_qkv(state, order=lambda matrix: matrix):
    """Replace the matrices of query, key and value in each layer of {name: tensor} by one of all their rows.
    order: reorders the rows of the query and key matrices."""
    for key in [k for k in state if k.endswith("self_attn.q_proj.weight")]:
        names = [key.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if all(name in state for name in names):           # else files.build says which tensor is missing
            q, k, v = (state.pop(name) for name in names)
            state[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat([order(q), order(k), v])


def convert(path, target):
    """Read a file or folder in any layout of this file's docstring and write it to `target` in the released
    layout, with its tensors as they are. Raises UserError if it is missing or damaged or of another kind."""
    state, beside = gather(path)
    state, told = files.select(state, path, released.UNUSED, beside), {}
    if "model.embed_tokens.weight" in state:               # Hugging Face's Llama layout
        join_qkv(state)     # RoPE is interleaved in these ports as in LlamaGen, so rows keep their order
        for theirs, ours in PORT.items():
            state = {key.replace(theirs, ours): value for key, value in state.items()}
        options = config_beside(path)
        told = {ours: options[theirs] for theirs, ours in PORT_CONFIG.items() if theirs in options}
        if wrong := [key for key, value in told.items() if type(value) is not files.TOLD[key]]:
            raise UserError(f"config.json of {path}: {wrong[0]} must be of type "
                            f"{files.TOLD[wrong[0]].__name__}, got {told[wrong[0]]!r:.99}.")
    if "tok_embeddings.weight" in state and (tokens := released.tokens_by_name(path)):
        told.setdefault("block_size", tokens)
    files.save({"model": state, **({"config": told} if told else {})}, target)


def export(model, path, dtype=torch.float32):
    """Write a GPT or VQGAN, or its state dict, atomically as {"model": state dict in `dtype`}. LlamaGen's own
    sampler reads such a file. A name with _256 or _512 tells from_pretrained the number of image tokens."""
    state = model if isinstance(model, dict) else model.state_dict()
    files.save({"model": {PREFIX.sub("", k): v.to("cpu", dtype) for k, v in state.items()}}, path)


def policy_of(state, path):
    """Return the GPT of the state dict of a run at `path`, its adapters merged into its matrices. Raises
    UserError if it is another model. LlamaGen's sampler would leave its own random layers instead."""
    with files.explain(f"{path} has adapters that do not fit to its matrices"):
        state = lora.merge(files.select(state, path))
    if "tok_embeddings.weight" not in state:
        raise UserError(f"{path} is no run of LlamaGen. Only LlamaGen's policies can be exported.")
    fields = released.fields(GPTConfig, released.gpt_shapes, state, {}, {}, path)
    return files.build(GPT, GPTConfig(**fields, n_head=1), state, torch.float32, path)


# ---- the command ---------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    folder: str = option("weights", "the folder of the released files", ending="")
    convert: str = option("", "a file or folder in another layout, to be written in the released one")
    export: str = option("", "a run: its policy in LlamaGen's layout, or its adapters for diffusers")
    to: str = option("weights/mine_256.pt", "the file, or for adapters the folder, to write", ending="")

    def check(cfg):
        if cfg.convert and cfg.export:
            raise UserError("--convert and --export are two tasks: give one of them")
        if cfg.convert and cfg.to == Config.to:
            raise UserError("--convert needs --to=FILE.pt, the file to write")


def main(argv):
    cfg, _ = config.load(Config, argv)
    if not cfg.convert and not cfg.export:
        folder = config.locate(cfg.folder)
        print(f"files in {folder} (sizes of LlamaGen's files in fp32):")
        for name in RELEASED:
            there = "yes" if _is_there(os.path.join(folder, name)) else "no "
            print(f"{there} {_line(name)}  {RELEASED[name][3]}")
        return
    if os.path.exists(cfg.to):
        raise UserError(f"{cfg.to} exists already. Move it away first, or choose another --to.")
    if cfg.convert:
        convert(cfg.convert, cfg.to)
    else:
        path = checkpoint_of(cfg.export)
        run = files.load(path)
        if not isinstance(run.get("model"), dict):
            raise UserError(f"{path} is no checkpoint of a run: it has no state dict under 'model'.")
        if run.get("config", {}).get("world") in ("sd3", "sana"):
            cfg = dataclasses.replace(cfg, to=lora.export(run["model"], cfg.to))
        else:
            export(policy_of(run["model"], path), cfg.to)
    print(f"wrote {cfg.to}")


if __name__ == "__main__":
    config.run(main)
