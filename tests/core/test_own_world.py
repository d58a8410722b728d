"""Run: python -m pytest tests/core/test_own_world.py

A world of your own: prompts, rewards and features in under 30 lines, given to train.grpo_loop. It needs no
file of tiny/ or full/. Only the models here are those of the tiny world, which need a base.
"""
import inspect
import json
import random
import signal

import pytest
import torch

import evaluate
import train
from common import config
from common.run import Run
from tiny.world import Pipeline, load_models

CPU = torch.device("cpu")


class Tint:
    """A world that asks for red and for blue images. common/interfaces.py describes what a world offers."""
    prompts = ["a red square", "a blue square"]
    columns = ["gap"]                                          # what tables show of `measure`
    images = None                                              # no real images: GRPO needs none

    def reward(self, images, prompts):
        sign = torch.tensor([1. if "red" in p else -1. for p in prompts])
        return sign * (images[:, 0] - images[:, 2]).mean((1, 2))            # [b]

    def heldout(self, images, prompts):
        return -images.std((1, 2, 3))                          # [b], higher for plainer images

    def draw(self, n):
        return random.choices(self.prompts, k=n)

    def fixed_prompts(self, n):
        return self.prompts[:n]

    def embed(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)

    def measure(self, prompts, images, rewards, base, sample):
        return {"gap": (rewards["reward"] - (base["reward"] if base else 0.)).mean().item()}

    def picture(self, path, prompts, columns):
        open(path, "w").close()                                # an image file, if you want one


@pytest.fixture
def trained(mini_base, tmp_path):
    """Train for 40 steps -> (lines of metrics.jsonl, evaluations before and after)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cfg, _ = config.load(evaluate.options, [
        f"--out_dir={tmp_path}/run", "--max_steps=40", "--eval_interval=40", "--prompts_per_step=4",
        "--learning_rate=0.01", "--beta=0.02", "--device=cpu"])
    world, (policy, vqgan, *_) = Tint(), load_models(mini_base, CPU)
    pipeline = Pipeline(policy, vqgan, CPU)

    def evaluation(model, base):
        return evaluate.evaluate(world, pipeline, model, base, prompts=2, draws=32)
    run = Run(cfg, None, pipeline.policy, pipeline.reference, CPU, evaluation,
              lambda path, columns: world.picture(path, world.prompts, columns))
    train.grpo_loop(cfg, run, world, pipeline)
    assert run.finish()
    for number, handler in before.items():
        signal.signal(number, handler)
    with open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file], run.before.results, run.after.results


def test_a_world_of_your_own_is_learned_and_logged(trained):
    lines, before, after = trained
    assert [line["step"] for line in lines] == list(range(40))
    assert max(line["max_ratio_error"] for line in lines) < 1e-4
    assert {"reward", "heldout_reward", "diversity", "kl_reverse", "entropy", "t_sample"} <= set(lines[0])
    assert after["reward"] > before["reward"] + .03               # .001 before and .094 after with seed 0
    assert after["gap"] == pytest.approx(after["reward"] - before["reward"], abs=1e-6)
    assert "| gap " in evaluate.table([("mine", after)], Tint.columns)


def test_the_world_is_shorter_than_30_lines():
    assert len(inspect.getsource(Tint).splitlines()) < 30
