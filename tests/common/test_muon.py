"""Run: python -m pytest tests/common/test_muon.py

Muon against a singular value decomposition, and against torch's own Muon. A run with Muon is resumed in
tests/core/test_train.py."""
import pytest
import torch

import evaluate
from common import config
from common.config import UserError
from common.lora import adapt
from common.muon import Muon, hidden_matrices, orthogonal
from common.sit import SiT, SiTConfig
from model import GPT, GPTConfig


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_singular_values_become_about_one(shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = u @ torch.diag(torch.linspace(.5, 30, len(s), dtype=torch.float64)) @ v
    found = u.T @ orthogonal(x) @ v.T                               # diagonal: the directions stay
    values = found.diagonal()
    assert (found - torch.diag(values)).abs().max() < 1e-9
    assert .68 < values.min() and values.max() < 1.21
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_the_range_of_singular_values():
    """Matrices [2,2] with singular values that are almost 1, and s, after the division by the norm."""
    for s in torch.logspace(-5, -.2, 400, dtype=torch.float64).tolist():
        values = torch.tensor([(1 - s * s) ** .5, s], dtype=torch.float64)
        raised = orthogonal(torch.diag(values))[1, 1].item()
        assert raised <= 485 * s and (s < .002 or .68 < raised < 1.21), s


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_steps_are_those_of_torch(shape):
    """torch.optim.Muon computes in bf16, so it differs by about 1 %."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    pair = Muon([ours], lr=.1), torch.optim.Muon([theirs], lr=.1, weight_decay=0)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator)
        for optimizer in pair:
            optimizer.step()
    assert (ours - theirs).norm() < .03 * theirs.norm()


def test_only_matrices_inside_blocks_are_hidden():
    gpt = GPT(GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=16, vocab_size=32, block_size=16))
    sit = SiT(SiTConfig(depth=1, dim=32, heads=2, channels=8, side=4, caption_dim=8))
    names = [[n for n, p in model.named_parameters() if any(p is h for h in hidden_matrices(model))]
             for model in (gpt, sit)]
    assert len(names[0]) == 2 * 5 and all(n.startswith("layers.") for n in names[0])
    assert all(n.startswith("blocks.0.") and "adaLN" not in n for n in names[1]) and len(names[1]) >= 4
    adapters = hidden_matrices(adapt(gpt, 4))                       # with LoRA: A and B, and no frozen matrix
    assert len(adapters) == 2 * 2 * 5 and all(4 in p.shape for p in adapters)


def test_muon_is_refused_where_matrices_are_split():
    with pytest.raises(UserError, match="--muon_lr needs whole matrices"):
        config.load(evaluate.options, ["--world=llamagen", "--shard", "--muon_lr=0.01"])
