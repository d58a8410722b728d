"""python -m pytest exercises/test_e04_find_the_bug.py

The first test is the check at ratio 1 that people usually write, and it passes with the bug. The others fail.
"""
import pytest
import torch

from divergences import DIVERGENCES
from grpo import advantages, policy_loss

CASES = [("A > 0, r > 1 + eps", 1, 1.5), ("A > 0, r < 1 - eps", 1, .5),
         ("A < 0, r > 1 + eps", -1, 1.5), ("A < 0, r < 1 - eps", -1, .5)]


def four_cases(exercise):
    """Return loss, gradient, and |A| of the four cases. Two images with rewards 1 and 0 have
    A = +-.5 / (sqrt(.5) + 1e-4)."""
    ratio = torch.tensor([[1.5, .5], [1.5, .5]], dtype=torch.float64)
    logp_old = torch.full((2, 2), -1., dtype=torch.float64)
    logp = (logp_old + ratio.log()).requires_grad_()
    loss = exercise.grpo_loss(logp, logp_old, logp_old, torch.tensor([1., 0.]).double(), 2, divergence="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    return loss.flatten().tolist(), gradient.flatten().tolist(), .5 / (.5 ** .5 + 1e-4)


def test_at_ratio_one_it_is_reinforce(exercise):
    g = torch.Generator().manual_seed(0)
    logp = (-torch.rand(8, 5, generator=g, dtype=torch.float64) - .1).requires_grad_()
    rewards = torch.rand(8, generator=g, dtype=torch.float64)
    loss = exercise.grpo_loss(logp, logp.detach(), logp.detach(), rewards, 4, divergence="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert torch.allclose(gradient, -advantages(rewards, 4)[0][:, None].expand(8, 5), atol=1e-10), (
        "at ratio 1 the gradient with respect to log pi is -A. It was right before. What did you change?")


def test_values_of_the_four_cases(exercise):
    loss, _, a = four_cases(exercise)
    values = [(-1.2, -1.5), (-.5, -.8), (1.5, 1.2), (.8, .5)]     # -r A and -clip(r) A over |A|, worse first
    for (case, _, _), yours, (worse, better) in zip(CASES, loss, values):
        hint = (", the better value. How does multiplying by a negative A change an order?"
                if yours == pytest.approx(better * a, abs=1e-9) else "")
        assert yours == pytest.approx(worse * a, abs=1e-9), (
            f"{case}: the loss is -min(r A, clip(r) A) = {worse * a:+.4f}, the worse of the two values; "
            f"you give {yours:+.4f}{hint}")


def test_gradient_is_zero_where_it_must_be_and_nowhere_else(exercise):
    _, gradient, a = four_cases(exercise)
    for (case, sign, r), yours, zero in zip(CASES, gradient, (True, False, False, True)):
        right = 0 if zero else -sign * a * r
        why = ("r has gone far enough in the direction of A, so there must be no more to gain" if zero else
               "r has gone in the wrong direction, so it must feel the pull back")
        assert yours == pytest.approx(right, abs=1e-9), (
            f"{case}: {why}. The gradient with respect to log pi is {right:+.4f}, you give {yours:+.4f}")


def test_agrees_with_grpo_py_off_policy(exercise):
    g = torch.Generator().manual_seed(1)
    logp, logp_old, logp_ref = (-2 * torch.rand(8, 5, generator=g, dtype=torch.float64) for _ in range(3))
    rewards = torch.rand(8, generator=g, dtype=torch.float64)
    rewards[4:] = .1                                                               # a group without spread
    yours = exercise.grpo_loss(logp, logp_old, logp_ref, rewards, 4, divergence="js", beta=.5)
    adv = advantages(rewards, 4)[0]
    right = policy_loss(logp, logp_old, adv, .2)[0] + .5 * DIVERGENCES["js"].sampled(logp, logp_ref)
    wrong = (yours - right).abs() > 1e-9
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} tokens have a loss that differs from grpo.py's, "
        f"{int((wrong & (adv[:, None] < 0)).sum())} of these tokens with A < 0")
