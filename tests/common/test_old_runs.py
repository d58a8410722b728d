"""Run: python -m pytest tests/common/test_old_runs.py

tests/data/run_640fa36 was made by commit 640fa36, before options had parts and before `chunk` was renamed to
`logit_chunk`. base.pt is a small base in half precision. `run` stopped after 2 of 4 steps, with chunk = 5 and
with init_from = "base.pt", which is relative to the current folder. `whole` is the log of the same run when
that commit finished it. This version must load such a folder, resume it, evaluate it and sample from it.
"""
import json
import os
import shutil
import signal

import pytest
import torch

import evaluate
import sample
import train
from common import config, files
from common.config import UserError

OLD = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "data", "run_640fa36")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Work in a copy of the old folder, and restore the signal handlers that a run replaces."""
    for name in ("run", "whole"):
        shutil.copytree(os.path.join(OLD, name), tmp_path / name)
    shutil.copy(os.path.join(OLD, "base.pt"), tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def lines(path):
    """Return the lines of a log as dicts, without times."""
    with open(path, encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")} for text in file]


def numbers(line):
    return {k: v for k, v in line.items() if isinstance(v, float)}


def test_an_old_run_resumes_to_the_end_that_the_old_code_reached(old, capsys):
    cfg = evaluate.options_of("run")[0]
    assert (cfg.logit_chunk, cfg.init_from, cfg.max_steps) == (5, "base.pt", 4)
    world, pipeline = evaluate.open_world(cfg, torch.device("cpu"))
    base = evaluate.evaluate(world, pipeline, pipeline.reference, prompts=1, draws=64).results
    train.main(["--out_dir=run", "--resume"])
    assert "logit_chunk = 5" in capsys.readouterr().out and os.path.exists("run/table.md")
    # Another CPU rounds differently. It shows in the base's evaluation, in which nothing was trained.
    known = lines("whole/evaluations.jsonl")[0]
    same_rounding = all(base[k] == v for k, v in numbers(known).items())
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for a, b in zip(lines(f"run/{name}"), lines(f"whole/{name}"), strict=True):
            a = {key: a[key] for key in b}                     # this version may measure more
            assert a == b if same_rounding else numbers(a) == pytest.approx(numbers(b), rel=1e-3, abs=1e-4)


def test_an_old_run_is_evaluated_and_sampled(old, capsys):
    evaluate.main(["run", "--draws=64", "--eval_prompts=1", "--device=cpu", "--picture=compare.png"])
    table = capsys.readouterr().out.splitlines()
    (row,) = [line for line in table if line.startswith("| run, step 2 ")]
    assert f"| {lines('run/evaluations.jsonl')[-1]['reward']:.3f} " in row and os.path.exists("compare.png")
    hashes = []
    for ckpt in ("run", "run/ckpt.pt", "base.pt"):
        sample.main([f"--ckpt={ckpt}", "--n=4", "--device=cpu", "--out=sample.png"])
        hashes.append(capsys.readouterr().out.split("hash ")[1].split()[0])
    assert hashes[0] == hashes[1] != hashes[2]                # the run's policy, and not its base


def test_an_option_that_this_version_lacks_is_refused_if_it_changes_the_run(old):
    saved = files.load("run/ckpt.pt")
    for key, value in (("critical_tokens", True), ("score_cfg", 2.0)):
        files.save(saved | {"config": saved["config"] | {key: value}}, "run/ckpt.pt")
        with pytest.raises(config.UserError, match=f"no option '{key}' for such a run, and it was {value}"):
            train.main(["--out_dir=run", "--resume"])


def test_an_option_that_is_a_constant_now_may_stand_in_a_checkpoint():
    stored = {"world": "llamagen", "reward": "hps", "heldout_reward": "clipscore", "antialias": True}
    assert config.restore(evaluate.options, stored, "run").world == "llamagen"
    with pytest.raises(UserError, match="no option 'antialias' for such a run, and it was False"):
        config.restore(evaluate.options, stored | {"antialias": False}, "run")
    with pytest.raises(UserError, match="no option 'antialiaz'"):
        config.restore(evaluate.options, {"world": "llamagen", "antialiaz": True}, "run")
