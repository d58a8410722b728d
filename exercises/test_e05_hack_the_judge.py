"""python -m pytest exercises/test_e05_hack_the_judge.py"""
import random

import pytest
import torch
from tiny.world import load_models
from tiny.judge import reader

STEPS, BUDGET = 20, .1                           # .1 of a range of 2: 13 of 255 grey levels


@pytest.fixture(scope="module")
def wrong():
    """Return the shipped judge, 16 clean images, and for each a caption that is false by the reader."""
    from common import config
    from tiny import shapes
    judge = load_models(config.locate("assets/tiny_base.pt"), torch.device("cpu"))[2]
    pairs = shapes.random_scenes(32, random.Random(0))
    images = shapes.render([scene for _, scene in pairs])
    captions = [pairs[i - 1][0].text for i in range(32)]                       # the neighbor's
    rows = (reader(images, captions) == 0).nonzero()[:16, 0]
    return judge, images[rows], [captions[i] for i in rows]


def test_budget_is_kept(exercise, wrong):
    judge, images, captions = wrong
    before = images.clone()
    for budget in (BUDGET, .02):
        hacked = exercise.hack(judge, images, captions, 4, budget)
        assert hacked.shape == images.shape and not hacked.requires_grad, "same shape, no gradient"
        assert torch.equal(images, before), "hack must not write into the images that it gets"
        assert hacked.abs().max() <= 1, "the images must stay in [-1,1]: clamp after each step"
        change = (hacked - images).abs().max().item()
        assert change <= budget + 1e-6, f"a pixel changed by {change:.3f}, but the budget is {budget}"


def test_judge_is_convinced_and_the_reader_is_not(exercise, wrong):
    judge, images, captions = wrong
    hacked = exercise.hack(judge, images, captions, STEPS, BUDGET)
    noise = BUDGET * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    rewards = [judge(x, captions).mean().item() for x in (images, hacked, (images + noise).clamp(-1, 1))]
    read = reader(hacked, captions).mean().item()
    found = (f"judge before {rewards[0]:.3f}, after {rewards[1]:.3f}, with noise of the same size "
             f"{rewards[2]:.3f}; reader before 0, after {read:.3f}")
    print(found)
    assert rewards[1] > rewards[0] + .2, (
        f"the judge's reward should rise by .2 or more (ours rises by .43). {found}. Ascent, not descent? "
        "Does the step reach the border of the budget? Is each image compared with its own caption?")
    assert read == 0, f"the images now show their captions, so this is no hack. {found}"


def curves(steps=120, seed=0):
    """Return noise with a standard deviation of .05 for two curves, as lists."""
    g = torch.Generator().manual_seed(seed)
    return (.05 * torch.randn(2, steps, generator=g, dtype=torch.float64)).tolist()


def test_detect_finds_the_step(exercise):
    # rewards rise by .01 per step. heldout is flat until step 50, then falls by .01 per step. From t = 59 on
    # its mean over ten steps is .5 - .01 (t - 54.5). The mean of 20 steps earlier is .5 until t = 70. So the
    # fall is .045 at step 59 and .055 at step 60.
    rewards = [.01 * t for t in range(120)]
    heldout = [.5 - .01 * max(0, t - 50) for t in range(120)]
    step = exercise.detect(rewards, heldout)
    assert step == 60, (
        f"the first step is 60 by hand, you return {step}. (Means end *at* t: y[t-9] .. y[t], so the first "
        "step that can show anything is 29. 59 or less: is the margin .05 kept? 51: do means start at t?)")
    noisy = [[a + b for a, b in zip(*pair)] for pair in zip((rewards, heldout), curves())]
    step = exercise.detect(*noisy)
    assert step is not None and 50 <= step <= 75, f"with noise it shows between 50 and 75, not at {step}"


def test_detect_is_silent_where_there_is_no_hacking(exercise):
    up, down, flat = ([.5 + slope * t for t in range(120)] for slope in (.005, -.005, 0))
    for name, pair in dict(healthy=(up, up), collapse=(down, down), blind=(flat, down), trade=(down, up),
                           short=(up[:20], down[:20])).items():
        assert exercise.detect(*pair) is None, (
            f"{name}: hacking means that the reward rises *while* the held-out reward falls; you return "
            f"{exercise.detect(*pair)}")
    for seed in range(3):
        assert exercise.detect(*curves(seed=seed)) is None, (
            "these are two flat, noisy curves. Compare means over ten steps, or noise looks like hacking.")
