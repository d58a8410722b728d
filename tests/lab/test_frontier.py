"""python -m pytest tests/lab/test_frontier.py

These tests check the statistics on points that can be computed by hand, and the bookkeeping: no run is made
twice, and no csv file mixes runs that cannot be compared.
"""
import csv
import fcntl
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest

import evaluate
from common import config
from common.config import Fault, UserError
from common.run import schedule
from lab import frontier, sweep
from lab.frontier import area, CELLS, complete, key, load, plan, reachable, steps_to
from lab.stats import false_alarms, judged, say, student


def line(cell, seed, reward=.2, kept=.9, **more):
    """Return a line of the csv file as `load` returns it."""
    row = dict.fromkeys(frontier.MEASURES, 0.) | dict(zip(frontier.FIELDS[:5], (*cell, seed)))
    return row | dict(reward=reward, heldout_reward=reward, entropy_kept=kept, base_reward=.1, kl_reverse=1.,
                      base_heldout_reward=.1, curve=" ".join(["0.1"] * 6 + ["0.3"] * 6), minutes="2",
                      device="cpu", torch="2", base="abc", date="2026-01-01") | more


def test_the_plan_has_every_cell_once_and_finishes_one_seed_after_another():
    runs = plan(5)
    assert len(runs) == len(set(runs)) == 5 * (3 * 3 * 5 + 3 + 1)
    assert [seed for *_, seed in runs] == sorted(seed for *_, seed in runs)
    for d, e in itertools.product(frontier.DIVERGENCES, frontier.ESTIMATORS):
        assert len({c[2] for c in CELLS if c[:2] == (d, e) and c[3] == "constant"}) == 5
    assert [(*cell, seed + 5) for *cell, seed in runs] == plan(5, first=5)
    # claim (i) needs runs of all divergences at the same beta
    assert {.125, .25, .5} == {c[2] for c in CELLS if c[0] == "js"} & {c[2] for c in CELLS if c[0] != "js"}


def test_reachable_gain_by_hand():
    points = [(1., 0.), (.9, .2), (.5, .3), (.8, .1)]                   # (.8, .1) lies below the others
    assert reachable(points, .9) == pytest.approx(.2) and reachable(points, .95) == pytest.approx(.1)
    assert reachable(points, .7) == pytest.approx(.25) and reachable(points, .8) == pytest.approx(.225)
    assert reachable(points, .4) == pytest.approx(.3)
    # linear between .7 and .9 (mean .225) and between .9 and .95 (mean .15)
    assert area(points) == pytest.approx((.2 * .225 + .05 * .15) / .25, abs=1e-3)
    assert area([(1., 0.)]) == 0


def test_intervals():
    text, shown = say([.1, .1, .1])
    assert text == "+0.100 [+0.100, +0.100] [+0.100, +0.100], 3 of 3" and shown == "more"
    assert say([-.2, -.1, -.15, -.1])[1] == "less" and say([-.2, .1, .15, -.1])[1] == "not shown"
    assert say([.3, .1, .2, -.1])[0].endswith("3 of 4") and say([-.3, .1])[0].endswith("1 of 2")
    # Three seeds that agree are enough for the bootstrap, but Student's interval contains 0: the standard
    # error is .1528 / sqrt(3) = .0882, times 4.303.
    text, shown = say([.1, .2, .4])
    assert text == "+0.233 [+0.100, +0.400] [-0.146, +0.613], 3 of 3" and shown == "not shown"
    assert say([.1])[1] == "not shown"


@pytest.mark.parametrize("n, half", [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (101, 1.984)])
def test_student(n, half):
    """The values of printed tables."""
    assert student(n) == pytest.approx(half, abs=1e-3)


@pytest.mark.parametrize("n", [*range(2, 33), 41, 101, 1001])
def test_student_holds_95_percent(n):
    """The density of Student's t, integrated numerically between -student(n) and student(n), gives .95."""
    k = n - 1
    t = np.linspace(0, student(n), 100_001)
    height = math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2)) / math.sqrt(k * math.pi)
    assert 2 * np.trapezoid(height * (1 + t * t / k) ** (-n / 2), t) == pytest.approx(.95, abs=2e-5)


def test_how_far_to_trust_them():
    # Three seeds by hand: 1 in 27 resamples contains only the smallest value, and that is more than 2.5 %. So
    # the interval reaches from the smallest to the largest value. It excludes 0 if all signs agree: 1 in 4.
    assert false_alarms(3)[0] == pytest.approx(.25, abs=.04)
    assert false_alarms(3)[0] > false_alarms(5)[0] > false_alarms(30)[0]
    for n in (3, 5, 30):
        assert false_alarms(n)[1] == pytest.approx(.05, abs=.02)
    assert false_alarms(5) == (.159, .048)                               # the numbers of results/frontier.md
    lines = [("(i)", "a - b", "reward", *say([.1, .2, .3]))] * 20
    text = judged(lines, 3)
    assert text.count("3 of 3") == 20 and "about 1 of these 20 lines" in text


def test_steps_to_a_reward():
    def steps(curve):
        return steps_to(line(("js", "sampled", .5, "constant"), 0, curve=curve))
    assert steps(" ".join(["0.1"] * 6 + ["0.3"] * 6)) == 80           # the second block above .2 ends there
    assert steps("0.1 0.3 0.1 0.3 0.3") == 50 and steps("0.3 0.3 0.1") == 20
    assert steps("0.1 0.3 0.1 0.1") == 40                                # never twice: all steps


def test_only_complete_seeds_are_compared():
    rows = [line(c, s) for *c, s in plan(3)]
    assert complete(rows) == [0, 1, 2] and complete(rows[:-1]) == complete(rows[1:] + rows[:1])[:2] == [0, 1]
    assert complete(rows[1:]) == [1, 2] and complete([]) == []


@pytest.fixture
def finished(tmp_path):
    """Return a csv file in which JS gains .05 more than the KLs in every estimator, a falling beta .02."""
    path = tmp_path / "frontier.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, frontier.FIELDS)
        out.writeheader()
        for *cell, seed in plan(3):
            b = cell[2] / (4 if cell[0] == "js" else 1)
            gain = .1 - .1 * b + .05 * (cell[0] == "js") + .02 * (cell[3] == "linear")
            out.writerow(line(cell, seed, reward=.1 + (gain if b else .2) + .001 * seed,
                              kept=.85 + .3 * b if b else .6))
    return path


def test_verdicts_say_what_was_put_in(finished):
    said = {(claim, what, measure): (text, shown) for claim, what, measure, text, shown
            in frontier.verdicts(load(finished))}
    assert said["(ii)", "js - reverse_kl, exact", "mean reachable reward"][1] == "more"
    assert said["(iii)", "exact - sampled, js", "mean reachable reward"][1] == "not shown"
    assert said["(v)", "falling - constant, forward_kl", "mean reachable reward"][1] == "more"
    assert said["(v)", "falling - constant, js", "mean reachable reward"][0].startswith("+0.0")
    # At one beta, JS is weaker here: it gains more reward and keeps less diversity.
    assert said["(i)", "js - forward_kl, sampled, both beta 0.5", "reward gained"][1] == "more"
    assert said["(i)", "js - forward_kl, sampled, both beta 0.5", "diversity kept"][1] == "less"


def test_what_was_looked_at_afterwards(finished):
    said = {(what, name): (text, shown) for what, name, text, shown in frontier.afterwards(load(finished))}
    name = "mean reachable reward"
    assert said["js - forward_kl, mean over estimators", name][1] == "more"             # as was put in
    assert said["reverse_kl - forward_kl, mean over estimators", name][0].startswith("+0.000 [+0.000")
    assert said["exact - sampled, mean over divergences", name][1] == "not shown"
    # `none` keeps .6. At the betas b = 1/32 and 1/16 of a KL, all divergences keep .85 + .3 b.
    text, shown = said["none - the 6 weakest exact cells", "diversity kept"]
    assert float(text[:6]) == pytest.approx(.6 - .85 - .3 * (1 / 32 + 1 / 16) / 2, abs=1e-3)
    assert shown == "less"


def test_figures_and_report_come_from_the_csv_alone(finished, capsys):
    frontier.main([f"--csv={finished}", "--only=figures"])
    assert {"frontier.png", "frontier_more.png", "frontier.md"} <= set(os.listdir(finished.parent))
    report = (finished.parent / "frontier.md").read_text(encoding="utf-8")
    assert "seeds [0, 1, 2]" in report and report in capsys.readouterr().out
    assert report.count("| js | sampled |") == 6


FAKE = """
import json
import os
import sys
folder = [a for a in sys.argv if a.startswith("--out_dir=")][0][10:]
os.makedirs(folder)
row = dict.fromkeys({measures!r}, 0.5)
for name, steps in (("evaluations", 2), ("metrics", 20)):
    with open(os.path.join(folder, name + ".jsonl"), "w") as f:
        for i in range(steps):
            f.write(json.dumps(dict(row, step=i)) + chr(10))
"""


def test_runs_are_made_once_and_never_mixed(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE.format(measures=frontier.MEASURES))
    commands = []

    def command(run, folder, device):
        commands.append((run[:4], run[4]))
        return [sys.executable, str(tmp_path / "fake.py"), f"--out_dir={folder}"]
    monkeypatch.setattr(frontier, "command", command)
    monkeypatch.setattr(frontier, "plan", lambda seeds, first: plan(seeds, first)[:4])
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds, sleep=sweep.time.sleep: sleep(.02))
    path = tmp_path / "results" / "frontier.csv"
    options = [f"--csv={path}", f"--out={tmp_path / 'out'}", "--only=runs"]
    frontier.main(options)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")                         # two of four are left
    frontier.main(options)
    assert len(commands) == 6 and {key(r) for r in load(path)} == set(commands[:4])    # in any order
    assert sorted(map(str, commands[4:])) == sorted(map(str, (key(r) for r in load(path)[2:])))
    assert os.listdir(tmp_path / "out") == ["lock"]
    with pytest.raises(UserError, match="another device or another base"):
        frontier.main([*options, "--device=cuda"])
    # another sweep holds the lock; then lines that cannot be compared
    with open(path, "a") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            frontier.main([*options, "--seeds=5"])
    whole = path.read_text()
    again = whole.splitlines()[1]
    other = again.replace(",cpu,", ",cuda,").replace(",constant,0,", ",constant,9,")
    for more, said in ((again, "two lines of the run"), (other, "mixes runs of device")):
        path.write_text(whole + more + "\n")
        with pytest.raises(UserError, match=said):
            frontier.main([f"--csv={path}", "--only=figures"])
    path.write_text("divergence,beta\njs,1\n")
    with pytest.raises(UserError, match="other|not a csv of this version"):
        frontier.main(options)


def test_no_run_goes_on_without_its_sweep(tmp_path, monkeypatch):
    """One run fails while another run would take a minute. The other run is ended and gets no line."""
    slow = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    fails = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():\n" \
            "    time.sleep(.01)\nsys.exit(3)"
    commands = iter([slow, fails])
    monkeypatch.setattr(frontier, "command", lambda *_: [sys.executable, "-c", next(commands),
                                                         str(tmp_path / "pid")])
    with pytest.raises(Fault, match="failed"):
        frontier.main([f"--csv={tmp_path / 'f.csv'}", f"--out={tmp_path / 'out'}", "--only=runs"])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 1


def test_commands_are_runs_that_train_understands():
    for cell in CELLS:
        cfg, _ = config.load(evaluate.options, frontier.command((*cell, 3), "out/x", "cpu")[2:])
        beta = [schedule(cfg.beta_schedule, cfg.beta, cfg.beta_end, s / 120) for s in range(121)]
        assert (cfg.divergence, cfg.estimator, cfg.seed) == (cell[0], cell[1], 3)
        assert sum(beta) / 121 == pytest.approx(cell[2]) and json.dumps(cfg.out_dir)
