"""python -m pytest tests/core/test_grpo.py"""
import pytest
import torch

from lab.bench import peak_bytes

from divergences import DIVERGENCES
from grpo import advantages, chunked_loss, grpo_loss, policy_loss

ALL = [("none", "sampled")] + [(d, e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")]


def batch(B=8, T=5, V=7, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(B, T, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    logp_old = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return logits.requires_grad_(), ref, tokens, logp_old, torch.randn(B, generator=g, dtype=dtype)


def test_advantages_by_hand():
    adv, zero = advantages(torch.tensor([1., 3., 5., 5.]), 2)
    # group one: mean 2, std over G-1 is sqrt(2); group two has no spread
    assert adv.tolist() == pytest.approx([-1 / (2 ** .5 + 1e-4), 1 / (2 ** .5 + 1e-4), 0, 0]) and zero == 1


@pytest.mark.parametrize("value", [0., .01, .1, 27.3, -1e6])
def test_equal_rewards_give_exactly_zero(value):
    """In fp32 the mean of twelve .01 is not .01; with std 0 and a small eps the rest became +.085
    (tiny-grpo)."""
    adv, zero = advantages(torch.full((24,), value), 12)
    assert (adv == 0).all() and zero == 2


def test_advantages_do_not_depend_on_shift_and_hardly_on_scale():
    r = torch.rand(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = advantages(r, 8)[0]
    assert torch.allclose(advantages(r + 5, 8)[0], base)
    assert torch.allclose(advantages(100 * r, 8)[0], base, atol=1e-2)
    assert torch.allclose(base.view(4, 8).mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)


def test_at_ratio_one_the_gradient_is_reinforce():
    logits, ref, tokens, logp_old, adv = batch()
    loss, _ = grpo_loss(logits, ref, tokens, logp_old, adv, tokens.numel(), divergence="none")
    (grpo,) = torch.autograd.grad(loss, logits)
    # REINFORCE written out: d/dz of -A log pi(a) is -A (1[a] - pi), averaged over all tokens
    onehot = torch.nn.functional.one_hot(tokens, logits.shape[-1])
    by_hand = -adv[:, None, None] * (onehot - logits.detach().softmax(-1)) / tokens.numel()
    assert torch.allclose(grpo, by_hand, atol=1e-12)


def test_clipping_takes_the_pessimistic_branch():
    logp_old, logp = torch.zeros(4, 1), torch.tensor([[.5], [.5], [-.5], [-.5]]).requires_grad_()
    adv = torch.tensor([1., -1., 1., -1.])
    loss, ratio = policy_loss(logp, logp_old, adv, .2)
    up, down = torch.tensor(.5).exp().item(), torch.tensor(-.5).exp().item()
    assert loss[:, 0].tolist() == pytest.approx([-1.2, up, -down, .8])
    (g,) = torch.autograd.grad(loss.sum(), logp)
    assert g[0] == 0 and g[3] == 0 and g[1] != 0 and g[2] != 0            # no reward for going further out


@pytest.mark.parametrize("divergence, estimator", ALL)
def test_micro_batches_add_up(divergence, estimator):
    logits, ref, tokens, logp_old, adv = batch()
    kw = dict(divergence=divergence, estimator=estimator, beta=.3, clip_eps=.1)
    noise = torch.randn(logp_old.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logp_old = logp_old + .2 * noise
    whole, stats = grpo_loss(logits, ref, tokens, logp_old, adv, tokens.numel(), **kw)
    (expected,) = torch.autograd.grad(whole, logits)
    parts, total, sums = torch.zeros_like(logits), 0, {}
    for rows in torch.arange(8).split(2):
        loss, some = grpo_loss(logits[rows], ref[rows], tokens[rows], logp_old[rows], adv[rows],
                               tokens.numel(), **kw)
        parts, total = parts + torch.autograd.grad(loss, logits)[0], total + loss.detach()
        sums = {k: torch.maximum(v, sums[k]) if k == "max_ratio_error" and sums else v + sums.get(k, 0)
                for k, v in some.items()}
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(parts, expected, rtol=1e-6)
    assert {k: v.item() for k, v in sums.items()} == pytest.approx(
        {k: v.item() for k, v in stats.items()}, rel=1e-6)


@pytest.mark.parametrize("divergence, estimator", ALL[1:])
def test_divergence_enters_with_beta(divergence, estimator):
    """loss(beta) - loss(0) = beta * mean of the divergence, for the values and for the gradients."""
    logits, ref, tokens, logp_old, adv = batch(seed=1)
    n, d = tokens.numel(), DIVERGENCES[divergence]
    free, bound = (grpo_loss(logits, ref, tokens, logp_old, adv, n, divergence=divergence,
                             estimator=estimator, beta=beta)[0] for beta in (0., .7))
    logp_all, ref_all = logits.log_softmax(-1), ref.log_softmax(-1)
    logp, logp_ref = (t.gather(-1, tokens[..., None])[..., 0] for t in (logp_all, ref_all))
    alone = {"sampled": lambda: d.sampled(logp, logp_ref), "unbiased": lambda: d.unbiased(logp, logp_ref),
             "exact": lambda: d.exact(logp_all, ref_all)}[estimator]().mean()
    difference = torch.autograd.grad(bound - free - .7 * alone, logits)[0]
    assert (bound - free).item() == pytest.approx(.7 * alone.item(), rel=1e-9)
    assert difference.abs().max() < 1e-12


def test_statistics_against_torch_distributions():
    from torch.distributions import Categorical, kl_divergence
    logits, ref, tokens, logp_old, adv = batch(seed=2)
    ref[0, 0, tokens[0, 0]] = -100.                                      # one token past the clamp
    moved = logp_old.clone()
    moved[1, 1] -= .5                                                    # one ratio of e^.5
    adv[1] = 1.
    _, stats = grpo_loss(logits, ref, tokens, moved, adv, tokens.numel(), divergence="js", beta=.1)
    p, q = Categorical(logits=logits.detach()), Categorical(logits=ref)
    assert stats["kl_reverse"].item() == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-9)
    assert stats["entropy"].item() == pytest.approx(p.entropy().mean().item(), rel=1e-9)
    assert stats["clamp_share"].item() == pytest.approx(1 / 40)
    assert stats["clip_share"].item() == pytest.approx(1 / 40)
    assert stats["max_ratio_error"].item() == pytest.approx(torch.tensor(.5).exp().item() - 1)


def heads(B, T, D, V, dtype=torch.float64):
    """Hidden states and output matrices of a policy and a reference, and the rest of a batch."""
    g = torch.Generator().manual_seed(1)
    hidden, ref_hidden = (torch.randn(B, T, D, generator=g, dtype=dtype) for _ in range(2))
    matrix, ref_matrix = (torch.randn(D, V, generator=g, dtype=dtype) for _ in range(2))
    tokens = torch.randint(V, (B, T), generator=g)
    logp_old = (hidden @ matrix).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    policy = (hidden.requires_grad_(), lambda h: h @ matrix.requires_grad_())
    reference, adv = (ref_hidden, lambda h: h @ ref_matrix), torch.randn(B, generator=g)
    return policy, reference, matrix, tokens, logp_old, adv


@pytest.mark.parametrize("divergence, estimator", ALL)
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunks_do_not_change_loss_gradient_or_statistics(divergence, estimator, chunk):
    policy, reference, matrix, tokens, logp_old, adv = heads(B=6, T=7, D=3, V=11)
    found = []
    for size in (0, chunk):
        loss, stats = chunked_loss(policy, reference, tokens, logp_old, adv, tokens.numel(), chunk=size,
                                   beta=.3, divergence=divergence, estimator=estimator)
        found.append((loss, *torch.autograd.grad(loss, [policy[0], matrix]), stats))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)
    whole = grpo_loss(policy[1](policy[0]), reference[1](reference[0]), tokens, logp_old, adv, tokens.numel(),
                      beta=.3, divergence=divergence, estimator=estimator)
    torch.testing.assert_close((found[1][0], found[1][-1]), whole, rtol=1e-6, atol=1e-12)


def test_memory_grows_with_the_chunk_not_with_the_image():
    def peak(T, chunk):
        policy, reference, _, tokens, logp_old, adv = heads(B=4, T=T, D=8, V=4096, dtype=torch.float32)
        return peak_bytes(lambda: chunked_loss(policy, reference, tokens, logp_old, adv, tokens.numel(),
                                               chunk=chunk, beta=.3)[0].backward(), torch.device("cpu"))
    one = 4 * 8 * 4096 * 4                                               # bytes of [B,chunk,V] in fp32
    assert peak(64, 8) < 1.2 * peak(16, 8) and peak(64, 8) < 12 * one
    assert peak(64, 0) > 4 * peak(64, 8)


def test_selected_tokens_and_the_dynamic_weight_by_hand():
    """The loss is the mean over selected tokens, divergence included; the weight is of the policy term."""
    logits, ref, tokens, logp_old, adv = batch()
    options = dict(divergence="js", beta=.3)
    N, mask = tokens.numel(), torch.rand(tokens.shape) < .4
    selected = mask / mask.double().mean()
    logp, logp_ref = (x.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] for x in (logits, ref))
    price = .3 * DIVERGENCES["js"].sampled(logp, logp_ref)
    x = (logp - logp_ref).clamp(-.5, .5).exp()
    running = torch.stack([x[:, :t + 1].mean(1) for t in range(x.shape[1])], 1)
    for dynamic, weight in ((False, 1), (True, running)):
        token_loss = -(logp - logp_old.detach()).exp() * adv[:, None] * weight + price
        expected = token_loss[mask].mean()
        loss, _ = grpo_loss(logits, ref, tokens, logp_old, adv, N, selected, dynamic=dynamic, **options)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        a, b = (torch.autograd.grad(y, logits, retain_graph=True)[0] for y in (loss, expected))
        assert torch.allclose(a, b, atol=1e-12)
    head = dict(selected=selected, divergence="js", beta=.3)
    whole, pieces = (chunked_loss((logits, lambda h: h), (ref, lambda h: h), tokens, logp_old, adv, N,
                                  chunk=c, **head)[0] for c in (0, 2))
    assert torch.allclose(whole, pieces, atol=1e-12)
