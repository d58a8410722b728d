"""python -m pytest tests/core/test_reward.py"""
import json
import random

import pytest
import torch

import reward
import train
from common.config import Fault, UserError, locate
from tiny import shapes
from tiny.judge import reader
from tiny.world import REWARDS, load_models


@pytest.fixture(scope="module")
def shown():
    """Return 10 prompts and their rendered images."""
    scenes = shapes.random_scenes(10, random.Random(21))
    return [c.text for c, _ in scenes], shapes.render([s for _, s in scenes])


@pytest.fixture(scope="module")
def judge():
    return load_models(locate("assets/tiny_base.pt"), "cpu")[2]


def test_weighted_sums(shown, judge):
    prompts, images = shown
    both = reward.weighted("judge:2, reader:0.5", {"judge": judge, "reader": reader})(images, prompts)
    assert torch.allclose(both, 2 * judge(images, prompts) + .5 * reader(images, prompts))
    assert reward.parse("judge", REWARDS) == {"judge": 1.0}


@pytest.mark.parametrize("spec", ["", "judje", "judge:", "judge:one", "judge:inf", "judge,,reader",
                                  "judge:1,judge:2"])
def test_bad_specs(spec):
    if spec == "judge:":
        assert reward.parse(spec, REWARDS) == {"judge": 1.0}
        return
    with pytest.raises(UserError):
        reward.parse(spec, REWARDS)


@pytest.mark.parametrize("broken, message", [
    (lambda images, prompts: 1 / 0, "reward 'mine' failed: ZeroDivisionError: division by zero"),
    (lambda images, prompts: images.mean(), r"for each of 10 images, \[10\], got torch.float32 \[\]"),
    (lambda images, prompts: images, r"got torch.float32 \[10, 3, 32, 32\]"),
    (lambda images, prompts: [1.] * 10, r"must return a float tensor .* \[10\], got a list"),
    (lambda images, prompts: images.mean((1, 2, 3)).numpy(), "got a ndarray"),
    (lambda images, prompts: images.mean((1, 2, 3)) * 1j, r"got torch.complex64 \[10\]")])
def test_a_broken_reward_is_named(broken, message, shown):
    prompts, images = shown
    with pytest.raises(Fault, match=message):
        reward.weighted("reader,mine:2", {"reader": reader, "mine": broken})(images, prompts)


def test_a_reward_may_edit_its_images_and_prompts(shown):
    prompts, images = shown
    before, asked = images.clone(), list(prompts)

    def vandal(images, prompts):
        prompts.clear()
        return images.zero_().sum((1, 2, 3))
    both = reward.weighted("vandal,reader", {"reader": reader, "vandal": vandal})(images, prompts)
    assert torch.equal(images, before) and prompts == asked
    assert torch.equal(both, reader(images, prompts))


def test_your_own_reward(mini_base, tmp_path, monkeypatch, small_evaluations):
    """README's section of this name: a function in REWARDS is known to --reward and is trained on."""
    def colorful(images, prompts):
        return (images - images.mean(1, keepdim=True)).abs().mean((1, 2, 3))
    run = [f"--out_dir={tmp_path / 'run'}", f"--init_from={mini_base}", "--max_steps=1", "--eval_prompts=1",
           "--eval_draws=8", "--reward=judge:1,colorful:0.5", "--device=cpu"]
    with pytest.raises(UserError, match="no reward 'colorful'; it has: judge, reader"):
        train.main(run)
    monkeypatch.setattr(reward, "REWARDS", {"colorful": colorful})
    train.main(run)
    line = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert {"reward", "reward/single"} <= set(line)
