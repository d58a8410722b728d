"""python -m pytest tests/core/test_reward.py"""
import random

import pytest
import torch

import reward
from tiny import shapes
from common.config import UserError, locate
from tiny.world import load_models
from tiny.judge import reader


@pytest.fixture(scope="module")
def world():
    drawn = shapes.random_scenes(300, random.Random(21))
    return [c.text for c, _ in drawn], shapes.render([s for _, s in drawn])


@pytest.fixture(scope="module")
def judge():
    return load_models(locate("assets/tiny_base.pt"), "cpu")[2]


def test_weighted_sums(world, judge):
    captions, images = world[0][:10], world[1][:10]
    both = reward.build(reward.parse("judge:2, reader:0.5"), {"judge": judge, "reader": reader})(
        images, captions)
    assert torch.allclose(both, 2 * judge(images, captions) + .5 * reader(images, captions))
    assert reward.parse("judge") == {"judge": 1.0}


@pytest.mark.parametrize("spec", ["", "judje", "judge:", "judge:one", "judge,,reader"])
def test_bad_specs(spec):
    if spec == "judge:":
        assert reward.parse(spec) == {"judge": 1.0}
        return
    with pytest.raises(UserError):
        reward.parse(spec)
