"""Run: python -m pytest tests/lab/test_reports.py

The verdicts of lab/chunks.py, lab/baselines.py and lab/long_frontier.py on csv files with known answers."""
import csv

import pytest

import evaluate
from common import config
from common.config import UserError, locate
from lab import baselines, chunks, frontier, long_frontier


def write(path, lab, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, lab.FIELDS)
        out.writeheader()
        for row in rows:
            out.writerow(dict.fromkeys(lab.FIELDS, .5) | {"device": "cpu", "base": "abc"} | row)


def said(path):
    """Return {(claim, difference of, in): [intervals, verdict]} of a report."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text(encoding="utf-8").splitlines()
             if line.startswith("| (") or line.startswith("| goal")]
    return {tuple(line[:3]): line[3:] for line in lines}


def test_chunks_say_what_was_put_in(tmp_path, capsys):
    gains = {"chunk": .05, "elbo": -.1, "js 0.05": -.03, "one update, equal": -.02}
    kept = {"none": .8, "js 0.05": float("nan")}                    # NaN: too few readable images
    rows = [{"arm": arm, "seed": s, "base_heldout_reward": .3, "entropy_kept": kept.get(arm, .9),
             "heldout_reward": .42 + gains.get(arm, 0) + .01 * s} for s in range(3) for arm in chunks.ARMS]
    path = tmp_path / "chunks.csv"
    write(path, chunks, rows[:2 * len(chunks.ARMS) - 1])
    with pytest.raises(UserError, match="no two seeds with all arms"):
        chunks.main([f"--csv={path}", "--only=figures"])
    write(path, chunks, rows)
    chunks.main([f"--csv={path}", "--only=figures"])
    found = said(tmp_path / "chunks.md")
    assert found["(i)", "chunk - step", "heldout_reward"] == [
        "+0.050 [+0.050, +0.050] [+0.050, +0.050], 3 of 3", "more"]
    assert found["(ii)", "chunk - step, weighted", "heldout_reward"][1] == "more"
    assert found["(iv)", "elbo - step", "heldout_reward"][1] == "less"
    assert found["(vi)", "js 0.05 - config", "heldout_reward"][1] == "less"
    assert found["(vi)", "js 0.2 - kl 0.2", "heldout_reward"][1] == "not shown"
    assert found["(vi)", "js 0.05 - config", "entropy_kept"] == ["3 not measurable", "not shown"]
    assert found["(vii)", "config - none", "entropy_kept"][1] == "more"
    assert found["goal: +.10", "config - base", "heldout_reward"][0].startswith("+0.130")
    assert "| chunk | 0.500" in capsys.readouterr().out and (tmp_path / "chunks.png").stat().st_size > 10_000


def test_baselines_say_what_was_put_in(tmp_path, capsys, monkeypatch):
    """GRPO with AdamW: a frontier of gains .1 and .15 at 90 and 80 % kept. AWR has the same. Muon gains .05
    more. Four times the samples: AWR beats best-of-8, and keeps too little."""
    known = dict(base_reward=.1, base_heldout_reward=.4, base_best_of_n_reward=.36, minutes=2.5,
                 base_best_of_n_heldout_reward=.78)
    known |= {"base_heldout_reward/position": .1, "base_heldout_reward/binding": .3,
              "heldout_reward/position": .2, "heldout_reward/binding": .6}
    rows = []
    for arm in baselines.ARMS:
        strong = arm.endswith(("0.0625", "0.025", "0.05"))
        gain, kept = (.15, .8) if strong else (.1, .9)
        gain += .05 * ("muon" in arm) + .3 * (arm == "x4 awr")
        kept -= .2 * (arm == "x4 awr")
        rows += [known | {"arm": arm, "seed": s, "reward": .1 + gain + .001 * s, "entropy_kept": kept,
                          "heldout_reward": .4 + 2 * gain + .001 * s} for s in range(3)]
    write(tmp_path / "baselines.csv", baselines, rows)
    old = frontier.load(locate("results/frontier.csv"))
    for r in old:
        strong = r["beta"] <= .0625 * (4 if r["divergence"] == "js" else 1)
        gain, kept = (.15, .8) if strong else (.1, .9)
        r |= {"reward": r["base_reward"] + gain + .001 * r["seed"], "entropy_kept": kept,
              "heldout_reward": r["base_heldout_reward"] + 2 * gain + .001 * r["seed"]}
    monkeypatch.setattr(frontier, "load", lambda path: old)
    baselines.main([f"--csv={tmp_path / 'baselines.csv'}", "--only=figures"])
    found = said(tmp_path / "baselines.md")
    assert found["(a)", "awr - js", "judge gained"][1] == "equal"
    assert found["(b)", "awr - reverse_kl", "diversity kept"][1] == "not shown"
    assert found["(c)", "js muon - js", "judge gained"][1] == "more"
    assert found["(d)", "x4 awr - best of 8 of the base", "reward"][1] == "more"
    assert found["(d)", "x4 awr - .85", "entropy_kept"][1] == "less"
    assert found["(d)", "x4 best of n - best of 8 of the base", "heldout_reward"][1] == "less"
    report = capsys.readouterr().out
    assert "| best of 8 of the base | 0.360 | 0.780 |" in report and "| dpo | 0.201 ± 0.001" in report
    assert "| 0.400 ± 0.000 | 2.500 ± 0.000 |" in report             # position and binding, minutes
    assert (tmp_path / "baselines.png").stat().st_size > 10_000


def test_the_long_frontier_says_what_was_put_in(tmp_path):
    """JS gains .1 more than both KLs, exact .05 more than sampled. After 120 steps JS has no such lead."""
    rows = []
    for d, e, b in long_frontier.CELLS:
        gain = .2 + .1 * (d == "js") + .05 * (e == "exact") if d != "none" else 0
        rows += [dict(divergence=d, estimator=e, beta=b, seed=s, entropy_kept=.95, base_reward=.1,
                      base_heldout_reward=.4, reward=.1 + gain + .001 * s, heldout_reward=.4 + gain)
                 for s in range(3)]
    write(tmp_path / "long.csv", long_frontier, rows)
    long_frontier.main([f"--csv={tmp_path / 'long.csv'}", "--only=figures"])
    found, judge = said(tmp_path / "long.md"), "mean reachable reward"
    assert found["(i)", "js - forward_kl, sampled", judge] == [
        "+0.100 [+0.100, +0.100] [+0.100, +0.100], 3 of 3", "more"]
    assert found["(ii)", "exact - sampled, reverse_kl", judge][0].startswith("+0.050")
    assert found["(iii)", "lead of js over reverse_kl, exact: 480 - 120 steps", judge][1] == "more"
    assert (tmp_path / "long.png").stat().st_size > 10_000


def test_each_arm_is_a_run_that_train_accepts():
    for lab in (chunks, baselines):
        for arm in lab.ARMS:
            words = lab.command((arm, 0), "out/x", "cpu")[2:]
            cfg, _ = config.load(evaluate.options, words)
            assert cfg.seed == 0 and cfg.out_dir == "out/x"
    cfg, _ = config.load(evaluate.options, long_frontier.command(("js", "exact", 2, .5), "out/x", "cpu")[2:])
    assert (cfg.divergence, cfg.estimator, cfg.seed, cfg.beta, cfg.max_steps) == ("js", "exact", 2, .5, 480)
