"""Several processes, one run: each process samples its part of a step's images, and gradients are added up.

    torchrun --nproc_per_node=8 train.py configs/llamagen_js.py                 one machine, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...

torchrun starts the processes. It tells each process its rank (RANK) and the world size (WORLD_SIZE), which is
the number of processes. This file is data parallelism in its plainest form. Every process holds the whole
policy and the whole optimizer, and with N tokens in the whole step,
    loss = (1/N) sum over all tokens of the step = sum over processes of (1/N) sum over their tokens.
So the gradient of the step is the *sum* of the gradients of all processes. After one all-reduce every process
holds the same gradient and takes the same optimizer step. Weights stay equal and are never exchanged. Every
process draws the sampler's noise for the whole step and uses its own rows of it (`part` in model.py). The
same holds for the prompts. So a run does not depend on the world size, except for rounding, and it can be
resumed with another world size.

PyTorch's DistributedDataParallel does the same, and it starts the all-reduce while the backward pass is still
running. A step here has many micro-batches, and only the last backward pass could hide the all-reduce. So
there is little to gain. Without torchrun every function below does nothing.

A policy that is too large for this (Janus-Pro-7B: 132 GB) is split by --shard. FSDP2, torch's `fully_shard`,
leaves each process 1/SIZE of every weight, and so of every gradient and every moment of AdamW. A layer is
gathered when it is needed and dropped afterwards. Gradients are summed and split during the backward pass.
Sampling would gather all layers at every token, so all layers are gathered once before it. Gathering needs
every process, so every process takes part in evaluations, and rank 0 reports them.
"""
import contextlib
import datetime
import os

import torch
import torch.distributed as dist

RANK, SIZE = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))          # the rank among the processes of this machine


def start(device):
    """Join the other processes, if there are any -> the device of this process.

    The timeout is an hour, because the other processes wait while rank 0 evaluates.
    """
    if SIZE == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
    return device


def stop():
    """Leave together. With gloo, an early exit makes a process that still communicates abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@contextlib.contextmanager
def in_turn():
    """The body runs on rank 0, then on one process of each other machine, then on the rest.

    For work that leaves files on the disk, such as a download: whoever comes later finds the files. Machines
    may or may not share a disk.
    """
    turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        wait()
    yield
    for _ in range(2 - turn):
        wait()


def wait():
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def gather(x):
    """Concatenate every process's x [b,...] in the order of ranks -> [B,...]. All b are equal."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(SIZE)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def add_gradients(parameters):
    """Replace each gradient by its sum over all processes."""
    if dist.is_initialized():
        for p in parameters:
            if p.requires_grad and not hasattr(p.grad, "full_tensor"):     # FSDP2 has summed those already
                dist.all_reduce(p.grad)


def combine(stats):
    """Statistics of this process's micro-batches (grpo.py) -> statistics of the step, as floats.

    Sums are added up. Of a statistic whose name begins with max_, the largest value counts.
    """
    names = sorted(stats)
    values = gather(torch.stack([stats[k] for k in names])[None])                  # [processes,n]
    return {k: (values[:, i].max() if k.startswith("max_") else values[:, i].sum()).item()
            for i, k in enumerate(names)}


# ---- FSDP2: each process holds a part of every weight ------------------------------------------------------
def shard(model):
    """Leave this process its part of a policy's weights, in place. The model is called as before."""
    if not dist.is_initialized():
        return
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    mesh = dist.device_mesh.init_device_mesh(next(model.parameters()).device.type, (SIZE,))
    model.shards = [*model.layers, model]                  # the units that are gathered and dropped together
    for part in model.shards:
        fully_shard(part, mesh=mesh)
        part.set_gradient_divide_factor(1.0)               # gradients are summed, not averaged
        # Otherwise FSDP2 multiplies while it reduces (PREMUL_SUM), an operation that gloo does not have.
        part.set_force_sum_reduction_for_comms(True)
    # Without this, only `forward` would gather the weights.
    for name in ("hidden", "logits", "generate"):
        register_fsdp_forward_method(model, name)
    for layer in model.layers:
        register_fsdp_forward_method(layer, "forward_prompt")


@contextlib.contextmanager
def gathered(*models):
    """In the body, every process has all weights of sharded models: for passes without gradients."""
    shards = [(model, part) for model in models for part in getattr(model, "shards", ())]
    for model, part in shards:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for model, part in shards:
        part.set_reshard_after_forward(part is not model, recurse=False)
        part.reshard()


def whole(x):
    """Gather the whole tensor of a sharded one. Dicts likewise. Anything else is returned as it is."""
    if isinstance(x, dict):
        return {key: whole(value) for key, value in x.items()}
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def split_state(state, parameters):
    """Return this process's part of an optimizer's state dict, which `whole` returned."""
    for i, p in enumerate(parameters):
        if hasattr(p, "full_tensor") and i in state["state"]:
            state["state"][i] = {
                key: dist.tensor.distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                if value.shape == p.shape else value for key, value in state["state"][i].items()}
    return state
