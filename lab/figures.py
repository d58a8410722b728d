"""Figures of the divergences, and films of runs."""
import glob
import os
import re
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from common import config
from common.config import UserError
from common.images import LINE, PAD
from divergences import DIVERGENCES, STRENGTH, check_gradients

WIDEST = 1624                              # pixels: a film, which is shrunk to that


def plot(path):
    """Three panels against x: c(w) of sampled and g(w) of unbiased and exact, by which a token's advantage is
    lowered, and the force U'(x) of sampled on a reference token."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x = torch.linspace(-6, 2.5, 400, dtype=torch.float64)
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    for name, d in DIVERGENCES.items():
        strength = STRENGTH[name]
        label = name + (f" x {strength}" if strength > 1 else "")
        axes[0].plot(x, strength * d.weight(x), label=label)
        axes[1].plot(x, strength * (d.f(x) + d.c(x)), label=label)
        axes[2].plot(x, -strength * d.weight(x) / x.exp(), label=label)
    axes[0].set(title="taken off the advantage: c(w), sampled", ylabel="c(w)", ylim=(-8, 6))
    axes[1].set(title="g(w), unbiased and exact", ylabel="g(w)", ylim=(-8, 6))
    axes[2].set(title="force on a token of the reference, $U'(x)$, sampled", ylabel="U'(x)", ylim=(-6.5, 3))
    for axis in axes:
        axis.set_xlabel("x = log(reference / policy); right: a lost token")
        axis.axhline(0, color="grey", lw=.6)
        axis.axvline(0, color="grey", lw=.6)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ---- a policy small enough to see --------------------------------------------------------------------------
# One softmax over ten tokens, reward 1 for one of them, and the objective E_pi[r] - beta D(pi, rho).
RHO = torch.tensor([.30, .22, .15, .10, .08, .06, .04, .025, .015, .01], dtype=torch.float64)
REWARD = torch.zeros(10, dtype=torch.float64).index_fill_(0, torch.tensor(4), 1.)


def shaping(name, estimator, logp, logq):
    """What a token's reward r is lowered by, per beta: c for sampled, g for the others, so that the gradient
    in the logits is pi (r - beta c) or pi (r - beta g), less its mean."""
    d, x = DIVERGENCES[name], logq - logp
    return d.c(x) if estimator == "sampled" else d.f(x) + d.c(x)


def fixed_point(name, estimator, beta, steps=5000, rate=.1):
    """Where the mean update comes to rest: pi [10]. Every token then has the same r - beta g (or r - beta c).

    Closed forms: exact (or unbiased) reverse KL rests at rho exp(r/beta) / Z; sampled reverse KL, which
    descends the forward KL, at beta rho / (l - r), with l such that it sums to 1. The rest is found by
    following that in the logits, which is the natural gradient: fast where pi is small, too.
    """
    logq, z = RHO.log(), RHO.log()
    for _ in range(steps):
        logp = z.log_softmax(0)
        z = logp + rate * (REWARD - beta * shaping(name, estimator, logp, logq)).clamp(-5, 5)
        if (z.log_softmax(0) - logp).abs().max() < 1e-13:
            break
    return z.softmax(0)


def demo(path, steps=1500, frames=60, batch=16, rate=.5, strength=.25, seed=0):
    """A GIF of nine policies that learn from the same seeds, `batch` sampled tokens a step; beta = strength
    times STRENGTH. Bars: the policy; black lines: the reference; red marks: the fixed points."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter
    cells = [(name, estimator) for estimator in ("sampled", "unbiased", "exact") for name in DIVERGENCES]
    beta = {name: strength * STRENGTH[name] for name in DIVERGENCES}
    logq = RHO.log()
    z = {cell: logq.clone() for cell in cells}
    g = {cell: torch.Generator().manual_seed(seed) for cell in cells}

    def advance():
        for name, estimator in cells:
            cell = name, estimator
            logp = z[cell].log_softmax(0)
            pi, shape = logp.exp(), beta[name] * shaping(name, estimator, logp, logq)
            a = torch.multinomial(pi, batch, replacement=True, generator=g[cell])
            # the policy gradient from samples, with their mean as a baseline; grad log pi(a) = 1[a] - pi
            value = (REWARD if estimator == "exact" else REWARD - shape)[a]
            share = torch.zeros(10, dtype=torch.float64).index_add_(0, a, value - value.mean()) / batch
            step = share - pi * share.sum()
            if estimator == "exact":
                step = step - pi * (shape - (pi * shape).sum())
            z[cell] = z[cell] + rate * step

    figure, axes = plt.subplots(3, 3, figsize=(9, 6.5), sharex=True, sharey=True, layout="constrained")
    bars = {}
    for axis, (name, estimator) in zip(axes.flat, cells):
        bars[name, estimator] = axis.bar(range(10), RHO.tolist(), color="tab:blue")
        axis.bar(range(10), RHO.tolist(), fill=False, edgecolor="black", lw=.8)
        rest = fixed_point(name, estimator, beta[name]).tolist()
        axis.plot(range(10), rest, "_", color="tab:red", ms=11, mew=2)
        axis.set_title(f"{name} (beta {beta[name]:g}), {estimator}", fontsize=9)
        axis.set(yscale="log", ylim=(5e-4, 1.2))                           # rare tokens are the point
    axes[2, 1].set_xlabel("step 0")
    figure.canvas.draw()
    figure.set_layout_engine("none")                       # laid out once, not again for every frame

    def frame(i):
        for _ in range(steps // frames if i else 0):
            advance()
        for cell, drawn in bars.items():
            for bar, height in zip(drawn, z[cell].softmax(0).tolist()):
                bar.set_height(height)
        axes[2, 1].set_xlabel(f"token (number 4 is rewarded), step {i * (steps // frames)}")
    film = FuncAnimation(figure, frame, frames=frames + 1, init_func=lambda: None)
    film.save(path, PillowWriter(fps=10), dpi=70)
    plt.close(figure)


def film(runs, path, milliseconds=700):
    """Run folders -> a GIF of their samples_STEP.png side by side, at the steps that all of them have."""
    steps = [{int(found[1]): name for name in glob.glob(os.path.join(glob.escape(run), "samples_*.png"))
              if (found := re.search(r"_(\d+)\.png$", name))} for run in runs]
    common = sorted(set.intersection(*map(set, steps)))
    if len(common) < 2:
        raise UserError(f"a film needs two sampled steps that all runs have, these have {len(common)}: "
                        f"{' '.join(runs)}")
    frames = []
    for step in common:
        grids = [Image.open(found[step]) for found in steps]
        canvas = Image.new("RGB", (sum(g.width for g in grids), LINE + max(g.height for g in grids)), "white")
        for i, (run, g) in enumerate(zip(runs, grids)):
            x = sum(other.width for other in grids[:i])
            ImageDraw.Draw(canvas).text((x + PAD, 1), run, "black", ImageFont.load_default())
            canvas.paste(g, (x, LINE))
        canvas.thumbnail((WIDEST, canvas.height), Image.LANCZOS)
        frames.append(canvas)
    # One palette for all frames: the file is half as large, and what stands still does not flicker.
    palette = frames[-1].quantize(64, kmeans=3)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[milliseconds] * (len(frames) - 1) + [4 * milliseconds])


@dataclass(frozen=True)
class Config:
    runs: tuple = ()                   # run folders, given as bare words
    out: str = "out/film.gif"          # where the film goes


def check(cfg):
    if not cfg.runs:
        raise UserError("name at least one run: python pictures.py out/tiny_none out/tiny_js")
    config.named(cfg, out=".gif")


def main(argv):
    cfg, _ = config.load(Config, argv, positional="runs")
    check(cfg)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    film(cfg.runs, cfg.out)
    print(f"{cfg.out}: {' | '.join(cfg.runs)}")


if __name__ == "__main__":
    config.run(main)

def divergences_main():
    import os
    import sys
    os.makedirs("out", exist_ok=True)
    if sys.argv[1:] == ["--demo"]:
        demo("out/demo.gif")
        print("out/demo.gif: bars: the policy; black: the reference; red: where the mean update rests")
    elif sys.argv[1:]:
        print("error: divergences.py takes --demo or nothing", file=sys.stderr)
        raise SystemExit(2)
    else:
        plot("out/divergences.png")
        for claim, difference in check_gradients().items():
            print(f"{claim:45s} largest difference {difference:.1e}")
        print("curves: out/divergences.png")
