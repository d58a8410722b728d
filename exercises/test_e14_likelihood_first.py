"""python -m pytest exercises/test_e14_likelihood_first.py"""
import itertools
import math
import random

import pytest
import torch

from tiny import shapes, text
from tiny.world import load_models

SEEN = "a red circle", "a green square", "a blue cross"
UNSEEN = "a red cross", "a green circle", "a blue triangle"


class Toy:
    """A policy of two tokens with four codes each. It ignores the prompt."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.one, self.two = torch.randn(4, generator=g), torch.randn(4, 4, generator=g)

    def __call__(self, tokens, cond, mask):
        return torch.stack([self.one.expand(len(tokens), 4), self.two[tokens[:, 0]]], 1)

    def probability(self, a, b):
        return (self.one.softmax(0)[a] * self.two[a].softmax(0)[b]).item()


def toy_costs(exercise):
    pairs = list(itertools.product(range(4), repeat=2))
    return pairs, exercise.costs(Toy(), torch.tensor(pairs), None, None)


def test_cost_of_a_sequence(exercise):
    pairs, cost = toy_costs(exercise)
    assert cost.shape == (16,), f"one number for each image: [16], yours is {list(cost.shape)}"
    right = torch.tensor([-math.log(Toy().probability(*pair)) for pair in pairs])
    assert torch.allclose(cost, right, atol=1e-5), (
        f"off by up to {(cost - right).abs().max():.4f} nat. (1/T of the right number: you took the mean "
        "over the tokens. Negative: the sign.)")
    assert torch.exp(-cost).sum().item() == pytest.approx(1, abs=1e-5)


def test_chance_is_the_sum_over_right_images(exercise):
    pairs, cost = toy_costs(exercise)
    right = torch.tensor([a == b for a, b in pairs])                       # right: both tokens are equal
    exact = math.log(sum(Toy().probability(a, a) for a in range(4)))
    yours = exercise.log_chance(cost[right], math.log(4))              # q: uniform over the 4 right images
    assert yours == pytest.approx(exact, abs=1e-5), (
        f"log p is {exact:.4f}, you give {yours:.4f}. (The mean cost in place of the mean of e^-cost gives "
        f"{math.log(4) - cost[right].mean():.4f}. Without H it is {exact - math.log(4):.4f}.)")
    far = exercise.log_chance(cost[right] + 2000, math.log(4))
    assert far == pytest.approx(exact - 2000, rel=1e-5), (
        f"with images e^-2000 times as likely, log p must fall by 2000; you give {far}. Does e^-cost "
        "underflow?")


def test_samples_until_one_is_right(exercise):
    assert exercise.samples_needed(math.log(.5), .75) == pytest.approx(2), (
        "p = 1/2: of two samples, none is right with probability 1/4, so 2 samples for s = .75")
    for log_p in (-10., -30., -100.):
        about = -math.log(.05) / math.exp(log_p)
        try:
            yours = exercise.samples_needed(log_p, .95)
        except ZeroDivisionError:
            yours = math.inf
        assert yours == pytest.approx(about, rel=1e-3), (
            f"log p = {log_p}: about {about:.3g} samples, you give {yours:.3g}. (Infinity: 1 - p was rounded "
            "to 1, whose logarithm is 0.)")


def test_unseen_pairs_are_out_of_reach(exercise):
    gpt, vqgan, _, _ = load_models("assets/tiny_base.pt", "cpu")
    rng, cost = random.Random(0), {}
    with torch.no_grad():
        for prompt in (*SEEN, *UNSEEN):
            scenes = [shapes.sample_scene(shapes.parse(prompt), rng, True) for _ in range(16)]
            tokens = vqgan.encode(shapes.render(scenes))
            cost[prompt] = exercise.costs(gpt, tokens, *text.encode([prompt] * 16))
    entropy = torch.cat([cost[p] for p in SEEN]).mean().item()
    assert 3 < entropy < 8, f"seen pairs cost 5 nat, yours {entropy:.1f}"
    for prompt in UNSEEN:
        log_p = exercise.log_chance(cost[prompt], entropy)
        share = (-cost[prompt]).softmax(0).max()
        print(f"{prompt}: {cost[prompt].mean():.1f} nat, p is about 10^{log_p / math.log(10):.1f} (one image "
              f"has {share:.0%} of the mean), {exercise.samples_needed(log_p):.1g} samples")
        assert cost[prompt].mean() > 40, f"{prompt}: about 79 nat, yours {cost[prompt].mean():.1f}"
        assert exercise.samples_needed(log_p) > 1000 * 7680, f"{prompt}: a run must be far too short for it"
