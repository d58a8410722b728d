"""Figures of the divergences, and films of runs.

    python -m lab.figures                      the curves of the divergences, to out/divergences.png, and the
                                               check of every gradient in divergences.py
    python -m lab.figures --demo               nine policies of ten tokens that learn, to out/demo.gif
    python -m lab.figures out/run1 out/run2    samples of runs side by side while they train, to out/film.gif

A film shows how diversity changes during training. Each of its frames is an evaluation, so train the runs
with frequent evaluations, for example --eval_interval=10.
"""
import glob
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from common import config, files
from common.config import UserError, option
from common.images import LINE, PAD, pyplot
from divergences import DIVERGENCES, LOG2, STRENGTH
from lab.stats import panels

WIDEST = 1624                              # pixels: a wider film is shrunk to this width


def plot(path):
    """Save a PNG with three panels against x = log w: c(w), g(w), and the force U'(x) of the sampled forms
    (divergences.py). Each curve is multiplied by STRENGTH, so all have one slope at x = 0."""
    x = torch.linspace(-6, 2.5, 400, dtype=torch.float64)
    with panels(path, 1, 3, (14, 3.8), dpi=120) as axes:
        for name, d in DIVERGENCES.items():
            strength = STRENGTH[name]
            label = name + (f" x {strength}" if strength > 1 else "")
            for axis, y in zip(axes, (d.weight(x), d.f(x) + d.c(x), -d.weight(x) / x.exp())):
                axis.plot(x, strength * y, label=label)
        axes[0].set(title="subtracted from the advantage: c(w), sampled", ylabel="c(w)", ylim=(-8, 6))
        axes[1].set(title="g(w), unbiased and exact", ylabel="g(w)", ylim=(-8, 6))
        axes[2].set(title="force on a token sampled from the reference, $U'(x)$", ylabel="U'(x)",
                    ylim=(-6.5, 3))
        for axis in axes:
            axis.set_xlabel("x = log(reference / policy); x > 0: a suppressed token")
            axis.axhline(0, color="grey", lw=.6)
            axis.axvline(0, color="grey", lw=.6)
            axis.legend(frameon=False)


def check_gradients(vocab=50, seed=0):
    """Return {claim: largest error} for the gradients derived in divergences.py, in float64.
    pi and rho are random distributions over `vocab` codes."""
    random = torch.Generator().manual_seed(seed)
    z, logq = (torch.randn(vocab, generator=random, dtype=torch.float64) * 1.5 for _ in range(2))
    z, logq = z.requires_grad_(), logq.log_softmax(0)
    logp = z.log_softmax(0)
    pi, x = logp.detach().exp(), (logq - logp).detach()

    def grad(y):
        return torch.autograd.grad(y, z, retain_graph=True)[0]

    def js_potential(x):        # U of js: the integral of U' from 0 to x, by Simpson's rule
        nodes, weights = torch.linspace(0, 1, 2001, dtype=torch.float64), torch.full((2001,), 2 / 6000.)
        weights[1::2], weights[0], weights[-1] = 4 / 6000., 1 / 6000., 1 / 6000.
        return x * ((LOG2 - F.softplus(-x[..., None] * nodes)) / 2 @ weights.double())
    # U of each divergence. For reverse_kl, E_rho[e^-x] is the constant 1, so U = x gives the same gradient.
    potential = {"reverse_kl": lambda x: x, "forward_kl": lambda x: x * x / 2, "js": js_potential}
    out = {}
    for name, d in DIVERGENCES.items():
        # Only x = log rho - log pi enters, so take log rho = 0 and any y for log pi.
        y = torch.linspace(-15, 15, 301, dtype=torch.float64, requires_grad=True)
        auto = torch.autograd.grad(d.sampled(y, torch.zeros_like(y)).sum(), y)[0]
        out[f"{name}: c = autograd of sampled"] = ((auto - d.weight(-y)).abs() / (1 + auto.abs())).max()
        out[f"{name}: E_pi[sampled] descends E_rho[U]"] = \
            (grad((pi * d.sampled(logp, logq)).sum())
             - grad((logq.exp() * potential[name](logq - logp)).sum())).abs().max()
        out[f"{name}: E_pi[unbiased] = exact"] = \
            (grad((pi * d.unbiased(logp, logq)).sum()) - grad(d.exact(logp, logq))).abs().max()
        g = d.f(x) + d.c(x)
        out[f"{name}: dD/dz = pi (g - E_pi[g])"] = \
            (grad(d.exact(logp, logq)) - pi * (g - (pi * g).sum())).abs().max()
    return {claim: error.item() for claim, error in out.items()}


# ---- The demo: one softmax over ten tokens, a reward of 1 for token 4, the objective E_pi[r] - beta D ------
RHO = torch.tensor([.30, .22, .15, .10, .08, .06, .04, .025, .015, .01], dtype=torch.float64)
REWARD = torch.zeros(10, dtype=torch.float64).index_fill_(0, torch.tensor(4), 1.)
FORMS = [(name, estimator) for estimator in ("sampled", "unbiased", "exact") for name in DIVERGENCES]


def shaping(name, estimator, logp, logq):
    """Return what beta multiplies before it is subtracted from the reward of each token, [10]: c if sampled,
    else g. With h = r - beta c or r - beta g, the mean gradient in the logits is pi (h - E_pi[h])."""
    d, x = DIVERGENCES[name], logq - logp
    return d.c(x) if estimator == "sampled" else d.f(x) + d.c(x)


def fixed_point(name, estimator, beta, steps=5000, rate=.1):
    """Return the policy pi [10] at which the mean update is zero: all r - beta g (or r - beta c) are equal.

    Two cases have a closed form. For exact or unbiased reverse KL, pi = rho exp(r/beta) / Z. Sampled reverse
    KL descends the forward KL, so its fixed point is pi = beta rho / (l - r), where l makes pi sum to 1. We
    find all cases by natural gradient ascent, which is fast even for small pi: add r - beta g to the logits.
    """
    logq, z = RHO.log(), RHO.log()
    for _ in range(steps):
        logp = z.log_softmax(0)
        z = logp + rate * (REWARD - beta * shaping(name, estimator, logp, logq)).clamp(-5, 5)
        if (z.log_softmax(0) - logp).abs().max() < 1e-13:
            break
    return z.softmax(0)


def update(z, name, estimator, beta, batch, generator):
    """Return the gradient of the objective in the logits z [10], estimated from `batch` sampled tokens. The
    baseline is the mean over the samples. For `exact` only the reward is estimated."""
    logp = z.log_softmax(0)
    pi, penalty = logp.exp(), beta * shaping(name, estimator, logp, RHO.log())
    a = torch.multinomial(pi, batch, replacement=True, generator=generator)
    value = (REWARD if estimator == "exact" else REWARD - penalty)[a]
    of_token = torch.zeros(10, dtype=torch.float64).index_add_(0, a, value - value.mean()) / batch
    gradient = of_token - pi * of_token.sum()                              # grad log pi(a) = 1[a] - pi
    return gradient - pi * (penalty - (pi * penalty).sum()) if estimator == "exact" else gradient


def demo(path, steps=1500, frames=60, batch=16, rate=.5, strength=.25, seed=0):
    """Save a GIF of nine policies that learn, each from `batch` tokens per step and the same random numbers.
    beta is strength * STRENGTH. Bars: policy (blue), reference (black outline). Red marks: fixed points."""
    plt = pyplot()
    beta = {name: strength * STRENGTH[name] for name in DIVERGENCES}
    z = {form: RHO.log() for form in FORMS}
    generators = {form: torch.Generator().manual_seed(seed) for form in FORMS}
    figure, axes = plt.subplots(3, 3, figsize=(9, 6.5), dpi=70, sharex=True, sharey=True)
    figure.subplots_adjust(left=.06, right=.99, top=.96, bottom=.09, wspace=.04, hspace=.2)
    label, bars, images = figure.supxlabel("step 0", fontsize=10), {}, []
    for axis, (name, estimator) in zip(axes.flat, FORMS):
        bars[name, estimator] = axis.bar(range(10), RHO.tolist(), color="tab:blue", zorder=3)
        axis.bar(range(10), RHO.tolist(), fill=False, edgecolor="black", lw=.8, zorder=3)
        axis.plot(range(10), fixed_point(name, estimator, beta[name]).tolist(), "_", color="tab:red", ms=11,
                  mew=2, zorder=3)
        axis.set_title(f"{name} (beta {beta[name]:g}), {estimator}", fontsize=9)
        axis.set(yscale="log", ylim=(5e-4, 1.2))                           # rare tokens stay visible
        axis.minorticks_off()
    for step in range(steps // frames * frames + 1):
        if step % (steps // frames) == 0:
            for form in FORMS:
                for bar, height in zip(bars[form], z[form].softmax(0).tolist()):
                    bar.set_height(height)
            label.set_text(f"token (token 4 is rewarded), step {step}")
            figure.canvas.draw()
            images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB"))
        for form in FORMS:
            z[form] = z[form] + rate * update(z[form], *form, beta[form[0]], batch, generators[form])
    plt.close(figure)
    save_gif(images, path, 100)


def save_gif(frames, path, milliseconds):
    """Save a list of Pillow images as a GIF that loops. The last frame is shown four times as long."""
    # One palette for all frames makes the file half as large, and still parts of the image do not flicker.
    palette = frames[-1].quantize(64, kmeans=3)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0,
                   duration=[milliseconds] * (len(frames) - 1) + [4 * milliseconds])


def film(runs, path, milliseconds=700):
    """Save a GIF with the files samples_STEP.png of run folders side by side, at the steps that all have.
    Raises UserError where the runs share fewer than two steps."""
    steps = [{int(found[1]): name for name in glob.glob(os.path.join(glob.escape(run), "samples_*.png"))
              if (found := re.search(r"_(\d+)\.png$", name))} for run in runs]
    common = sorted(set.intersection(*map(set, steps)))
    if len(common) < 2:
        raise UserError(f"a film needs two sampled steps that all runs have, but {' '.join(runs)} share "
                        f"{len(common)}. Train the runs with the same --eval_interval.")
    frames = []
    for step in common:
        grids, x = [], 0
        for found in steps:
            with files.explain(f"{found[step]} cannot be read as an image"):
                grids.append(Image.open(found[step]).convert("RGB"))
        canvas = Image.new("RGB", (sum(g.width for g in grids), LINE + max(g.height for g in grids)), "white")
        for run, g in zip(runs, grids):
            ImageDraw.Draw(canvas).text((x + PAD, 1), run, "black", ImageFont.load_default())
            canvas.paste(g, (x, LINE))
            x += g.width
        canvas.thumbnail((WIDEST, canvas.height), Image.LANCZOS)
        frames.append(canvas)
    save_gif(frames, path, milliseconds)


@dataclass(frozen=True)
class Config:
    runs: tuple = option((), "run folders, given as bare words: make a film of them")
    demo: bool = option(False, "make the demo")


def main(argv):
    cfg, _ = config.load(Config, argv, positional="runs")
    if cfg.demo and cfg.runs:
        raise UserError(f"--demo takes no runs, got {' '.join(cfg.runs)}. Give either --demo or runs.")
    os.makedirs("out", exist_ok=True)
    if cfg.demo:
        demo("out/demo.gif")
        print("out/demo.gif: blue bars: the policy; black: the reference; red: where the mean update is zero")
    elif cfg.runs:
        film(cfg.runs, "out/film.gif")
        print(f"out/film.gif: {' | '.join(cfg.runs)}")
    else:
        plot("out/divergences.png")
        for claim, error in check_gradients().items():
            print(f"{claim:45s} largest error {error:.1e}")
        print("curves: out/divergences.png")


if __name__ == "__main__":
    config.run(main)
