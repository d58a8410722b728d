"""Pictures for your own captions.

    python sample.py --ckpt=out/tiny_js --prompt="a red circle left of a blue square"
    python sample.py --prompt="three blue crosses; a circle and a square" --temperature=0.8
    python sample.py --gpt_ckpt=t2i_XL_stage1_256.pt --vq_ckpt=vq_ds16_t2i.pt --prompt="a fox in the snow"
    python sample.py --gpt_ckpt=c2i_L_384.pt --vq_ckpt=vq_ds16_c2i.pt --prompt="207; 360; 387"
    python sample.py --world=janus --gpt_ckpt=Janus-Pro-1B --prompt="a red fox in the snow"
    python sample.py --ckpt=out/llamagen_js --prompt="a red fox in the snow"
    python sample.py --ckpt=out/llamagen_js --prompts=evaluation_metadata.jsonl --save=out/geneval --n=4
    python sample.py --ckpt=out/llamagen_c2i_vapi --npz=out/samples.npz --n=50000 --cfg_scale=1 --top_k=0

Here, unlike in training, the distribution may be cut (top_k, top_p), cooled, or guided: nothing is learned
from it. In the tiny world a frame is green where the exact reader finds what the caption says, red where not;
captions outside its grammar, but of its words, get no frame. A class-conditional model takes class numbers
of ImageNet, 0 to 999, for prompts. Released files are looked for in `weights`, and fetched if not there.

--save draws every prompt of a file, for a benchmark's own scorer, in the folders that GenEval (arXiv
2310.11513) wants: out/geneval/00000/metadata.jsonl, the prompt's own line of the file, and beside it
samples/0000.png, 0001.png ...

--npz draws n pictures in all, of uniformly random classes, for the evaluator of ADM (FID, Inception score,
precision and recall; github.com/openai/guided-diffusion): one array of bytes, arr_0 [n,256,256,3]. Larger
pictures are resized as LlamaGen's scripts do it, bicubic without antialias. 50,000 of them are 9.8 GB, which
go to the disk as they are drawn.

Also printed: how many different codes were used, and a hash of them. Two runs that print the same hash drew
the same tokens; on another machine or a GPU the last bit of a sum may differ, and then they do not.
"""
import hashlib
import importlib
import json
import os
import zipfile
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import files as checkpoint
from common import config
import evaluate
from common import lora
from common import images as pictures
from full import prompts as prompt_files
from tiny import shapes
from tiny import text
from full import weights
from common.config import UserError
from common.device import batched
from tiny.world import load_models
from common.device import freeze
from common.device import pick_device
from tiny.judge import reader

# (cfg_scale, top_k) of LlamaGen's and Janus's own samplers
USUAL = {"tiny": (1.0, 0), "t2i": (7.5, 1000), "c2i": (4.0, 2000), "janus": (5.0, 0)}


@dataclass(frozen=True)
class Config:
    ckpt: str = "assets/tiny_base.pt"  # a run's folder, a checkpoint, or a base of the tiny world
    prompt: str = "a red circle left of a blue square"  # captions, with ; between them; or class numbers
    out: str = "out/sample.png"        # where the picture goes
    n: int = 8                         # pictures a caption; with npz, in all
    prompts: str = ""                  # a file of prompts (as in train.py), in place of prompt
    save: str = ""                     # with prompts: the folder for their pictures, in place of out
    npz: str = ""                      # a .npz file for pictures of random classes, in place of out; c2i only
    seed: int = 0                      # of the samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    # ---- distribution
    temperature: float = 1.0           # 0 is greedy: the likeliest code each time, so n equal pictures
    cfg_scale: float = 0.0             # guidance; 1 is none; 0 = usual: tiny 1, t2i 7.5, c2i 4, janus 5
    top_k: int = -1                    # only the k likeliest codes; 0 is all; -1 = usual: t2i 1000, c2i 2000
    top_p: float = 1.0                 # only the fewest codes with this much probability; 1 is all
    # ---- released files in place of ckpt (as in train.py)
    world: Literal["llamagen", "janus"] = "llamagen"  # a Janus has all of its files in the folder gpt_ckpt
    gpt_ckpt: str = ""                 # e.g. t2i_XL_stage1_256.pt, c2i_L_384.pt, or one made by weights.py
    vq_ckpt: str = "vq_ds16_t2i.pt"    # tokenizer; vq_ds16_c2i.pt for c2i
    t5: str = "flan-t5-xl"             # encoder of the captions, t2i only
    weights: str = "weights"           # folder of these files
    n_head: int = 0                    # attention heads of gpt_ckpt; 0 = by the table of released sizes
    block_size: int = 0                # image tokens of gpt_ckpt; 0 = by its name: _256, _384 or _512 pixels
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the policy's matrix products


def load(cfg, device):
    """-> (policy, the parts of a world that drawing needs: encode, decode, autocast; and its kind)."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    options, state = cfg, None
    if not cfg.gpt_ckpt:
        path = config.locate(cfg.ckpt)
        path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
        saved = checkpoint.load(path)
        options = evaluate.options_in(saved, path) if {"config", "model"} <= set(saved) else None
        if options is None or options.world == "tiny":
            policy, vqgan, _, _ = load_models(path, device)
            return policy, SimpleNamespace(encode=lambda c: text.encode(c, device), decode=vqgan.decode,
                                           autocast=autocast, kind="tiny", prepare=list)
        state = saved["model"]
    parts = importlib.import_module({"tiny": "tiny.world", "llamagen": "full.llamagen", "janus": "full.janus"}[options.world]).World
    policy, vqgan = parts.load_models(options, weights.find(parts.model_files(options), cfg.weights), device)
    if state:
        policy = lora.adapt(policy, options.lora_rank) if getattr(options, "lora_rank", 0) else policy
        checkpoint.load_weights(policy, state, path)
    prepare = list                      # T5 wants all captions at once; others have nothing to prepare
    if policy.config.model_type == "c2i":
        def encode(classes):
            return torch.tensor(classes, device=device), torch.ones(len(classes), 1, device=device)
    else:
        captions = parts.captions_of(options, weights.find(parts.text_files(options), cfg.weights), device)
        prepare = captions.prepare

        def encode(texts):
            return captions.encode(texts, device)
    return policy, SimpleNamespace(encode=encode, decode=lambda tokens: batched(vqgan.decode, tokens),
                                   autocast=autocast, kind=policy.config.model_type, prepare=prepare)


def check(cfg):
    config.at_least(cfg, n=1, seed=0, temperature=0, top_k=-1, n_head=0, block_size=0)
    config.named(cfg, ckpt="", out=".png", vq_ckpt="", t5="", weights="")
    if cfg.cfg_scale and cfg.cfg_scale < 1:
        raise UserError(f"cfg_scale must be at least 1, or 0 for the usual one, not {cfg.cfg_scale}")
    if bool(cfg.save) != bool(cfg.prompts):
        raise UserError("--prompts=FILE and --save=FOLDER go together: every prompt of the file is drawn "
                        "into the folder")
    if cfg.npz:
        config.named(cfg, npz=".npz")
        if cfg.save:
            raise UserError("--npz and --save are two tasks: one at a time")
        if os.path.exists(cfg.npz):
            raise UserError(f"{cfg.npz} is there already: choose another file by --npz=...")
    if cfg.save and os.path.isdir(cfg.save) and os.listdir(cfg.save):
        raise UserError(f"{cfg.save} is not empty: choose another folder by --save=...")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {cfg.top_p}")


def classes_of(captions, policy, cfg):
    """Texts -> class numbers. UserError if they are none of this model."""
    told = [int(c) if c.isdecimal() else -1 for c in captions]
    if not all(0 <= c < policy.config.num_classes for c in told):
        raise UserError(f"prompt must be class numbers from 0 to {policy.config.num_classes - 1} with ; "
                        f"between them, not {'; '.join(captions):.99}: {cfg.gpt_ckpt} draws classes")
    return told


def save_pictures(records, told, draw, cfg):
    """A folder for each (caption, record), in GenEval's layout; told: what the model reads of captions."""
    for i, (_, record) in enumerate(tqdm(records, desc="drawing", unit="prompt", ncols=110)):
        folder = os.path.join(cfg.save, f"{i:05d}")
        os.makedirs(os.path.join(folder, "samples"))
        with open(os.path.join(folder, "metadata.jsonl"), "w", encoding="utf-8") as file:
            json.dump(record, file)
        for j, image in enumerate(draw([told[i]], seed=cfg.seed + i)[1]):
            pictures.to_pil(image).save(os.path.join(folder, "samples", f"{j:04d}.png"))
    print(f"{len(records)} x {cfg.n} pictures in {cfg.save}")


def to_bytes(images):
    """images [b,3,H,W] in about [-1,1] -> uint8 [b,256,256,3], numpy, rounded to the nearest."""
    if images.shape[2:] != (256, 256):
        images = F.interpolate(images, (256, 256), mode="bicubic")
    return (127.5 * images + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_npz(draw, config, cfg):
    """cfg.n pictures of classes drawn uniformly, by a policy of this config, as cfg.npz: whole or not at
    all."""
    at_once = evaluate.CHUNK // config.block_size or 1
    generator = torch.Generator().manual_seed(cfg.seed)
    told = torch.randint(config.num_classes, (cfg.n,), generator=generator).split(at_once)
    seeds = torch.randint(2 ** 62, (len(told),), generator=generator).tolist()
    os.makedirs(os.path.dirname(cfg.npz) or ".", exist_ok=True)
    # An .npz is a zip of .npy, and an .npy a header before the bytes, so both can be written piece by piece.
    # The date is fixed, for the same pictures to make the same file.
    try:
        with zipfile.ZipFile(f"{cfg.npz}.tmp", "w") as file, file.open(
                zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as part, tqdm(
                total=cfg.n, desc="drawing", unit="picture", ncols=110) as bar:
            np.lib.format.write_array_header_1_0(part, {"descr": "|u1", "fortran_order": False,
                                                        "shape": (cfg.n, 256, 256, 3)})
            for some, seed in zip(told, seeds):
                part.write(to_bytes(draw(some.tolist(), seed, 1)[1]).tobytes())
                bar.update(len(some))
        os.replace(f"{cfg.npz}.tmp", cfg.npz)
    finally:
        if os.path.exists(f"{cfg.npz}.tmp"):
            os.remove(f"{cfg.npz}.tmp")
    print(f"{cfg.n} pictures in {cfg.npz}")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    device = pick_device(cfg.device)
    records = prompt_files.records(cfg.prompts) if cfg.save else [
        (c.strip(), None) for c in cfg.prompt.split(";")]
    policy, world = load(cfg, device)
    if cfg.npz and world.kind != "c2i":
        raise UserError("--npz draws random classes, and this model reads captions: see --prompts and --save")
    freeze(policy, cfg.dtype)
    captions = [caption for caption, _ in records]
    told = captions
    if world.kind == "c2i":
        told = [] if cfg.npz else classes_of(captions, policy, cfg)
    world.prepare(told)
    scale, top_k = USUAL[world.kind]

    def draw(told, seed, n=cfg.n):
        return evaluate.draw(world, policy, told, n, seed=seed, temperature=cfg.temperature,
                             cfg_scale=cfg.cfg_scale or scale,
                             top_k=top_k if cfg.top_k < 0 else cfg.top_k, top_p=cfg.top_p)
    if cfg.save:
        return save_pictures(records, told, draw, cfg)
    if cfg.npz:
        return save_npz(draw, policy.config, cfg)
    tokens, images = draw(told, cfg.seed)
    rows = [(c, [group], [reader(group, [c] * cfg.n)]
             if world.kind == "tiny" and c in shapes.CAPTIONS else None)
            for c, group in zip(captions, images.split(cfg.n))]
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    pictures.grid(rows, cfg.out)
    for caption, _, scores in rows if world.kind == "tiny" else ():
        print(f"{caption}: "
              + (f"{scores[0].mean():.0%} right" if scores else "not of the grammar, so not judged"))
    print(f"{tokens.numel()} tokens, {len(tokens.unique())} different codes, hash "
          + hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16])
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
