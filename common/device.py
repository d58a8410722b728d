"""Where tensors live and how they are computed: the device, its threads, precision, and memory."""
import ctypes
import math

import torch

from common.config import UserError


def quota(path="/sys/fs/cgroup/cpu.max"):
    """How many cores a container may use, rounded up. Infinity where nothing limits it."""
    try:
        with open(path, encoding="ascii") as file:
            used, period = file.read().split()             # microseconds of CPU time in each period
        return math.ceil(int(used) / int(period))
    except (OSError, ValueError):                          # no such file, or "max"
        return math.inf


def start(name):
    """Prepare the process for a run -> torch.device.

    name: cuda, mps, cpu, or auto, which takes the first of these that is there. Raises UserError for a device
    that is not there. Call this once: it changes settings of the whole process.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not there.get(name):
        raise UserError(f"--device={name} is not there; there are: "
                        f"{', '.join(k for k, v in there.items() if v)}")
    # torch starts one thread for each core of the machine, even in a container that may use only two.
    torch.set_num_threads(min(torch.get_num_threads(), quota()))
    # cuDNN's attention, torch's first choice on an H100 or H200, gives NaN gradients under a mask (pytorch
    # issue 196678). It is also another kernel with gradients than without, where both have to agree.
    torch.backends.cuda.enable_cudnn_sdp(False)
    keep_freed_memory()
    return torch.device(next(k for k, v in there.items() if v) if name == "auto" else name)


def keep_freed_memory():
    """Tell glibc to keep freed memory.

    By default glibc gives large blocks back to the system, which hands them out again page by page, zeroed.
    That takes up to half of the time of a decode on a CPU (LOG.md).
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)              # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-3, 2 ** 30)                  # M_MMAP_THRESHOLD: blocks below 1 GB come from the heap
    except (OSError, AttributeError):
        pass                                       # not glibc (macOS, Windows, musl): another allocator


def freeze(module, dtype="float32"):
    """Make a module one that is used and never trained, and adapt it to the precision of a run.

    "bfloat16": matrices and convolutions are stored rounded, everything else stays in fp32. Autocast rounds
    these weights at every use anyway. So the results are the same bit for bit, in half the memory, and a
    frozen copy of the policy gives exactly the policy's logits until the policy moves.
    """
    module.requires_grad_(False).eval()
    if dtype == "bfloat16":
        for part in module.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)):
                part.bfloat16()
    return module


@torch.no_grad()
def batched(f, items, size=8):
    """Apply f in batches of `size` items and concatenate, to bound the memory of activations."""
    return torch.cat([f(items[i:i + size]) for i in range(0, len(items), size)])
