"""python -m pytest exercises/test_e02_alpha.py"""
import functools

import pytest
import torch

from divergences import DIVERGENCES, Divergence

VALUES = (-1., 0., .3, .5, 1., 2.)


def member(exercise, a):
    """Return the student's three functions at one a, as a Divergence."""
    return Divergence(*(functools.partial(g, a=a) for g in (exercise.f, exercise.c, exercise.exact)))


def policies(vocab=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, logq = (torch.randn(vocab, generator=g, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), logq.log_softmax(0)


def test_members_that_have_a_name(exercise):
    z, logq = policies()
    logp = z.detach().log_softmax(0)
    p, q = logp.exp(), logq.exp()
    named = {.5: ("2 sum (sqrt pi - sqrt rho)^2", 2 * (p.sqrt() - q.sqrt()).square().sum()),
             2.: ("1/2 sum (rho - pi)^2 / pi", ((q - p) ** 2 / p).sum() / 2),
             -1.: ("1/2 sum (rho - pi)^2 / rho", ((q - p) ** 2 / q).sum() / 2)}
    for a, (name, value) in named.items():
        yours = exercise.exact(logp, logq, a)
        assert yours.item() == pytest.approx(value.item(), rel=1e-9), (
            f"a = {a}: D is {name} = {value:.6f}; your exact gives {yours:.6f}")
    for a in VALUES:
        mean, yours = (p * exercise.f(logq - logp, a)).sum(), exercise.exact(logp, logq, a)
        many = exercise.exact(torch.stack([logp, logq]), torch.stack([logq, logq]), a)
        assert many.tolist() == pytest.approx([yours.item(), 0], abs=1e-9), (
            "exact sums over the last axis alone: [2,V] -> [2], one value for each token of a batch")
        assert yours.item() == pytest.approx(mean.item(), rel=1e-9), (
            f"a = {a}: your exact is {yours:.6f}, but the mean of your f under pi is {mean:.6f}")
        mirror = exercise.exact(logq, logp, 1 - a)
        assert yours.item() == pytest.approx(mirror.item(), rel=1e-9), (
            f"a = {a}: D_a(pi, rho) = D_(1-a)(rho, pi), but you have {yours:.6f} and {mirror:.6f}")


def test_limits_are_the_kls(exercise):
    x = torch.linspace(-4, 3, 141, dtype=torch.float64)
    for a, name, other in ((0., "reverse_kl", "forward_kl"), (1., "forward_kl", "reverse_kl")):
        for part in ("f", "c"):
            near = getattr(exercise, part)(x, a + 1e-6)
            yours = getattr(exercise, part)(x, a)
            right, swapped = (getattr(DIVERGENCES[n], part)(x) for n in (name, other))
            assert not torch.allclose(yours, swapped), (
                f"a = {a:.0f}: your {part} is that of {other}. Swap the two limits: at a = {a + 1e-6} "
                f"and x = {x[0]:.0f} your own formula gives {near[0]:.4f}, and {name} {right[0]:.4f}")
            assert torch.allclose(near, right, rtol=1e-4, atol=1e-5), (
                f"a = {a + 1e-6}: {part} should be close to that of {name}; at x = {x[0]:.0f} you give "
                f"{near[0]:.5f} and {name} is {right[0]:.5f}")
            assert torch.allclose(yours, right, rtol=1e-10, atol=1e-10), (
                f"a = {a:.0f}: return the limit, which is {part} of {name}; at x = {x[0]:.0f} you return "
                f"{yours[0]:.5f}, not {right[0]:.5f}")
        z, logq = policies()
        logp = z.detach().log_softmax(0)
        assert exercise.exact(logp, logq, a).item() == pytest.approx(
            DIVERGENCES[name].exact(logp, logq).item(), rel=1e-9), f"a = {a:.0f}: exact is that of {name}"


@pytest.mark.parametrize("a", VALUES)
def test_c_is_the_gradient_of_sampled(exercise, a):
    logp = torch.linspace(-5, 5, 201, dtype=torch.float64, requires_grad=True)                # rho = 1
    d = member(exercise, a)
    (auto,) = torch.autograd.grad(d.sampled(logp, torch.zeros_like(logp)).sum(), logp)
    yours = d.weight(-logp.detach())
    worst = ((yours - auto).abs() / (1 + auto.abs())).argmax()
    assert torch.allclose(yours, auto, rtol=1e-8, atol=1e-10), (
        f"your c(w) is not -w f'(w): at a = {a}, log w = {-logp[worst]:.2f} autograd through f gives "
        f"{auto[worst]:.6f}, you give {yours[worst]:.6f}")


@pytest.mark.parametrize("a", VALUES)
def test_mean_of_unbiased_is_the_gradient_of_exact(exercise, a):
    z, logq = policies(seed=1)
    logp, d = z.log_softmax(0), member(exercise, a)
    mean = (logp.detach().exp() * d.unbiased(logp, logq)).sum()
    (mean,) = torch.autograd.grad(mean, z, retain_graph=True)
    (exact,) = torch.autograd.grad(d.exact(logp, logq), z)
    assert (mean - exact).abs().max() < 1e-8, (
        f"a = {a}: E_pi[unbiased] and exact differ in their gradients by {(mean - exact).abs().max():.1e}")
    pi, force = logp.detach().exp(), (d.f(logq - logp) + d.c(logq - logp)).detach()         # g = f - w f'
    assert (pi * (force - (pi * force).sum()) - exact).abs().max() < 1e-8, (
        f"a = {a}: dD/dz = pi (g - E_pi[g]) with g = f + c does not hold, so c does not belong to f")
