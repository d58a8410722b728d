"""python -m pytest tests/tiny/test_judge.py"""
import random

import pytest
import torch

from common.config import UserError, locate
from pretrain import near_miss
from tiny import shapes
from tiny.judge import Judge, reader
from tiny.world import load_models


@pytest.fixture(scope="module")
def world():
    """300 captions, and images that show what they say."""
    drawn = shapes.random_scenes(300, random.Random(21))
    return [c.text for c, _ in drawn], shapes.render([s for _, s in drawn])


@pytest.fixture(scope="module")
def judge():
    return load_models(locate("assets/tiny_base.pt"), "cpu")[2]


def test_reader_reward(world):
    captions, images = world
    assert reader(images, captions).tolist() == [1.0] * 300
    assert reader(images, captions[1:] + captions[:1]).mean() < .05
    with pytest.raises(UserError):
        reader(images[:1], ["a photo of a cat"])
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and 1 prompts"):
        reader(images[:2], captions[:1])


def test_judge_prefers_the_true_caption(world, judge):
    """Compare it with a random caption, and with a near miss that differs in one word."""
    captions, images = world
    rng, right = random.Random(0), judge(images, captions)
    assert right.shape == (300,) and right.abs().max() <= 1 + 1e-5
    assert (right > judge(images, captions[1:] + captions[:1])).float().mean() > .95
    assert (right > judge(images, [near_miss(c, rng) for c in captions])).float().mean() > .85


def test_reward_of_an_image_is_its_own(world, judge):
    """A reward must not depend on the rest of the batch or on its order."""
    captions, images = world
    for f in (judge, reader):
        whole = f(images[:20], captions[:20])
        assert torch.allclose(f(images[3:4], captions[3:4]), whole[3:4], atol=1e-5)
        assert torch.allclose(f(images[:20].flip(0), captions[:20][::-1]).flip(0), whole, atol=1e-5)


def test_judge_loss_is_the_sigmoid_loss_written_out():
    torch.manual_seed(0)
    judge, images = Judge(), torch.rand(3, 3, 32, 32) * 2 - 1
    captions, truth = ["a red circle", "two blue squares"], torch.tensor([[1., 0.], [0., 1.], [0., 0.]])
    total = 0
    for b in range(3):
        for n in range(2):
            cosine = judge(images[b:b + 1], captions[n:n + 1])
            sign = 1 if truth[b, n] else -1
            total += -torch.log(torch.sigmoid(sign * (judge.scale.exp() * cosine + judge.bias)))
    assert judge.loss(images, captions, truth).item() == pytest.approx(total.item() / 6, rel=1e-5)
