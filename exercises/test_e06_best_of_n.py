"""python -m pytest exercises/test_e06_best_of_n.py"""
import itertools
import math

import pytest
import torch


def test_all_subsets_one_by_one(exercise):
    # the pairs of 4, 1, 2 have the maxima 4, 4, 2
    assert exercise.best_of_n(torch.tensor([4., 1., 2.]), 2) == pytest.approx(10 / 3, abs=1e-6), (
        "rewards 4, 1, 2 and n = 2: the maxima of pairs are 4, 4, 2, so the estimate is 10/3. Did you sort?")
    rewards = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[3] = rewards[5]                                                                    # a tie
    for n in range(1, 8):
        subsets = [max(s) for s in itertools.combinations(rewards.tolist(), n)]
        right, yours = sum(subsets) / len(subsets), exercise.best_of_n(rewards, n)
        assert yours == pytest.approx(right, abs=1e-9), (
            f"n = {n} of 7: the mean of the maxima of all {len(subsets)} subsets is {right:.6f}, you give "
            f"{yours:.6f}. (n = 1 is the plain mean, n = m the maximum. The ranks i count from 1.)")


def test_unbiased_and_less_noisy_than_groups(exercise):
    draws, m, n = 2000, 16, 4
    rewards = torch.rand(draws, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    yours = torch.tensor([exercise.best_of_n(r, n) for r in rewards], dtype=torch.float64)
    groups = rewards.view(draws, m // n, n).amax(2).mean(1)                                # as in evaluate.py
    right, error = n / (n + 1), yours.std().item() / draws ** .5                     # E max of n uniforms
    assert abs(yours.mean().item() - right) < 5 * error, (
        f"the best of {n} uniform numbers is {right:.4f} on average; over {draws} sets of {m} you estimate "
        f"{yours.mean():.4f} +- {error:.4f}, so your estimate is biased")
    assert yours.std() < groups.std(), (
        f"the mean over all subsets must be less noisy than that over {m // n} groups, but its std is "
        f"{yours.std():.4f}, and that of the groups is {groups.std():.4f}")


def test_kl_of_a_base_with_many_outcomes(exercise):
    """For K equally likely outcomes, ranked 1 .. K by reward, P(best of n is i) = (i/K)^n - ((i-1)/K)^n."""
    K = 20000
    edges = torch.arange(K + 1, dtype=torch.float64) / K
    for n in (1, 2, 4, 8, 64):
        p = (edges ** n).diff()
        right, yours = torch.special.xlogy(p, p * K).sum().item(), exercise.kl_of_best_of_n(n)
        assert yours == pytest.approx(right, abs=1e-3), (
            f"n = {n}: for {K} equally likely outcomes the KL is {right:.5f} nat, you give {yours:.5f}")
        few = (torch.arange(3, dtype=torch.float64) / 2) ** n                              # K = 2: many ties
        assert torch.special.xlogy(few.diff(), few.diff() * 2).sum() <= yours + 1e-12, (
            "with ties the KL is smaller than your formula, never larger")


def test_kl_by_monte_carlo(exercise):
    K, n, draws = 500, 4, 200_000
    g = torch.Generator().manual_seed(2)
    best = torch.randint(K, (draws, n), generator=g).amax(1)
    p = torch.bincount(best, minlength=K).double() / draws
    measured = torch.special.xlogy(p, p * K).sum().item() - (K - 1) / (2 * draws)    # minus the plug-in bias
    yours = exercise.kl_of_best_of_n(n)
    assert math.isclose(yours, measured, abs_tol=.01), (
        f"the best of {n} of {K} outcomes, {draws} times: the KL is {measured:.4f}, you give {yours:.4f}")
