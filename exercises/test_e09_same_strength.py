"""python -m pytest exercises/test_e09_same_strength.py"""
import pytest
import torch

from divergences import DIVERGENCES, STRENGTH, Divergence


def only_exact(exact):
    """Return a Divergence that has nothing but `exact`."""
    return Divergence(None, None, exact)


def test_strength_of_the_three(exercise):
    for name, right in STRENGTH.items():
        yours = exercise.strength(only_exact(DIVERGENCES[name].exact))
        assert yours == pytest.approx(right, rel=1e-4), (
            f"{name} has f''(1) = 1/{right}, so its STRENGTH is {right}; you measure {yours:.6f}. "
            f"(1/{right}: divide the KL's curvature by the divergence's. Off by 1e-3 or so: one-sided "
            "differences, or eps too large. Far off: eps too small, or fp32.)")


def test_strength_of_a_stranger(exercise):
    """chi-square with f = (w - 1)^2 and f''(1) = 2, and three times a KL. STRENGTH has neither."""
    chi2 = only_exact(lambda logp, logq: ((logq.exp() - logp.exp()) ** 2 / logp.exp()).sum(-1))
    triple = only_exact(lambda logp, logq: 3 * DIVERGENCES["forward_kl"].exact(logp, logq))
    for d, name, right in ((chi2, "chi-square", 1 / 2), (triple, "3 x forward_kl", 1 / 3)):
        yours = exercise.strength(d)
        assert yours == pytest.approx(right, rel=1e-3), f"{name}: STRENGTH is {right:.4f}, not {yours:.6f}"


def test_matched_beta_matches_the_gradients(exercise):
    """Near the reference, beta times the gradient of `exact` is then the same vector for every divergence."""
    g = torch.Generator().manual_seed(3)
    logq, u = (torch.randn(60, generator=g, dtype=torch.float64) for _ in range(2))
    logq = logq.log_softmax(0)
    z = (logq + .01 * u).requires_grad_()
    pull = {}
    for name, d in DIVERGENCES.items():
        value = exercise.matched_beta(name, .125) * d.exact(z.log_softmax(0), logq)
        (pull[name],) = torch.autograd.grad(value, z)
    for name, vector in pull.items():
        cosine = torch.cosine_similarity(vector, pull["reverse_kl"], dim=0).item()
        ratio = (vector.norm() / pull["reverse_kl"].norm()).item()
        beta = exercise.matched_beta(name, .125)
        assert cosine > .99, f"{name} pulls in another direction, cosine {cosine:.4f}. Is your beta positive?"
        assert ratio == pytest.approx(1, abs=.02), (
            f"{name}: at beta {beta:.4f} it pulls {ratio:.3f} times as hard as reverse_kl at .125. "
            "(A weak divergence needs a *larger* beta: multiply by STRENGTH.)")
    yours = exercise.matched_beta("js", .125)
    assert yours == pytest.approx(.5, abs=1e-3), f"js at beta .5 matches a KL at .125, you return {yours:.4f}"
