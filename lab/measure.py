"""Measure time and memory, and what the hardware allows.

 1. Both sides of a comparison alternate in one process, so a machine that slows down slows both. The first
    round is discarded, because it allocates, loads and compiles.
 2. GPU kernels run asynchronously, so we synchronize before we read the clock.
 3. A speed says little without the speed that the machine can reach. `ceilings` measures it in the same run.
"""
import contextlib
import itertools
import os
import platform
import statistics
import subprocess
import time

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from common.config import UserError

MIB = 2 ** 20                      # bytes


def sync(device):
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(sides, device, repeats, pick=statistics.median):
    """Return the median seconds of each function of `sides` (or another pick than the median), over `repeats`
    rounds in which they alternate. One more round comes first and is discarded."""
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
    """Return the most bytes that tensors held at once during f(), above what they held before it (in an
    update: weights and gradients). Raises UserError for a device that does not report its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu":
        raise UserError(f"--device={device.type} does not report its peak memory. Use cpu or cuda")
    # The CPU allocator keeps no peak, but the profiler records every allocation and every release.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


def ceilings(device):
    """Return {"copy": bytes/s read and written by a large copy, dtype: FLOP/s of a large product in it}."""
    def fastest(f):
        # A GPU leaves its idle clock within a second. A ceiling is what the machine can do, so the fastest
        # round counts, not the median.
        timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        return min(timer.blocked_autorange(min_run_time=3).times)
    gpu = device.type == "cuda"
    big = torch.zeros(2 ** 28 if gpu else 2 ** 26, device=device)
    to, n = torch.empty_like(big), 8192 if gpu else 2048
    out = {"copy": 2 * big.nbytes / fastest(lambda: to.copy_(big))}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        out[dtype] = 2 * n ** 3 / fastest(lambda: a @ b)
    return out


def least_seconds_of_a_step(gpt, rows, cache, limits, device, repeats):
    """Return the least seconds of a sampling step of `rows` rows that reads `cache` bytes of keys and values.
    On a GPU: the time to read all weights and the cache once, at the speed of a copy. On a CPU neither memory
    nor arithmetic alone limits a product with so few rows. So we time the products with the model's own
    matrices, with nothing between them, and add the time to read the cache."""
    matrices = [m.weight for m in [*gpt.layers.modules(), gpt.output] if isinstance(m, torch.nn.Linear)]
    if device.type == "cuda":
        return (sum(w.nbytes for w in matrices) + cache) / limits["copy"]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=device, dtype=w.dtype) for w in matrices}

    @torch.no_grad()
    def products():
        for w in matrices:
            F.linear(inputs[w.shape[1]], w)
    return seconds([products], device, repeats)[0] + cache / limits["copy"]


def describe(limits, device, repeats):
    """Return a paragraph of text: machine, versions, commit, settings and ceilings."""
    name, commit = platform.processor() or platform.machine(), "unknown"
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip() or commit
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}, "
            f"{time.strftime('%Y-%m-%d')}. Medians of {repeats} alternating runs, after a run that is "
            f"discarded. Both sides share process, allocator and threads. TF32 is off.\n\nCeilings, measured "
            f"in the same run: copy {limits['copy'] / 1e9:.1f} GB/s (read + written), large product in fp32 "
            f"{limits[torch.float32] / 1e12:.2f} TFLOP/s, in bf16 {limits[torch.bfloat16] / 1e12:.2f}.")
