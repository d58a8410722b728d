"""Experiment: the frontier of lab/frontier.py after 480 steps, at rewards that a user would want.

    python -m lab.long_frontier                  continue where the csv ends; a run takes 6 minutes
    python -m lab.long_frontier --only=figures   figure and verdicts from the csv files alone

In 120 steps, no run reaches the reward of best-of-8 of the base. In 480 steps the weak divergences of
lab/frontier.py reach it, but keep a third of the diversity. So this grid is stronger. It shall keep 40 to
95 % of the diversity.

    cells = none  +  {reverse_kl, forward_kl, js} x {sampled, exact} x 4 betas

Claims, each stated before its runs were made, with its verdict in results/long_frontier.md:
  (i)   at matched strength (whole frontiers), JS beats both KLs
  (ii)  the exact estimator gains more than the sampled estimator at equal diversity
  (iii) the ranking of the divergences differs from the ranking after 120 steps
For (iii) we compare the lead of JS over reverse KL after 480 steps with its lead after 120 steps, in the
range of diversity that lab/frontier.py compares. Differences are paired by seed.
"""
import os
import sys
from dataclasses import dataclass
from itertools import product

from common import config
from common.config import UserError, locate, option
from divergences import STRENGTH
from lab import frontier, stats, sweep

STEPS, ESTIMATORS = 480, ("sampled", "exact")
BETAS = (.125, .19, .28, .42)                  # of a KL; JS: times STRENGTH
LEVELS = (.4, .95)                             # the range of diversity kept that (i) and (ii) compare
MEASURES = ("reward", "heldout_reward", "entropy_kept", "kl_reverse", "unseen", "unreadable")
BEFORE = ("reward", "heldout_reward", "best_of_n_reward", "best_of_n_heldout_reward")
NUMBERS = ("beta", *MEASURES, *(f"base_{m}" for m in BEFORE))
FIELDS = ("divergence", "estimator", "seed", *NUMBERS, *sweep.STAMP)
NONE = ("none", "sampled", 0.0)                # (divergence, estimator, beta)
CELLS = [(d, e, b * STRENGTH[d]) for b, e, d in product(BETAS, ESTIMATORS, frontier.DIVERGENCES)] + [NONE]


@dataclass(frozen=True)
class Config(sweep.Config):
    seeds: int = option(3, "seeds of each method", low=1, high=1000)
    csv: str = option("results/long_frontier.csv", "the file of results, one line for a run", ending=".csv")
    out: str = option("out/long_frontier", "folder of the run folders, removed after their runs", ending="")


# ---- the runs ----------------------------------------------------------------------------------------------
def command(run, folder, device):
    """Return the command line of a run (divergence, estimator, seed, beta)."""
    divergence, estimator, seed, beta = run
    return [sys.executable, locate("train.py"), "configs/tiny_js.py", f"--divergence={divergence}",
            f"--estimator={estimator}", f"--beta={beta}", f"--seed={seed}", f"--device={device}",
            f"--out_dir={folder}", f"--max_steps={STEPS}", f"--eval_interval={STEPS}"]


def row_of(run, folder):
    """Return the values of a finished run's line in the csv file."""
    return [*run, *sweep.measured(folder, MEASURES, BEFORE)]


# ---- the statistics ----------------------------------------------------------------------------------------
def cell_of(row):
    return row["divergence"], row["estimator"], row["beta"]


def area(rows, seed, divergence, estimator, measure, levels):
    """Return the mean reachable gain of one frontier of one seed (frontier.area): base, none, four betas."""
    wanted = {NONE, *((divergence, estimator, b * STRENGTH[divergence]) for b in BETAS)}
    return frontier.area([(1., 0.)] + [(r["entropy_kept"], frontier.gain(r, measure)) for r in rows
                                       if r["seed"] == seed and cell_of(r) in wanted], levels)


def verdicts(rows, short, seeds):
    """Return the lines of stats.judged. short: the lines of frontier.csv."""
    out = []

    def line(claim, name, measure, one, other):
        differences = [one(s) - other(s) for s in seeds]
        out.append([claim, name, frontier.REACHED[measure], *stats.say(differences)])
    for m, e, kl in product(frontier.REACHED, ESTIMATORS, frontier.DIVERGENCES[:2]):
        line("(i)", f"js - {kl}, {e}", m, lambda s: area(rows, s, "js", e, m, LEVELS),
             lambda s: area(rows, s, kl, e, m, LEVELS))
    for m, d in product(frontier.REACHED, frontier.DIVERGENCES):
        line("(ii)", f"exact - sampled, {d}", m, lambda s: area(rows, s, d, "exact", m, LEVELS),
             lambda s: area(rows, s, d, "sampled", m, LEVELS))

    def lead(area_of, e, m):
        return lambda s: area_of(s, "js", e, m) - area_of(s, "reverse_kl", e, m)
    for m, e in product(frontier.REACHED, ESTIMATORS):
        line("(iii)", f"lead of js over reverse_kl, {e}: 480 - 120 steps", m,
             lead(lambda s, d, e, m: area(rows, s, d, e, m, frontier.LEVELS), e, m),
             lead(lambda s, d, e, m: frontier.area(
                 frontier.frontier(short, s, frontier.BETAS, m, d, e)), e, m))
    return out


# ---- the report --------------------------------------------------------------------------------------------
def by_cell(rows, seeds):
    return {cell: [r for r in rows if cell_of(r) == cell and r["seed"] in seeds]
            for cell in sorted(CELLS, key=lambda c: (c == NONE, c[1], c[0], c[2]))}


def figure(rows, short, seeds, path):
    """Write the figure: judge and reader against diversity kept, and the judge against the KL to the base.
    Dotted: the exact cells of frontier.csv, after 120 steps."""
    found = [((d, e, b, "constant"), rs) for (d, e, b), rs in by_cell(rows, seeds).items()]
    after_120 = [(cell, rs) for cell, rs in frontier.groups(short).items()
                 if cell[1] == "exact" and cell[3] == "constant"]
    first = rows[0]

    def kl(row):
        return row["kl_reverse"]

    def reader(row):
        return frontier.gain(row, "heldout_reward")
    views = [(frontier.entropy_kept, frontier.gain, "reward"),
             (frontier.entropy_kept, reader, "heldout_reward"), (kl, frontier.gain, "reward")]
    with stats.panels(path, 1, 3, (14, 4.6)) as axes:
        for axis, (x, y, measure) in zip(axes, views):
            for estimator, style in (("exact", "o-"), ("sampled", "s--")):
                cells = [c for c in found if c[0][1] == estimator or c[0][0] == "none"]
                frontier.trace(axis, cells, x, y, style, legend=estimator == "exact")
            frontier.trace(axis, after_120, x, y, ":", legend=False)
            axis.axhline(first[f"base_best_of_n_{measure}"] - first[f"base_{measure}"], color="grey", lw=.8,
                         label="best of 8 of the base")
            axis.set(xlabel="KL to the base, nat per image" if x is kl else "share of diversity kept",
                     ylabel=("reader" if y is reader else "judge") + " reward gained",
                     xscale="log" if x is kl else "linear")
        axes[0].set_title("solid: exact, dashed: sampled, dotted: exact after 120 steps", fontsize=9)
        axes[0].legend(frameon=False, fontsize=8)


def report(rows, short, seeds):
    """Return the report: the verdicts, and a row of means for each cell."""
    shown = ("reward", "heldout_reward", "entropy_kept", "kl_reverse", "unseen")
    first = rows[0]
    lines = [[name, "", "", *(stats.spread([first[f"{key}{m}"]]) for m in shown[:2]), *3 * ["-"]]
             for name, key in (("base", "base_"), ("best of 8 of the base", "base_best_of_n_"))]
    lines += [[d, e, f"{b:g}", *(stats.spread([r[m] for r in rs]) for m in shown)]
              for (d, e, b), rs in by_cell(rows, seeds).items()]
    return (f"# The frontier after {STEPS} steps\n\nMade by `python -m lab.long_frontier --only=figures` "
            f"from long_frontier.csv: {len(rows)} runs, device {first['device']}, base {first['base']}, "
            f"seeds {seeds}. Frontiers are compared where {LEVELS[0]} to {LEVELS[1]} of the diversity is "
            f"kept, in (iii) from {frontier.LEVELS[0]} to {frontier.LEVELS[1]}. lab/long_frontier.py states "
            f"the claims.\n\n![reward against diversity](long_frontier.png)\n\n"
            f"{stats.judged(verdicts(rows, short, seeds), len(seeds))}\n\n"
            f"{stats.table(['divergence', 'estimator', 'beta', *shown], lines)}\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    plan = [(d, e, seed, b) for seed in range(cfg.seeds) for d, e, b in CELLS]
    if cfg.only != "figures":
        sweep.make(cfg, sweep.load(cfg.csv, FIELDS, NUMBERS, 4), plan, FIELDS, command, row_of)
    if cfg.only != "runs":
        rows, short = sweep.load(cfg.csv, FIELDS, NUMBERS, 4), frontier.load(locate("results/frontier.csv"))
        seeds = [s for s in sweep.complete(rows, CELLS, cell_of) if s in frontier.complete(short)]
        if len(seeds) < 2:
            raise UserError(f"{cfg.csv} has no two seeds with all cells. Continue with "
                            f"python -m lab.long_frontier")
        figure(rows, short, seeds, os.path.splitext(cfg.csv)[0] + ".png")
        stats.publish(report(rows, short, seeds), os.path.splitext(cfg.csv)[0] + ".md")


if __name__ == "__main__":
    config.run(main)
