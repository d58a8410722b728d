"""Benchmark: how fast is model.py, compared with a plain implementation and with the limits of the hardware?

    python -m lab.bench                     10 minutes on 2 CPU cores; writes results/bench.md and bench.png
    python -m lab.bench --only=sampling     one part, printed only; also update, vapi, growth
    python -m lab.bench --device=cuda       the full grid on a GPU; take single parts where time is short

Two sides run the same weights, alternating in this process. A figure is the median of `repeats` runs.
  ours    model.py: the prompt is read once and seen as one token, attention covers only filled positions, and
          the update makes its logits in chunks. VA-pi: one forward pass for each image
  plain   lab/plain.py: the prefix runs once per sequence, attention covers all positions through a mask, and
          the update takes log-softmax of all logits in fp32. VA-pi: one forward pass for each sample
Before a figure is printed, we check that both sides give the same losses, in fp32 the same logits, and in
fp32 on a CPU the same tokens. Elsewhere one rounding may change a token and all tokens after it.

lab/measure.py measures the ceilings in the same run. A sampling step has to read all weights and the keys and
values of earlier positions. The update has to do the arithmetic that any order of computation needs.
"""
import functools
import itertools
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import grpo
import vapi
from common import config
from common.config import option
from common.device import freeze, start
from common.interfaces import Conditions, Rollout
from divergences import Categorical
from lab.measure import MIB, ceilings, describe, least_seconds_of_a_step, peak_bytes, seconds
from lab.plain import Plain
from lab.stats import panels, table
from model import GPT, GPTConfig, PRESETS

# What we want to reach: (device, part, model, dtype, images, column, lowest value).
GOALS = [("cpu", "sampling", "GPT-B", "float32", "8", "ratio", 1.5),
         ("cpu", "sampling", "GPT-B", "float32", "8", "share of ceiling", .65),
         ("cpu", "sampling", "GPT-B", "bfloat16", "8", "share of ceiling", .40),
         ("cuda", "sampling", "GPT-XL", "bfloat16", "8", "ratio", 5.0),
         ("cuda", "sampling", "GPT-XL", "bfloat16", "8", "share of ceiling", .60),
         ("cuda", "update", "GPT-XL", "bfloat16", "4 x 8", "share of ceiling", .45)]


@dataclass(frozen=True)
class Config:
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, then mps, then cpu")
    repeats: int = option(5, "timed runs of each side, of which the median is reported", low=1)
    only: Literal["all", "sampling", "update", "vapi", "growth"] = option(
        "all", "one part; only all writes bench.md")
    out: str = option("results", "folder of bench.md and .png; on a GPU bench_cuda.md and .png", ending="")


# ---- what both sides share: models, prompts, and how an update is measured ---------------------------------
def build(preset, device, dtype=torch.float32, **changes):
    """Return a GPT in eval mode. All its weights are random, so that nothing is trivially zero."""
    if preset in PRESETS:
        n_layer, n_head, dim = PRESETS[preset]
        changes = dict(n_layer=n_layer, n_head=n_head, dim=dim) | changes
    with torch.device(device):
        gpt = GPT(GPTConfig(**changes))
        torch.nn.init.normal_(gpt.output.weight, std=.02)
    return gpt.to(dtype).eval().requires_grad_(False)


def pair(name, device, dtype, changes):
    """Return (policy, reference, autocast context) as in train.py: weights in fp32, bf16 by autocast."""
    gpt, ref = build(name, device, **changes).requires_grad_(True), build(name, device, **changes)
    freeze(ref, str(dtype)[6:])
    return gpt, ref, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prompts(gpt, n, device, dtype, samples):
    """Return n random prompts, left-padded, 2/3 visible: cond [n,L,C], mask [n,L], prompt [n * samples]."""
    c = gpt.config
    cond = torch.randn(n, c.cls_token_num, c.caption_dim, device=device, dtype=dtype)
    mask = (torch.arange(c.cls_token_num, device=device) >= c.cls_token_num // 3).expand(n, -1)
    return cond, mask, torch.arange(n, device=device).repeat_interleave(samples)


def compare(name, dtype, sides, device, repeats):
    """Return the seconds and the peak MiB of each of `sides`. Each runs an update and returns its loss.
    Raises Fault if the losses of the first two sides, the baseline and ours, differ."""
    baseline, ours = sides[0](), sides[1]()
    if abs(baseline - ours) > 1e-4 * (1 if dtype == torch.float32 else 100):
        raise config.Fault(f"{name}: the loss is {ours}, but the baseline's is {baseline}")
    return seconds(sides, device, repeats), [peak_bytes(side, device) / MIB for side in sides]


# ---- the parts: each yields dicts, and each dict is a row of its table -------------------------------------
TINY = dict(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=256, block_size=64, cls_token_num=32,
            caption_dim=320)                                               # as pretrain.py makes it


def sampling(device, repeats, limits):
    """All images belong to one prompt. Only tiny has 8 images for each prompt, as in training."""
    gpu, half, full = device.type == "cuda", torch.bfloat16, torch.float32
    # T must be a square, so XL takes 9 tokens. On a GPU, fp32 is only a check.
    sizes = [(name, dtype, n, T) for name, n, T in (("GPT-B", 1, 64), ("GPT-B", 8, 64), ("GPT-XL", 1, 9))
             for dtype in (full, half)]
    if gpu:
        sizes = [("GPT-B", full, 8, 256)]
        sizes += [(name, half, n, 256) for name in ("GPT-B", "GPT-XL") for n in (1, 8, 64)]
    grid = [("tiny", full, 64, 1.0, TINY)]
    grid += [(*size, scale, dict(block_size=T)) for *size, T in sizes for scale in (7.5, 1.0)[:1 + gpu]]
    for name, dtype, n, cfg_scale, changes in tqdm(grid, desc="sampling", dynamic_ncols=True):
        gpt = build(name, device, dtype, **changes)
        c, per_prompt, plain = gpt.config, 8 if name == "tiny" else n, Plain(gpt)
        cond, mask, prompt = prompts(gpt, n // per_prompt, device, dtype, per_prompt)

        def sample(side):
            generator = torch.Generator(device).manual_seed(0)
            return side.generate(cond, mask, prompt, cfg_scale=cfg_scale, generator=generator)
        tokens = sample(gpt)
        same = (tokens == sample(plain)).float().mean().item()
        if dtype == full:
            if same < 1 and not gpu:
                raise config.Fault(f"{name}: only {same:.0%} of the tokens agree with the plain path's")
            a, b = (f(tokens[:8], cond, mask, prompt[:8], cfg_scale=cfg_scale) for f in (gpt, plain.forward))
            if (off := (a - b).abs().max().item()) > 1e-4 * max(1, b.abs().max().item()):
                raise config.Fault(f"{name}: logits differ by up to {off:.1e} from the plain path's")
        usual, ours = seconds([lambda: sample(plain), lambda: sample(gpt)], device, repeats)
        R = n * (2 if cfg_scale > 1 else 1)
        # Step t reads the keys and values of 1 + t positions, on average T/2.
        cache = 2 * R * c.n_layer * c.dim * cond.element_size() * c.block_size / 2
        least = least_seconds_of_a_step(gpt, R, cache, limits, device, repeats)
        yield {"model": name, "dtype": str(dtype)[6:], "images": n, "CFG": f"{cfg_scale:g}",
               "tokens": c.block_size, "plain, tokens/s": n * c.block_size / usual,
               "ours, tokens/s": n * c.block_size / ours, "ratio": usual / ours,
               "share of ceiling": least * c.block_size / ours, "same tokens": same}
        gpt = plain = None                 # frees the memory before the next model is built


def update(device, repeats, limits):
    """Forward and backward pass of a step's loss with its reference, without the optimizer."""
    grid = [("tiny", torch.float32, 8, 8, 0, TINY), ("GPT-B", torch.float32, 1, 8, 16, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 4, 8, 64, {}), ("GPT-XL", torch.bfloat16, 4, 8, 64, {})]
    for name, dtype, n, G, chunk, changes in tqdm(grid, desc="update", dynamic_ncols=True):
        gpt, ref, autocast = pair(name, device, dtype, changes)
        c, cond = gpt.config, prompts(gpt, n, device, torch.float32, G)
        tokens = torch.randint(c.vocab_size, (n * G, c.block_size), device=device)
        adv = torch.randn(n * G, device=device)
        plain = lambda model: (Plain(model).forward(tokens, *cond), None)                    # logits [B,T,V]
        ours = lambda model: (model.hidden(tokens, *cond), model.logits)                     # hidden [B,T,D]

        def step(form, chunk=0, recompute=False):
            """Return GRPO's loss. form: a model -> the arguments of Categorical."""
            gpt.zero_grad()
            gpt.recompute = recompute
            with autocast:
                policy = Categorical(*form(gpt))
                with torch.no_grad():
                    reference = Categorical(*form(ref))
                loss, _ = grpo.loss(policy, reference, tokens, logp_old, adv, tokens.numel(), beta=.04,
                                    divergence="js", logit_chunk=chunk)
            loss.backward()
            return loss.item()
        with torch.no_grad(), autocast:
            logp_old = Categorical(*plain(gpt)).log_prob(tokens)
        sides = [lambda: step(plain), lambda: step(ours, chunk), lambda: step(ours),
                 lambda: step(ours, chunk or 16, recompute=True)]
        times, peaks = compare(name, dtype, sides, device, repeats)
        # 2 FLOP for each weight and row in a forward pass, 4 in a backward pass, 2 for the reference. Counted
        # are the rows that any order of computation needs, and the logits once. Attention is left out.
        inner, output = sum(p.numel() for p in gpt.layers.parameters()), gpt.output.weight.numel()
        flop = 8 * n * (inner * (G * (c.block_size - 1) + c.cls_token_num) + output * G * c.block_size)
        yield {"model": name, "dtype": str(dtype)[6:], "images": f"{n} x {G}", "tokens": c.block_size,
               "plain, s": times[0], "ours, s": times[1], "ratio": times[0] / times[1],
               "share of ceiling": flop / times[1] / limits[dtype], "all logits at once, s": times[2],
               "recomputing, s": times[3], "peak MiB: plain": peaks[0], "ours": peaks[1],
               "all logits at once": peaks[2], "recomputing": peaks[3]}
        gpt = ref = None


def shared_images(device, repeats, limits):
    """VA-pi's update of n images x G samples: one forward pass for each sample, or for each image."""
    grid = [("tiny", torch.float32, 8, 8, TINY), ("GPT-B", torch.float32, 1, 8, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 8, 8, {}), ("GPT-XL", torch.bfloat16, 4, 8, {})]
    for name, dtype, n, G, changes in tqdm(grid, desc="vapi", dynamic_ncols=True):
        gpt, ref, autocast = pair(name, device, dtype, changes)
        (cond, mask, prompt), c = prompts(gpt, n, device, torch.float32, G), gpt.config
        images, tokens = (torch.randint(c.vocab_size, (b, c.block_size), device=device) for b in (n, n * G))
        adv, logp_old = torch.randn(n * G, device=device), torch.zeros(tokens.shape, device=device)
        cfg = SimpleNamespace(temperature=1.0, divergence="none", estimator="sampled", clip_eps=.2,
                              prior_weight=.1)

        def step(cond, mask, images, image_of):
            """Return VA-pi's loss. images [P,T]: tokens of real images. image_of [B]: that of each sample."""
            gpt.zero_grad()
            context = Rollout(images, None, torch.arange(len(images), device=device))
            with autocast:
                loss, _ = vapi.loss_of(cfg, gpt, ref, context, Conditions(cond, mask), images, image_of,
                                       tokens, logp_old, adv, tokens.numel())
            loss.backward()
            return loss.item()
        per_sample = cond[prompt], mask[prompt], images[prompt], torch.arange(n * G, device=device)
        sides = [lambda: step(*per_sample), lambda: step(cond, mask, images, prompt)]
        times, peaks = compare(name, dtype, sides, device, repeats)
        yield {"model": name, "dtype": str(dtype)[6:], "images": f"{n} x {G}", "tokens": c.block_size,
               "a forward for each sample, s": times[0], "for each image, s": times[1],
               "ratio": times[0] / times[1], "peak MiB: for each sample": peaks[0],
               "for each image": peaks[1]}
        gpt = ref = None


def growth(device, repeats):
    """Return how the cost of sampling grows with T tokens, a prompt of length L, and G images of it: {title:
    (letter, xs, {side: seconds}, peak MiB, counted MiB of keys and values)}. All points of a panel alternate.
    The fastest run of each point counts, because other work of the machine only adds time."""
    size, out = dict(dim=256, n_layer=4, n_head=4, vocab_size=1024, caption_dim=256), {}
    if device.type == "cuda":
        size = dict(dim=768, n_layer=12, n_head=12, vocab_size=16384)
    axes = {"tokens": ("T", [25, 64, 100, 144, 196, 256]), "prompt length": ("L", [8, 60, 120, 240]),
            "images of a prompt": ("G", [1, 2, 4, 8, 16, 32])}
    for title, (letter, xs) in tqdm(axes.items(), desc="growth", dynamic_ncols=True):
        plain, ours, memory, counted = [], [], [], []
        for x in xs:
            at = dict(T=100, L=120, G=8) | {letter: x}
            gpt = build("", device, **size, block_size=at["T"], cls_token_num=at["L"])
            cond = prompts(gpt, 1, device, torch.float32, at["G"])
            plain.append(functools.partial(Plain(gpt).generate, *cond))
            ours.append(functools.partial(gpt.generate, *cond))
            memory.append(peak_bytes(ours[-1], device) / MIB)
            counted.append(8 * at["G"] * at["T"] * size["dim"] * size["n_layer"] / MIB)   # k, v: fp32
        found = seconds(plain + ours, device, 2 * repeats, pick=min)
        out[title] = (letter, xs, dict(plain=found[:len(xs)], ours=found[len(xs):]), memory, counted)
    return out


# ---- the report --------------------------------------------------------------------------------------------
def show(key, value):
    """Return the text of a value in the column `key`."""
    if isinstance(value, (str, int)):
        return value
    if key in ("share of ceiling", "same tokens"):
        return f"{value:.0%}"
    return f"{value:.2f}" if key == "ratio" else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goals(device, part, rows):
    """Yield a line (goal, asked, measured, reached) for each goal that these rows decide."""
    for (kind, where, *of, what, least), row in itertools.product(GOALS, rows):
        here = (kind, where) == (device.type, part) and row.get("CFG", "7.5") == "7.5"
        if here and of == [row["model"], row["dtype"], str(row["images"])]:
            yield (f"{of[0]}, {part}, {of[1]}, {of[2]} images: {what}", f"at least {show(what, least)}",
                   show(what, row[what]), "no" if row[what] < least else "yes")


def show_growth(costs, path):
    """Write the figure of what `growth` found to `path`, and return in words what it shows."""
    (_, T, t, *_), (_, L, p, *_), (_, G, g, memory, counted) = costs.values()
    with panels(path, 1, 4, (16, 3.4)) as axes:
        for axis, (title, (letter, xs, times, *_)) in zip(axes, costs.items()):
            for name, ys in times.items():
                axis.plot(xs, ys, "o-", label=name)
            axis.set(title=f"sampling time, {title}", xlabel=letter, ylabel="seconds", ylim=0)
        axes[3].plot(G, memory, "o-", label="peak, measured")
        axes[3].plot(G, counted, "--", color="grey", label="keys and values, counted")
        axes[3].set(title="memory, images of a prompt", xlabel="G", ylabel="MiB", ylim=0)
        for axis in axes:
            axis.legend(frameon=False)
    exponent = lambda xs, ys: np.polyfit(np.log(xs), np.log(ys), 1)[0]     # k of the best fit y = a x^k
    return (f"Our time grows as T^{exponent(T, t['ours']):.2f} with the tokens and as "
            f"G^{exponent(G, g['ours']):.2f} with the images per prompt. From L = {L[0]} to {L[-1]} it grows "
            f"{p['ours'][-1] / p['ours'][0]:.2f} times (plain: {p['plain'][-1] / p['plain'][0]:.2f} times). "
            f"One more image holds {(memory[-1] - memory[-2]) / (G[-1] - G[-2]):.2f} MiB, of which keys and "
            f"values are {counted[-1] / G[-1]:.2f}.")


def main(argv):
    cfg, _ = config.load(Config, argv)
    device, begin = start(cfg.device), time.time()
    torch.manual_seed(0)
    os.makedirs(cfg.out, exist_ok=True)
    limits, reached = ceilings(device, cfg.repeats), []
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    report = [f"# Speed\n\n`python -m lab.bench --device={device.type}`. lab/bench.py says what is compared, "
              f"and peaks are above weights and gradients.", describe(limits, device, cfg.repeats)]
    print(report[-1], flush=True)

    def tell(text):
        """Print a part of the report and write the file, so that a part survives if a later part fails."""
        report.append(text)
        print(text, flush=True)
        if cfg.only == "all":
            with open(os.path.join(cfg.out, f"{name}.md"), "w", encoding="utf-8") as file:
                file.write("\n\n".join(report) + "\n")
    for part, title, rows_of in (("sampling", "Sampling", sampling), ("update", "Update", update),
                                 ("vapi", "The update of VA-pi", shared_images)):
        if cfg.only in ("all", part):
            rows = list(rows_of(device, cfg.repeats, limits))
            reached += goals(device, part, rows)
            tell(f"## {title}\n\n" + table(rows[0], [[show(*item) for item in row.items()] for row in rows]))
    if cfg.only in ("all", "growth"):
        words = show_growth(growth(device, cfg.repeats), os.path.join(cfg.out, f"{name}.png"))
        tell(f"## Growth of sampling\n\n{words}\n\n![growth]({name}.png)")
    if reached:
        tell("## Goals\n\n" + table(["goal", "asked", "measured", "reached"], reached)
             + "\n\nGoals on a GPU: `python -m lab.bench --device=cuda`." * (device.type != "cuda"))
    print(f"finished in {(time.time() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    config.run(main)
