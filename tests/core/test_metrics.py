"""python -m pytest tests/core/test_metrics.py

Each measure is compared with a second way to compute it.
"""
import itertools

import pytest
import torch
import torch.nn.functional as F

import metrics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_vectors(*shape):
    return F.normalize(torch.randn(*shape, generator=generator()), dim=-1)


def test_pairwise_over_all_pairs():
    f = unit_vectors(3, 5, 4)
    every = [1 - f[p, i] @ f[p, j] for p in range(3) for i in range(5) for j in range(5) if i != j]
    assert metrics.pairwise(f) == pytest.approx(torch.stack(every).mean().item(), abs=1e-6)
    assert metrics.pairwise(torch.eye(4)[None]) == 1
    assert metrics.pairwise(torch.eye(4)[None, :1].expand(2, 6, 4)) == 0


def test_vendi():
    assert metrics.vendi(torch.ones(64, 3) / 3 ** .5) == pytest.approx(1, abs=1e-6)
    assert metrics.vendi(torch.eye(4).repeat(16, 1)) == pytest.approx(4, rel=1e-6)
    f = unit_vectors(20, 6)
    p = torch.linalg.eigvalsh((f @ f.T / 20).double()).clamp_min(1e-12)          # the n x n form of the paper
    assert metrics.vendi(f) == pytest.approx((-(p * p.log()).sum()).exp().item(), rel=1e-4)


def test_frechet_distance_of_gaussians():
    x = torch.randn(4000, 1, generator=generator(), dtype=torch.float64)
    x = (x - x.mean()) / x.std()       # in one dimension: (difference of means)^2 + (difference of stds)^2
    assert metrics.frechet(2 * x + 1, 5 * x - 3) == pytest.approx(4 ** 2 + 3 ** 2)
    a, b = torch.randn(2, 500, 6, generator=generator(1), dtype=torch.float64)
    b = b @ torch.randn(6, 6, generator=generator(2), dtype=torch.float64)
    # the second way: the eigenvalues of the product itself, which is not symmetric
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    other = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    assert metrics.frechet(a, b) == pytest.approx(other.item())
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_brute_force():
    real, sampled = torch.randn(40, 2, generator=generator()), .4 * torch.randn(30, 2, generator=generator(1))

    def share(points, cloud):
        def inside(p):
            return any((p - c).norm() <= sorted((c - o).norm() for o in cloud)[3] for c in cloud)
        return sum(map(inside, points)) / len(points)
    assert metrics.precision_recall(real, sampled) == (
        pytest.approx(share(sampled, real)), pytest.approx(share(real, sampled)))
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)


def test_lpips_by_hand():
    a, b = torch.randn(2, 2, 3, 4, 4, generator=generator())
    layers = [torch.randn(2, 5, 2, 2, generator=generator(s)) for s in range(4)]

    def activations(images):                                     # two layers, different ones for each image
        return layers[:2] if images is a else layers[2:]
    by_hand = torch.zeros(2)
    for i, x, y, n in itertools.product(range(2), range(2), range(2), range(2)):
        u, v = (layers[n + k][i, :, y, x] for k in (0, 2))
        by_hand[i] += ((u / u.norm() - v / v.norm()) ** 2).sum() / 4
    assert torch.allclose(metrics.lpips(activations, a, b), by_hand, atol=1e-6)
    assert (metrics.lpips(lambda images: [images], a, a.clone()) == 0).all()
