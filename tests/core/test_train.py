"""python -m pytest tests/core/test_train.py

The loop on a base with random weights: what is tested here is that it is the loop it claims to be. That it
*learns* is tests/test_learns.py.
"""
import json
import os
import subprocess
import sys

import pytest
import torch

from common import files as checkpoint
import train
from common.config import UserError

QUICK = ["--eval_interval=3", "--eval_prompts=1", "--prompts_per_step=4", "--group_size=4",
         "--micro_batch=16", "--heldout_reward=reader", "--device=cpu"]
KEYS = {"step", "reward", "heldout_reward", "reward_std", "zero_spread", "kl_reverse", "entropy",
        "max_ratio_error", "clip_share", "clamp_share", "grad_norm",
        "t_sample", "t_reward", "t_advantage", "t_update", "t_log"}


def lines(folder, name="metrics.jsonl"):
    """The log without its times, which no two runs share."""
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(folder / name)]


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])
    return checkpoint.load(str(folder / "ckpt.pt"))


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_six_steps_are_three_and_three_bit_for_bit(mini_base, tmp_path):
    whole = go(tmp_path / "whole", mini_base, "--max_steps=6")
    half = go(tmp_path / "halves", mini_base, "--max_steps=6", "--stop_after=3")
    assert half["step"] == 3 and not (tmp_path / "halves" / "table.md").exists()
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')                           # as a kill in the middle of a step leaves it
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    rest = checkpoint.load(str(tmp_path / "halves" / "ckpt.pt"))
    for key in ("model", "optimizer", "rng", "step"):
        assert same(whole[key], rest[key]), key
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "halves", name)
    for name in ("samples_00000.png", "samples_00006.png", "before_after.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_log_has_its_keys_and_the_sampler_is_the_trained_policy(mini_base, tmp_path):
    go(tmp_path / "run", mini_base, "--max_steps=3", "--temperature=0.8", "--cfg_scale=2.0",
       "--inner_epochs=2", "--learning_rate=0.01")
    log = lines(tmp_path / "run")
    raw = json.loads(open(tmp_path / "run" / "metrics.jsonl").readline())
    assert KEYS <= set(raw) and [line["step"] for line in log] == [0, 1, 2]
    assert all(line["max_ratio_error"] < 1e-4 for line in log)             # under CFG and temperature too
    assert log[0]["kl_reverse"] == pytest.approx(0, abs=1e-6) and log[2]["kl_reverse"] > 0
    assert [e["step"] for e in lines(tmp_path / "run", "evaluations.jsonl")] == [0, 3]
    assert {"before_after.png", "curves.png", "table.md", "samples_00000.png"} <= set(
        os.listdir(tmp_path / "run"))


@pytest.mark.parametrize("divergence, estimator", [
    ("js", "sampled"), ("reverse_kl", "unbiased"), ("forward_kl", "exact")])
def test_micro_batches_do_not_change_the_step(divergence, estimator, mini_base, tmp_path):
    runs = [go(tmp_path / f"m{m}", mini_base, "--max_steps=1", f"--micro_batch={m}", *memory,
               f"--divergence={divergence}", f"--estimator={estimator}")
            for m, *memory in [(16,), (4, "--chunk=5", "--recompute")]]
    one, four = (lines(tmp_path / f"m{m}")[0] for m in (16, 4))
    for key in ("grad_norm", "kl_reverse", "entropy", "clip_share"):
        assert one[key] == pytest.approx(four[key], rel=1e-5, abs=1e-7)
    # Adam's first moment is .1 of the gradient: compare that, as its step is the same for a gradient near
    # zero or not.
    for i, state in runs[0]["optimizer"]["state"].items():
        other = runs[1]["optimizer"]["state"][i]["exp_avg"]
        assert (state["exp_avg"] - other).norm() <= 1e-5 * state["exp_avg"].norm() + 1e-9, i


def test_a_used_folder_is_refused_and_left_as_it_is(mini_base, tmp_path):
    go(tmp_path / "run", mini_base, "--max_steps=1")
    before = {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}
    with pytest.raises(UserError, match="--resume.*--out_dir"):
        go(tmp_path / "run", mini_base, "--max_steps=1")
    with pytest.raises(UserError, match="beta"):                        # another run under the old one's name
        train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--beta=0.7"])
    assert before == {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}
    with pytest.raises(UserError, match="nothing to resume"):
        train.main([f"--out_dir={tmp_path / 'none'}", "--resume"])


def test_schedules():
    cfg = train.Config(max_steps=100, warmup=.1, min_lr_ratio=.1, learning_rate=1.0)
    rates = [train.learning_rate(cfg, s) for s in range(101)]
    assert rates[0] == pytest.approx(.1) and rates[9] == rates[10] == 1 and rates[100] == pytest.approx(.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert train.ramp("constant", .4, 0, .5) == .4 and train.ramp("linear", .4, 0, .25) == pytest.approx(.3)
    assert train.ramp("cosine", .4, 0, .5) == pytest.approx(.2)
    assert train.ramp("cosine", .4, .1, 1) == pytest.approx(.1)


def test_importing_train_does_not_wait_for_matplotlib():
    """It takes longer than everything else together, and the first step does not need it."""
    code = "import sys, train; " \
           "raise SystemExit(bool({'matplotlib', 'torch._dynamo', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(train.__file__)).returncode == 0
