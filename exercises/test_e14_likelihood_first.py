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


def toy_nats(exercise):
    pairs = list(itertools.product(range(4), repeat=2))
    return pairs, exercise.nat_per_image(Toy(), torch.tensor(pairs), None, None)


def test_nat_of_a_sequence(exercise):
    pairs, nats = toy_nats(exercise)
    assert nats.shape == (16,), f"one number for each image: [16], yours is {list(nats.shape)}"
    right = torch.tensor([-math.log(Toy().probability(*pair)) for pair in pairs])
    assert torch.allclose(nats, right, atol=1e-5), (
        f"off by up to {(nats - right).abs().max():.4f} nat. (Half of the right number: you took the mean "
        "over the tokens. Negative: the sign.)")
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


def test_chance_is_the_sum_over_right_images(exercise):
    pairs, nats = toy_nats(exercise)
    right = torch.tensor([a == b for a, b in pairs])                       # right: both tokens are equal
    exact = math.log(sum(Toy().probability(a, a) for a in range(4)))
    yours = exercise.log_chance(nats[right], math.log(4))              # q: uniform over the 4 right images
    assert yours == pytest.approx(exact, abs=1e-5), (
        f"log P is {exact:.4f}, you give {yours:.4f}. (The mean of nat in place of the mean of e^-nat gives "
        f"{math.log(4) - nats[right].mean():.4f}. Without H it is {exact - math.log(4):.4f}.)")
    far = exercise.log_chance(nats[right] + 2000, math.log(4))
    assert far == pytest.approx(exact - 2000, rel=1e-5), (
        f"with images e^-2000 times as likely, log P must fall by 2000; you give {far}. Does e^-nat "
        "underflow?")


def test_samples_until_one_is_right(exercise):
    assert exercise.samples_needed(math.log(.5), .75) == pytest.approx(2), (
        "P = 1/2: of two samples, none is right with probability 1/4, so 2 samples for c = .75")
    for log_p in (-10., -30., -100.):
        about = -math.log(.05) / math.exp(log_p)
        try:
            yours = exercise.samples_needed(log_p, .95)
        except ZeroDivisionError:
            yours = math.inf
        assert yours == pytest.approx(about, rel=1e-3), (
            f"log P = {log_p}: about {about:.3g} samples, you give {yours:.3g}. (Infinity: 1 - P was rounded "
            "to 1, whose logarithm is 0.)")


def test_unseen_pairs_are_out_of_reach(exercise):
    gpt, vqgan, _, _ = load_models("assets/tiny_base.pt", "cpu")
    rng, nats = random.Random(0), {}
    with torch.no_grad():
        for kind, prompts in (("seen", SEEN), ("unseen", UNSEEN)):
            asked = [p for p in prompts for _ in range(16)]
            scenes = [shapes.sample_scene(shapes.parse(p), rng, True) for p in asked]
            nats[kind] = exercise.nat_per_image(gpt, vqgan.encode(shapes.render(scenes)), *text.encode(asked))
    entropy = nats["seen"].mean().item()
    found = {kind: exercise.log_chance(n, entropy) for kind, n in nats.items()}
    for kind in found:
        print(f"{kind}: {nats[kind].mean():.1f} nat, P is about 10^{found[kind] / math.log(10):.1f}, "
              f"{exercise.samples_needed(min(found[kind], -1e-3)):.2g} samples")
    assert 3 < nats["seen"].mean() < 8, f"seen pairs: 5 nat, yours {nats['seen'].mean():.1f}"
    assert nats["unseen"].mean() > 40, f"unseen pairs: about 70 nat, yours {nats['unseen'].mean():.1f}"
    assert abs(found["seen"]) < 1.5 and found["unseen"] < -10
