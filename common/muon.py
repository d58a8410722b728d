"""Muon, an optimizer for the matrices inside a network: all directions of a matrix move equally far.

    python train.py configs/tiny_js.py --muon_lr=0.002

AdamW scales every number of a matrix on its own. Muon (Jordan 2024, kellerjordan.github.io/posts/muon) treats
a matrix as a whole. Let U S V' be the singular value decomposition of the averaged gradient, where ' means
transposed. The step is about
    -lr U V' sqrt(max(1, rows / columns)),
so directions with large and with small singular values in S move almost equally far. U V' is found without a
decomposition. Let X be the gradient divided by its Frobenius norm. Then repeat five times
    X <- a X + b X X' X + c X X' X X' X,        a = 3.4445, b = -4.7750, c = 2.0315.
This changes singular values only. It maps those above .002 to between .68 and 1.21, and raises smaller ones
by at most 3.4445^5 = 485.                                                       [tests/common/test_muon.py]

Muon is meant for hidden matrices. So only matrices in the blocks of a policy get it. Embeddings, norms and
the output layer keep AdamW. Jordan's code splits the matrix of queries, keys and values into three. We do
not. With --lora_rank the matrices are the adapters A and B. B is zero at first, so A has no gradient in the
first step, and B moves by lr in every direction in which it has a gradient. Weight decay is AdamW's only.
--grad_clip hardly affects Muon, because the step does not depend on the size of the gradient.

torch.optim.Muon computes in bf16. On a CPU without bf16 instructions its step is 12 times as slow as this
one, which computes in fp32.
"""
import re

import torch

from common.config import UserError

IN_BLOCKS = re.compile(r"(network\.)?(transformer_)?(layers|blocks)\.")


def hidden_matrices(model):
    """Return the trained matrices in the blocks of a policy, except those of adaLN in a SiT, which read the
    time t. Raises UserError if the policy has no such matrix."""
    found = [p for name, p in model.named_parameters()
             if p.requires_grad and p.dim() == 2 and IN_BLOCKS.match(name) and "adaLN" not in name]
    if not found:
        raise UserError("--muon_lr finds no matrices in the blocks of this policy: leave it out")
    return found


def orthogonal(x, rounds=5):
    """Replace the singular values of a matrix x [n,m] by about 1. Singular values that are 0 stay 0."""
    wide = x.T if len(x) > x.shape[1] else x
    wide = wide / wide.norm().clamp_min(1e-7)              # now no singular value exceeds 1
    for _ in range(rounds):                                # singular values: s -> a s + b s^3 + c s^5
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide.T if len(x) > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """params: matrices. lr: see above. The gradient is averaged with Jordan's momentum .95, in Nesterov's
    form. `orthogonal` ignores the size of the average, so the first steps need no bias correction."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                average.lerp_(p.grad, .05)
                ahead = p.grad.lerp(average, .95)
                p -= group["lr"] * max(1, len(p) / p.shape[1]) ** .5 * orthogonal(ahead)
