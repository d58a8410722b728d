"""The full-size world: prompts from a file, rewards by CLIP models, and for VA-pi images from the disk.

    python train.py configs/llamagen_js.py

Files are looked for in the folder `weights`, and fetched from the Hugging Face Hub if they are not there
(full/weights.py lists them, with sizes and licences). Prompts come from a text file. A fixed handful of them
is never trained on and serves all evaluations. Rewards see the prompts as they were written.

A run of vapi.py takes images, with captions or classes, from `data` (full/data.py) in place of the text file.
A class-conditional policy, a file whose name begins with c2i_, reads a number, not text. Rewards then get the
name of the class, which is its folder's: CLIPScore can rate "golden retriever", but not "n02099601".

Memory for LlamaGen-XL (P = 775 million parameters) on one 24 GB card, 32 images a step, `dtype = "bfloat16"`.
These numbers are calculated. A run on a GPU prints the measured peak after its first step.
    policy and gradient in fp32          2 x 4 P    6.2 GB   in bf16 a step of 1e-5 on a weight of .02 is lost
    AdamW's two moments in fp32          2 x 4 P    6.2 GB
    autocast's bf16 copy of the policy       2 P    1.6 GB
    reference, matrices in bf16              2 P    1.6 GB
    rewards in fp16, tokenizer in fp32              3.1 GB   HPSv2.1 and the held-out CLIPScore
    the largest of sampling (keys and values), update (activations, logits) and decoding: 2 to 3 GB
"""
import os
import random
from dataclasses import dataclass

import torch

import reward
from common import images, parallel
from common.config import UserError, locate, option
from common.device import freeze
from full import clip, data, janus, llamagen, lpips, prompts, sd3, weights

PIPELINES = {"llamagen": llamagen.Pipeline, "janus": janus.Pipeline,
             "sd3": sd3.Pipeline, "sana": sd3.SanaPipeline}
COMPARED = 8                        # images that LPIPS compares at once


@dataclass(frozen=True)
class Options:
    """---- full size: files in the folder `weights`, fetched if they are not there"""
    weights: str = option("weights", "the folder", ending="")
    gpt_ckpt: str = option("t2i_XL_stage1_256.pt", "policy, or a folder with all models", ending="")
    vq_ckpt: str = option("vq_ds16_t2i.pt", "tokenizer of the images", ending="")
    t5: str = option("flan-t5-xl", "encoder of the prompts", ending="")
    n_head: int = option(0, "attention heads of gpt_ckpt; 0 = by the table of released sizes", low=0)
    block_size: int = option(0, "image tokens; 0 = by the name of gpt_ckpt, or 512 pixels", low=0)
    prompts: str = option("assets/prompts.txt", ".txt, .json, .jsonl, .csv or .tsv", ending="")
    antialias = True            # was an option: of HPS's resize to 224 pixels
    lora_rank: int = option(0, "above 0: train adapters of this rank, not the weights (lora.py)", low=0)

    def check(cfg):
        reward.check(cfg, clip.FILES)
        if not measured_by(cfg):
            raise UserError(f"--reward or --heldout_reward must name one of {', '.join(clip.FILES)}: "
                            f"diversity is measured in its image features")
        if cfg.shard and cfg.lora_rank:
            raise UserError("--shard splits weights that --lora_rank shares between policy and reference: "
                            "use one of them")


@dataclass(frozen=True)
class ImageOptions:
    """---- images"""
    data: str = option("", "a folder of images, or a list of them (full/data.py)")


def measured_by(o):
    """Return the learned rewards of a run, held-out ones first. Features of the first measure diversity."""
    return [name for spec in (o.heldout_reward, o.reward) for name in reward.parse(spec, clip.FILES)
            if name in clip.FILES]


class World:
    """Prompts and rewards. held_back, pool: prompts of evaluations, and to train on. found: {name: path}."""
    columns = []

    def __init__(self, o, found, device, held_back, pool):
        self.held_back, self.pool, self.images = held_back, pool, None
        learned = measured_by(o)
        # As in the code of HPS, rewards run in fp16 on a GPU.
        dtype = (torch.float16 if device.type == "cuda" else
                 torch.bfloat16 if o.dtype == "bfloat16" else torch.float32)
        models = {n: clip.Reward(n, {k: found[f] for k, f in clip.FILES[n].items()}, device, dtype)
                  for n in sorted(set(learned))}
        self.reward = reward.weighted(o.reward, models | reward.REWARDS)
        self.heldout = reward.weighted(o.heldout_reward, models | reward.REWARDS)
        self.embed = models[learned[0]].embed_images

    def draw(self, n):
        return [random.choice(self.pool) for _ in range(n)]

    def fixed_prompts(self, n):
        if n > len(self.held_back):
            raise UserError(f"--eval_prompts must be at most {len(self.held_back)}, the number of prompts "
                            f"that are never trained on, got {n}")
        return self.held_back[:n]

    def measure(self, prompts, pixels, rewards, base, sample):
        return {}

    def picture(self, path, prompts, columns, shown=4):
        """Write a grid: a row for each of the first eight prompts, and in it the images of each column."""
        draws = len(columns[0][1]) // len(prompts)
        rows = [(prompt, [pixels[i * draws:i * draws + min(shown, draws)] for _, pixels in columns], None)
                for i, prompt in enumerate(prompts[:8])]
        images.grid(rows, path, [heading for heading, _ in columns])


class Images:
    """Images of a disk. listed: a data.Pictures. side: their height and width in pixels. measure: LPIPS."""

    def __init__(self, listed, side, measure, device):
        self.listed, self.side, self.measure, self.device = listed, side, measure, device

    def draw(self, n):
        return [(caption, file) for caption, file, _ in random.sample(self.listed.training, n)]

    def load(self, paths):
        return torch.stack([data.load(path, self.side) for path in paths]).to(self.device)

    def fixed_images(self):
        """Return (captions, images), on which no run trains."""
        captions, paths, _ = zip(*self.listed.held_back)
        return list(captions), self.load(paths)

    def perceptual(self, images, originals):
        pieces = images.split(COMPARED)
        others = [originals] * len(pieces) if len(originals) == 1 else originals.split(COMPARED)
        return torch.cat([self.measure(*pair) for pair in zip(pieces, others)])


def split_prompts(o, listed=None):
    """(prompts of evaluations, each once; prompts to train on). Raises UserError if there are too few."""
    if listed:
        seen = list(dict.fromkeys(caption for caption, *_ in listed.held_back))
        if len(seen) < o.eval_prompts:
            raise UserError(f"--eval_prompts must be at most {len(seen)}, the number of captions of the "
                            f"{len(listed.held_back)} held-back images of {o.data}, got {o.eval_prompts}")
        return seen, [caption for caption, *_ in listed.training]
    found = list(dict.fromkeys(prompts.read(locate(o.prompts))))
    if len(found) <= o.eval_prompts:
        raise UserError(f"--eval_prompts must be below {len(found)}, the number of prompts in {o.prompts}, "
                        f"got {o.eval_prompts}: none would be left to train on")
    random.Random(1234).shuffle(found)
    return found[:o.eval_prompts], found[o.eval_prompts:]


def open_world(o, device, with_images=False):
    """(World, Pipeline) of the options above. Raises UserError that names every file that is missing."""
    classes, kind = os.path.basename(o.gpt_ckpt).startswith("c2i_"), PIPELINES[o.world]
    if classes and not with_images:
        raise UserError(f"{o.gpt_ckpt} reads classes, not the prompts of {o.prompts}: it can be trained with "
                        f"--algorithm=vapi, where images have classes")
    listed = data.Pictures(o.data, o.prompts_per_step, classes) if with_images else None
    names = [getattr(o, key) for key in kind.model_files + (() if classes else kind.text_files)]
    names += [lpips.VGG_FILE, lpips.HEADS_FILE] if with_images else []
    names += [file for name in sorted(set(measured_by(o))) for file in clip.FILES[name].values()]
    with parallel.in_turn():                        # one process downloads and encodes, then the others read
        found = weights.find(list(dict.fromkeys(names)), o.weights)
        held_back, pool = split_prompts(o, listed)
        text = (llamagen.Classes(listed.label_of) if classes else
                kind.text_encoder(o, found, device, held_back + pool))
    pipeline = kind(o, found, text, device, o.dtype)
    pipeline.made_from = found
    if classes != (pipeline.kind == "c2i"):
        raise UserError(f"{o.gpt_ckpt} is of model_type {pipeline.kind}: names of policies that read classes "
                        f"must begin with c2i_, and no other names")
    if classes and max(listed.label_of.values()) >= pipeline.policy.config.num_classes:
        raise UserError(f"{o.data} has a class {max(listed.label_of.values())}, and {o.gpt_ckpt} knows "
                        f"classes from 0 to {pipeline.policy.config.num_classes - 1}")
    world = World(o, found, device, held_back, pool)
    if with_images:
        world.columns = ["reconstruction"]
        measure = freeze(lpips.LPIPS(found[lpips.VGG_FILE], found[lpips.HEADS_FILE]).to(device))
        world.images = Images(listed, pipeline.pixels, measure, device)
    return world, pipeline
