"""Where tensors live and how they are computed: the device, threads, precision, and memory."""
import ctypes
import math

import torch

from common.config import UserError


def quota(path="/sys/fs/cgroup/cpu.max"):
    """How many cores a container may use, rounded up; infinity where nothing limits it."""
    try:
        with open(path, encoding="ascii") as file:
            most, period = file.read().split()             # microseconds, of each so many
        return math.ceil(int(most) / int(period))
    except (OSError, ValueError):                          # no such file, or "max"
        return math.inf


def pick_device(name):
    """'auto', 'cuda', 'mps' or 'cpu' -> torch.device; auto: the first of cuda, mps, cpu that is there. Also
    sets the number of threads: torch starts one for each core, even in a container that may use only two. And
    it turns off one of torch's kernels for attention."""
    torch.set_num_threads(min(torch.get_num_threads(), quota()))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name != "auto" and not there.get(name):
        raise UserError(f"device {name!r} is not there; "
                        f"there are: {', '.join(k for k, v in there.items() if v)}")
    # cuDNN's attention, torch's first choice on an H100 or H200, gives NaN gradients under a mask (pytorch
    # issue 196678); and it is another kernel with gradients than without, where ours have to agree.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(next(k for k, v in there.items() if v) if name == "auto" else name)


def keep_freed_memory():
    """Tells glibc to keep freed memory. By default it gives large blocks back to the system, which then hands
    them out again page by page, zeroed: up to half of the time of a decode on a CPU (LOG.md)."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2 ** 31 - 1)              # M_TRIM_THRESHOLD: never shrink the heap
        libc.mallopt(-3, 2 ** 30)                  # M_MMAP_THRESHOLD: blocks below 1 GB come from the heap
    except (OSError, AttributeError):
        pass                                       # not glibc (macOS, Windows, musl): their own allocator


def freeze(module, dtype):
    """Makes a module one that is only used, never trained, and adapts it to the precision of a run.

    "bfloat16": matrices and convolutions are stored rounded. Autocast rounds them at every use anyway, so the
    results are the same bit for bit and the module takes half the memory; all else stays in fp32. So a frozen
    copy of the policy gives exactly the policy's logits, until the policy moves.
    """
    module.requires_grad_(False).eval()
    if dtype == "float64":
        module.double()
    if dtype == "bfloat16":
        for part in module.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)):
                part.bfloat16()


@torch.no_grad()
def batched(f, items, size=8):
    """f of items, so many at a time, put together: memory for the activations of `size` pictures alone."""
    return torch.cat([f(items[i:i + size]) for i in range(0, len(items), size)])
