"""The tiny world as train.py sees it: its models, captions, rewards, and what else can be measured there.

A *world* is all that a run needs besides the algorithm. train.py and evaluate.py ask for these, and for
nothing else, so llamagen.py can put real weights and real captions in its place:

    policy, reference, vqgan     the model to train, its frozen copy, the tokenizer
    rewards                      {"reward": f, "heldout_reward": f}, functions (images, captions) -> [B]
    draw(n)                      n training captions, by Python's random stream
    encode(captions)             features [P,L,C] and mask [P,L], the conditions of the policy
    autocast                     context in which policy and reference run: bfloat16, if the run wants it
    decode(tokens)               tokens [B,T] -> images [B,3,H,W]
    embed(images)                images -> unit vectors [B,d], for diversity
    fixed_prompts(n)             the captions of every evaluation
    extra(...)                   further measurements of an evaluation
    picture(path, columns)       a grid of an evaluation's pictures
and, for vapi.py alone,
    draw_pictures(n)             n training pictures (caption, what `load` takes), by Python's random stream
    load(items)                  these -> images [n,3,H,W] in [-1,1]
    held_back_pictures()         captions and images that are never trained on
    perceptual(images, originals)  a distance, of each to its own or of all to one -> [b]

Because every attribute of a tiny picture can be read exactly, this world adds to an evaluation:
  reward/single ...   rewards by category
  unseen              held-out reward on captions with a pair (shapes.HELD_OUT) that the policy has never seen
  open_entropy        nat; sum over the attributes that the caption leaves open (shapes.open_attributes) of
                      the entropy of their values. Always of 64 pictures: the plug-in estimate is biased, by
                      about (values-1)/(2*64) each, so it compares only at equal numbers. Pictures that are
                      unreadable or show too few objects do not enter; `unreadable` is their share. A prompt
                      with fewer than 64 others has no entropy
  entropy_kept        open_entropy as a share of the base's, on the prompts where both have one
and to one of a run of vapi.py, which has pictures of its own:
  reconstruction      mean reward of samples of held-back pictures (vapi.py)
  frechet, precision, recall   of the drawn pictures against as many rendered ones of the same captions, in
                      the judge's features (evaluate.py)
"""
import math
import os
import random
from collections import Counter

import torch

from common import files
import evaluate
from common import images as pictures
import reward
from tiny import shapes
from tiny import text
import vapi
from common.config import UserError, locate
from common.device import freeze
from model import GPT, GPTConfig
from tiny.judge import Judge, reader
from vqgan import VQGAN, VQConfig
import metrics

COUNTED = 64                    # readable pictures a prompt that enter open_entropy
HELD_BACK = 128                 # pictures that `reconstruction` of vapi.py looks at
UNSEEN_DRAWS = 8                # draws a prompt for captions with held-out pairs


def fixed_prompts(per_category, heldout=False):
    """The same captions whoever asks: `per_category` of each category, drawn with their own generator."""
    rng = random.Random(1234)
    pools = [shapes.captions(category, heldout) for category in shapes.CATEGORIES]
    return [c for pool in pools for c in rng.sample(pool, min(per_category, len(pool)))]


def entropy(values):
    """Plug-in entropy, in nat, of a list of hashable values."""
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


def open_entropy(scenes, caption):
    """(entropy in nat or None, unreadable): of the first 64 usable scenes of one prompt, and how many were
    not."""
    found = [shapes.open_attributes(s, caption) for s in scenes]
    usable = [f for f in found if f is not None]
    if len(usable) < COUNTED:
        return None, len(found) - len(usable)
    return sum(entropy([f[k] for f in usable[:COUNTED]]) for k in usable[0]), len(found) - len(usable)


def load_models(path, device, depth=0):
    """Policy, tokenizer, judge (fp32, eval mode) and the run's options ({} for a base), all on `device`.

    path: a base made by pretrain.py, a run's folder, or a checkpoint in one. depth: how many runs led here
    by their init_from. Raises UserError.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    if depth > 9:
        raise UserError(f"{path}: its init_from leads in a circle, never to a base")
    parts = files.load(path, device)
    if {"gpt", "vqgan", "judge"} <= set(parts):
        return (files.unpack(GPT, GPTConfig, parts["gpt"], device, path),
                files.unpack(VQGAN, VQConfig, parts["vqgan"], device, path),
                files.unpack(Judge, None, parts["judge"], device, path), {})
    try:
        begin, state = locate(parts["config"]["init_from"]), parts["model"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is no base or run of this version: it lacks gpt, vqgan and judge, or config "
                        f"and model") from None
    policy, vqgan, judge, _ = load_models(begin, device, depth + 1)
    files.load_weights(policy, state, path)
    return policy, vqgan, judge, parts["config"]


class World:
    columns = ["unseen", "open_entropy", "entropy_kept", "unreadable"]           # of `extra`, in the tables
    from_pictures = ["reconstruction", "frechet", "precision", "recall"]         # with vapi, these as well

    def __init__(self, options, device):
        """options: those of train.py; a base or a run of the tiny world is at options.init_from."""
        if options.eval_draws < COUNTED:
            raise UserError(f"eval_draws must be at least {COUNTED} in the tiny world, not "
                            f"{options.eval_draws}: fewer pictures give no open_entropy")
        path = locate(options.init_from)
        self.device = device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
        self.policy, self.vqgan, self.judge, _ = load_models(path, device)
        self.reference = load_models(path, device)[0]
        freeze(self.reference, options.dtype)
        for module in (self.vqgan, self.judge):            # used outside autocast, so never in bfloat16
            freeze(module, "float64" if options.dtype == "float64" else "float32")
        if options.dtype == "float64":
            self.policy.double()
        functions = reward.REWARDS | {"judge": self.judge, "reader": reader}
        self.rewards = {name: reward.build(reward.parse(getattr(options, name)), functions)
                        for name in ("reward", "heldout_reward")}
        self.pools = [shapes.captions(category) for category in shapes.CATEGORIES]
        self.vapi, self.wrong_captions = options.algorithm == "vapi", options.wrong_captions
        self.columns = self.columns + self.from_pictures * self.vapi

    def draw(self, n):
        return [random.choice(random.choice(self.pools)) for _ in range(n)]

    def draw_pictures(self, n):
        drawn = shapes.random_scenes(n, random)
        return [(self.draw(1)[0] if random.random() < self.wrong_captions else caption.text, scene)
                for caption, scene in drawn]

    def load(self, scenes):
        return shapes.render(scenes).to(self.device, self.policy.norm.weight.dtype)

    def held_back_pictures(self):
        captions, scenes = zip(*shapes.random_scenes(HELD_BACK, random.Random(4321)))
        return [c.text for c in captions], self.load(scenes)

    def perceptual(self, images, originals):
        return vapi.lpips_of(self.judge.activations, images, originals)

    def encode(self, captions):
        features, mask = text.encode(captions, self.device)
        return features.to(self.policy.norm.weight.dtype), mask

    def decode(self, tokens):
        return self.vqgan.decode(tokens)

    def embed(self, images):
        return self.judge.embed_images(images)

    fixed_prompts = staticmethod(fixed_prompts)

    def extra(self, policy, prompts, scores, images, base, **sampling):
        """The measurements named above. prompts: captions, each drawn equally often; scores {name: [P,n]};
        base: results of the same evaluation for the base, or None."""
        out, draws = {}, len(images) // len(prompts)
        for category in shapes.CATEGORIES:
            rows = [i for i, p in enumerate(prompts) if shapes.parse(p).category == category]
            out |= {f"{name}/{category}": s[rows].mean().item() for name, s in scores.items()}
        unseen = fixed_prompts(len(prompts) // len(shapes.CATEGORIES), heldout=True)
        _, others = evaluate.draw(self, policy, unseen, UNSEEN_DRAWS, seed=1, **sampling)
        out["unseen"] = self.rewards["heldout_reward"](
            others, [p for p in unseen for _ in range(UNSEEN_DRAWS)]).mean().item()
        scenes = shapes.read(images)
        measured = [open_entropy(scenes[i * draws:(i + 1) * draws], shapes.parse(p))
                    for i, p in enumerate(prompts)]
        per_prompt = out["open_entropy_of"] = [h for h, _ in measured]
        known = [h for h in per_prompt if h is not None]
        out["open_entropy"] = sum(known) / len(known) if known else float("nan")
        both = [(h, b) for h, b in zip(per_prompt, base["open_entropy_of"] if base else per_prompt)
                if h is not None and b is not None]
        out["entropy_kept"] = sum(h for h, _ in both) / sum(b for _, b in both) if both else float("nan")
        out["unreadable"] = sum(n for _, n in measured) / len(scenes)
        if self.vapi:
            rng = random.Random(1234)
            real = self.embed(self.load([shapes.sample_scene(shapes.parse(p), rng) for p in prompts
                                         for _ in range(draws)]))
            drawn = self.embed(images)
            out["reconstruction"] = vapi.reconstruction(self, policy, sampling["temperature"])
            out["frechet"] = metrics.frechet(real, drawn)
            out["precision"], out["recall"] = metrics.precision_recall(real, drawn)
        return out

    def picture(self, path, prompts, columns, a_row=2):
        """A grid: a row a prompt (two of each category), side by side the first pictures of each (heading,
        images); a frame is green where the reader finds what the caption says."""
        draws, shown = len(columns[0][1]) // len(prompts), max(3, 8 // len(columns))
        each, rows = len(prompts) // len(shapes.CATEGORIES), []
        for i, caption in enumerate(prompts):
            if i % each < a_row:
                groups = [images[i * draws:i * draws + shown] for _, images in columns]
                rows.append((caption, groups, [reader(g, [caption] * shown) for g in groups]))
        pictures.grid(rows, path, [heading for heading, _ in columns])
