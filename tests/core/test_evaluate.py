"""python -m pytest tests/core/test_evaluate.py"""
import json
import math
import os

import pytest
import torch

import evaluate
import sample
import train
from common.config import UserError
from tiny import shapes
from tiny import world as tiny
from tiny.shapes import Obj, Scene


@pytest.fixture()
def opened(mini_base):
    return evaluate.open_world(evaluate.options({})(init_from=mini_base), torch.device("cpu"))


def test_entropy():
    assert tiny.entropy(["a"] * 8) == 0
    assert tiny.entropy([1, 2, 3, 4] * 16) == pytest.approx(math.log(4))


def test_open_entropy_is_always_of_64_readable_images():
    caption = shapes.parse("a red circle")
    scenes = [Scene(g, (Obj("circle", "red", s, x, 16),)) for g in ("white", "black")
              for s in ("small", "large") for x in (4, 28)] * 8
    # two backgrounds, two sizes, and two places, all equally often: three times log 2
    assert tiny.open_entropy(scenes, caption)[0] == pytest.approx(3 * math.log(2))
    bad = [Scene("grey", (), False)] * 30
    assert tiny.open_entropy(bad + scenes, caption) == (pytest.approx(3 * math.log(2)), 30)
    assert tiny.open_entropy(scenes[:63] + bad, caption) == (None, 30)


def test_kl_against_torch_distributions(opened):
    _, pipeline = opened
    policy, other = pipeline.policy, pipeline.reference
    torch.nn.init.normal_(other.output.weight, std=.3)
    prompts = ["a red circle", "two blue squares"]
    tokens, images = evaluate.sample(pipeline, policy, prompts, 3)
    assert tokens.shape == (6, 16) and images.shape == (6, 3, 32, 32)
    kl, entropy = evaluate.divergence_to(pipeline, policy, other, prompts, tokens)
    conditions = pipeline.encode([p for p in prompts for _ in range(3)])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(tokens, conditions.cond, conditions.mask))
                for m in (policy, other))
    exact = torch.distributions.kl_divergence(p, q).sum(1).mean().item()
    assert kl == pytest.approx(exact, rel=1e-4)
    assert entropy == pytest.approx(p.entropy().mean().item(), rel=1e-4)


def test_evaluation_is_fixed_by_its_seed_and_best_of_n_is_better(opened):
    world, pipeline = opened
    torch.manual_seed(0)
    first, tokens, _ = evaluate.evaluate(world, pipeline, pipeline.reference, prompts=1, draws=64)
    torch.manual_seed(1)
    again, others, _ = evaluate.evaluate(world, pipeline, pipeline.reference, prompts=1, draws=64)
    assert torch.equal(tokens, others) and str(first) == str(again)
    assert first["best_of_n_reward"] > first["reward"] and first["kl_reverse"] == first["kl_forward"] == 0
    assert {f"reward/{c}" for c in shapes.CATEGORIES} | set(world.columns) <= set(first)


def test_compare_runs_and_sample_from_one(mini_base, tmp_path, capsys, small_evaluations):
    for seed in (0, 1):
        train.main([f"--out_dir={tmp_path / str(seed)}", f"--init_from={mini_base}", f"--seed={seed}",
                    "--max_steps=1", "--eval_prompts=1", "--eval_draws=8", "--prompts_per_step=1"])
    capsys.readouterr()
    evaluate.main([str(tmp_path / "0"), str(tmp_path / "1"), "--eval_prompts=1", "--draws=8",
                   f"--picture={tmp_path / 'compare.png'}"])
    printed = capsys.readouterr().out
    assert "best of 8" in printed and "2 seeds" in printed and "±" in printed
    assert (tmp_path / "compare.png").stat().st_size > 1000
    sample.main([f"--ckpt={tmp_path / '0'}", f"--out={tmp_path / 's.png'}",
                 "--prompt=a red circle; circle circle", "--n=2", "--top_k=5"])
    printed = capsys.readouterr().out
    assert "a red circle: " in printed and "not of the grammar" in printed and (tmp_path / "s.png").exists()


def test_images_in_the_folders_of_geneval(mini_base, tmp_path, capsys, small_evaluations):
    train.main([f"--out_dir={tmp_path / 'run'}", f"--init_from={mini_base}", "--max_steps=1",
                "--eval_prompts=1", "--eval_draws=8", "--prompts_per_step=1", "--learning_rate=0.1"])
    metadata = [{"tag": "counting", "include": [{"class": "circle", "count": 2}],
                 "prompt": "two red circles"}, {"tag": "single", "prompt": "a blue square"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, metadata)))

    def save(name, ckpt=tmp_path / "run"):
        sample.main([f"--ckpt={ckpt}", f"--prompts={tmp_path / 'm.jsonl'}", "--n=3",
                     f"--save={tmp_path / name}"])
        return [(tmp_path / name / "00001" / "samples" / f"{j:04d}.png").read_bytes() for j in range(3)]
    # The policy is that of the run, not its base, and the three samples differ.
    run, base = save("run_images"), save("base_images", mini_base)
    assert run != base and len(set(run)) == 3
    assert run == save("again")
    for i, record in enumerate(metadata):
        folder = tmp_path / "run_images" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png", "0002.png"]
    with pytest.raises(UserError, match="not empty"):
        save("again")
    with pytest.raises(UserError, match="--prompts=FILE"):
        sample.main([f"--save={tmp_path / 'x'}"])
