"""Muon, an optimizer for the matrices inside a network: all directions of a matrix move equally far.

    python train.py configs/tiny_js.py --muon_lr=0.002

AdamW scales every number of a matrix on its own. Muon (Jordan 2024, kellerjordan.github.io/posts/muon) treats
a matrix as a whole. Let U S V' be the singular value decomposition of the averaged gradient. The step is
    -lr U V' sqrt(max(1, rows / columns)),
so every direction of the gradient that is not zero moves equally far, whether its singular value in S is
large or small. A polynomial in X X' finds U V' without a decomposition. It maps singular values in (0, 1] to
about 1, between .7 and 1.2.                                       [tests/common/test_muon.py verifies both]

Muon is meant for hidden matrices. So only matrices in the blocks of a policy get it. Embeddings, norms and
the output layer keep AdamW. With --lora_rank these matrices are the adapters A and B. B is zero at first, so
A has no gradient in the first step, and B makes a step of full size. Weight decay is AdamW's only.

torch.optim.Muon computes in bf16. On a CPU without bf16 instructions its step is 12 times as slow as this
one, which computes in fp32.
"""
import re

import torch

IN_BLOCKS = re.compile(r"(network\.)?(transformer_)?(layers|blocks)\.")


def hidden_matrices(model):
    """Return the trained matrices in the blocks of a policy, except those of adaLN in a SiT, which read t."""
    return [p for name, p in model.named_parameters()
            if p.requires_grad and p.dim() == 2 and IN_BLOCKS.match(name) and "adaLN" not in name]


def orthogonal(x, rounds=5):
    """Replace the singular values of a matrix x [n,m] by about 1. Singular values that are 0 stay 0."""
    wide = x.T if len(x) > x.shape[1] else x
    wide = wide / wide.norm().clamp_min(1e-7)              # now no singular value exceeds 1
    for _ in range(rounds):                                # s -> a s + b s^3 + c s^5, a, b, c as published
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide.T if len(x) > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """params: matrices. The gradient is averaged with momentum .95, in Nesterov's form."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, .05)
                ahead = p.grad.lerp(average, .95)
                p -= group["lr"] * max(1, len(p) / p.shape[1]) ** .5 * orthogonal(ahead)
