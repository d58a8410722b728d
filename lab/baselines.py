"""Experiment: is GRPO worth its machinery? GRPO against imitation of own images, and AdamW against Muon.

    python -m lab.baselines                  continue where results/baselines.csv ends; a run takes 2 minutes
    python -m lab.baselines --minutes=60     the same, but start no run after an hour
    python -m lab.baselines --only=figures   figure and verdicts from the csv file alone

Arms with 7,680 sampled images, as many as configs/tiny_js.py:
    js, reverse_kl              GRPO with AdamW, exact, at three strengths, from results/frontier.csv
    js muon, reverse_kl muon    the same with Muon (common/muon.py)
    awr                         configs/tiny_awr.py at three temperatures tau
    best of n, dpo              configs/tiny_best_of_n.py and tiny_dpo.py
Arms "x4" have four times the steps and the images. Arms "3 categories" train on single, two and counting
only. For them the column "position, binding" shows transfer.

Claims, each stated before its runs were made, with its verdict in results/baselines.md:
  (a) with equally many samples, imitation gains as much reward as GRPO at equal diversity
  (b) imitation keeps more diversity than GRPO at equal reward
  (c) Muon gains more than AdamW at equal diversity
  (d) with four times the samples, some arm exceeds best-of-8 of the base and keeps 85 % of the entropy
For (a) to (c), points of one method form a frontier with the base, as in lab/frontier.py. In (a) "as much"
means that Student's interval of the difference lies within +-.02. Differences are paired by seed.
"""
import os
import sys
from dataclasses import dataclass

import numpy as np

from common import config
from common.config import UserError, locate, option
from divergences import STRENGTH
from lab import frontier, stats, sweep

STRENGTHS, TAUS, MUON_LR = (.0625, .125, .25), (.025, .05, .1), .003
GRPO = ("configs/tiny_js.py", "--estimator=exact")
AWR, BEST = ("configs/tiny_awr.py",), ("configs/tiny_best_of_n.py",)
FOUR, FEWER = "--max_steps=480", "--categories=('single','two','counting')"


def with_muon(divergence, b):
    return (*GRPO, f"--divergence={divergence}", f"--beta={b * STRENGTH[divergence]:g}",
            f"--muon_lr={MUON_LR}")


ARMS = {f"{d} muon {b:g}": with_muon(d, b) for d in ("js", "reverse_kl") for b in STRENGTHS}
ARMS |= {f"awr {t:g}": (*AWR, f"--tau={t}") for t in TAUS}
ARMS |= {"best of n": BEST, "dpo": ("configs/tiny_dpo.py",)}
ARMS |= {"x4 js muon": (*with_muon("js", STRENGTHS[2]), FOUR), "x4 awr": (*AWR, FOUR),
         "x4 best of n": (*BEST, FOUR, "--pool=480")}
ARMS |= {"js, 3 categories": (*GRPO, f"--beta={STRENGTHS[1] * STRENGTH['js']:g}", FEWER),
         "awr, 3 categories": (*AWR, FEWER), "best of n, 3 categories": (*BEST, FEWER)}
MEASURES = ("reward", "heldout_reward", "entropy_kept", "kl_reverse", "unseen", "heldout_reward/position",
            "heldout_reward/binding", "unreadable")
BEFORE = ("reward", "heldout_reward", "best_of_n_reward", "best_of_n_heldout_reward",
          "heldout_reward/position", "heldout_reward/binding")
NUMBERS = (*MEASURES, *(f"base_{m}" for m in BEFORE))
FIELDS = ("arm", "seed", *NUMBERS, *sweep.STAMP)
GAINS = (.08, .14)                             # judge reward gained, where (b) compares diversity
LEVEL = .02                                    # the largest difference that (a) calls equal


@dataclass(frozen=True)
class Config(sweep.Config):
    csv: str = option("results/baselines.csv", "the file of results, one line for each run", ending=".csv")
    out: str = option("out/baselines", "folder of the run folders; each is removed after its run", ending="")


# ---- the runs ----------------------------------------------------------------------------------------------
def command(key, folder, device):
    """Return the command line of a run (arm, seed)."""
    arm, seed = key
    return [sys.executable, locate("train.py"), *ARMS[arm], f"--seed={seed}", f"--device={device}",
            f"--out_dir={folder}", "--eval_interval=1000"]


def row_of(key, folder):
    """Return the values of a finished run's line in the csv file."""
    return [*key, *sweep.measured(folder, MEASURES, BEFORE)]


# ---- the report --------------------------------------------------------------------------------------------
def adamw(rows):
    """Return the runs of frontier.csv that belong to this experiment, with the names of arms."""
    cells = {(d, "exact", b * STRENGTH[d], "constant"): f"{d} {b:g}"
             for d in ("js", "reverse_kl") for b in STRENGTHS}
    return [r | {"arm": cells[cell]} for r in rows if (cell := frontier.key(r)[0]) in cells]


def points(rows, seed, method):
    """Return (diversity kept, judge gained, reader gained) of the base, and of the runs of a method: arms
    with this name and a number."""
    return [(1., 0., 0.)] + [
        (r["entropy_kept"], frontier.gain(r), frontier.gain(r, "heldout_reward")) for r in rows
        if r["seed"] == seed and r["arm"].rpartition(" ")[0] == method]


def gained(rows, seed, method, measure):
    """Return the mean reachable gain of a method over the range of diversity that frontier.py compares."""
    column = 1 if measure == "judge" else 2
    return frontier.area([(p[0], p[column]) for p in points(rows, seed, method)])


def kept(rows, seed, method):
    """Return the mean diversity that a method can keep, over a range of judge reward gained."""
    return frontier.area([(p[1], p[0]) for p in points(rows, seed, method)], GAINS)


def verdicts(rows, seeds):
    """Return the lines of stats.judged. In (a) the verdict is "equal" if Student's interval lies within
    +-LEVEL."""
    out = []
    for one, others, claim in (("awr", ("js", "reverse_kl"), "(a)"), ("js muon", ("js",), "(c)"),
                               ("reverse_kl muon", ("reverse_kl",), "(c)")):
        for other in others:
            for measure in ("judge", "reader"):
                d = [gained(rows, s, one, measure) - gained(rows, s, other, measure) for s in seeds]
                said, verdict = stats.say(d)
                error = stats.student(len(d)) * np.std(d, ddof=1) / len(d) ** .5
                if claim == "(a)" and abs(np.mean(d)) + error < LEVEL:
                    verdict = "equal"
                out.append([claim, f"{one} - {other}", f"{measure} gained", said, verdict])
            if claim == "(a)":
                d = [kept(rows, s, one) - kept(rows, s, other) for s in seeds]
                out.append(["(b)", f"{one} - {other}", "diversity kept", *stats.say(d)])
    at = {(r["arm"], r["seed"]): r for r in rows}
    for arm in (a for a in ARMS if a.startswith("x4")):
        for measure in ("reward", "heldout_reward"):
            d = [at[arm, s][measure] - at[arm, s][f"base_best_of_n_{measure}"] for s in seeds]
            out.append(["(d)", f"{arm} - best of 8 of the base", measure, *stats.say(d)])
        d = [at[arm, s]["entropy_kept"] - .85 for s in seeds]
        out.append(["(d)", f"{arm} - .85", "entropy_kept", *stats.say(d)])
    return out


def by_arm(rows, seeds):
    """Return {arm: its rows}, with the runs of frontier.csv first."""
    order = dict.fromkeys([r["arm"] for r in rows if r["arm"] not in ARMS] + [*ARMS])
    return {arm: [r for r in rows if r["arm"] == arm and r["seed"] in seeds] for arm in order}


def figure(rows, seeds, path):
    """Write the figure: reward gained against diversity kept, by judge and by reader. A method whose arms
    differ by a number has one color."""
    base = next(r for r in rows if r["arm"] in ARMS)
    method_of = {arm: arm.rpartition(" ")[0] if arm[-1].isdigit() else arm for arm in by_arm(rows, seeds)}
    colors = {method: f"C{i}" for i, method in enumerate(dict.fromkeys(method_of.values()))}
    with stats.panels(path, 1, 2, (13, 4.8), dpi=100) as axes:
        for axis, measure, name in ((axes[0], "reward", "judge"), (axes[1], "heldout_reward", "reader")):
            for arm, found in by_arm(rows, seeds).items():
                method = method_of[arm]
                x, y = [r["entropy_kept"] for r in found], [frontier.gain(r, measure) for r in found]
                first = method not in axis.get_legend_handles_labels()[1]
                axis.errorbar(np.mean(x), np.mean(y), np.std(y), np.std(x), fmt="s" if "x4" in arm else "o",
                              color=colors[method], ms=5, elinewidth=.7, label=method if first else None)
            axis.axhline(base[f"base_best_of_n_{measure}"] - base[f"base_{measure}"], color="black", lw=.8,
                         label="best of 8 of the base")
            axis.plot(1, 0, "s", color="grey")
            axis.set(xlabel="share of diversity kept", ylabel=f"{name} reward gained")
        axes[1].legend(frameon=False, fontsize=8, ncol=2)


def report(rows, seeds):
    """Return the report: the verdicts, and a row of means for each arm."""
    shown = ("reward", "heldout_reward", "entropy_kept", "kl_reverse", "unseen")

    def transfer(r, name=""):
        return (r[f"{name}heldout_reward/position"] + r[f"{name}heldout_reward/binding"]) / 2
    base = next(r for r in rows if r["arm"] in ARMS)
    lines = [["base", *(stats.spread([base[f"base_{m}"]]) for m in shown[:2]), "1.000", "0.000", "-",
              stats.spread([transfer(base, "base_")]), "-"],
             ["best of 8 of the base", *(stats.spread([base[f"base_best_of_n_{m}"]]) for m in shown[:2]),
              *5 * ["-"]]]
    for arm, found in by_arm(rows, seeds).items():
        means = [stats.spread([r[m] for r in found]) for m in shown]
        known = "heldout_reward/position" in found[0]
        lines.append([arm, *means, stats.spread([transfer(r) for r in found]) if known else "-",
                      stats.spread([float(r["minutes"]) for r in found]) if known else "-"])
    return (f"# GRPO, imitation, and Muon\n\nMade by `python -m lab.baselines --only=figures` from "
            f"baselines.csv and frontier.csv: {len(rows)} runs, device {base['device']}, "
            f"base {base['base']}. Entries are mean ± standard deviation over {len(seeds)} seeds. "
            f"lab/baselines.py states the claims and explains the arms. `position, binding`: the reader in "
            f"these categories: where an arm trains on 3 categories, this is transfer. Minutes are of one "
            f"core and contain two evaluations. Other computers made the runs of frontier.csv, so their "
            f"minutes are left out.\n\n"
            f"![reward against diversity](baselines.png)\n\n"
            f"{stats.judged(verdicts(rows, seeds), len(seeds))}\n\n"
            f"{stats.table(['arm', *shown, 'position, binding', 'minutes'], lines)}\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    plan = [(arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    if cfg.only != "figures":
        sweep.make(cfg, sweep.load(cfg.csv, FIELDS, NUMBERS, 2), plan, FIELDS, command, row_of)
    if cfg.only != "runs":
        rows = sweep.load(cfg.csv, FIELDS, NUMBERS, 2)
        others = adamw(frontier.load(locate("results/frontier.csv")))
        seeds = [s for s in sweep.complete(rows, ARMS) if s in {r["seed"] for r in others}]
        if len(seeds) < 2:
            raise UserError(f"{cfg.csv} has no two seeds with all arms. Continue with "
                            f"python -m lab.baselines")
        figure(rows + others, seeds, os.path.splitext(cfg.csv)[0] + ".png")
        stats.publish(report(rows + others, seeds), os.path.splitext(cfg.csv)[0] + ".md")


if __name__ == "__main__":
    config.run(main)
