"""What limits a short run: three figures about noise, drift, and what a nat of KL buys.

    python -m lab.diagnosis              to results/diagnosis.png and .md, about 15 minutes; trains five runs
    python -m lab.diagnosis --seeds=0    the figures that need no runs, 3 minutes

left    The cosine between the gradients of two independent batches of the base, against the images in a
        batch. Both gradients are the true gradient plus noise, so a cosine of .1 means that about 90 % of the
        squared length of a gradient is noise. Lines: GRPO, and imitation (rejection.py)
middle  Without a divergence, the backgrounds of the images collapse (docs/lesson.md). Bars: the mean
        advantage that the judge gives to the base's correct images of each background. Dots: the share of
        each background after 120 steps without a divergence, one dot for each seed. If one background wins
        in every seed, and had the largest advantage, the reward chose it. If seeds differ, it is drift
right   The reader reward gained, against the KL to the base: all cells of frontier.csv, the arms of
        baselines.csv, and best-of-8 of the base, whose KL is log 8 - 7/8 nat
"""
import math
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import trange

import evaluate
import grpo
import rejection
from common import config, device, files
from common.config import Fault, locate, option
from lab import baselines, frontier, stats, sweep
from tiny import shapes

BATCHES, G = 64, 8                 # batches of 8 prompts x 8 images
STEPS = 120


@dataclass(frozen=True)
class Config:
    seeds: int = option(5, "runs without a divergence; 0 = none", low=0)
    out: str = option("results", "folder of the figure and the report", ending="")
    runs: str = option("out/diagnosis", "folder of the runs", ending="")


def opened(argv):
    """Return (world, pipeline) of a run with these options, on the CPU."""
    cfg, _ = config.load(evaluate.options, [*argv, "--device=cpu"])
    return evaluate.open_world(cfg, torch.device("cpu"))


# ---- left: noise -------------------------------------------------------------------------------------------
def gradients(world, pipeline, batches):
    """Return {method: gradients [batches,number of parameters]} of independent batches of the base."""
    found, params = {"GRPO": [], "imitation": []}, list(pipeline.policy.parameters())
    random.seed(0)                                                       # of the prompts
    for i in trange(batches, desc="gradients", dynamic_ncols=True, leave=False):
        generator = torch.Generator().manual_seed(i)
        prompts = world.draw(G)
        conditions, of = pipeline.encode(prompts), torch.arange(G).repeat_interleave(G)
        rollout = pipeline.policy.rollout(conditions, of, generator=generator)
        rewards = world.reward(pipeline.decode(rollout.actions), [prompts[j] for j in of])
        pi = pipeline.policy.distribution(rollout, conditions, torch.arange(len(of)))
        logp = pi.log_prob(rollout.actions)
        adv, _ = grpo.advantages(rewards, G)
        _, weights = rejection.imitated(rewards.view(-1, G), rejection.Options.tau)
        losses = {"GRPO": -(adv[:, None] * logp).mean(),
                  "imitation": rejection.imitation_loss(logp.view(G, G, -1), weights).mean()}
        for name, loss in losses.items():
            parts = torch.autograd.grad(loss, params, retain_graph=name == "GRPO")
            found[name].append(torch.cat([g.flatten() for g in parts]))
    return {name: torch.stack(some) for name, some in found.items()}


def cosines(found):
    """Return {m: cosines} of mean gradients of disjoint sets of m batches. found [batches,parameters]."""
    out, m = {}, 1
    while 2 * m <= len(found):
        means = found[:len(found) // m * m].unflatten(0, (-1, m)).mean(1)
        out[m] = [torch.cosine_similarity(a, b, 0).item() for a, b in zip(means[::2], means[1::2])]
        m *= 2
    return out


# ---- middle: drift or reward -------------------------------------------------------------------------------
def advantages_by_background(world, pipeline, draws=96):
    """Return {background: mean advantage of the base's correct images}, over the fixed prompts."""
    prompts = world.fixed_prompts(3)
    _, images = evaluate.sample(pipeline, pipeline.policy, prompts, draws)
    asked = [p for p in prompts for _ in range(draws)]
    adv, _ = grpo.advantages(world.reward(images, asked), G)
    right, scenes = world.heldout(images, asked) > .5, shapes.read(images)
    return {b: np.mean([adv[i].item() for i, s in enumerate(scenes) if right[i] and s.background == b])
            for b in shapes.BACKGROUNDS}


def shares_after(folder, seed, draws=32):
    """Train a run without a divergence, unless it is there -> {background: share in its images}."""
    path = os.path.join(folder, f"none_{seed}")
    there = os.path.exists(os.path.join(path, "ckpt.pt"))
    if not there or files.load(os.path.join(path, "ckpt.pt"))["step"] < STEPS:
        command = [sys.executable, locate("train.py"), "configs/tiny_none.py", f"--seed={seed}",
                   "--device=cpu", f"--out_dir={path}", f"--max_steps={STEPS}", *["--resume"] * there]
        if subprocess.run(command).returncode:
            raise Fault(f"the run {path} failed: its error is above")
    world, pipeline = opened([f"--init_from={path}"])
    _, images = evaluate.sample(pipeline, pipeline.policy, world.fixed_prompts(3), draws)
    seen = Counter(s.background for s in shapes.read(images) if s.readable)
    return {b: seen[b] / sum(seen.values()) for b in shapes.BACKGROUNDS}


# ---- right: what a nat buys --------------------------------------------------------------------------------
def bought():
    """Return {kind: (KLs [n], reader rewards gained [n])} of n cells or arms, means over their seeds."""
    cells = frontier.groups(frontier.load(locate("results/frontier.csv"))).items()
    found = [(f"GRPO, {divergence}", rows) for (divergence, *_), rows in cells]
    path = locate("results/baselines.csv")
    if os.path.exists(path):
        rows = sweep.load(path, baselines.FIELDS, baselines.NUMBERS, 2)
        found += [(arm.rstrip(" .0123456789"), [r for r in rows if r["arm"] == arm])
                  for arm in dict.fromkeys(r["arm"] for r in rows)]
    out = {}
    for kind, rows in found:
        out.setdefault(kind, []).append([np.mean([r["kl_reverse"] for r in rows]),
                                         np.mean([frontier.gain(r, "heldout_reward") for r in rows])])
    return {kind: np.array(points).T for kind, points in out.items()}


def main(argv):
    cfg, _ = config.load(Config, argv)
    device.start("cpu")
    os.makedirs(cfg.out, exist_ok=True)
    world, pipeline = opened([])
    base = evaluate.evaluate(world, pipeline, pipeline.reference).results
    noise = {name: cosines(g) for name, g in gradients(world, pipeline, BATCHES).items()}
    adv = advantages_by_background(world, pipeline)
    shares = [shares_after(cfg.runs, seed) for seed in range(cfg.seeds)]
    with stats.panels(os.path.join(cfg.out, "diagnosis.png"), 1, 3, (15, 4.6)) as axes:
        for name, found in noise.items():
            axes[0].errorbar([m * G * G for m in found], [np.mean(c) for c in found.values()],
                             [np.std(c) / len(c) ** .5 for c in found.values()], fmt="o-", label=name)
        axes[0].set(xscale="log", xlabel="images in a batch", ylabel="cosine of two batches' gradients")
        axes[0].legend(frameon=False)
        axes[1].bar(list(adv), list(adv.values()), color=".8", label="advantage of the base's correct images")
        for i, share in enumerate(shares):
            axes[1].plot([j + .1 * (i - 2) for j in range(len(share))], list(share.values()), "o",
                         label=f"share after {STEPS} steps, seed {i}")
        axes[1].legend(frameon=False, fontsize=8)
        for kind, (x, y) in bought().items():
            axes[2].plot(x, y, "." if kind.startswith("GRPO") else "s", label=kind)
        axes[2].plot(math.log(8) - 7 / 8, base["best_of_n_heldout_reward"] - base["heldout_reward"], "k*",
                     ms=12, label="best of 8 of the base")
        axes[2].set(xscale="log", xlabel="KL to the base, nat per image", ylabel="reader reward gained")
        axes[2].legend(frameon=False, fontsize=7)
    lines = [[name, *(f"{np.mean(c):.3f}" for c in found.values())] for name, found in noise.items()]
    places = [["advantage of correct images", *(f"{adv[b]:+.3f}" for b in adv)]]
    places += [[f"share after {STEPS} steps, seed {i}", *(f"{share[b]:.2f}" for b in adv)]
               for i, share in enumerate(shares)]
    sizes = [f"{m * G * G} images" for m in noise["GRPO"]]
    stats.publish(f"# What limits a short run\n\nMade by `python -m lab.diagnosis`, whose docstring explains "
                  f"the figure.\n\n![three panels](diagnosis.png)\n\nCosine between the gradients of two "
                  f"batches at the base:\n\n{stats.table(['', *sizes], lines)}\n\nBackgrounds:\n\n"
                  f"{stats.table(['', *adv], places)}\n", os.path.join(cfg.out, "diagnosis.md"))


if __name__ == "__main__":
    config.run(main)
