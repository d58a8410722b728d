"""python -m pytest tests/lab/test_ablation.py

These tests check the bookkeeping and the verdicts of lab/ablation.py on csv files with known answers.
"""
import csv
import os

import pytest

import evaluate
from common import config
from common.config import UserError
from lab import ablation, sweep


@pytest.fixture
def finished(tmp_path):
    """Return a folder with csv files. The reward alone loses .1 of the reader reward. The prior alone changes
    nothing. Both together gain .2 at their own temperature, with noise .1 as well. But under its best setting
    the base is as good as the trained policies."""
    gains = {"reward only": -.1, "perceptual only": -.1, "all": .2, "all, noise .5": -.3, "calibrated": -.05}
    with open(tmp_path / "ablation.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, ablation.FIELDS)
        out.writeheader()
        for arm in ablation.ARMS:
            for seed in range(3):
                row = dict.fromkeys(ablation.FIELDS, .5) | {
                    "arm": arm, "seed": seed, "base_heldout_reward": .3, "device": "cpu", "base": "abc",
                    "heldout_reward": .3 + gains.get(arm, 0 if "noise" not in arm else .2) + .01 * (seed - 1)}
                out.writerow(row)
    with open(tmp_path / "ablation_settings.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, ablation.SETTING_FIELDS)
        out.writeheader()
        for seed in range(-1, 3):
            for i, (t, s) in enumerate(ablation.SETTINGS):
                out.writerow(dict.fromkeys(ablation.SETTING_FIELDS, .5) | {
                    "seed": seed, "temperature": t, "cfg_scale": s, "frechet": .1 * i,
                    "heldout_reward": .6 - .05 * abs(i - 3) + .01 * max(seed, 1) - .01})
    return tmp_path


def test_verdicts_say_what_was_put_in(finished, capsys):
    ablation.main([f"--csv={finished / 'ablation.csv'}", "--only=figures", "--seeds=3"])
    report = (finished / "ablation.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out and (finished / "ablation.png").stat().st_size > 10_000
    said = {(line.split(" | ")[0][2:], line.split(" | ")[1], line.split(" | ")[2]): line.split(" | ")[3:]
            for line in report.splitlines() if line.startswith("| (")}
    assert said["(i)", "reward only - base", "reader"][1] == "worse |"
    assert said["(ii)", "prior only - base", "reader"][1] == "not shown |"
    assert said["(iii)", "all - base", "reader"] == ["+0.200 [+0.190, +0.210] [+0.175, +0.225], 3 of 3",
                                                     "better |"]
    assert said["(iv)", "all, noise .1 - all", "reader"][1] == "not shown |"
    assert said["(iv)", "all, noise .5 - all", "reader"][1] == "worse |"
    assert said["(v)", "all - base, each under its best setting", "reader"][1] == "not shown |"
    assert "| base at 1.4 | 0.500 | 0.300 |" in report
    assert "| prior only | 0.500 ± 0.000 | 0.300 ± 0.010 |" in report


def test_best_is_the_largest_or_the_smallest(finished):
    rows = sweep.load(str(finished / "ablation_settings.csv"), *2 * (ablation.SETTING_FIELDS,), 3)
    assert ablation.best(rows, 2, "heldout_reward") == pytest.approx(.61)
    assert ablation.best(rows, -1, "frechet") == 0


def test_an_unfinished_csv_has_no_verdicts(finished):
    path = finished / "ablation.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="not all runs"):
        ablation.main([f"--csv={path}", "--only=figures", "--seeds=3"])
    assert not os.path.exists(finished / "ablation.md")


def test_commands_are_runs_that_train_understands():
    arms = {}
    for arm in ablation.ARMS:
        cfg, _ = config.load(evaluate.options, ablation.command((arm, 3), "out/x", "cpu")[2:])
        assert cfg.seed == 3 and cfg.algorithm == "vapi" and cfg.eval_interval == cfg.max_steps
        arms[arm] = cfg
    assert arms["all"].temperature == ablation.BROAD and arms["calibrated"].temperature == 1
    assert arms["prior only"].mse_weight == arms["prior only"].perceptual_weight == 0
    assert arms["reward only"].prior_weight == 0 < arms["prior only"].prior_weight == arms["all"].prior_weight
