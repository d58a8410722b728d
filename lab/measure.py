"""How to measure: seconds that mean something, the most memory held at once, and what the hardware allows.

Three habits, each of which somebody forgot before a wrong number was published. Both sides of a comparison
take turns in one process, so that a machine that gets slower gets slower for both; the first round is thrown
away, because it allocates, loads and compiles. A GPU works behind Python's back: whoever does not wait for it
measures how fast it takes orders. And a speed says little without the speed that the machine could reach:
`ceilings` measures that here and now, instead of believing a data sheet.
"""
import contextlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time

import torch
import torch.nn.functional as F

from common import config

MIB = 2 ** 20                      # bytes


def sync(device):
    """Waits until the device has done what it was told."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(sides, device, repeats, pick=statistics.median):
    """Functions -> the median seconds of each (or another pick), over `repeats` rounds in which they take
    turns, after one that does not count."""
    times = [[] for _ in sides]
    for _ in range(repeats + 1):
        for side, found in zip(sides, times):
            sync(device)
            begin = time.perf_counter()
            side()
            sync(device)
            found.append(time.perf_counter() - begin)
    return [pick(found[1:]) for found in times]


def peak_bytes(f, device):
    """The most bytes that tensors held at once during f(), above what they held before (in an update:
    weights and gradients). Raises UserError for a device that does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        raise config.UserError(f"{device.type} does not tell its peak memory: use --device=cpu or cuda")
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
    gpu, times = device.type == "cuda", 20 if device.type == "cuda" else 1

    def often(f):                          # a GPU needs work for longer than a call takes to start
        def many():
            for _ in range(times):
                f()
        end = time.time() + (1 if gpu else 0)
        while time.time() < end:           # ... and a second to leave its idle clock
            many()
            sync(device)
        # The best of many rounds, not the median: a ceiling is what the machine can do, not what it did.
        return seconds([many], device, 4 * repeats, min)[0] / times
    big = torch.zeros(2 ** 28 if gpu else 2 ** 26, device=device)
    to, n = torch.empty_like(big), 8192 if gpu else 2048
    out = {"copy": 2 * big.nbytes / often(lambda: to.copy_(big))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out[dtype] = 2 * n ** 3 / often(lambda: a @ b)
    return out


def least_seconds_of_a_step(gpt, rows, cache, limits, device, repeats):
    """What a sampling step of `rows` rows takes at least, with `cache` bytes of keys and values to read.

    On a GPU: all weights and the cache, once, at the speed of the copy. On a CPU the model's own matrices
    times so few rows ("skinny") are bound by neither memory nor arithmetic alone, so these products are made,
    with nothing between them, and timed.
    """
    matrices = [m.weight for m in [*gpt.layers.modules(), gpt.output] if isinstance(m, torch.nn.Linear)]
    if device.type == "cuda":
        return (sum(w.nbytes for w in matrices) + cache) / limits["copy"]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=device, dtype=w.dtype) for w in matrices}

    @torch.no_grad()
    def skinny():
        for w in matrices:
            F.linear(inputs[w.shape[1]], w)
    return seconds([skinny], device, repeats)[0] + cache / limits["copy"]


def describe(limits, device, repeats):
    """A paragraph: machine, versions, commit, settings and ceilings."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    commit = "of unknown name"
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip() or commit
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}, "
            f"{time.strftime('%Y-%m-%d')}. Medians of {repeats} alternating runs after one that is thrown "
            f"away; same process, allocator and threads for both sides; TF32 off.\n\nCeilings measured in "
            f"the same run: copy {limits['copy'] / 1e9:.1f} GB/s (read + written), large product in fp32 "
            f"{limits[torch.float32] / 1e12:.2f} TFLOP/s, in bf16 {limits[torch.bfloat16] / 1e12:.2f}.")


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
