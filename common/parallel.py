"""Many processes, one run: each takes its share of a step's pictures, and their gradients are added up.

    torchrun --nproc_per_node=8 train.py configs/llamagen_js.py                 one machine, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

torchrun starts the processes and tells each its number (RANK) and how many there are (WORLD_SIZE). What is
here is data parallelism in its plainest form: every process holds the whole policy and the whole optimizer,
    loss = (1/N) sum over all tokens of the step = sum over processes of (1/N) sum over their tokens,
so the gradient of the step is the *sum* of theirs, N being the tokens of the whole step. After one all-reduce
all of them hold the same gradient, take the same optimizer step, and so stay equal without ever exchanging
weights. The noise of the sampler is drawn for the whole step by every process, each then using its own rows
(`part` in model.py), and the captions likewise. So a run does not depend on the number of processes, but for
rounding, and can go on with another number of them.

PyTorch's DistributedDataParallel does the same and starts to add up gradients while the backward pass is
still running. A step here has many micro-batches, of which only the last one's backward could hide that, so
there is little to hide and nothing to learn from it. Without torchrun every function below does nothing.

A policy that is too large for that (Janus-Pro-7B: 132 GB) is cut up by --shard. FSDP2, torch's `fully_shard`,
leaves each process 1/SIZE of every weight, so of every gradient and every moment of AdamW as well. A layer is
gathered when its turn comes and dropped after it, and gradients are summed and cut up again as the backward
pass goes along. Sampling would gather all layers at every token, so all of them are gathered once before it.
As gathering takes every process, all of them evaluate then, and the first one tells.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist


RANK, SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))          # the number of this process on its own machine


def start(device):
    """Joins the other processes, if there are any -> the device of this one.

    Each process of a machine takes a GPU of its own; on CPUs they talk by gloo. An hour of patience: the
    others wait while process 0 evaluates.
    """
    if SIZE == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return device


def stop():
    if dist.is_initialized():
        dist.barrier()                  # or one that is done hangs up on another, which then aborts (gloo)
        dist.destroy_process_group()


def wait():
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(x):
    """Every process's x [b,...], equally large, one below the other in the order of ranks -> [B,...]."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(SIZE)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def add_gradients(parameters):
    """Replaces each gradient by the sum over all processes. 4 bytes a parameter cross the wire, about twice:
    a ring adds up pieces on the way round, then sends the sums round once more."""
    if dist.is_initialized():
        for p in parameters:
            if p.requires_grad and not hasattr(p.grad, "full_tensor"):     # those of a shard are sums already
                dist.all_reduce(p.grad)


def combine(stats):
    """Statistics of this process's micro-batches (grpo.py) -> those of the step, as floats: sums add up, of
    the max_ ones the largest counts."""
    names = sorted(stats)
    values = gather(torch.stack([stats[k] for k in names])[None])                  # [processes,n]
    return {k: (values[:, i].max() if k.startswith("max_") else values[:, i].sum()).item()
            for i, k in enumerate(names)}


# ---- a share of the weights for each process -----------------------------------------------------------
def shard(model):
    """Leaves this process its share of a GPT or Janus, in place; the model is called as before."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = dist.device_mesh.init_device_mesh(next(model.parameters()).device.type, (SIZE,))
    model.shards = [*model.layers, model]                  # what is gathered, and dropped, together
    for part in model.shards:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)               # sums, not means
    for part, names in [(model, ("hidden", "logits", "generate")), *((m, ("read",)) for m in model.layers)]:
        for name in names:                                 # else only `forward` would gather the weights
            register_fsdp_forward_method(part, name)


@contextlib.contextmanager
def gathered(model):
    """Within, every process has all weights of a sharded model: for many small passes without gradients."""
    shards = getattr(model, "shards", ())
    for part in shards:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in shards:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def whole(x):
    """Of a share the whole, put together by all processes; dicts likewise, and all else as it is."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shares(state, parameters):
    """The optimizer's state dict, of `whole` -> this process's share of it, cut up as the parameters are."""
    for i, p in enumerate(parameters):
        if hasattr(p, "full_tensor") and i in state["state"]:
            state["state"][i] = {
                key: dist.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                if value.shape == p.shape else value for key, value in state["state"][i].items()}
    return state
