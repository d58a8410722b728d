"""How fast is it, against the usual way of doing the same and against what the hardware allows?

    python bench.py                     about 10 minutes on 2 CPU cores; writes results/bench.md and bench.png
    python bench.py --only=sampling     or update, vapi, growth: that part alone, printed, nothing written
    python bench.py --device=cuda       the full grid on a GPU

Both sides run in this process, alternate, have the same weights, the same allocator and the same number of
threads; a figure is the median of `repeats` runs after one that is thrown away. The two sides:
  ours    model.py: the caption read once a prompt and seen as one token, attention over filled positions,
          the update's logits by chunks
  plain   plain.py: the prefix once per sequence, attention over all positions through a mask with the math
          kernel; in the update, log-softmax of all logits in fp32 for policy and reference
  VA-pi   (vapi.py) a forward pass for each sample, as in its public code, and one for each picture
Given the same random stream both draw the same tokens, and their losses agree: this is checked before a
number is printed.

What the hardware allows, measured here and now (`ceilings`): a large copy for memory, a large matrix product
for arithmetic, and the model's own matrices times as many rows as one sampling step has ("skinny"), because
these are bound by neither alone. The ceiling of sampling is skinny products plus the bytes of keys and values
that a step has to read; that of the update is the arithmetic that any order of computation needs.
"""
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import vapi
from grpo import chunked_loss, grpo_loss
from model import GPT, GPTConfig, PRESETS
from plain import Plain
from sweep import table


@dataclass(frozen=True)
class Config:
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    repeats: int = 5                   # timed runs of each side; the median counts
    only: Literal["all", "sampling", "update", "vapi", "growth"] = "all"  # all also writes the files
    out: str = "results"               # folder of bench.md and bench.png


# ---- measuring ---------------------------------------------------------------------------------------------
def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(sides, device, repeats):
    """Functions -> the median seconds of each, over `repeats` rounds in which they take turns."""
    times = [[] for _ in sides]
    for _ in range(repeats + 1):
        for side, found in zip(sides, times):
            sync(device)
            begin = time.perf_counter()
            side()
            sync(device)
            found.append(time.perf_counter() - begin)
    return [statistics.median(found[1:]) for found in times]


def peak_bytes(f, device):
    """The most bytes that tensors held at once during f(), above what they held before (in an update:
    weights and gradients)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator keeps no peak, but the profiler notes the total after every allocation and release.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    with tempfile.TemporaryDirectory() as folder:
        p.export_chrome_trace(os.path.join(folder, "trace.json"))
        with open(os.path.join(folder, "trace.json"), encoding="utf-8") as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    level = peak = 0
    for e in events:
        level += e["args"]["Bytes"]
        peak = max(peak, level)
    return peak


def ceilings(device, repeats):
    """{"copy": bytes/s read and written by a large copy, torch.float32: FLOP/s of a large product, ...}."""
    big = torch.zeros(2 ** 28 if device.type == "cuda" else 2 ** 26, device=device)
    to = torch.empty_like(big)
    out = {"copy": 2 * big.numel() * 4 / seconds([lambda: to.copy_(big)], device, repeats)[0]}
    n = 8192 if device.type == "cuda" else 2048
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out[dtype] = 2 * n ** 3 / seconds([lambda: a @ b], device, repeats)[0]
    return out


def skinny(gpt, rows, device, repeats):
    """Seconds of the matrix products of one sampling step, with nothing between them."""
    matrices = [m.weight for m in [*gpt.layers.modules(), gpt.output] if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=device, dtype=w.dtype) for w in matrices}

    @torch.no_grad()
    def run():
        for w in matrices:
            F.linear(inputs[w.shape[1]], w)
    return seconds([run], device, repeats)[0]


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


# ---- the three parts ---------------------------------------------------------------------------------------
TINY = dict(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=256, block_size=64, cls_token_num=32,
            caption_dim=320)                                               # as pretrain.py makes it


def sampling(device, repeats, limits):
    """Rows of the sampling table: all images are of one prompt, except tiny, with 8 a prompt as in
    training."""
    grid = [("tiny", torch.float32, 64, 1.0, TINY)]
    sizes = [("GPT-B", 1, 64), ("GPT-B", 8, 64), ("GPT-XL", 1, 9)]
    if device.type == "cuda":
        sizes = [(name, n, 256) for name in ("GPT-B", "GPT-XL") for n in (1, 8, 64)]
    for name, n, T in sizes:
        for dtype in (torch.float32, torch.bfloat16):
            for cfg_scale in (7.5, 1.0) if device.type == "cuda" else (7.5,):
                grid.append((name, dtype, n, cfg_scale, dict(block_size=T)))
    rows = []
    for name, dtype, n, cfg_scale, changes in tqdm(grid, desc="sampling", ncols=110):
        gpt = build(name, device, dtype, **changes)
        c, per_prompt = gpt.config, 8 if name == "tiny" else n
        cond = prompts(gpt, n // per_prompt, device, dtype, per_prompt)
        plain = Plain(gpt)

        def draw(side):
            return side.generate(*cond, cfg_scale=cfg_scale, generator=torch.Generator(device).manual_seed(0))
        same = (draw(gpt) == draw(plain)).float().mean().item()
        # bf16 rounds the two orders of summation differently, and after one other token all may differ
        if dtype == torch.float32 and same < 1:
            raise config.Fault(f"{name}: only {same:.0%} of the tokens agree with the plain path's")
        usual, ours = seconds([lambda: draw(plain), lambda: draw(gpt)], device, repeats)
        R = n * (2 if cfg_scale > 1 else 1)
        # keys and values that step t reads: 1 + t positions, t on average T/2
        cache = 2 * R * c.n_layer * c.dim * cond[0].element_size() * c.block_size / 2
        step = skinny(gpt, R, device, repeats) + cache / limits["copy"]
        total = n * c.block_size
        rows.append((name, str(dtype)[6:], n, cfg_scale, c.block_size, total / usual, total / ours,
                     usual / ours, step * c.block_size / ours))
        del gpt, plain
    return rows


def update(device, repeats, limits):
    """Rows of the update table: forward and backward of a step's loss, reference included, no optimizer."""
    grid = [("tiny", torch.float32, 8, 8, 0, TINY), ("GPT-B", torch.float32, 1, 8, 16, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 4, 8, 32, {}), ("GPT-XL", torch.bfloat16, 4, 8, 32, {})]
    rows = []
    for name, dtype, n, G, chunk, changes in tqdm(grid, desc="update", ncols=110):
        gpt, ref = (build(name, device, dtype, **changes) for _ in range(2))
        gpt.requires_grad_(True)
        c, cond = gpt.config, prompts(gpt, n, device, dtype, G)
        tokens = torch.randint(c.vocab_size, (n * G, c.block_size), device=device)
        adv = torch.randn(n * G, device=device)
        with torch.no_grad():
            logp_old = Plain(gpt).forward(tokens, *cond).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        columns, options = (tokens, logp_old, adv, tokens.numel()), dict(beta=.04, divergence="js")

        def usual():
            gpt.zero_grad()
            logits = Plain(gpt).forward(tokens, *cond)
            with torch.no_grad():
                ref_logits = Plain(ref).forward(tokens, *cond)
            loss = grpo_loss(logits, ref_logits, *columns, **options)[0]
            loss.backward()
            return loss

        def ours(chunk=chunk, recompute=False):
            gpt.zero_grad()
            gpt.recompute = recompute
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
        times, peaks = seconds(sides, device, repeats), [peak_bytes(side, device) for side in sides]
        # Counted: 2 FLOP for each weight and row in a forward pass, 4 in a backward one, 2 for the reference;
        # the rows that any order of computation needs, and the logits' matrix once. Attention is left out.
        inner = sum(p.numel() for p in gpt.layers.parameters())
        flop = 8 * (inner * (n * G * (c.block_size - 1) + n * c.cls_token_num)
                    + gpt.output.weight.numel() * n * G * c.block_size)
        rows.append((name, str(dtype)[6:], n, G, c.block_size, times, [p / 2 ** 20 for p in peaks],
                     flop / times[1] / limits[dtype]))
        del gpt, ref
    return rows


def shared_pictures(device, repeats):
    """Rows of the table on VA-pi: the update of n pictures x G samples, by one forward pass for each picture
    and by one for each sample: the same step, with every picture told G times over."""
    grid = [("tiny", torch.float32, 8, 8, TINY), ("GPT-B", torch.float32, 1, 8, dict(block_size=64))]
    if device.type == "cuda":
        grid = [("GPT-B", torch.bfloat16, 8, 8, {}), ("GPT-XL", torch.bfloat16, 4, 8, {})]
    out = []
    for name, dtype, n, G, changes in tqdm(grid, desc="vapi", ncols=110):
        gpt, ref = (build(name, device, dtype, **changes) for _ in range(2))
        gpt.requires_grad_(True)
        (cond, mask, prompt), c = prompts(gpt, n, device, dtype, G), gpt.config
        z = torch.randint(c.vocab_size, (n, c.block_size), device=device)
        tokens = torch.randint(c.vocab_size, (n * G, c.block_size), device=device)
        once = vapi.Batch([], cond, mask, prompt, 0, tokens, torch.zeros(tokens.shape, device=device),
                          targets=z, context=z)
        told = dataclasses.replace(once, cond=cond[prompt], mask=mask[prompt], targets=z[prompt],
                                   context=z[prompt], prompt=torch.arange(n * G, device=device))
        world = SimpleNamespace(policy=gpt, reference=ref, autocast=contextlib.nullcontext())
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
        out.append((name, str(dtype)[6:], f"{n} x {G}", c.block_size, seconds(sides, device, repeats),
                    [peak_bytes(side, device) / 2 ** 20 for side in sides]))
        del gpt, ref
    return out


def growth(device, repeats):
    """{title: (letter, xs, {side: seconds}, MiB at the peak, MiB of keys and values as counted)}: how the
    cost of sampling grows with T, L and G, on a model of middle size."""
    size = dict(dim=256, n_layer=4, n_head=4, vocab_size=1024, caption_dim=256)
    if device.type == "cuda":
        size = dict(dim=768, n_layer=12, n_head=12, vocab_size=16384)
    base = dict(T=100, L=120, G=8)
    panels = {"tokens written": ("T", [25, 64, 100, 144, 196, 256]),
              "prompt length": ("L", [8, 60, 120, 240]), "images of a prompt": ("G", [1, 2, 4, 8, 16, 32])}
    out = {}
    for title, (letter, xs) in panels.items():
        times, memory, counted = {"plain": [], "ours": []}, [], []
        for x in tqdm(xs, desc=f"growth with {letter}", ncols=110):
            at = base | {letter: x}
            gpt = build("", device, **size, block_size=at["T"], cls_token_num=at["L"])
            cond = prompts(gpt, 1, device, torch.float32, at["G"])
            plain = Plain(gpt)
            found = seconds([lambda: plain.generate(*cond), lambda: gpt.generate(*cond)], device, repeats)
            for name, value in zip(times, found):
                times[name].append(value)
            memory.append(peak_bytes(lambda: gpt.generate(*cond), device) / 2 ** 20)
            # 2 (k and v) x 4 bytes
            counted.append(8 * at["G"] * at["T"] * size["dim"] * size["n_layer"] / 2 ** 20)
        out[title] = (letter, xs, times, memory, counted)
    return out


# ---- the report --------------------------------------------------------------------------------------------
def describe(limits, device):
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{time.strftime('%Y-%m-%d')}.\nCeilings measured in the same run: copy "
            f"{limits['copy'] / 1e9:.1f} GB/s (read + written), large product in fp32 "
            f"{limits[torch.float32] / 1e12:.2f} TFLOP/s, in bf16 {limits[torch.bfloat16] / 1e12:.2f}.")


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def draw(panels, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    for axis, (title, (letter, xs, times, _, _)) in zip(axes, panels.items()):
        for name, ys in times.items():
            axis.plot(xs, ys, "o-", label=name)
        axis.set(title=f"sampling time, {title}", xlabel=letter, ylabel="seconds", ylim=0)
        axis.legend(frameon=False)
    _, xs, _, memory, counted = panels["images of a prompt"]
    axes[3].plot(xs, memory, "o-", label="peak, measured")
    axes[3].plot(xs, counted, "--", color="grey", label="keys and values, counted")
    axes[3].set(title="sampling memory, images of a prompt", xlabel="G", ylabel="MiB", ylim=0)
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def check(cfg):
    config.at_least(cfg, repeats=1)
    config.named(cfg, out="")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    device, begin = config.pick_device(cfg.device), time.time()
    torch.manual_seed(0)
    limits = ceilings(device, cfg.repeats)
    report = [describe(limits, device)]
    print(report[0])
    if cfg.only in ("all", "sampling"):
        report.append("## Sampling\n\n" + table(
            ["model", "dtype", "images", "CFG", "tokens", "plain, tokens/s", "ours, tokens/s", "ratio",
             "share of ceiling"],
            [(*row[:5], *(f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in row[5:7]), f"{row[7]:.2f}",
              f"{row[8]:.0%}")
             for row in sampling(device, cfg.repeats, limits)]))
        print(report[-1])
    if cfg.only in ("all", "update"):
        report.append("## Update\n\n" + table(
            ["model", "dtype", "prompts x G", "tokens", "plain, s", "ours, s", "ratio", "share of ceiling",
             "all logits at once, s", "recomputing, s",
             "peak MiB: plain", "ours", "all logits at once", "recomputing"],
            [(name, dtype, f"{n} x {G}", T, f"{t[0]:.3f}", f"{t[1]:.3f}", f"{t[0] / t[1]:.2f}",
              f"{share:.0%}", f"{t[2]:.3f}", f"{t[3]:.3f}", *(f"{p:.0f}" for p in peaks))
             for name, dtype, n, G, T, t, peaks, share in update(device, cfg.repeats, limits)]))
        print(report[-1])
    if cfg.only in ("all", "vapi"):
        report.append("## The update of VA-pi\n\n" + table(
            ["model", "dtype", "pictures x G", "tokens", "a forward for each sample, s",
             "for each picture, s", "ratio", "peak MiB: for each sample", "for each picture"],
            [(*row, f"{t[0]:.3f}", f"{t[1]:.3f}", f"{t[0] / t[1]:.2f}", *(f"{p:.0f}" for p in peaks))
             for *row, t, peaks in shared_pictures(device, cfg.repeats)]))
        print(report[-1])
    if cfg.only in ("all", "growth"):
        panels = growth(device, cfg.repeats)
        os.makedirs(cfg.out, exist_ok=True)
        draw(panels, os.path.join(cfg.out, "bench.png"))
    if cfg.only == "all":
        print(f"all of it in {(time.time() - begin) / 60:.1f} minutes")
        with open(os.path.join(cfg.out, "bench.md"), "w", encoding="utf-8") as file:
            file.write("# Speed\n\n`python bench.py`, see bench.py for what is compared.\n\n"
                       + "\n\n".join(report)
                       + "\n\nPeaks are above weights and gradients. The growth of sampling"
                       " with tokens, prompt length and images of a prompt:\n\n![growth](bench.png)\n")


if __name__ == "__main__":
    config.run(main)
