"""Low-rank adapters, so that a model can be trained where its weights barely fit.

    python train.py configs/janus_js.py --lora_rank=64

Training all weights takes 20 bytes per parameter (full/world.py lists them): 132 GB for Janus-Pro-7B. LoRA
(arXiv 2106.09685) freezes each matrix W [out,in] of the blocks and learns a low-rank correction beside it,
    y = W x + (alpha / rank) B A x,      A [rank,in] random, B [out,rank] zero at first.
So the untrained policy is exactly the reference. Only A and B have gradients and AdamW's moments: about 2 %
of the parameters at rank 64. W never changes, so the reference needs no copy of its own. It is the same W
without the adapters, and 2 bytes per parameter remain. The cost: only corrections of this rank can be
learned. Embeddings, norms and the output are not trained.
"""
import copy
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import files
from common.config import UserError

ALPHA = 32           # of the paper. The factor alpha / rank makes one learning rate fit all ranks.


class LowRank(nn.Module):
    def __init__(self, base, rank, generator):
        super().__init__()
        self.base, self.scale = base, ALPHA / rank
        # W may be stored in bf16, but A and B may not: small steps of the optimizer would be rounded away.
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        a = torch.randn(rank, base.in_features, generator=generator) / base.in_features ** .5
        self.a = nn.Parameter(a.to(base.weight.device, dtype))
        self.b = nn.Parameter(self.a.new_zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a), self.b)


def last_outputs(linear, x, n):
    """Return the last n outputs of a Linear or LowRank for x [..,in], without computing the others."""
    if not isinstance(linear, LowRank):
        return F.linear(x, linear.weight[-n:])
    # Two products, as in `forward`: in bf16 the sum of the matrices would round away much of a small B A.
    return last_outputs(linear.base, x, n) + linear.scale * F.linear(F.linear(x, linear.a), linear.b[-n:])


def merge(state):
    """Return a state dict in which W + (alpha / rank) B A replaces each matrix W and its adapters."""
    state = dict(state)
    for name in [key.removesuffix(".base.weight") for key in state if key.endswith(".base.weight")]:
        w, a, b = (state.pop(f"{name}.{part}") for part in ("base.weight", "a", "b"))
        state[f"{name}.weight"] = w + ALPHA / len(a) * b @ a
    return state


def adapt(reference, rank, names=r"layers\."):
    """Freeze a policy, and return one that shares its weights and has adapters. Only these are trained. Their
    initial values are the same at every call. names: a regular expression for the start of the names of the
    matrices that get an adapter; by default all matrices in the blocks of a GPT or Janus."""
    reference.requires_grad_(False)
    shared = {id(p): p for p in (*reference.parameters(), *reference.buffers())}
    policy, generator = copy.deepcopy(reference, shared), torch.Generator().manual_seed(0)
    for prefix, module in list(policy.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and re.match(names, f"{prefix}.{name}"):
                setattr(module, name, LowRank(child, rank, generator))
    return policy


def export(state, folder):
    """Write the adapters in the state dict of a policy of full/sd3.py for diffusers, whose load_lora_weights
    reads FOLDER/pytorch_lora_weights.safetensors. Return this path. B is multiplied by alpha / rank, because
    diffusers takes this factor for 1. Raises UserError if there are no adapters."""
    found, path = {}, os.path.join(folder, "pytorch_lora_weights.safetensors")
    for name in [key.removesuffix(".a") for key in state if key.endswith(".a")]:
        a, b = state[f"{name}.a"], state[f"{name}.b"]
        theirs = name.replace("network.", "transformer.", 1)
        found |= {f"{theirs}.lora_A.weight": a.contiguous(), f"{theirs}.lora_B.weight": b * (ALPHA / len(a))}
    if not found:
        raise UserError("this run has no adapters to export: it was trained without --lora_rank")
    with files.explain(f"cannot write {path}"):
        from safetensors.torch import save_file
        os.makedirs(folder, exist_ok=True)
        save_file(found, f"{path}.tmp", {"format": "pt"})
        os.replace(f"{path}.tmp", path)
    return path
