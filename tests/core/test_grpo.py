"""python -m pytest tests/core/test_grpo.py"""
import math

import pytest
import torch
from torch.nn.functional import one_hot

import grpo
from divergences import DIVERGENCES, Categorical
from grpo import advantages, policy_loss
from lab.measure import peak_bytes

ALL = [("none", "sampled")] + [(d, e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")]


def batch(B=8, T=5, V=7, seed=0, dtype=torch.float64):
    """Return logits [B,T,V] of policy and reference, tokens and logp_old [B,T], and advantages [B]."""
    g = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    logp_old = of(logits.log_softmax(-1), tokens)
    return logits.requires_grad_(), ref, tokens, logp_old, torch.randn(B, generator=g, dtype=dtype)


def of(table, tokens):
    """Return the entries of table [B,T,V] at tokens [B,T]."""
    return table.gather(-1, tokens[..., None])[..., 0]


def loss(logits, ref, *args, **options):
    return grpo.loss(Categorical(logits), Categorical(ref), *args, **options)


def test_advantages_by_hand():
    adv, zero = advantages(torch.tensor([1., 3., 5., 5.]), 2)
    # Group one has mean 2, and its standard deviation over G - 1 is sqrt(2). Group two has no spread.
    assert adv.tolist() == pytest.approx([-1 / (2 ** .5 + 1e-4), 1 / (2 ** .5 + 1e-4), 0, 0]) and zero == 1


@pytest.mark.parametrize("value", [0., .01, .1, 21.3, 27.3, -1e6])
@pytest.mark.parametrize("size", [2, 8, 12])
def test_equal_rewards_give_exactly_zero(value, size):
    """In fp32 the mean of twelve .01 is not .01. With a standard deviation of 0 and a small eps, tiny-grpo
    turned the rest into an advantage of +.085."""
    adv, zero = advantages(torch.full((2 * size,), value), size)
    assert (adv == 0).all() and zero == 2


@pytest.mark.parametrize("value, noise", [(.1, 7e-5), (21.3, 1.9e-2)])
def test_what_equal_rewards_would_give_without_the_mask(value, noise):
    """The numbers of grpo.py, for a group of 8 in fp32: rounding error of the mean, divided by eps."""
    rewards = torch.full((8,), value)
    plain = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert plain.abs().max().item() == pytest.approx(noise, rel=.07)
    assert (rewards - rewards.mean()).abs().max() < 1e-7 * value                  # and not of the size of eps


def test_advantages_do_not_depend_on_shift_and_hardly_on_scale():
    r = torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = advantages(r, 8)[0]
    assert torch.allclose(advantages(r + 5, 8)[0], base)
    assert torch.allclose(advantages(100 * r, 8)[0], base, atol=1e-2)
    assert torch.allclose(base.view(4, 8).mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_at_ratio_one_the_gradient_is_reinforce():
    logits, ref, tokens, logp_old, adv = batch()
    ours, _ = loss(logits, ref, tokens, logp_old, adv, tokens.numel(), divergence="none")
    (gradient,) = torch.autograd.grad(ours, logits)
    # REINFORCE written out: d/dz of -A log pi(a) is -A (1[a] - pi), averaged over all tokens
    by_hand = -adv[:, None, None] * (one_hot(tokens, 7) - logits.detach().softmax(-1)) / tokens.numel()
    assert torch.allclose(gradient, by_hand, atol=1e-12)
    assert ours.item() == pytest.approx(-adv.mean().item(), abs=1e-12)


@pytest.mark.parametrize("rewards", [[0., 1, 2, 3, 4, 5, 6, 7], [1e4, 1, 1, 1, -3, 0, 0, 9], [2.] * 8])
def test_at_ratio_one_the_loss_does_not_tell_the_rewards(rewards):
    """The first term is -mean(A) = 0. So the loss is beta D. Its gradient still depends on the rewards."""
    logits, ref, tokens, logp_old, _ = batch()
    adv = advantages(torch.tensor(rewards, dtype=torch.float64), 4)[0]
    free, bound = (loss(logits, ref, tokens, logp_old, adv, tokens.numel(), divergence="js", beta=b)[0]
                   for b in (0., .3))
    js = DIVERGENCES["js"].sampled(logp_old, of(ref.log_softmax(-1), tokens)).mean().item()
    assert free.item() == pytest.approx(0, abs=1e-12) and bound.item() == pytest.approx(.3 * js, abs=1e-12)
    (gradient,) = torch.autograd.grad(free, logits)
    assert bool(gradient.abs().max() > 1e-3) == (len(set(rewards)) > 1)


def test_clipping_takes_the_pessimistic_branch():
    logp_old, logp = torch.zeros(4, 1), torch.tensor([[.5], [.5], [-.5], [-.5]]).requires_grad_()
    adv = torch.tensor([1., -1., 1., -1.])
    found, ratio = policy_loss(logp, logp_old, adv, .2)
    up, down = math.exp(.5), math.exp(-.5)
    assert ratio[:, 0].tolist() == pytest.approx([up, up, down, down])
    assert found[:, 0].tolist() == pytest.approx([-1.2, up, -down, .8])
    (g,) = torch.autograd.grad(found.sum(), logp)
    assert g[0] == 0 and g[3] == 0 and g[1] != 0 and g[2] != 0            # no reward for going further out


@pytest.mark.parametrize("divergence, estimator", ALL)
def test_micro_batches_add_up(divergence, estimator):
    logits, ref, tokens, logp_old, adv = batch()
    options = dict(divergence=divergence, estimator=estimator, beta=.3, clip_eps=.1)
    noise = torch.randn(logp_old.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logp_old = logp_old + .2 * noise
    whole, stats = loss(logits, ref, tokens, logp_old, adv, tokens.numel(), **options)
    (expected,) = torch.autograd.grad(whole, logits)
    parts, total, sums = torch.zeros_like(logits), 0, {}
    for rows in torch.arange(8).split(2):
        part, some = loss(logits[rows], ref[rows], tokens[rows], logp_old[rows], adv[rows],
                          tokens.numel(), **options)
        parts, total = parts + torch.autograd.grad(part, logits)[0], total + part.detach()
        grpo.accumulate(sums, some)
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(parts, expected, rtol=1e-6)
    assert {k: v.item() for k, v in sums.items()} == pytest.approx(
        {k: v.item() for k, v in stats.items()}, rel=1e-6)


@pytest.mark.parametrize("divergence, estimator", ALL[1:])
def test_divergence_enters_with_beta(divergence, estimator):
    """loss(beta) - loss(0) is beta times the mean of the divergence, for the values and the gradients."""
    logits, ref, tokens, logp_old, adv = batch(seed=1)
    n, d = tokens.numel(), DIVERGENCES[divergence]
    free, bound = (loss(logits, ref, tokens, logp_old, adv, n, divergence=divergence, estimator=estimator,
                        beta=beta)[0] for beta in (0., .7))
    logp_all, ref_all = logits.log_softmax(-1), ref.log_softmax(-1)
    logp, logp_ref = of(logp_all, tokens), of(ref_all, tokens)
    alone = {"sampled": lambda: d.sampled(logp, logp_ref), "unbiased": lambda: d.unbiased(logp, logp_ref),
             "exact": lambda: d.exact(logp_all, ref_all)}[estimator]().mean()
    difference = torch.autograd.grad(bound - free - .7 * alone, logits)[0]
    assert (bound - free).item() == pytest.approx(.7 * alone.item(), rel=1e-9)
    assert difference.abs().max() < 1e-12


def test_statistics_against_torch_distributions():
    logits, ref, tokens, logp_old, adv = batch(seed=2)
    ref[0, 0, tokens[0, 0]] = -100.                                      # one token past the clamp
    moved = logp_old.clone()
    moved[1, 1] -= .5                                                    # one ratio of e^.5
    adv[1] = 1.
    _, stats = loss(logits, ref, tokens, moved, adv, tokens.numel(), divergence="js", beta=.1)
    p, q = (torch.distributions.Categorical(logits=z) for z in (logits.detach(), ref))
    kl = torch.distributions.kl_divergence(p, q).mean().item()
    assert stats["kl_reverse"].item() == pytest.approx(kl, rel=1e-9)
    assert stats["entropy"].item() == pytest.approx(p.entropy().mean().item(), rel=1e-9)
    assert stats["clamp_share"].item() == pytest.approx(1 / 40)
    assert stats["clip_share"].item() == pytest.approx(1 / 40)
    assert stats["max_ratio_error"].item() == pytest.approx(math.exp(.5) - 1)


def heads(B, T, D, V, dtype=torch.float64):
    """Return distributions of policy and reference, the policy's hidden states and output matrix, tokens,
    logp_old, and advantages."""
    g = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(B, T, D, generator=g, dtype=dtype) for _ in range(2))
    matrix, ref_matrix = (torch.randn(D, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    logp_old, adv = of((hidden @ matrix).log_softmax(-1), tokens), torch.randn(B, generator=g)
    leaves = hidden.requires_grad_(), matrix.requires_grad_()

    def distributions():       # made anew for each loss, because a Categorical keeps what it has computed
        return Categorical(hidden, lambda h: h @ matrix), Categorical(ref_hidden, lambda h: h @ ref_matrix)
    return distributions, leaves, tokens, logp_old, adv


@pytest.mark.parametrize("divergence, estimator", ALL)
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunks_do_not_change_loss_gradient_or_statistics(divergence, estimator, chunk):
    distributions, leaves, tokens, logp_old, adv = heads(B=6, T=7, D=3, V=11)
    options, found = dict(beta=.3, divergence=divergence, estimator=estimator), []
    for size in (0, chunk):
        ours, stats = grpo.loss(*distributions(), tokens, logp_old, adv, tokens.numel(), logit_chunk=size,
                                **options)
        found.append((ours, *torch.autograd.grad(ours, leaves), stats))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)
    whole = loss(*(d.logits for d in distributions()), tokens, logp_old, adv, tokens.numel(), **options)
    torch.testing.assert_close((found[1][0], found[1][-1]), whole, rtol=1e-6, atol=1e-12)


def test_memory_grows_with_the_chunk_not_with_the_image():
    def peak(T, chunk):
        distributions, _, tokens, logp_old, adv = heads(B=4, T=T, D=8, V=4096, dtype=torch.float32)
        return peak_bytes(lambda: grpo.loss(*distributions(), tokens, logp_old, adv, tokens.numel(),
                                            logit_chunk=chunk, beta=.3)[0].backward(), torch.device("cpu"))
    one = 4 * 8 * 4096 * 4                                               # bytes of [B,chunk,V] in fp32
    assert peak(64, 8) < 1.2 * peak(16, 8) and peak(64, 8) < 12 * one
    assert peak(64, 0) > 4 * peak(64, 8)


def test_weights_and_the_dynamic_weight_by_hand():
    """With the weights of selected tokens, the loss is the mean over these tokens, divergence included. The
    dynamic weight multiplies the policy term only."""
    logits, ref, tokens, logp_old, adv = batch()
    options = dict(divergence="js", beta=.3)
    N, mask = tokens.numel(), torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < .4
    weights = mask / mask.double().mean()
    logp, logp_ref = (of(x.log_softmax(-1), tokens) for x in (logits, ref))
    penalty = .3 * DIVERGENCES["js"].sampled(logp, logp_ref)
    x = (logp - logp_ref).clamp(-.5, .5).exp()
    running = torch.stack([x[:, :t + 1].mean(1) for t in range(x.shape[1])], 1)
    for dynamic, weight in ((False, 1), (True, running)):
        token_loss = -(logp - logp_old.detach()).exp() * adv[:, None] * weight + penalty
        expected = token_loss[mask].mean()
        ours, _ = loss(logits, ref, tokens, logp_old, adv, N, weights, dynamic=dynamic, **options)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-10)
        a, b = (torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (ours, expected))
        assert torch.allclose(a, b, atol=1e-12)
    whole, pieces = (loss(logits, ref, tokens, logp_old, adv, N, weights, logit_chunk=c, **options)[0]
                     for c in (0, 2))
    assert torch.allclose(whole, pieces, atol=1e-12)
