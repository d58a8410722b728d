"""Images of a flow policy: when an image takes shape, and how the ratios spread after one update.

    python -m lab.trajectory                           the base, to out/trajectory.png and out/ratios.png
    python -m lab.trajectory --ckpt=out/tiny_flow      a run
    python -m lab.trajectory --pairs=10 --out=results  are gradients of chunks smoother? to gradients.md

trajectory.png  above: the estimate x0(x) of the image at each step, from noise to the image. Below: by how
                much a wrong prompt makes this estimate worse, against t. Where the curve is high, the prompt
                decides what the image shows
ratios.png      of one rollout, after one update by the policy gradient alone. Left: for each noisy step the
                standard deviation of its noise, the norm of its gradient, and the spread of its log-ratios,
                each as a share of the largest. Dashed lines separate the chunks. Right: a histogram of the
                ratios of each step, and the clip
gradients.md    the cosine between the gradients of two batches of 64 images. The larger it is, the less noise
                is in a gradient. "first update": all ratios are 1. "later": after one update on a third
                batch, with the clip. Chunk-GRPO (arXiv 2510.21583) says that chunks make gradients smoother
"""
import copy
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import trange

import grpo
from common import config, device
from common.config import option
from common.folder import checkpoint_of
from common.images import to_pil
from lab.stats import panels, publish, say, spread, table
from tiny import shapes
from tiny.world import fixed_prompts, open_flow

PROMPTS = ("a red circle", "three blue squares", "a green cross above a yellow triangle")
CHUNKS, CLIP, SAMPLES, LEARNING_RATE = (1, 2, 2), .0256, 64, 2e-4


@dataclass(frozen=True)
class Config:
    ckpt: str = option("assets/tiny_flow_base.pt", "a flow base, or a run", ending="")
    out: str = option("out", "folder of the two images", ending="")
    seed: int = option(0, "of the samples", low=0)
    pairs: int = option(0, "above 0: only gradients.md, from this many pairs of batches", low=0)


@torch.no_grad()
def estimates(pipeline, prompts, seed):
    """Return the estimates of the image on the way of the ODE, as images [prompts,steps,3,H,W], and times."""
    policy, conditions = pipeline.policy, pipeline.encode(list(prompts))
    x = torch.randn(len(prompts), *policy.shape, generator=torch.Generator().manual_seed(seed))
    out, times = [], policy.ode.tolist()
    for t, end in zip(times, times[1:]):
        v = policy.velocity(x, torch.full((len(x),), t), conditions.cond, conditions.mask)
        out.append(pipeline.decode((x - t * v)[:, None]))
        x = x + (end - t) * v
    return torch.stack(out, 1), times[:-1]


@torch.no_grad()
def prompt_gap(pipeline, times, n=500):
    """Return for each time the mean squared error of x0(x) with wrong prompts, minus that with right ones."""
    captions, scenes = zip(*shapes.random_scenes(n, random.Random(5)))
    x0 = pipeline.latents.encode(pipeline.vqgan, shapes.render(scenes))
    right = pipeline.encode([c.text for c in captions])
    eps, gaps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), []
    for t in times:
        x, errors = (1 - t) * x0 + t * eps, []
        for shift in (0, 7):                               # 7: each image gets the caption of another one
            cond, mask = right.cond.roll(shift, 0), right.mask.roll(shift, 0)
            v = pipeline.policy.velocity(x, torch.full((n,), t), cond, mask)
            errors.append((x - t * v - x0).square().mean().item())
        gaps.append(errors[1] - errors[0])
    return gaps


def trajectory(pipeline, path, seed):
    images, times = estimates(pipeline, PROMPTS, seed)
    grid = [i / 20 for i in range(1, 21)]
    with panels(path, 2, 1, (11, 5.6), height_ratios=[5, 4]) as (above, below):
        canvas = torch.cat([torch.cat(list(row), 2) for row in images], 1)
        above.imshow(to_pil(canvas), interpolation="nearest")
        side = images.shape[-1]
        above.set_xticks([(k + .5) * side for k in range(len(times))], [f"t = {t:.2f}" for t in times])
        above.set_yticks([(r + .5) * side for r in range(len(PROMPTS))], PROMPTS)
        above.tick_params(length=0)
        below.plot(grid, prompt_gap(pipeline, grid), "o-", ms=3)
        below.invert_xaxis()
        below.set(xlabel="t: from noise (1) to the image (0)", ylim=(0, None),
                  ylabel="error added by\na wrong prompt")


def batch(pipeline, reward, seed):
    """Sample 8 images for each of 8 prompts -> (rollout, conditions, rows [64], advantages [64])."""
    prompts, rows = fixed_prompts(2)[:8], torch.arange(SAMPLES)
    conditions = pipeline.encode(prompts)
    rollout = pipeline.policy.rollout(conditions, rows // 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        rewards = reward(pipeline.decode(rollout.actions), [prompts[i // 8] for i in rows.tolist()])
    return rollout, conditions, rows, grpo.advantages(rewards, 8)[0]


def one_update(pipeline, reward, seed):
    """Return (log-ratios [b,T] after one update, norms [T] of the gradient of each step's loss)."""
    policy = pipeline.policy
    rollout, conditions, rows, adv = batch(pipeline, reward, seed)
    logp = policy.distribution(rollout, conditions, rows).log_prob(rollout.actions)
    loss, _ = grpo.policy_loss(logp, rollout.logp, adv, 1.0, per=pipeline.per)
    params, norms = list(policy.parameters()), []
    for k in range(loss.shape[1]):
        grads = torch.autograd.grad(loss[:, k].mean(), params, retain_graph=True)
        norms.append(sum(g.square().sum() for g in grads).sqrt().item())
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, betas=(.9, .95), weight_decay=0)
    optimizer.zero_grad()
    loss.mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = policy.distribution(rollout, conditions, rows).log_prob(rollout.actions)
    return (after - rollout.logp) / pipeline.per, norms


def cosines(pipeline, reward, pairs, seed):
    """Return {(kind of ratio, "first update" or "later"): cosines between gradients of pairs of batches}."""
    kinds = {"step": ((), True), "step, weighted": (CHUNKS, False), "chunk": (CHUNKS, True),
             "sample": ((sum(CHUNKS),), True)}
    policy, clip, out = pipeline.policy, CLIP / pipeline.per ** .5, {}
    params, base = list(policy.parameters()), copy.deepcopy(policy.state_dict())

    def gradient(some, kind):
        rollout, conditions, rows, adv = some
        logp = policy.distribution(rollout, conditions, rows).log_prob(rollout.actions)
        chunks, shared = kinds[kind]
        loss, _ = grpo.policy_loss(logp, rollout.logp, adv, clip, chunks, per=pipeline.per, shared=shared)
        return torch.autograd.grad(loss.mean(), params)
    for pair in trange(pairs, desc="pairs of batches", dynamic_ncols=True):
        policy.load_state_dict(base)
        one, other, third = (batch(pipeline, reward, 1000 * seed + 3 * pair + i) for i in range(3))
        for when in ("first update", "later"):
            if when == "later":
                optimizer = torch.optim.AdamW(params, LEARNING_RATE, betas=(.9, .95), weight_decay=0)
                for p, g in zip(params, gradient(third, "step")):
                    p.grad = g
                optimizer.step()
            for kind in kinds:
                both = [torch.cat([g.flatten() for g in gradient(some, kind)]) for some in (one, other)]
                out.setdefault((kind, when), []).append(torch.cosine_similarity(*both, 0).item())
    return out


def ratios(pipeline, reward, path, seed):
    log_ratio, norms = one_update(pipeline, reward, seed)
    std = pipeline.policy.trained[2]
    T, clip = len(std), CLIP / pipeline.per ** .5
    with panels(path, 1, 2, (12, 4.2)) as (left, right):
        for i, (name, values) in enumerate((("noise", std), ("gradient", torch.tensor(norms)),
                                            ("spread of log-ratios", log_ratio.std(0)))):
            left.bar([k + .27 * (i - 1) for k in range(T)], values / values.max(), .25, label=name)
        for edge in torch.tensor(CHUNKS).cumsum(0)[:-1].tolist():
            left.axvline(edge - .5, color="black", ls="--", lw=.8)
        left.set(xlabel="noisy step, from noise to image", ylabel="share of the largest")
        left.legend(frameon=False, fontsize=8)
        width = 4 * clip
        for k in range(T):
            outside = (log_ratio[:, k].exp() - 1).abs().gt(clip).float().mean().item()
            right.hist(log_ratio[:, k].exp().clamp(1 - width, 1 + width).numpy(), 30, histtype="step",
                       range=(1 - width, 1 + width), label=f"step {k}: {outside:.0%} outside the clip")
        for edge in (1 - clip, 1 + clip):
            right.axvline(edge, color="black", ls="--", lw=.8)
        right.set(xlabel="ratio per component, after one update", ylabel="samples")
        right.legend(frameon=False, fontsize=8)


def main(argv):
    cfg, _ = config.load(Config, argv)
    where = device.start("cpu")
    pipeline = open_flow(checkpoint_of(cfg.ckpt), None, where)
    os.makedirs(cfg.out, exist_ok=True)
    if cfg.pairs:
        found = cosines(pipeline, pipeline.judge, cfg.pairs, cfg.seed)
        lines = [[kind, when, spread(values), *say(np.subtract(values, found["step", when]))]
                 for (kind, when), values in found.items()]
        return publish(f"# Gradients of two batches\n\nMade by `python -m lab.trajectory --pairs={cfg.pairs} "
                       f"--out={cfg.out}`; lab/trajectory.py explains it.\n\n" + table(
                           ["ratio of", "when", "cosine, mean ± standard deviation",
                            "minus step, mean [bootstrap] [Student's]", "shown"], lines) + "\n",
                       os.path.join(cfg.out, "gradients.md"))
    trajectory(pipeline, os.path.join(cfg.out, "trajectory.png"), cfg.seed)
    ratios(pipeline, pipeline.judge, os.path.join(cfg.out, "ratios.png"), cfg.seed)
    print(f"wrote trajectory.png and ratios.png in {cfg.out}")


if __name__ == "__main__":
    config.run(main)
