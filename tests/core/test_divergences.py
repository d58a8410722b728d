"""python -m pytest tests/core/test_divergences.py

These tests verify every claim of divergences.py, in float64. They compare closed forms with autograd, and
values with torch.distributions. Expectations are exact sums over the vocabulary, not averages of samples.
"""
import inspect
import math
import re

import pytest
import torch
from torch.distributions import Categorical as TorchCategorical, kl_divergence

import divergences
import test_gaussians
from divergences import CLAMP, DIVERGENCES, STRENGTH, Categorical
from lab.figures import check_gradients

NAMES = list(DIVERGENCES)


def policies(vocab=200, seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(vocab, generator=g, dtype=torch.float64) * scale).requires_grad_()
    return z, (torch.randn(vocab, generator=g, dtype=torch.float64) * scale).log_softmax(0)


def grad(y, z):
    return torch.autograd.grad(y, z, retain_graph=True)[0]


@pytest.mark.parametrize("name", NAMES)
def test_exact_equals_torch_distributions(name):
    z, logq = policies()
    p, q = TorchCategorical(logits=z.detach()), TorchCategorical(logits=logq)
    m = TorchCategorical(probs=(p.probs + q.probs) / 2)
    oracle = {"reverse_kl": kl_divergence(p, q), "forward_kl": kl_divergence(q, p),
              "js": (kl_divergence(p, m) + kl_divergence(q, m)) / 2}[name]
    value = DIVERGENCES[name].exact(z.detach().log_softmax(0), logq)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_mean_of_sampled_is_the_divergence(name):
    """The values (unlike the gradients) of the sampled form are unbiased: E_pi[f(w)] = D."""
    z, logq = policies(seed=1)
    logp, d = z.detach().log_softmax(0), DIVERGENCES[name]
    mean = (logp.exp() * d.sampled(logp, logq)).sum()
    assert mean.item() == pytest.approx(d.exact(logp, logq).item(), rel=1e-10)
    assert (d.sampled(logp, logq) >= 0).all() and d.sampled(logp, logp).abs().max() < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_weight_equals_autograd_of_sampled(name):
    d, logp = DIVERGENCES[name], torch.linspace(-24, 24, 4001, dtype=torch.float64, requires_grad=True)
    auto = grad(d.sampled(logp, torch.zeros_like(logp)).sum(), logp)
    weight = d.weight(-logp.detach())
    assert torch.allclose(auto, weight, rtol=1e-9, atol=1e-12)
    assert (weight[logp.abs() > CLAMP] == 0).all() and (weight[(logp.abs() < CLAMP) & (logp != 0)] != 0).all()


def test_limits_and_peaks_of_c():
    """Limits and peaks of c(w), computed independently of this code."""
    x = torch.linspace(-12, 6, 200001, dtype=torch.float64)
    w = x.exp()
    forward, js = DIVERGENCES["forward_kl"].weight(x), DIVERGENCES["js"].weight(x)
    assert forward.max() == pytest.approx(1 / math.e, abs=1e-8)
    assert w[forward.argmax()] == pytest.approx(1 / math.e, rel=1e-3)
    assert js.max() == pytest.approx(.116, abs=5e-4) and w[js.argmax()] == pytest.approx(.302, abs=2e-3)
    assert DIVERGENCES["reverse_kl"].weight(x)[0] == pytest.approx(1, abs=1e-4)                # w -> 0
    assert (js / w)[-1] == pytest.approx(-math.log(2) / 2, rel=1e-2)                           # w -> infinity


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_unbiased_averages_to_the_gradient_of_exact(name, seed):
    z, logq = policies(seed=seed)
    logp, d = z.log_softmax(0), DIVERGENCES[name]
    mean = grad((logp.detach().exp() * d.unbiased(logp, logq)).sum(), z)
    assert (mean - grad(d.exact(logp, logq), z)).abs().max() < 1e-6
    # The sampled form's mean gradient is another one, which is the main finding of divergences.py.
    mean = grad((logp.detach().exp() * d.sampled(logp, logq)).sum(), z)
    assert (mean - grad(d.exact(logp, logq), z)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_unbiased_off_policy(name):
    """For samples of an older policy, and with logp_old given, the mean gradient is that of `exact`."""
    z, logq = policies(seed=5)
    old = policies(seed=6)[0].detach().log_softmax(0)
    logp, d = z.log_softmax(0), DIVERGENCES[name]
    mean = grad((old.exp() * d.unbiased(logp, logq, old)).sum(), z)
    assert (mean - grad(d.exact(logp, logq), z)).abs().max() < 1e-6


def test_sampled_forms_descend_another_function():
    """E_pi[c(w) s] = grad E_rho[U(x)], where U has a closed form. check_gradients integrates U for js."""
    z, logq = policies(seed=2)
    logp = z.log_softmax(0)
    for name, u in (("reverse_kl", lambda x: x), ("forward_kl", lambda x: x ** 2 / 2)):
        mean = grad((logp.detach().exp() * DIVERGENCES[name].sampled(logp, logq)).sum(), z)
        assert (mean - grad((logq.exp() * u(logq - logp)).sum(), z)).abs().max() < 1e-8
    forward = grad(DIVERGENCES["forward_kl"].exact(logp, logq), z)          # k3 descends the *forward* KL
    k3 = grad((logp.detach().exp() * DIVERGENCES["reverse_kl"].sampled(logp, logq)).sum(), z)
    assert (k3 - forward).abs().max() < 1e-12


@pytest.mark.parametrize("name, u", [("reverse_kl", lambda x: 1 - math.exp(-x)), ("forward_kl", lambda x: x),
                                     ("js", lambda x: math.log(2 / (1 + math.exp(-x))) / 2)])
def test_force_on_a_token_of_the_reference(name, u):
    for x in (-3., -.5, 0., .5, 3.):
        c = DIVERGENCES[name].weight(torch.tensor(x, dtype=torch.float64)).item()
        assert -c / math.exp(x) == pytest.approx(u(x), abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_in_a_logit(name):
    z, logq = policies(seed=4)
    logp, d = z.log_softmax(0), DIVERGENCES[name]
    pi, rho, c = logp.detach().exp(), logq.exp(), d.weight((logq - logp).detach())
    auto = grad((pi * d.sampled(logp, logq)).sum(), z)
    force = -c * pi / rho                                                            # U'
    assert (auto - pi * (c - (pi * c).sum())).abs().max() < 1e-14
    assert (auto - (pi * (rho * force).sum() - rho * force)).abs().max() < 1e-14


def test_how_far_the_sampled_gradient_is_off():
    """The error of sampled reverse KL, relative to the length of the exact gradient, at a given KL in nat."""
    def off(z, logq):
        z = z.detach().requires_grad_()
        logp, d = z.log_softmax(0), DIVERGENCES["reverse_kl"]
        exact = grad(d.exact(logp, logq), z)
        return ((grad((logp.detach().exp() * d.sampled(logp, logq)).sum(), z) - exact).norm() / exact.norm())

    def moved(logq, direction, kl):
        low, high = 0., 20.
        for _ in range(60):
            middle = (low + high) / 2
            near = DIVERGENCES["reverse_kl"].exact((logq + middle * direction).log_softmax(0), logq) < kl
            low, high = (middle, high) if near else (low, middle)
        return logq + low * direction
    pairs = [(policies(seed=2 * s, vocab=64)[1], policies(seed=2 * s + 1, vocab=64, scale=1.)[0].detach())
             for s in range(20)]
    for kl, share in ((.1, .25), (.01, .08)):                             # all tokens, in a random direction
        mean = sum(off(moved(logq, direction, kl), logq) for logq, direction in pairs) / 20
        assert mean.item() == pytest.approx(share, rel=.15), (kl, mean)
    rare = torch.full((64,), 1., dtype=torch.float64).index_fill_(0, torch.tensor(0), .064).log_softmax(0)
    one = torch.zeros(64, dtype=torch.float64).index_fill_(0, torch.tensor(0), 1.)
    assert off(moved(rare, one, .1), rare) > .6                           # one token of probability .001


@pytest.mark.parametrize("name, g", [("reverse_kl", lambda w: -math.log(w)), ("forward_kl", lambda w: 1 - w),
                                     ("js", lambda w: -math.log((1 + w) / 2) / 2)])
def test_g_in_closed_form(name, g):
    d = DIVERGENCES[name]
    for w in (.01, .3, 1., 2., 50.):
        x = torch.tensor(math.log(w), dtype=torch.float64)
        assert (d.f(x) + d.c(x)).item() == pytest.approx(g(w), abs=1e-12)


def test_unbiased_forward_kl_is_sampled_reverse_kl():
    """Two of the nine forms are one method: their gradients agree token by token, not only on average."""
    logp = torch.linspace(-8, -.1, 100, dtype=torch.float64, requires_grad=True)
    logq = logp.detach().flip(0)
    a = grad(DIVERGENCES["forward_kl"].unbiased(logp, logq).sum(), logp)
    b = grad(DIVERGENCES["reverse_kl"].sampled(logp, logq).sum(), logp)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)
    # The values differ, however, and off policy the gradients differ, too.
    assert (DIVERGENCES["forward_kl"].unbiased(logp, logq)
            - DIVERGENCES["reverse_kl"].sampled(logp, logq)).abs().max() > 1
    off = grad(DIVERGENCES["forward_kl"].unbiased(logp, logq, logp.detach() + .1).sum(), logp)
    assert (off - b).abs().max() > .1


@pytest.mark.parametrize("name", NAMES)
def test_what_per_token_leaves_out(name):
    """Two tokens of three codes, summed over all nine sequences. The gradient of E_pi[D_1 + D_2] is the
    gradient with a fixed prefix plus the further term. Only for reverse_kl is the sum the divergence of
    sequences."""
    z, logq = (x.view(4, 3) for x in (policies(12, seed=7)[0], policies(12, seed=8)[0].detach()))
    logp, logq, d = z.log_softmax(-1), logq.log_softmax(-1), DIVERGENCES[name]
    first, later = d.exact(logp[0], logq[0]), d.exact(logp[1:], logq[1:])           # later [3], by prefix
    total = grad(first + (logp[0].exp() * later).sum(), z)
    fixed = grad(first + (logp[0].detach().exp() * later).sum(), z)
    further = grad((logp[0].detach().exp() * logp[0] * later.detach()).sum(), z)    # E_pi[s_1 D_2]
    assert (total - fixed - further).abs().max() < 1e-12 and further.abs().max() > 1e-3
    joint = d.exact((logp[0][:, None] + logp[1:]).flatten(), (logq[0][:, None] + logq[1:]).flatten())
    gap = (first + (logp[0].exp() * later).sum() - joint).abs().item()
    assert gap < 1e-12 if name == "reverse_kl" else gap > 1e-3


def test_k1_as_a_loss_has_no_gradient_and_k2_is_exact_reverse_kl():
    z, logq = policies(seed=3)
    logp = z.log_softmax(0)
    pi, x = logp.detach().exp(), logq - logp
    assert grad((pi * -x).sum(), z).abs().max() < 1e-15
    k2 = grad((pi * x ** 2 / 2).sum(), z)
    assert (k2 - grad(DIVERGENCES["reverse_kl"].exact(logp, logq), z)).abs().max() < 1e-12


@pytest.mark.parametrize("name, curvature", [("reverse_kl", 1), ("forward_kl", 1), ("js", .25)])
def test_strength_at_the_reference(name, curvature):
    """D(rho + eps) = curvature/2 * chi^2, and STRENGTH is 1 / curvature."""
    assert STRENGTH[name] == 1 / curvature
    _, logq = policies(seed=4)
    step = torch.randn(len(logq), generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    logp = (logq + step).log_softmax(0)
    chi2 = ((logp.exp() - logq.exp()) ** 2 / logq.exp()).sum()
    assert (DIVERGENCES[name].exact(logp, logq) / chi2 * 2).item() == pytest.approx(curvature, rel=1e-3)


@pytest.mark.parametrize("name, order2, at_04, at_1", [
    ("reverse_kl", -1 / 2, (.18, .23), (.37, .72)), ("forward_kl", 0, (0, 0), (0, 0)),
    ("js", -1 / 4, (.10, .10), (.24, .24))])
def test_strength_further_out(name, order2, at_04, at_1):
    """STRENGTH times the force U' of the sampled form is x + order2 x^2 + .. Further out it differs from x by
    the shares that divergences.py states, for x > 0 and for x < 0."""
    def force(x):
        weight = DIVERGENCES[name].weight(torch.tensor(x, dtype=torch.float64)).item()
        return -STRENGTH[name] * weight / math.exp(x)
    for x in (.1, -.1):
        assert force(x) == pytest.approx(x + order2 * x * x, abs=1e-4 if name == "js" else 2e-4)
    for x, shares in ((.4, at_04), (1., at_1)):
        for signed, share in zip((x, -x), shares):
            assert abs(1 - force(signed) / signed) == pytest.approx(share, abs=.005)
    for x in (-1., -.4, .4, 1.):                                                # js lies between the KLs
        js, reverse_kl = (-STRENGTH[n] * DIVERGENCES[n].c(torch.tensor(x)) / math.exp(x)
                          for n in ("js", "reverse_kl"))
        assert reverse_kl < js < x


def test_js_is_bounded_and_finite_far_out():
    far = torch.tensor([0., -60.]).log_softmax(0), torch.tensor([-60., 0.]).log_softmax(0)
    assert DIVERGENCES["js"].exact(*far).item() == pytest.approx(math.log(2), rel=1e-5)
    x = torch.tensor([-1e4, -88., 0., 88., 1e4], requires_grad=True)
    for d in DIVERGENCES.values():
        value = d.sampled(-x, torch.zeros_like(x))
        assert value.isfinite().all() and grad(value.sum(), x).isfinite().all()
        assert d.weight(x).isfinite().all()


def test_all_gradients_are_as_claimed():
    errors = check_gradients(vocab=30, seed=9)
    assert len(errors) == 12 and max(errors.values()) < 1e-8


# ---- Categorical -------------------------------------------------------------------------------------------
def logits_and_tokens(rows=None):
    """Logits [3,5,11] of policy and reference, tokens [b,5], b = 3 or the number of rows."""
    g = torch.Generator().manual_seed(11)
    logits, ref = torch.randn(2, 3, 5, 11, generator=g, dtype=torch.float64).unbind()
    return logits, ref, torch.randint(11, (3 if rows is None else len(rows), 5), generator=g)


def test_categorical_equals_torch_distributions():
    logits, ref, tokens = logits_and_tokens()
    p, q = Categorical(logits), Categorical(ref)
    torch_p, torch_q = TorchCategorical(logits=logits), TorchCategorical(logits=ref)
    torch_m = TorchCategorical(probs=(torch_p.probs + torch_q.probs) / 2)
    assert torch.allclose(p.log_prob(tokens), torch_p.log_prob(tokens), atol=1e-14)
    assert torch.allclose(p.entropy(), torch_p.entropy(), atol=1e-14)
    assert torch.allclose(p.divergence("reverse_kl", q), kl_divergence(torch_p, torch_q), atol=1e-14)
    assert torch.allclose(p.divergence("forward_kl", q), kl_divergence(torch_q, torch_p), atol=1e-14)
    assert torch.allclose(p.divergence("js", q), atol=1e-14, other=(
        kl_divergence(torch_p, torch_m) + kl_divergence(torch_q, torch_m)) / 2)


@pytest.mark.parametrize("rows", [None, [2, 0, 0, 1]])
def test_categorical_equals_the_plain_formulas_bit_for_bit(rows):
    """In fp32, values and gradients, also where several samples share a row of the logits."""
    rows = None if rows is None else torch.tensor(rows)
    logits, ref, tokens = logits_and_tokens(rows)
    logits, ref = logits.float().requires_grad_(), ref.float()
    own = torch.arange(3) if rows is None else rows
    logp, logq = logits.log_softmax(-1), ref.log_softmax(-1)
    pi, p, q = logp.exp(), Categorical(logits, rows=rows), Categorical(ref, rows=rows)
    plain = [logp[own[:, None], torch.arange(5), tokens], -(pi * logp).sum(-1)[own],
             (pi * (logp - logq)).sum(-1)[own]] + [d.exact(logp, logq)[own] for d in DIVERGENCES.values()]
    ours = [p.log_prob(tokens), p.entropy(), p.divergence("reverse_kl", q)] + [
        p.divergence(name, q) for name in NAMES]
    weights = torch.randn(len(own), 5, generator=torch.Generator().manual_seed(12))
    for a, b in zip(plain, ours):
        assert a.shape == b.shape == (len(own), 5) and torch.equal(a, b)
        assert torch.equal(grad((a * weights).sum(), logits), grad((b * weights).sum(), logits))
    assert torch.equal(ours[0], logp[own].gather(-1, tokens[..., None])[..., 0])


def test_categorical_computes_logits_on_first_use_and_once():
    logits, ref, tokens = logits_and_tokens()
    seen = []

    def head(hidden):
        seen.append(tuple(hidden.shape))
        return hidden * 2
    whole = Categorical(logits, head)
    part = whole.at(1, 3)
    assert not seen
    part.entropy(), part.log_prob(tokens[:, 1:3]), part.divergence("js", Categorical(ref[:, 1:3]))
    assert seen == [(3, 2, 11)]                                     # the part alone, a single time
    assert torch.equal(part.logp, (logits[:, 1:3] * 2).log_softmax(-1))
    whole.entropy()
    assert seen == [(3, 2, 11), (3, 5, 11)]


def test_parts_of_a_categorical_give_the_whole():
    rows = torch.tensor([1, 1, 2, 0])
    logits, ref, tokens = logits_and_tokens(rows)
    p, q = Categorical(logits, lambda h: 3 * h, rows), Categorical(ref, rows=rows)
    parts = [(p.at(i, i + 2), q.at(i, i + 2), tokens[:, i:i + 2]) for i in (0, 2, 4)]
    for f in (lambda p, q, t: p.log_prob(t), lambda p, q, t: p.entropy(),
              lambda p, q, t: p.divergence("js", q)):
        assert torch.equal(torch.cat([f(*part) for part in parts], 1), f(p, q, tokens))


def test_every_test_named_in_divergences_is_there():
    source = inspect.getsource(divergences)
    named = set(re.findall(r"test_\w+", source)) - {"test_divergences", "test_name"}
    assert len(named) >= 9 and named <= {*globals(), *vars(test_gaussians)}
    for part in (divergences, *(getattr(divergences.Divergence, m)
                                for m in ("weight", "sampled", "unbiased", "exact"))):
        assert "[test_" in part.__doc__
