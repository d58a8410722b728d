"""Run: python -m pytest tests/tiny/test_world.py          (-m slow: the fixed images, 3 seconds)

What docs/results.md says about the prompts and images of every evaluation: which of them are training data.
"""
import random

import pytest
import torch

import evaluate
from common import config
from common.config import UserError
from pretrain import Config
from tiny import shapes, world


def test_fixed_prompts_are_training_prompts():
    pools, prompts = [shapes.captions(category) for category in shapes.CATEGORIES], world.fixed_prompts(3)
    assert len(prompts) == 15 and set(prompts) <= {prompt for pool in pools for prompt in pool}
    share = sum(sum(p in pool for p in prompts) / len(pool) for pool in pools) / len(pools)   # of all draws
    assert share == pytest.approx(.127, abs=5e-4)
    assert not set(world.fixed_prompts(3, unseen=True)) & {prompt for pool in pools for prompt in pool}


def test_categories_may_be_held_out_of_training(mini_base):
    """--categories names what is trained on, and `transfer` is the held-out reward in the others."""
    chosen = "('single', 'two')"
    cfg, _ = config.load(evaluate.options, [f"--init_from={mini_base}", f"--categories={chosen}"])
    made, pipeline = evaluate.open_world(cfg, torch.device("cpu"))
    random.seed(0)
    assert {shapes.parse(p).category for p in made.draw(200)} == {"single", "two"}
    prompts = made.fixed_prompts(1)
    rewards = {"heldout_reward": torch.tensor([[.1], [.2], [.3], [.4], [.8]])}   # in their order
    asked = prompts, torch.zeros(5, 3, 32, 32), rewards, None, lambda p, n: torch.zeros(len(p) * n, 3, 32, 32)
    found = made.measure(*asked)
    assert found["transfer"] == pytest.approx((.3 + .4 + .8) / 3) and made.columns[0] == "transfer"
    cfg, _ = config.load(evaluate.options, [f"--init_from={mini_base}"])
    whole, _ = evaluate.open_world(cfg, pipeline.device)
    assert "transfer" not in whole.columns and "transfer" not in whole.measure(*asked)
    with pytest.raises(UserError, match="--categories must be some of"):
        config.load(evaluate.options, ["--categories=('singel',)"])


@pytest.mark.slow
def test_most_fixed_images_were_seen_in_pretraining():
    rng = random.Random(Config.seed)                                       # as in pretrain.main
    shapes.random_scenes(Config.scenes // 2, rng, allow_unseen=True)
    seen = {scene for _, scene in shapes.random_scenes(Config.scenes, rng)}
    captions, images = world.Images(0, None, torch.device("cpu")).fixed_images()
    scenes = [scene for _, scene in shapes.random_scenes(len(captions), random.Random(4321))]
    assert torch.equal(images, shapes.render(scenes))
    assert (len(scenes), sum(scene in seen for scene in scenes)) == (128, 78)
