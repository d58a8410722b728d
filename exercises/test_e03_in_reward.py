"""python -m pytest exercises/test_e03_in_reward.py"""
import pytest
import torch

import grpo
from divergences import DIVERGENCES, Categorical

BETA = .3


def diagnosis(yours, adv, x, beta, d):
    """Return a sentence that names the mistake, if A' shows a common one."""
    f, c = d.f(x), d.c(x)
    for value, what in (
            (c, "beta c(w): the sampled form, whose mean is not the gradient of D (see Divergence.sampled)"),
            (f, "beta f(w): f alone ignores that w depends on pi, too"),
            (f - c, "beta (f - c): c is already -w f', so it must be added"),
            (-f - c, "-beta (f + c): the sign is wrong, because a divergence is a cost")):
        if torch.allclose(yours, adv - beta * value):
            return f"You subtract {what}."
    return "The right value is A' = A - beta (f - w f'), at log w = log rho - log pi of each token."


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_same_gradient_as_the_unbiased_loss_sample_by_sample(exercise, name):
    g = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, 4, 9, generator=g, dtype=torch.float64) for _ in range(2))
    tokens, adv = torch.randint(9, (6, 4), generator=g), torch.randn(6, generator=g, dtype=torch.float64)
    logp, logp_ref = (t.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
                      for t in (logits.requires_grad_(), ref))
    shaped = exercise.shaped_advantage(adv, logp, logp_ref, BETA, name)
    assert shaped.shape == logp.shape, (
        f"A' has one value per token, so its shape is {tuple(logp.shape)}, not {tuple(shaped.shape)}")
    assert not shaped.requires_grad, "A' must be detached, because REINFORCE differentiates only log pi"
    (reinforce,) = torch.autograd.grad(-(shaped * logp).mean(), logits, retain_graph=True)
    loss, _ = grpo.loss(Categorical(logits), Categorical(ref), tokens, logp.detach(), adv, tokens.numel(),
                        divergence=name, estimator="unbiased", beta=BETA)
    (unbiased,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(reinforce, unbiased, atol=1e-10), (
        f"{name}: -A' grad log pi differs from grpo.loss(estimator='unbiased') by up to "
        f"{(reinforce - unbiased).abs().max():.1e}. "
        + diagnosis(shaped, adv[:, None], (logp_ref - logp).detach(), BETA, DIVERGENCES[name]))


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_in_expectation_it_is_the_exact_divergence(exercise, name):
    """One token over 9 codes, each with a reward. The mean over a ~ pi is a sum over all codes."""
    V, g = 9, torch.Generator().manual_seed(1)
    z, ref, adv = (torch.randn(V, generator=g, dtype=torch.float64) for _ in range(3))
    logits = z.expand(V, 1, V).clone().requires_grad_()                  # row v: code v is sampled
    tokens, pi = torch.arange(V)[:, None], z.softmax(0)[:, None, None]
    logp, logp_ref = (t.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
                      for t in (logits, ref.expand(V, 1, V)))
    shaped = exercise.shaped_advantage(adv, logp, logp_ref, BETA, name)
    (reinforce,) = torch.autograd.grad(-(shaped * logp).sum(), logits, retain_graph=True)
    loss, _ = grpo.loss(Categorical(logits), Categorical(ref.expand(V, 1, V)), tokens, logp.detach(), adv, 1,
                        divergence=name, estimator="exact", beta=BETA)
    (exact,) = torch.autograd.grad(loss, logits)
    difference = (pi * (reinforce - exact)).sum(0).abs().max()
    assert difference < 1e-10, (
        f"{name}: the mean over a ~ pi of -A' grad log pi differs by {difference:.1e} from that of "
        "grpo.loss(estimator='exact'). "
        + diagnosis(shaped, adv[:, None], (logp_ref - logp).detach(), BETA, DIVERGENCES[name]))


def test_reverse_kl_by_hand(exercise):
    logp, logp_ref = torch.tensor([[-1., -2.]], requires_grad=True), torch.tensor([[-1.5, -1.]])
    shaped = exercise.shaped_advantage(torch.tensor([2.]), logp, logp_ref, .1, "reverse_kl")
    # A' = A - beta (log pi - log rho): 2 - .1 * .5, and 2 - .1 * (-1)
    assert shaped.flatten().tolist() == pytest.approx([1.95, 2.1], abs=1e-5), (
        f"for reverse KL f - w f' = -log w, so A' = A - beta (log pi - log rho) = 1.95 and 2.1; "
        f"you give {shaped.flatten().tolist()}")
