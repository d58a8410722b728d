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


@dataclass(frozen=True)
class Config:
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, then mps, then cpu")
    repeats: int = option(5, "timed runs of each side, of which the median is reported", low=1)
    only: Literal["all", "sampling", "update", "vapi", "growth"] = option(
        "all", "one part; only all writes bench.md")
    out: str = option("results", "folder of bench.md and .png; on a GPU bench_cuda.md and .png", ending="")


# ---- what both sides share: models, prompts, and how an update is measured ---------------------------------
TINY = dict(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=256, block_size=64, cls_token_num=32,
            caption_dim=320)                                               # as pretrain.py makes it


def build(preset, device, dtype=torch.float32, **changes):
    """Return a GPT in eval mode. All its weights are random, so that nothing is trivially zero."""
    if preset in PRESETS:
        n_layer, n_head, dim = PRESETS[preset]
        changes = dict(n_layer=n_layer, n_head=n_head, dim=dim) | changes
    with torch.device(device):
        gpt = GPT(GPTConfig(**changes))
        torch.nn.init.normal_(gpt.output.weight, std=.02)
    return gpt.to(dtype).eval().requires_grad_(False)


def prompts(gpt, n, device, dtype, samples):
    """Return n random prompts, left-padded, 2/3 visible: cond [n,L,C], mask [n,L], prompt [n * samples]."""
    c = gpt.config
    cond = torch.randn(n, c.cls_token_num, c.caption_dim, device=device, dtype=dtype)
    mask = (torch.arange(c.cls_token_num, device=device) >= c.cls_token_num // 3).expand(n, -1)
    return cond, mask, torch.arange(n, device=device).repeat_interleave(samples)


def updates(part, device):
    """Yield the models and the random inputs of an update of n prompts x G samples, one size after another.
    Precision is as in train.py: weights are in fp32, and products in bf16 run under autocast."""
    sizes = [("tiny", torch.float32, 8, TINY), ("GPT-B", torch.float32, 1, dict(block_size=64))]
    if device.type == "cuda":
        sizes = [("GPT-B", torch.bfloat16, 4, {}), ("GPT-XL", torch.bfloat16, 4, {})]
    for name, dtype, n, changes in tqdm(sizes, desc=part, dynamic_ncols=True):
        gpt, ref, G = build(name, device, **changes).requires_grad_(True), build(name, device, **changes), 8
        freeze(ref, str(dtype)[6:])
        T, V = gpt.config.block_size, gpt.config.vocab_size
        yield SimpleNamespace(
            name=name, dtype=dtype, n=n, G=G, gpt=gpt, ref=ref, device=device,
            autocast=torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            cond=prompts(gpt, n, device, torch.float32, G), adv=torch.randn(n * G, device=device),
            tokens=torch.randint(V, (n * G, T), device=device),
            row={"model": name, "dtype": str(dtype)[6:], "images": f"{n} x {G}", "tokens": T})


def compare(s, sides, repeats):
    """Return the seconds and the peak MiB of each of `sides`. Each runs an update and returns its loss. s: of
    `updates`. Raises Fault if the losses of the first two sides, the baseline and ours, differ."""
    baseline, ours = sides[0](), sides[1]()
    if abs(baseline - ours) > 1e-4 * (1 if s.dtype == torch.float32 else 100):
        raise config.Fault(f"{s.name}: the loss is {ours}, but the baseline's is {baseline}")
    return seconds(sides, s.device, repeats), [peak_bytes(side, s.device) / MIB for side in sides]


# ---- the parts: each yields dicts, and each dict is a row of its table -------------------------------------
def sampling(device, repeats, limits):
    """All images belong to one prompt. Only tiny has 8 images for each prompt, as in training."""
    gpu, half, full = device.type == "cuda", torch.bfloat16, torch.float32
    sizes = [("GPT-B", dtype, n, 64) for n in (1, 8) for dtype in (full, half)]
    if gpu:                                # there, fp32 is only a check
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


def update(device, repeats, limits):
    """Forward and backward pass of a step's loss with its reference, without the optimizer."""
    plain = lambda model, s: (Plain(model).forward(s.tokens, *s.cond), None)                 # logits [B,T,V]
    ours = lambda model, s: (model.hidden(s.tokens, *s.cond), model.logits)                  # hidden [B,T,D]
    for s in updates("update", device):
        G, T, chunk = s.G, s.gpt.config.block_size, 0 if s.name == "tiny" else s.gpt.config.block_size // 4

        def step(form, chunk=0, recompute=False):
            """Return GRPO's loss. form: a model and s -> the arguments of Categorical."""
            s.gpt.zero_grad()
            s.gpt.recompute = recompute
            with s.autocast:
                policy = Categorical(*form(s.gpt, s))
                with torch.no_grad():
                    reference = Categorical(*form(s.ref, s))
                loss, _ = grpo.loss(policy, reference, s.tokens, logp_old, s.adv, s.tokens.numel(), beta=.04,
                                    divergence="js", logit_chunk=chunk)
            loss.backward()
            return loss.item()
        with torch.no_grad(), s.autocast:
            logp_old = Categorical(*plain(s.gpt, s)).log_prob(s.tokens)
        times, peaks = compare(s, [
            lambda: step(plain), lambda: step(ours, chunk), lambda: step(ours),
            lambda: step(ours, chunk or 16, recompute=True)], repeats)
        # 2 FLOP for each weight and row in a forward pass, 4 in a backward pass, 2 for the reference. Counted
        # are the rows that any order of computation needs, and the logits once. Attention is left out.
        inner, output = sum(p.numel() for p in s.gpt.layers.parameters()), s.gpt.output.weight.numel()
        flop = 8 * s.n * (inner * (G * (T - 1) + s.gpt.config.cls_token_num) + output * G * T)
        yield s.row | {
            "plain, s": times[0], "ours, s": times[1], "ratio": times[0] / times[1],
            "share of ceiling": flop / times[1] / limits[s.dtype], "all logits at once, s": times[2],
            "recomputing, s": times[3], "peak MiB: plain": peaks[0], "ours": peaks[1],
            "all logits at once": peaks[2], "recomputing": peaks[3]}


def shared_images(device, repeats, limits):
    """VA-pi's update of n images x G samples: one forward pass for each sample, or for each image."""
    cfg = SimpleNamespace(temperature=1.0, divergence="none", estimator="sampled", clip_eps=.2,
                          prior_weight=.1)
    for s in updates("vapi", device):
        cond, mask, prompt = s.cond
        images, logp_old = s.tokens[:s.n], torch.zeros(s.tokens.shape, device=device)

        def step(cond, mask, images, image_of):
            """Return VA-pi's loss. images [P,T]: tokens of real images. image_of [B]: that of each sample."""
            s.gpt.zero_grad()
            context = Rollout(images, None, torch.arange(len(images), device=device))
            with s.autocast:
                loss, _ = vapi.loss_of(cfg, s.gpt, s.ref, context, Conditions(cond, mask), images, image_of,
                                       s.tokens, logp_old, s.adv, s.tokens.numel())
            loss.backward()
            return loss.item()
        per_sample = cond[prompt], mask[prompt], images[prompt], torch.arange(len(prompt), device=device)
        times, peaks = compare(s, [
            lambda: step(*per_sample), lambda: step(cond, mask, images, prompt)], repeats)
        yield s.row | {
            "a forward for each sample, s": times[0], "for each image, s": times[1],
            "ratio": times[0] / times[1], "peak MiB: for each sample": peaks[0], "for each image": peaks[1]}


def growth(device, repeats):
    """Return how the time of sampling grows with T tokens, a prompt of length L, and G images of it: {title:
    (letter, xs, {side: seconds})}. All points of a panel alternate. The fastest run of each point counts,
    because other work of the machine only adds time."""
    size, out = dict(dim=256, n_layer=4, n_head=4, vocab_size=1024, caption_dim=256), {}
    if device.type == "cuda":
        size = dict(dim=768, n_layer=12, n_head=12, vocab_size=16384)
    axes = {"tokens": ("T", [25, 64, 100, 144, 196, 256]), "prompt length": ("L", [8, 60, 120, 240]),
            "images of a prompt": ("G", [1, 2, 4, 8, 16, 32])}
    for title, (letter, xs) in tqdm(axes.items(), desc="growth", dynamic_ncols=True):
        plain, ours = [], []
        for x in xs:
            at = dict(T=100, L=120, G=8) | {letter: x}
            gpt = build("", device, **size, block_size=at["T"], cls_token_num=at["L"])
            cond = prompts(gpt, 1, device, torch.float32, at["G"])
            plain.append(functools.partial(Plain(gpt).generate, *cond))
            ours.append(functools.partial(gpt.generate, *cond))
        found = seconds(plain + ours, device, 2 * repeats, pick=min)
        out[title] = letter, xs, dict(plain=found[:len(xs)], ours=found[len(xs):])
    return out


# ---- the report --------------------------------------------------------------------------------------------
def show(key, value):
    """Return the text of a value in the column `key`."""
    if isinstance(value, (str, int)):
        return value
    if key in ("share of ceiling", "same tokens"):
        return f"{value:.0%}"
    return f"{value:.2f}" if key == "ratio" else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show_growth(costs, path):
    """Write the figure of what `growth` found to `path`, and return in words what it shows."""
    with panels(path, 1, 3, (12, 3.4)) as axes:
        for axis, (title, (letter, xs, times)) in zip(axes, costs.items()):
            for name, ys in times.items():
                axis.plot(xs, ys, "o-", label=name)
            axis.set(title=f"sampling time, {title}", xlabel=letter, ylabel="seconds", ylim=0)
            axis.legend(frameon=False)
    exponent = lambda xs, ys: np.polyfit(np.log(xs), np.log(ys), 1)[0]     # k of the best fit y = a x^k
    (_, T, t), (_, L, p), (_, G, g) = costs.values()
    return (f"Our time grows as T^{exponent(T, t['ours']):.2f} with the tokens and as "
            f"G^{exponent(G, g['ours']):.2f} with the images per prompt. From L = {L[0]} to {L[-1]} it grows "
            f"{p['ours'][-1] / p['ours'][0]:.2f} times (plain: {p['plain'][-1] / p['plain'][0]:.2f} times).")


def main(argv):
    cfg, _ = config.load(Config, argv)
    device, begin = start(cfg.device), time.time()
    torch.manual_seed(0)
    os.makedirs(cfg.out, exist_ok=True)
    limits = ceilings(device)
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
            tell(f"## {title}\n\n" + table(rows[0], [[show(*item) for item in row.items()] for row in rows]))
    if cfg.only in ("all", "growth"):
        words = show_growth(growth(device, cfg.repeats), os.path.join(cfg.out, f"{name}.png"))
        tell(f"## Growth of sampling\n\n{words}\n\n![growth]({name}.png)")
    print(f"finished in {(time.time() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    config.run(main)
