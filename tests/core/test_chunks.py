"""Run: python -m pytest tests/core/test_chunks.py

Chunk-GRPO (grpo.policy_loss): consecutive actions share one ratio.
"""
import pytest
import torch

import grpo
from divergences import Categorical, Gaussian

B, T, EPS = 5, 9, .1
CHUNKS = (2, 3, 4)


def numbers(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.fixture
def pair():
    """Return logp and logp_old [B,T] of an update off the policy that sampled, and advantages [B]."""
    old = numbers(B, T) - 3
    return old + numbers(B, T, seed=1, scale=.4), old, numbers(B, seed=2)


def by_hand(logp, old, adv, chunks):
    """The published objective, with loops and products of probabilities."""
    total = 0.0
    for i in range(B):
        start = 0
        for size in chunks:
            ratio = 1.0
            for t in range(start, start + size):
                ratio *= (logp[i, t].exp() / old[i, t].exp()).item()
            ratio, a, start = ratio ** (1 / size), adv[i].item(), start + size
            total -= min(ratio * a, min(max(ratio, 1 - EPS), 1 + EPS) * a) / len(chunks) / B
    return total


@pytest.mark.parametrize("chunks", [CHUNKS, (1,) * T, (9,), (1, 8)])
def test_the_loss_is_the_published_one(chunks, pair):
    loss, ratio = grpo.policy_loss(*pair, EPS, chunks)
    assert loss.shape == ratio.shape == (B, T)
    assert loss.mean().item() == pytest.approx(by_hand(*pair, chunks))
    assert ((ratio - 1).abs() > EPS).any() and ((ratio - 1).abs() < EPS).any()     # some are clipped


def test_chunks_of_one_action_change_nothing(pair):
    for one, other in zip(grpo.policy_loss(*pair, EPS), grpo.policy_loss(*pair, EPS, (1,) * T)):
        assert torch.equal(one, other)


def test_chunks_on_the_first_pass(pair):
    """The gradient is that of single actions, each with the weight T / (J c_j)."""
    logp, _, adv = pair

    def gradient(chunks, weights):
        x = logp.clone().requires_grad_()
        loss, _ = grpo.policy_loss(x, logp, adv, EPS, chunks)
        return torch.autograd.grad((loss * weights).mean(), x)[0]
    weights = torch.tensor([T / (len(CHUNKS) * c) for c in CHUNKS for _ in range(c)], dtype=torch.float64)
    assert torch.allclose(gradient(CHUNKS, 1), gradient((), weights), atol=1e-15)
    assert not torch.allclose(gradient(CHUNKS, 1), gradient((), 1), atol=1e-3)


def test_off_the_policy_chunks_are_more_than_weights(pair):
    logp, old, adv = pair

    def gradient(chunks, weights):
        x = logp.clone().requires_grad_()
        return torch.autograd.grad((grpo.policy_loss(x, old, adv, EPS, chunks)[0] * weights).mean(), x)[0]
    weights = torch.tensor([T / (len(CHUNKS) * c) for c in CHUNKS for _ in range(c)], dtype=torch.float64)
    assert not torch.allclose(gradient(CHUNKS, 1), gradient((), weights), atol=1e-3)


def test_chunks_average_the_noise_of_the_ratio():
    """Independent noise of the log-ratios falls with the root of the size of a chunk, so few are clipped."""
    old = numbers(4000, 8)
    logp, adv = old + numbers(4000, 8, seed=1, scale=.1), torch.ones(4000, dtype=torch.float64)
    spread = [grpo.policy_loss(logp, old, adv, EPS, chunks)[1].log().std().item()
              for chunks in ((), (4, 4), (8,))]
    assert spread == pytest.approx([.1, .05, .1 / 8 ** .5], rel=.05)


def test_chunks_may_only_weigh_their_actions(pair):
    """The control of lab/chunks.py: the weights of chunks, without their shared ratio."""
    logp, old, adv = pair
    alone, ratio = grpo.policy_loss(logp, old, adv, EPS)
    weighted, same = grpo.policy_loss(logp, old, adv, EPS, CHUNKS, shared=False)
    weights = torch.tensor([T / (len(CHUNKS) * c) for c in CHUNKS for _ in range(c)])
    assert torch.equal(ratio, same) and torch.allclose(weighted, alone * weights)


def test_micro_batches_cut_no_chunk():
    batches = list(grpo.micro_batches(5, 8, 3, 4, (1, 2, 2, 3)))
    assert [(rows.tolist(), span, inside) for rows, span, inside in batches] == [
        (rows, *part) for rows in ([0, 1, 2], [3, 4])
        for part in (((0, 3), (1, 2)), ((3, 5), (2,)), ((5, 8), (3,)))]
    assert [span for _, span, _ in grpo.micro_batches(1, 5, 1, 2)] == [(0, 2), (2, 4), (4, 5)]
    assert [span for _, span, _ in grpo.micro_batches(1, 5, 1, 2, (4, 1))] == [(0, 4), (4, 5)]
    (_, span, inside), = grpo.micro_batches(1, 5, 1, 0, (4, 1))
    assert (span, inside) == ((0, 5), (4, 1))


def test_parts_of_the_actions_add_up(pair):
    """Micro-batches of actions, cut between chunks, have the loss and the gradient of the whole."""
    logp, old, adv = pair
    grads = []
    for actions in (0, 3):
        x, total = logp.clone().requires_grad_(), 0.
        for rows, (start, stop), inside in grpo.micro_batches(B, T, 2, actions, CHUNKS):
            loss, _ = grpo.policy_loss(x[rows, start:stop], old[rows, start:stop], adv[rows], EPS, inside,
                                       (T, len(CHUNKS)))
            total = total + loss.sum()
        grads.append(torch.autograd.grad(total, x)[0])
    assert torch.allclose(*grads)


@pytest.mark.parametrize("n", [32, 512])
def test_the_ratio_per_component(n):
    """Log-ratio per component: mean -q^2/2, standard deviation q/sqrt(n). Its ratio is no density ratio."""
    q, std = .3, torch.ones(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    old = Gaussian(torch.zeros(4000, 1, n, dtype=torch.float64), std)
    new = Gaussian(torch.full((4000, 1, n), q, dtype=torch.float64), std)
    actions = torch.randn(4000, 1, n, dtype=torch.float64, generator=generator)
    _, ratio = grpo.policy_loss(new.log_prob(actions), old.log_prob(actions), torch.ones(4000), EPS, per=n)
    assert ratio.log().mean().item() == pytest.approx(-q ** 2 / 2, abs=4 * q / (n * 4000) ** .5)
    assert ratio.log().std().item() == pytest.approx(q / n ** .5, rel=.05)
    assert ratio.mean() < 1


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
def test_micro_batches_add_up(kind, pair):
    """For tokens, chunks may be the rows of an image. For vectors, they are steps of a flow policy."""
    logp, old, adv = pair
    if kind == "tokens":
        pi, rho = (Categorical(numbers(B, T, 7, seed=s)) for s in (3, 4))
        actions = torch.randint(7, (B, T), generator=torch.Generator().manual_seed(5))
    else:
        std = torch.full((T,), .5, dtype=torch.float64)
        pi, rho = (Gaussian(numbers(B, T, 2, seed=s, scale=.3), std) for s in (3, 4))
        actions = numbers(B, T, 2, seed=5)
    old = pi.log_prob(actions) + numbers(B, T, seed=6, scale=.2)

    def some(rows):
        parts = (Categorical(p.hidden[rows]) if kind == "tokens" else Gaussian(p.mean[rows], p.std.flatten())
                 for p in (pi, rho))
        return grpo.loss(*parts, actions[rows], old[rows], adv[rows], B * T, divergence="js",
                         estimator="exact", beta=.3, clip_eps=EPS, chunks=CHUNKS)
    whole, stats = some(slice(None))
    parts = [some(slice(0, 2)), some(slice(2, 5))]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item())
    assert sum(found["clip_share"] for _, found in parts).item() == pytest.approx(stats["clip_share"].item())
