"""Images for your own prompts.

    python sample.py --ckpt=out/tiny_js --prompt="two blue squares"
    python sample.py --ckpt=assets/tiny_flow_base.pt         a flow policy (flow.py)
    python sample.py --prompt="three blue crosses; a circle and a square" --temperature=0.8
    python sample.py --gpt_ckpt=t2i_XL_stage1_256.pt --vq_ckpt=vq_ds16_t2i.pt --prompt="a fox in the snow"
    python sample.py --gpt_ckpt=c2i_L_384.pt --vq_ckpt=vq_ds16_c2i.pt --prompt="207; 360; 387"
    python sample.py --world=janus --gpt_ckpt=Janus-Pro-1B --prompt="a red fox in the snow"
    python sample.py --world=sd3 --gpt_ckpt=stable-diffusion-3.5-medium --prompt="a red fox in the snow"
    python sample.py --ckpt=out/llamagen_js --prompt="a red fox in the snow"
    python sample.py --ckpt=out/llamagen_js --prompts=evaluation_metadata.jsonl --save=out/geneval --n=4
    python sample.py --ckpt=out/llamagen_c2i_vapi --npz=out/samples.npz --n=50000 --cfg_scale=1 --top_k=0

Unlike in training, the distribution may be cut (top_k, top_p), cooled, or guided here, because nothing is
learned from it. In the tiny world a frame is green where the exact reader finds what the prompt says, and red
where it does not. Prompts outside the grammar of the tiny world, but of its words, get no frame. A
class-conditional model takes class numbers of ImageNet, 0 to 999, for prompts. Released files are looked for
in `weights`, and fetched if they are not there.

--save samples every prompt of a file, for the program of a benchmark, into the folders that GenEval (arXiv
2310.11513) wants: out/geneval/00000/metadata.jsonl, the prompt's own line of the file, and beside it
samples/0000.png, 0001.png ... If it was stopped, the same command continues after the last whole folder.
options.json holds what decides the images, so that other options cannot add theirs.

--npz samples n images in all, of uniformly random classes, for the evaluator of ADM (FID, Inception score,
precision and recall; github.com/openai/guided-diffusion): one array of bytes, arr_0 [n,256,256,3]. Larger
images are resized as in LlamaGen's scripts, bicubic without antialias. 50,000 images are 9.8 GB, which are
written as they are sampled.

Also printed: how many different codes were used, and a hash of them. A flow policy has latents in place of
codes. Two runs that print the same hash
sampled the same tokens. On another machine or a GPU the last bit of a sum may differ, and then the tokens
differ.
"""
import hashlib
import json
import os
import shutil
import zipfile
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluate
import full.world
import tiny.world
from common import config, device, files, images
from common.config import UserError, option
from common.folder import checkpoint_of
from full import llamagen, weights
from full import prompts as prompt_files
from tiny import shapes, text
from tiny.judge import reader

# (cfg_scale, top_k) of the models' own samplers
USUAL = {"tiny": (1.0, 0), "tiny_flow": (1.0, 0), "sd3": (4.5, 0), "sana": (4.5, 0),
         "t2i": (7.5, 1000), "c2i": (4.0, 2000), "janus": (5.0, 0)}
FREE = ("prompt", "prompts", "out", "save", "npz", "device", "weights")    # may differ when --save continues


@dataclass(frozen=True)
class Config:
    ckpt: str = option("assets/tiny_base.pt", "a run folder, a checkpoint, or a tiny base", ending="")
    prompt: str = option("a red circle left of a blue square", "prompts or class numbers, with ; between")
    out: str = option("out/sample.png", "the image file", ending=".png")
    n: int = option(8, "images of each prompt; with --npz, in all", low=1)
    prompts: str = option("", "a file of prompts (full/prompts.py), in place of --prompt")
    save: str = option("", "with --prompts: the folder for their images, in place of --out")
    npz: str = option("", "a .npz file for images of random classes, in place of --out; c2i only")
    seed: int = option(0, "of the samples", low=0)
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, then mps, then cpu")
    # the distribution
    temperature: float = option(1.0, "0 is greedy: always the likeliest code, so n equal images", low=0)
    cfg_scale: float = option(
        0.0, "guidance; 1 = none; 0 = usual: tiny 1, t2i 7.5, c2i 4, janus 5, sd3 and sana 4.5", low=0)
    top_k: int = option(-1, "only the k likeliest codes; 0 = all; -1 = usual: t2i 1000, c2i 2000", low=-1)
    top_p: float = option(1.0, "only the fewest codes with this much probability; 1 = all", high=1)
    # released files in place of --ckpt, as in train.py
    world: Literal["llamagen", "janus", "sd3", "sana"] = option("llamagen", "of gpt_ckpt")
    gpt_ckpt: str = option("", "such as t2i_XL_stage1_256.pt, c2i_L_384.pt, or an exported file")
    vq_ckpt: str = option("vq_ds16_t2i.pt", "tokenizer of the images; vq_ds16_c2i.pt for c2i", ending="")
    t5: str = option("flan-t5-xl", "encoder of the prompts, t2i only", ending="")
    weights: str = option("weights", "folder of these files", ending="")
    n_head: int = option(0, "attention heads of gpt_ckpt; 0 = by the table of released sizes", low=0)
    block_size: int = option(0, "image tokens of gpt_ckpt; 0 = by its name: _256, _384, _512 pixels", low=0)
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the policy's matrix products")

    def check(cfg):
        if 0 < cfg.cfg_scale < 1:
            raise UserError(f"--cfg_scale must be at least 1, or 0 for the usual one, got {cfg.cfg_scale}")
        if cfg.top_p <= 0:
            raise UserError(f"--top_p must be above 0, got {cfg.top_p}")
        if bool(cfg.prompts) != bool(cfg.save):
            raise UserError("--prompts=FILE and --save=FOLDER go together: every prompt of the file is "
                            "sampled into the folder")
        if cfg.npz and not cfg.npz.lower().endswith(".npz"):
            raise UserError(f"--npz must be the name of a file that ends in .npz, got {cfg.npz!r}")
        if cfg.npz and cfg.save:
            raise UserError("--npz and --save are two tasks: give one of them")
        if cfg.npz and os.path.exists(cfg.npz):
            raise UserError(f"{cfg.npz} exists already: choose another file with --npz=...")
        there = os.listdir(cfg.save) if cfg.save and os.path.isdir(cfg.save) else []
        if there and "options.json" not in there:
            raise UserError(f"{cfg.save} is not empty: choose another folder with --save=...")


def open_pipeline(cfg, prompts, where):
    """The models that `cfg` names -> (pipeline, its kind: a key of USUAL).

    prompts: all texts that will be sampled. An encoder such as T5 encodes them at once, and is freed.
    """
    options, state = cfg, None
    if not cfg.gpt_ckpt:
        path = checkpoint_of(cfg.ckpt)
        saved = files.load(path)
        options = None                                     # of a base
        if {"config", "model"} <= set(saved):
            options = config.restore(evaluate.options, saved["config"], path)
        if "flow" in saved or options and options.world == "tiny_flow":
            return tiny.world.open_flow(path, options, where), "tiny_flow"
        if options is None or options.world == "tiny":
            policy, vqgan, *_ = tiny.world.load_models(path, where)
            pipeline = tiny.world.Pipeline(policy, vqgan, where, cfg.dtype)
            pipeline.made_from = {"ckpt": path}
            return pipeline, "tiny"
        state = saved["model"]
    kind = full.world.PIPELINES[options.world]
    same = {k: getattr(options, k) for k in ("gpt_ckpt", "vq_ckpt", "t5", "n_head", "block_size")}
    o = full.world.Options(weights=cfg.weights, lora_rank=getattr(options, "lora_rank", 0), **same)
    if state and options.world in evaluate.FLOWS:          # the pipeline needs the options of the sampler too
        o = replace(options, weights=cfg.weights)
    def find(keys):
        return weights.find([getattr(o, key) for key in keys], o.weights)
    found = find(kind.model_files)
    # The text encoders of flow policies are large. They encode first, and are freed before the rest is read.
    early = options.world in evaluate.FLOWS and kind.text_encoder(o, find(kind.text_files), where, prompts)
    pipeline = kind(o, found, early, where, cfg.dtype, train=False)
    pipeline.made_from = found
    if state:
        files.check_made_from(saved, found, path)
        files.load_weights(pipeline.policy, state, path)
        pipeline.made_from = found | {"ckpt": path}
    if pipeline.kind == "c2i":                             # whatever the name of its file
        pipeline.text = llamagen.Classes()
    elif not early:
        pipeline.text = kind.text_encoder(o, find(kind.text_files), where, prompts)
    return pipeline, pipeline.kind


def open_folder(folder, options):
    """Keep the options in options.json of the folder. Raises UserError if it has the images of others."""
    path = os.path.join(folder, "options.json")
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(path):
        with open(path, "w", encoding="utf-8") as file:
            return json.dump(options, file, indent=1)
    with files.explain(f"cannot read {path}"), open(path, encoding="utf-8") as file:
        before = json.load(file)
        for key, value in options.items():
            if before[key] != value:
                raise UserError(f"the images in {folder} were made with {key} = {before[key]!r}, not with "
                                f"{value!r}: choose another folder with --save=...")


def save_images(records, sample, cfg):
    """Sample a folder for each (prompt, record), in GenEval's layout. Whole folders are kept."""
    for i, (prompt, record) in enumerate(tqdm(records, desc="sampling", unit="prompt", dynamic_ncols=True)):
        folder = os.path.join(cfg.save, f"{i:05d}")
        if os.path.isdir(folder):
            continue
        shutil.rmtree(f"{folder}.tmp", ignore_errors=True)
        os.makedirs(os.path.join(f"{folder}.tmp", "samples"))
        with open(os.path.join(f"{folder}.tmp", "metadata.jsonl"), "w", encoding="utf-8") as file:
            json.dump(record, file)
        for j, image in enumerate(sample([prompt], seed=cfg.seed + i)[1]):
            images.to_pil(image).save(os.path.join(f"{folder}.tmp", "samples", f"{j:04d}.png"))
        os.rename(f"{folder}.tmp", folder)                 # from now on it is whole
    print(f"{len(records)} x {cfg.n} images in {cfg.save}")


def to_bytes(pixels):
    """pixels [b,3,H,W] in about [-1,1] -> uint8 [b,256,256,3], numpy, rounded to the nearest."""
    if pixels.shape[2:] != (256, 256):
        pixels = F.interpolate(pixels, (256, 256), mode="bicubic")
    return (127.5 * pixels + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_npz(sample, model, cfg):
    """cfg.n images of classes drawn uniformly as cfg.npz: whole or not at all. model: the policy's config."""
    at_once = evaluate.TOKENS_AT_ONCE // model.block_size or 1
    generator = torch.Generator().manual_seed(cfg.seed)
    labels = torch.randint(model.num_classes, (cfg.n,), generator=generator).split(at_once)
    seeds = torch.randint(2 ** 62, (len(labels),), generator=generator).tolist()
    os.makedirs(os.path.dirname(cfg.npz) or ".", exist_ok=True)
    # An .npz is a zip of .npy files, and an .npy is a header before the bytes. So both can be written piece
    # by piece. The date is fixed, so that the same images make the same file.
    try:
        with zipfile.ZipFile(f"{cfg.npz}.tmp", "w") as file, file.open(
                zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as part, tqdm(
                total=cfg.n, desc="sampling", unit="image", dynamic_ncols=True) as bar:
            np.lib.format.write_array_header_1_0(part, {"descr": "|u1", "fortran_order": False,
                                                        "shape": (cfg.n, 256, 256, 3)})
            for some, seed in zip(labels, seeds):
                part.write(to_bytes(sample([str(label) for label in some.tolist()], seed, 1)[1]).tobytes())
                bar.update(len(some))
        os.replace(f"{cfg.npz}.tmp", cfg.npz)
    finally:
        if os.path.exists(f"{cfg.npz}.tmp"):
            os.remove(f"{cfg.npz}.tmp")
    print(f"{cfg.n} images in {cfg.npz}")


def main(argv):
    cfg, given = config.load(Config, argv)
    ignored = [f"--{key}" for key in ("world", "vq_ckpt", "t5", "n_head", "block_size") if key in given]
    if ignored and not cfg.gpt_ckpt:
        raise UserError(f"{', '.join(ignored)} would be ignored without --gpt_ckpt: a checkpoint knows its "
                        f"own models")
    where = device.start(cfg.device)
    records = prompt_files.records(cfg.prompts) if cfg.save else [
        (p.strip(), None) for p in cfg.prompt.rstrip().removesuffix(";").split(";")]
    prompts = [prompt for prompt, _ in records]
    pipeline, kind = open_pipeline(cfg, [] if cfg.npz else prompts, where)
    policy = device.freeze(pipeline.policy, cfg.dtype)
    if cfg.npz and kind != "c2i":
        raise UserError("--npz samples random classes, and this model reads prompts: see --save")
    if kind == "c2i" and not cfg.npz:
        pipeline.text.check(prompts, policy.config.num_classes)
    if kind.startswith("tiny"):
        prompts = [text.normalize(prompt) for prompt in prompts]
        text.encode(prompts)                               # raises UserError now, not after hours of images
    scale, top_k = USUAL[kind]
    scale, top_k = cfg.cfg_scale or scale, top_k if cfg.top_k < 0 else cfg.top_k
    if not pipeline.generates_actions and (cfg.temperature, top_k, cfg.top_p) != (1, 0, 1):
        raise UserError("a flow policy draws no codes: leave --temperature, --top_k and --top_p out")

    def sample(prompts, seed, n=cfg.n):
        return evaluate.sample(pipeline, policy, prompts, n, seed=seed, temperature=cfg.temperature,
                               cfg_scale=scale, top_k=top_k, top_p=cfg.top_p)
    if cfg.save:
        options = {key: value for key, value in asdict(cfg).items() if key not in FREE}
        made_from = [files.fingerprint(path) for path in pipeline.made_from.values()]
        open_folder(cfg.save, options | {
            "cfg_scale": scale, "top_k": top_k, "weights": made_from,
            "prompts": hashlib.sha256(json.dumps(records).encode()).hexdigest()})
        return save_images(records, sample, cfg)
    if cfg.npz:
        return save_npz(sample, policy.config, cfg)
    tokens, pixels = sample(prompts, cfg.seed)
    tiny_kind = kind.startswith("tiny")
    rows = [(p, [group], [reader(group, [p] * cfg.n)] if tiny_kind and p in shapes.CAPTIONS else None)
            for p, group in zip(prompts, pixels.split(cfg.n))]
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    images.grid(rows, cfg.out)
    for prompt, _, right in rows if tiny_kind else ():
        print(f"{prompt}: "
              + (f"{right[0].mean():.0%} right" if right else "not of the grammar, so not rated"))
    kinds = f"tokens, {len(tokens.unique())} different codes" if pipeline.generates_actions else "numbers"
    print(f"{tokens.numel()} {kinds}, hash "
          + hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16])
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
