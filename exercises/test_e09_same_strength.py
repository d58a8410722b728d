"""python -m pytest exercises/test_e09_same_strength.py"""
import pytest
import torch

from divergences import DIVERGENCES, Divergence


def only_exact(exact):
    """A Divergence that has nothing but `exact`."""
    return Divergence(None, None, exact)


def test_strength_of_the_three(exercise):
    for name, right in (("reverse_kl", 1), ("forward_kl", 1), ("js", 1 / 4)):
        yours = exercise.strength(only_exact(DIVERGENCES[name].exact))
        assert yours == pytest.approx(right, abs=1e-4), (
            f"{name} has f''(1) = {right}, so its strength is {right}; you measure {yours:.6f}. (Off by 1e-3 "
            "or so: one-sided differences, or eps too large. Wild: eps too small, or fp32.)")


def test_strength_of_a_stranger(exercise):
    """chi-square, f = (w - 1)^2, f''(1) = 2; and a KL three times over. No table of three has these."""
    chi2 = only_exact(lambda logp, logq: ((logq.exp() - logp.exp()) ** 2 / logp.exp()).sum(-1))
    triple = only_exact(lambda logp, logq: 3 * DIVERGENCES["forward_kl"].exact(logp, logq))
    for d, name, right in ((chi2, "chi-square", 2), (triple, "3 x forward_kl", 3)):
        yours = exercise.strength(d)
        assert yours == pytest.approx(right, abs=1e-3), f"{name} has strength {right}, you find {yours:.6f}"


def test_matched_beta_matches_the_gradients(exercise):
    """Near the reference, beta * gradient of `exact` is then one vector, whatever the divergence."""
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
        assert cosine > .99, f"{name}: another direction, cosine {cosine:.4f}. Is your beta positive?"
        assert ratio == pytest.approx(1, abs=.02), (
            f"{name}: at beta {beta:.4f} it pulls {ratio:.3f} times as hard as reverse_kl at .125. "
            "(A weak divergence needs a *larger* beta: divide by the strength.)")
    yours = exercise.matched_beta("js", .125)
    assert yours == pytest.approx(.5, abs=1e-3), f"js matches .125 of a KL at beta .5, you say {yours:.4f}"
