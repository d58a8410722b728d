"""Run: python -m pytest tests/core/test_gaussians.py

Divergences between normal distributions with one standard deviation (divergences.py).
"""
import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from divergences import DIVERGENCES, LOG2, Gaussian, GaussianJS

STD = torch.tensor([.7, .2, .05], dtype=torch.float64)
SHAPE = (4, 3, 2, 5)                                       # b, K, and actions of 2 x 5 numbers


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.fixture
def pair():
    """Return two Gaussians whose means differ by about 1.6 standard deviations, and the same for torch."""
    mean = draw(*SHAPE)
    other = mean + draw(*SHAPE, seed=1, scale=.5) * STD[:, None, None]
    ours = [Gaussian(m, STD) for m in (mean, other)]
    return *ours, *(Independent(Normal(m, STD[:, None, None].expand_as(m)), 2) for m in (mean, other))


def test_densities_and_entropies_are_those_of_torch(pair):
    pi, _, theirs, _ = pair
    actions = theirs.sample()
    assert torch.allclose(pi.log_prob(actions), theirs.log_prob(actions))
    assert torch.allclose(pi.entropy(), theirs.entropy())
    assert torch.allclose(pi.at(1, 3).log_prob(actions[:, 1:3]), theirs.log_prob(actions)[:, 1:3])


def test_kl_of_gaussians(pair):
    pi, rho, torch_pi, torch_rho = pair
    for name, expected in (("reverse_kl", kl_divergence(torch_pi, torch_rho)),
                           ("forward_kl", kl_divergence(torch_rho, torch_pi))):
        assert torch.allclose(pi.divergence(name, rho), expected)


def test_js_of_gaussians_by_monte_carlo(pair):
    pi, rho, torch_pi, torch_rho = pair

    def half(p, q, n=10000):                               # KL(p || (p + q)/2)
        torch.manual_seed(0)
        a = p.sample((n,))
        ratio = p.log_prob(a) - torch.logaddexp(p.log_prob(a), q.log_prob(a)) + LOG2
        return ratio.mean(0), ratio.std(0) / n ** .5
    (left, e1), (right, e2) = half(torch_pi, torch_rho), half(torch_rho, torch_pi)
    found = pi.divergence("js", rho)
    assert found.min() > .1 and ((found - (left + right) / 2).abs() < 5 * (e1 + e2)).all()
    assert torch.allclose(rho.divergence("js", pi), found)


def test_js_of_gaussians_near_and_far():
    q = torch.tensor([0., 1e-8, 1e-4, 1e-3], dtype=torch.float64)
    assert torch.allclose(GaussianJS.apply(q), q / 8 - q ** 2 / 64, rtol=1e-5, atol=1e-18)
    assert torch.allclose(GaussianJS.apply(q.float()).double(), q / 8 - q ** 2 / 64, rtol=2e-3, atol=1e-12)
    far = GaussianJS.apply(torch.tensor([4., 100., 1e4], dtype=torch.float64))
    assert far[0].item() == pytest.approx(.3368, abs=1e-4)
    assert (far[1:] - LOG2).abs().max() < 1e-4


def test_gradient_of_js_of_gaussians():
    q = torch.tensor([1e-3, .1, 1., 9., 50.], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GaussianJS.apply, q)
    x, density = GaussianJS.log_ratio(q)                   # autograd, where d has a derivative
    autograd = torch.autograd.grad(-(torch.log1p(torch.expm1(x) / 2) * density).sum(), q)[0]
    ours = torch.autograd.grad(GaussianJS.apply(q).sum(), q)[0]
    assert torch.allclose(ours, autograd, atol=1e-7)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(GaussianJS.apply(zero), zero)[0].item() == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_at_the_reference_all_is_zero_and_finite(name):
    mean = draw(*SHAPE).requires_grad_()
    found = Gaussian(mean, STD).divergence(name, Gaussian(mean.detach(), STD))
    found.sum().backward()
    assert not found.any() and not mean.grad.any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_unbiased_averages_to_the_gradient_of_exact(name):
    """With few components. The policy is pi, and its samples are the actions."""
    shift, std, n = torch.tensor([.3, -.2], dtype=torch.float64).requires_grad_(), STD[:1], 50000
    pi, rho = (Gaussian(m.expand(n, 1, 2), std) for m in (shift, torch.zeros(2, dtype=torch.float64)))
    actions = (pi.mean + std * draw(n, 1, 2)).detach()
    estimate = DIVERGENCES[name].unbiased(pi.log_prob(actions), rho.log_prob(actions))
    exact = pi.divergence(name, rho).mean()
    assert estimate.mean().item() == pytest.approx(exact.item(), abs=.006)
    one, two = (torch.autograd.grad(y, shift, retain_graph=True)[0] for y in (estimate.mean(), exact))
    assert torch.allclose(one, two, atol=.03)


def test_the_density_ratio_of_many_components_varies_too_much():
    """Var[w] = exp(d^2) - 1, and d^2 grows with the number of components. A mean that is off by .1 standard
    deviations in each of 512 components makes w useless: its variance is 166. In 2 components it is .02."""
    for n, deviation in ((2, .1), (512, .02), (512, .05)):
        d2, z = n * deviation ** 2, draw(10000, n)
        w = (-d2 / 2 - deviation * z.sum(1)).exp()         # rho(a) / pi(a) at samples of pi
        assert w.mean().item() == pytest.approx(1, abs=.05)
        assert w.var().item() == pytest.approx(math.expm1(d2), rel=.35)
    assert math.expm1(512 * .1 ** 2) > 160
