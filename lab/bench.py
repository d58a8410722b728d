"""How fast is it, against the usual way of doing the same and against what the hardware allows?

    python bench.py                     about 10 minutes on 2 CPU cores; writes results/bench.md and bench.png
    python bench.py --only=sampling     or update, vapi, growth: that part alone, printed
    python bench.py --device=cuda       the full grid on a GPU; where a command's time is short, part by part

Both sides run in this process, alternate, have the same weights, the same allocator and the same number of
threads; a figure is the median of `repeats` runs after one that is thrown away. The two sides:
  ours    model.py: the caption read once a prompt and seen as one token, attention over filled positions,
          the update's logits by chunks
  plain   plain.py: the prefix once per sequence, attention over all positions through a mask with the math
          kernel; in the update, log-softmax of all logits in fp32 for policy and reference
  VA-pi   (vapi.py) a forward pass for each sample, as in its public code, and one for each picture
Given the same random stream both draw the same tokens (in fp32 on a CPU; elsewhere logits are compared, as
one rounding may turn a token and all behind it), and their losses agree: this is checked before a number is
printed.

What the hardware allows is measured here and now (measure.py). The ceiling of sampling: on a CPU the model's
own matrices times as many rows as a step has, plus the bytes of keys and values that it has to read; on a GPU
all weights and these bytes at the speed of a large copy. That of the update: the arithmetic that any order of
computation needs, at the speed of a large matrix product.
"""
import dataclasses
import functools
import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from common import config
import vapi
from grpo import chunked_loss, grpo_loss
from lab.measure import MIB, ceilings, describe, least_seconds_of_a_step, peak_bytes, seconds
from model import GPT, GPTConfig, PRESETS
from lab.plain import Plain
from lab.stats import table
from common.device import freeze
from common.device import pick_device

# What we want to reach: (device, part, model, dtype, pictures or prompts x G, what, at least).
GOALS = [("cpu", "sampling", "GPT-B", "float32", "8", "ratio", 1.5),
         ("cpu", "sampling", "GPT-B", "float32", "8", "share", .65),
         ("cpu", "sampling", "GPT-B", "bfloat16", "8", "share", .40),
         ("cuda", "sampling", "GPT-XL", "bfloat16", "8", "ratio", 5),
         ("cuda", "sampling", "GPT-XL", "bfloat16", "8", "share", .60),
         ("cuda", "update", "GPT-XL", "bfloat16", "4 x 8", "share", .45)]


@dataclass(frozen=True)
class Config:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    repeats: int = 5                   # timed runs of each side; the median counts
    only: Literal["all", "sampling", "update", "vapi", "growth"] = "all"  # one part; all writes bench.md
    out: str = "results"               # folder of bench.md and bench.png, on a GPU bench_cuda.md and .png


# ---- models and prompts -----------------------------------------------------------------------------------
def build(preset, device, dtype=torch.float32, **changes):
    """A GPT with random weights (every tensor, so that nothing is trivially zero), eval mode."""
    if preset in PRESETS:
        n_layer, n_head, dim = PRESETS[preset]
        changes = dict(n_layer=n_layer, n_head=n_head, dim=dim) | changes
    with torch.device(device):
        gpt = GPT(GPTConfig(**changes))
        torch.nn.init.normal_(gpt.output.weight, std=.02)
    return gpt.to(dtype).eval().requires_grad_(False)


def prompts(gpt, n, device, dtype, samples):
    """n random prompts, left-padded, 2/3 visible, and the prompt of each of n * samples sequences."""
    c = gpt.config
    cond = torch.randn(n, c.cls_token_num, c.caption_dim, device=device, dtype=dtype)
    mask = (torch.arange(c.cls_token_num, device=device) >= c.cls_token_num // 3).expand(n, -1)
    return cond, mask, torch.arange(n, device=device).repeat_interleave(samples)


# ---- the parts: each yields dicts, a row of its table each -----------------------------------------------
TINY = dict(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=256, block_size=64, cls_token_num=32,
            caption_dim=320)                                               # as pretrain.py makes it


def sampling(device, repeats, limits):
    """All pictures are of one prompt, except tiny, with 8 a prompt as in training."""
    gpu, half, full = device.type == "cuda", torch.bfloat16, torch.float32
    # T is a square: 9 tokens of XL, where 8 would do. On a GPU fp32 is a check only.
    sizes = [(name, d, n, T) for name, n, T in (("GPT-B", 1, 64), ("GPT-B", 8, 64), ("GPT-XL", 1, 9))
             for d in (full, half)]
    if gpu:
        sizes = [("GPT-B", full, 8, 256)] + [(name, half, n, 256) for name in ("GPT-B", "GPT-XL")
                                             for n in (1, 8, 64)]
    grid = [("tiny", full, 64, 1.0, TINY)]
    grid += [(name, d, n, scale, dict(block_size=T)) for name, d, n, T in sizes
             for scale in ((7.5, 1.0) if gpu else (7.5,))]
    for name, dtype, n, cfg_scale, changes in tqdm(grid, desc="sampling", ncols=110):
        gpt = build(name, device, dtype, **changes)
        c, per_prompt, plain = gpt.config, 8 if name == "tiny" else n, Plain(gpt)
        cond = prompts(gpt, n // per_prompt, device, dtype, per_prompt)

        def draw(side):
            stream = torch.Generator(device).manual_seed(0)
            return side.generate(*cond, cfg_scale=cfg_scale, generator=stream)
        tokens = draw(gpt)
        same = (tokens == draw(plain)).float().mean().item()
        # One rounding may turn one token, and then all behind it. On a CPU fp32 has never done that.
        if dtype == full and same < 1 and not gpu:
            raise config.Fault(f"{name}: only {same:.0%} of the tokens agree with the plain path's")
        if dtype == full:
            some = tokens[:8], *cond[:2], cond[2][:8]
            a, b = (f(*some, cfg_scale=cfg_scale) for f in (gpt, plain.forward))
            if (off := (a - b).abs().max().item()) > 1e-4 * max(1, b.abs().max().item()):
                raise config.Fault(f"{name}: logits are up to {off:.1e} from the plain path's")
        usual, ours = seconds([lambda: draw(plain), lambda: draw(gpt)], device, repeats)
        R = n * (2 if cfg_scale > 1 else 1)
        # keys and values that step t reads: 1 + t positions, t on average T/2
        cache = 2 * R * c.n_layer * c.dim * cond[0].element_size() * c.block_size / 2
        least = least_seconds_of_a_step(gpt, R, cache, limits, device, repeats)
        yield {"model": name, "dtype": str(dtype)[6:], "pictures": n, "CFG": f"{cfg_scale:g}",
               "tokens": c.block_size, "plain, tokens/s": n * c.block_size / usual,
               "ours, tokens/s": n * c.block_size / ours,
               "ratio": usual / ours, "share of ceiling": least * c.block_size / ours, "same tokens": same}
        del gpt, plain


def pair(name, device, dtype, changes):
    """Policy and reference as in train.py -> (policy, reference, the context they run in): weights that are
    trained are fp32, and bf16 is autocast's."""
    gpt, ref = build(name, device, **changes).requires_grad_(True), build(name, device, **changes)
    if dtype == torch.bfloat16:
        freeze(ref, "bfloat16")
    return gpt, ref, torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def update(device, repeats, limits):
    """Forward and backward of a step's loss, reference included, no optimizer."""
    grid = [("tiny", torch.float32, 8, 8, 0, TINY), ("GPT-B", torch.float32, 1, 8, 16, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 4, 8, 64, {}), ("GPT-XL", torch.bfloat16, 4, 8, 64, {})]
    for name, dtype, n, G, chunk, changes in tqdm(grid, desc="update", ncols=110):
        gpt, ref, autocast = pair(name, device, dtype, changes)
        c, cond = gpt.config, prompts(gpt, n, device, torch.float32, G)
        tokens = torch.randint(c.vocab_size, (n * G, c.block_size), device=device)
        adv = torch.randn(n * G, device=device)
        with torch.no_grad(), autocast:
            logp_old = Plain(gpt).forward(tokens, *cond).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        columns, options = (tokens, logp_old, adv, tokens.numel()), dict(beta=.04, divergence="js")

        def usual():
            gpt.zero_grad()
            with autocast:
                logits = Plain(gpt).forward(tokens, *cond)
                with torch.no_grad():
                    ref_logits = Plain(ref).forward(tokens, *cond)
                loss = grpo_loss(logits, ref_logits, *columns, **options)[0]
            loss.backward()
            return loss

        def ours(chunk=chunk, recompute=False):
            gpt.zero_grad()
            gpt.recompute = recompute
            with autocast:
                hidden = gpt.hidden(tokens, *cond)
                with torch.no_grad():
                    ref_hidden = ref.hidden(tokens, *cond)
                loss = chunked_loss((hidden, gpt.logits), (ref_hidden, ref.logits), *columns, chunk=chunk,
                                    **options)[0]
            loss.backward()
            return loss
        a, b = usual().item(), ours().item()
        if abs(a - b) > 1e-4 * (1 if dtype == torch.float32 else 100):
            raise config.Fault(f"{name}: the loss is {b}, the plain path's is {a}")
        sides = [usual, ours, lambda: ours(0), lambda: ours(chunk or 16, True)]
        times, peaks = seconds(sides, device, repeats), [peak_bytes(side, device) / MIB for side in sides]
        # Counted: 2 FLOP for each weight and row in a forward pass, 4 in a backward one, 2 for the reference;
        # the rows that any order of computation needs, and the logits' matrix once. Attention is left out.
        inner = sum(p.numel() for p in gpt.layers.parameters())
        flop = 8 * (inner * (n * G * (c.block_size - 1) + n * c.cls_token_num)
                    + gpt.output.weight.numel() * n * G * c.block_size)
        yield {"model": name, "dtype": str(dtype)[6:], "pictures": f"{n} x {G}", "tokens": c.block_size,
               "plain, s": times[0], "ours, s": times[1], "ratio": times[0] / times[1],
               "share of ceiling": flop / times[1] / limits[dtype], "all logits at once, s": times[2],
               "recomputing, s": times[3], "peak MiB: plain": peaks[0], "ours": peaks[1],
               "all logits at once": peaks[2], "recomputing": peaks[3]}
        del gpt, ref


def shared_pictures(device, repeats, limits):
    """VA-pi: the update of n pictures x G samples, by one forward pass for each picture and by one for each
    sample: the same step, with every picture told G times over."""
    grid = [("tiny", torch.float32, 8, 8, TINY), ("GPT-B", torch.float32, 1, 8, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 8, 8, {}), ("GPT-XL", torch.bfloat16, 4, 8, {})]
    for name, dtype, n, G, changes in tqdm(grid, desc="vapi", ncols=110):
        gpt, ref, autocast = pair(name, device, dtype, changes)
        (cond, mask, prompt), c = prompts(gpt, n, device, torch.float32, G), gpt.config
        z = torch.randint(c.vocab_size, (n, c.block_size), device=device)
        tokens = torch.randint(c.vocab_size, (n * G, c.block_size), device=device)
        once = vapi.Batch([], cond, mask, prompt, 0, tokens, torch.zeros(tokens.shape, device=device),
                          targets=z, context=z)
        told = dataclasses.replace(once, cond=cond[prompt], mask=mask[prompt], targets=z[prompt],
                                   context=z[prompt], prompt=torch.arange(n * G, device=device))
        world = SimpleNamespace(policy=gpt, reference=ref, autocast=autocast)
        cfg = SimpleNamespace(prompts_per_step=n, group_size=G, temperature=1.0, divergence="none", beta=0.0,
                              estimator="sampled", clip_eps=.2, prior_dropout=False, prior_weight=.1)
        adv, rows = torch.randn(n * G, device=device), torch.arange(n * G, device=device)

        def step(batch):
            gpt.zero_grad()
            loss, _ = vapi.loss_of(cfg, world, batch, rows, adv, torch.ones_like(batch.logp_old), 0.0)
            loss.backward()
            return loss.item()
        a, b = step(told), step(once)
        if abs(a - b) > 1e-4 * abs(a) * (1 if dtype == torch.float32 else 100):
            raise config.Fault(f"{name}: the loss is {b}, that of the repeated form is {a}")
        sides = [lambda: step(told), lambda: step(once)]
        times, peaks = seconds(sides, device, repeats), [peak_bytes(side, device) / MIB for side in sides]
        yield {"model": name, "dtype": str(dtype)[6:], "pictures": f"{n} x {G}", "tokens": c.block_size,
               "a forward for each sample, s": times[0], "for each picture, s": times[1],
               "ratio": times[0] / times[1], "peak MiB: for each sample": peaks[0],
               "for each picture": peaks[1]}
        del gpt, ref


def growth(device, repeats):
    """{title: (letter, xs, {side: seconds}, MiB at the peak, MiB of keys and values as counted)}: how the
    cost of sampling grows with T, L and G, on a model of middle size. All points of a panel take turns, and
    of the runs the fastest counts: what grows is the work, and all else that a machine does adds to it."""
    size = dict(dim=256, n_layer=4, n_head=4, vocab_size=1024, caption_dim=256)
    if device.type == "cuda":
        size = dict(dim=768, n_layer=12, n_head=12, vocab_size=16384)
    base = dict(T=100, L=120, G=8)
    panels = {"tokens written": ("T", [25, 64, 100, 144, 196, 256]),
              "prompt length": ("L", [8, 60, 120, 240]), "images of a prompt": ("G", [1, 2, 4, 8, 16, 32])}
    out = {}
    for title, (letter, xs) in tqdm(panels.items(), desc="growth", ncols=110):
        plain, ours, memory, counted = [], [], [], []
        for x in xs:
            at = base | {letter: x}
            gpt = build("", device, **size, block_size=at["T"], cls_token_num=at["L"])
            cond = prompts(gpt, 1, device, torch.float32, at["G"])
            plain.append(functools.partial(Plain(gpt).generate, *cond))
            ours.append(functools.partial(gpt.generate, *cond))
            memory.append(peak_bytes(ours[-1], device) / MIB)
            # 2 (k and v) x 4 bytes
            counted.append(8 * at["G"] * at["T"] * size["dim"] * size["n_layer"] / MIB)
        found = seconds(plain + ours, device, 2 * repeats, pick=min)
        out[title] = (letter, xs, dict(plain=found[:len(xs)], ours=found[len(xs):]), memory, counted)
    return out


# ---- the report --------------------------------------------------------------------------------------------
def show(key, value):
    """A number as its column wants it."""
    if isinstance(value, (str, int)):
        return value
    if key in ("share of ceiling", "same tokens"):
        return f"{value:.0%}"
    return f"{value:.2f}" if key == "ratio" else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def goals(device, part, rows):
    """Lines (goal, asked, measured, reached) that these rows decide."""
    for kind, where, model, dtype, pictures, what, least in GOALS:
        for row in rows if (kind, where) == (device.type, part) else []:
            if (row["model"], row["dtype"], str(row["pictures"]), row.get("CFG", "7.5")) == (
                    model, dtype, pictures, "7.5"):
                value = row["ratio" if what == "ratio" else "share of ceiling"]
                form = "{:.2f}x" if what == "ratio" else "{:.0%}"
                name = "against the usual way" if what == "ratio" else "share of the ceiling"
                yield (f"{model}, {part}, {dtype}, {pictures} pictures: {name}",
                       "at least " + form.format(least), form.format(value), "no" if value < least else "yes")


def exponent(xs, ys):
    """k of the best y = a x^k."""
    return np.polyfit(np.log(xs), np.log(ys), 1)[0]


def slopes(panels):
    """What the growth figure shows, in words."""
    (_, T, t, *_), (_, L, p, *_), (_, G, g, memory, counted) = panels.values()
    return (f"Time of ours grows as T^{exponent(T, t['ours']):.2f} with the tokens written and as "
            f"G^{exponent(G, g['ours']):.2f} with the pictures of a prompt; from L = {L[0]} to {L[-1]} it "
            f"takes {p['ours'][-1] / p['ours'][0]:.2f} times as long (the usual way "
            f"{p['plain'][-1] / p['plain'][0]:.2f} times). A picture more holds "
            f"{(memory[-1] - memory[-2]) / (G[-1] - G[-2]):.2f} MiB more, of which keys and values are "
            f"{counted[-1] / G[-1]:.2f}.")


def draw(panels, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.4), layout="constrained")
    for axis, (title, (letter, xs, times, _, _)) in zip(axes, panels.items()):
        for name, ys in times.items():
            axis.plot(xs, ys, "o-", label=name)
        axis.set(title=f"sampling time, {title}", xlabel=letter, ylabel="seconds", ylim=0)
        axis.legend(frameon=False)
    _, xs, _, memory, counted = panels["images of a prompt"]
    axes[3].plot(xs, memory, "o-", label="peak, measured")
    axes[3].plot(xs, counted, "--", color="grey", label="keys and values, counted")
    axes[3].set(title="memory, images of a prompt", xlabel="G", ylabel="MiB", ylim=0)
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check(cfg):
    config.at_least(cfg, repeats=1)
    config.named(cfg, out="")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    device, begin = pick_device(cfg.device), time.time()
    torch.manual_seed(0)
    limits, reached = ceilings(device, cfg.repeats), []
    os.makedirs(cfg.out, exist_ok=True)
    name = "bench" if device.type == "cpu" else f"bench_{device.type}"
    report = [f"# Speed\n\n`python bench.py --device={device.type}`, see bench.py for what is compared. "
              f"Peaks are above weights and gradients.", describe(limits, device, cfg.repeats)]
    print(report[-1], flush=True)

    def tell(text):
        """To the screen, and to the file: what is measured stays, if the rest is cut off."""
        report.append(text)
        print(text, flush=True)
        if cfg.only == "all":
            with open(os.path.join(cfg.out, f"{name}.md"), "w", encoding="utf-8") as file:
                file.write("\n\n".join(report) + "\n")
    for part, title, rows_of in (("sampling", "Sampling", sampling), ("update", "Update", update),
                                 ("vapi", "The update of VA-pi", shared_pictures)):
        if cfg.only in ("all", part):
            rows = list(rows_of(device, cfg.repeats, limits))
            reached += goals(device, part, rows)
            tell(f"## {title}\n\n" + table(rows[0], [[show(*item) for item in row.items()] for row in rows]))
    if cfg.only in ("all", "growth"):
        panels = growth(device, cfg.repeats)
        draw(panels, os.path.join(cfg.out, f"{name}.png"))
        tell(f"## Growth of sampling\n\n{slopes(panels)}\n\n![growth]({name}.png)")
    if reached:
        others = "" if device.type == "cuda" else (
            "\n\nThe goals on a GPU are not measured here: `python bench.py --device=cuda`.")
        tell("## Goals\n\n" + table(["goal", "asked", "measured", "reached"], reached) + others)
    print(f"all of it in {(time.time() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    config.run(main)
