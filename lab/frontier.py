"""The experiment: which divergence, in which estimator, gives the most reward for the diversity it costs?

    python frontier.py                  go on where results/frontier.csv ends (a run: 2 minutes of a core)
    python frontier.py --minutes=60     the same, but start no run after an hour
    python frontier.py --only=figures   figures and verdicts from the csv alone
    python frontier.py --csv=out/new/frontier.csv --first_seed=5      all of it again, on other seeds

One answer for one strength says little: a weaker divergence usually gets more reward and less diversity. So
every divergence and estimator is run over a grid of strengths, and what is compared is the *frontier* of
(diversity kept, reward gained) that it traces. JS takes four times the beta of a KL, because its curvature at
the reference is a quarter of theirs (STRENGTH in divergences.py). Everything else is configs/tiny_js.py: 120
GRPO steps on the tiny world, and per seed the same prompts in the same order.

    cells = none  +  {reverse_kl, forward_kl, js} x {sampled, unbiased, exact} x 5 betas
                  +  {reverse_kl, forward_kl, js} with a sampled beta that falls from 2b to 0 (mean b)

Runs are made in an order in which stopping early leaves a smaller but balanced experiment: three betas and
three seeds of every cell first. Each appends one line to results/frontier.csv and is never made again. A line
carries the device and the base it was made with, and a csv with two of either is refused.

Claims, each stated before a run of the csv was made, with its verdict in results/frontier.md:
  (i)   at one beta, JS beats both KLs
  (ii)  at matched strength (whole frontiers), JS beats both KLs
  (iii) the exact estimator gains more than the sampled one at equal diversity
  (iv)  the unbiased estimator gains more than the sampled one at equal diversity
  (v)   a beta that falls from strong to weak gains more than a constant one at equal diversity
Differences are paired by seed; 95 % intervals over the seeds are the bootstrap's (10,000 resamples) and
Student's. The report says how far five seeds can be trusted, and which verdicts another range than LEVELS
would change. (v) compares two frontiers of one run each, with `none` and the base: held against five constant
betas, one run would win wherever it lies between two of them, where their frontier is only a straight line.
(Where on the curve the single runs lie still matters a little.)

A control that is in the grid without having been planned: unbiased forward KL and sampled reverse KL are one
method (section 3 of divergences.py), so it was run twice, and what differs between the two is rounding. The
function `afterwards` uses that to ask of (iii) and (iv) what they mix: how noisy a gradient is, and whose it
is.
"""
import json
import os
import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common import config
from lab import sweep
from common.config import UserError, locate
from divergences import STRENGTH
from lab.sweep import check
from lab import stats

DIVERGENCES, ESTIMATORS = ("reverse_kl", "forward_kl", "js"), ("sampled", "unbiased", "exact")
BETAS = (.125, .03125, .5, .0625, .25)         # of a KL, the first three first; times STRENGTH
SCHEDULED = .125                               # mean beta of the falling schedule, likewise
TARGET = .2                                    # reward of training pictures whose first step is reported
LEVELS, OTHER_LEVELS = (.7, .95), (.8, .98)    # of diversity kept: where frontiers are compared; a check
REACHED = {"reward": "mean reachable reward", "heldout_reward": "the same for the reader"}   # gained
MEASURES = ("reward", "heldout_reward", "unseen", "open_entropy", "entropy_kept", "pairwise", "vendi",
            "token_entropy", "kl_reverse", "kl_forward", "unreadable")
FIELDS = ("divergence", "estimator", "beta", "schedule", "seed", *MEASURES, "base_reward",
          "base_heldout_reward", "curve", *sweep.STAMP)
COLOURS = {"none": "black", "reverse_kl": "tab:blue", "forward_kl": "tab:orange", "js": "tab:green"}


@dataclass(frozen=True)
class Config:
    only: Literal["all", "runs", "figures"] = "all"  # runs, then figures and verdicts; or one of them
    seeds: int = 5                     # of each cell
    first_seed: int = 0                # the first of them; with a csv of its own, a test on new seeds
    minutes: float = 0.0               # start no run after this; 0 = make all
    jobs: int = 2                      # runs at a time, one thread each
    device: Literal["cuda", "mps", "cpu"] = "cpu"  # tiny runs are as quick on a core as on a GPU alone
    csv: str = "results/frontier.csv"  # one line a run
    out: str = "out/frontier"          # run folders, removed when their line is written


# ---- the runs ----------------------------------------------------------------------------------------------
def cells(betas):
    """(divergence, estimator, beta, schedule) of every cell with one of these betas (of a KL)."""
    for b in betas:
        for estimator in ESTIMATORS:
            for d in DIVERGENCES:
                yield d, estimator, b * STRENGTH[d], "constant"
    if SCHEDULED in betas:
        for d in DIVERGENCES:
            yield d, "sampled", SCHEDULED * STRENGTH[d], "linear"
        yield "none", "sampled", 0.0, "constant"


def plan(seeds, first=0):
    """All (cell, seed): first 3 betas x 3 seeds, then all betas x 3 seeds, then all betas x all seeds."""
    some, every = range(first, first + min(3, seeds)), range(first, first + seeds)
    stages = [(BETAS[:3], some), (BETAS, some), (BETAS, every)]
    return list(dict.fromkeys((cell, seed) for betas, some in stages for seed in some
                              for cell in cells(betas)))


def load(path):
    """Lines of the csv as dicts, numbers as floats; errors as sweep.load's."""
    return sweep.load(path, FIELDS, (*MEASURES, "beta", "base_reward", "base_heldout_reward"), key=5)


def key(row):
    return (row["divergence"], row["estimator"], float(row["beta"]), row["schedule"]), row["seed"]


def command(run, folder, device):
    divergence, estimator, beta, schedule, seed = run
    falling = [f"--beta={2 * beta}", "--beta_schedule=linear", "--beta_end=0.0"]
    return [sys.executable, locate("train.py"), "configs/tiny_js.py", f"--divergence={divergence}",
            f"--estimator={estimator}", f"--seed={seed}", f"--device={device}", f"--out_dir={folder}",
            "--eval_interval=120", *(falling if schedule == "linear" else [f"--beta={beta}"])]


def row_of(run, folder):
    """What a finished run's folder says, as values of a line of the csv."""
    before, after = (sweep.evaluations(folder)[i] for i in (0, -1))
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        rewards = np.array([json.loads(text)["reward"] for text in file]).reshape(-1, 10).mean(1)  # of 10
    return [*run, *(round(after[m], 5) for m in MEASURES), round(before["reward"], 5),
            round(before["heldout_reward"], 5), " ".join(f"{r:.4f}" for r in rewards)]


# ---- the statistics ----------------------------------------------------------------------------------------
def gain(row, measure="reward"):
    """What a run gained over its base."""
    return row[measure] - row["base_" + measure]


def entropy_kept(row):
    return row["entropy_kept"]


def complete(rows):
    """(betas of a KL, seeds) of the largest block of which every cell was run: comparisons use only that."""
    done, seeds = {key(r) for r in rows}, {r["seed"] for r in rows}
    blocks = [(BETAS[:n], [s for s in sorted(seeds) if all((cell, s) in done for cell in cells(BETAS[:n]))])
              for n in range(1, len(BETAS) + 1)]
    return max(blocks, key=lambda block: (len(block[0]) >= 3, len(block[0]) * len(block[1])))


def frontier(rows, seed, divergence, estimator, betas, measure="reward", schedule="constant"):
    """Points (diversity kept, gain) of one seed: these betas, the run without a divergence, and the base."""
    strengths = [b * STRENGTH[divergence] for b in betas]
    return [(1.0, 0.0)] + [
        (r["entropy_kept"], gain(r, measure)) for r in rows if r["seed"] == seed and (
            r["divergence"] == "none" or (r["divergence"], r["estimator"], r["schedule"]) ==
            (divergence, estimator, schedule) and r["beta"] in strengths)]


def reachable(points, level):
    """The largest gain at `level` of diversity or more, on the upper hull of the points: between two runs
    lies what a coin attains that chooses between their policies for each prompt."""
    best = max((g for k, g in points if k >= level), default=-np.inf)
    mixed = [g + (g2 - g) * (level - k) / (k2 - k) for k, g in points for k2, g2 in points if k < level <= k2]
    return max([best, *mixed])


def area(points, levels=LEVELS):
    """Mean of the reachable gain over a range of diversity kept: one number for a frontier."""
    return float(np.mean([reachable(points, level) for level in np.linspace(*levels, 51)]))


def reach(rows, seed, forms, betas, measure, levels=LEVELS, schedule="constant"):
    """`area` of one seed, as a mean over some forms (divergence, estimator)."""
    return np.mean([area(frontier(rows, seed, *form, betas, measure, schedule), levels) for form in forms])


def verdicts(rows, levels=LEVELS):
    """The claims and what the runs say: lines (claim, comparison, measure, difference, what is shown)."""
    betas, seeds = complete(rows)
    at = {key(r): r for r in rows}
    out = []

    def compare(claim, what, measure, difference):
        out.append((claim, what, measure, *stats.say([difference(s) for s in seeds])))
    # (i): the same number as beta for all three. "Beats" asks for more of one and no less of the other.
    for b in sorted(set(betas) & {STRENGTH["js"] * b for b in betas}):
        for kl in DIVERGENCES[:2]:
            for name, value in (("reward gained", gain), ("diversity kept", entropy_kept)):
                compare("(i)", f"js - {kl}, sampled, both beta {b:g}", name, lambda s: value(
                    at[("js", "sampled", b, "constant"), s]) - value(at[(kl, "sampled", b, "constant"), s]))
    for measure, name in REACHED.items():
        def at_best(s, d, e, betas=betas, schedule="constant"):
            return reach(rows, s, [(d, e)], betas, measure, levels, schedule)
        for estimator in ESTIMATORS:
            for kl in DIVERGENCES[:2]:
                compare("(ii)", f"js - {kl}, {estimator}", name,
                        lambda s: at_best(s, "js", estimator) - at_best(s, kl, estimator))
        for claim, estimator in (("(iii)", "exact"), ("(iv)", "unbiased")):
            for d in DIVERGENCES:
                compare(claim, f"{estimator} - sampled, {d}", name,
                        lambda s: at_best(s, d, estimator) - at_best(s, d, "sampled"))
        for d in DIVERGENCES:
            compare("(v)", f"falling - constant, {d}", name, lambda s: at_best(
                s, d, "sampled", [SCHEDULED], "linear") - at_best(s, d, "sampled", [SCHEDULED]))
    return out


def afterwards(rows):
    """Comparisons that nobody had stated before the runs were seen: lines of `verdicts` without a claim."""
    (betas, seeds), at, out = complete(rows), {key(r): r for r in rows}, []
    twice = [("forward_kl", "unbiased"), ("reverse_kl", "sampled")]            # one method
    pairs = [("one method run twice: unbiased forward_kl - sampled reverse_kl", twice[:1], twice[1:]),
             ("the same function, less noise: exact forward_kl - those two",
              [("forward_kl", "exact")], twice),
             ("another function, also of single samples: unbiased reverse_kl - those two",
              [("reverse_kl", "unbiased")], twice)]
    for a, b in (("exact", "sampled"), ("unbiased", "sampled"), ("exact", "unbiased")):
        pairs.append((f"{a} - {b}, mean over divergences",
                      [(d, a) for d in DIVERGENCES], [(d, b) for d in DIVERGENCES]))
    for a, b in (("reverse_kl", "js"), ("reverse_kl", "forward_kl"), ("js", "forward_kl")):
        pairs.append((f"{a} - {b}, mean over estimators",
                      [(a, e) for e in ESTIMATORS], [(b, e) for e in ESTIMATORS]))
    for measure, name in REACHED.items():
        for what, one, other in pairs:
            out.append((what, name, *stats.say([
                reach(rows, s, one, betas, measure) - reach(rows, s, other, betas, measure) for s in seeds])))
    weak = [(d, "exact", b * STRENGTH[d], "constant") for d in DIVERGENCES for b in sorted(betas)[:2]]
    for name, value in (("reward gained", gain), ("the same for the reader",
                        lambda r: gain(r, "heldout_reward")), ("diversity kept", entropy_kept)):
        out.append((f"none - the {len(weak)} weakest exact cells", name, *stats.say([
            value(at[("none", "sampled", 0.0, "constant"), s])
            - np.mean([value(at[cell, s]) for cell in weak]) for s in seeds])))
    return out


# ---- the report --------------------------------------------------------------------------------------------
def groups(rows):
    """{cell: its lines}, in the order of DIVERGENCES, ESTIMATORS and beta."""
    out = {}
    for r in sorted(rows, key=lambda r: (r["divergence"] == "none", r["divergence"], r["estimator"],
                                         r["schedule"], r["beta"])):
        out.setdefault(key(r)[0], []).append(r)
    return out


def steps_to(row):
    """The step by which the mean reward was TARGET or more for twice ten steps (once may be luck). If it
    never was, that is all steps: too few, so a mean over such runs is a lower bound."""
    over = np.array(row["curve"].split(), float) >= TARGET
    twice = over[1:] & over[:-1]
    return 10.0 * (twice.argmax() + 2 if twice.any() else len(over))


def trace(axis, found, x, y, style="o-", legend=True):
    """A line through a divergence's cells from weak to strong, with crosses of one standard deviation."""
    for d, colour in COLOURS.items():
        cell = [(np.array([x(r) for r in rs]), np.array([y(r) for r in rs]))
                for (name, *_), rs in found if name == d]
        if cell:
            xs, ys = ([np.nanmean(v[i]) for v in cell] for i in (0, 1))
            errors = [[np.nanstd(v[i], ddof=1) if np.isfinite(v[i]).sum() > 1 else 0 for v in cell]
                      for i in (0, 1)]
            axis.errorbar(xs, ys, errors[1], errors[0], fmt=style, ms=3, lw=1, elinewidth=.6,
                          color=colour, label=d if legend else None)


def figures(rows, folder):
    """frontier.png: the main result. frontier_more.png: the other views. From the csv's lines alone, those
    of the block that `complete` finds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    betas, seeds = complete(rows)
    known = {(cell, seed) for cell in cells(betas) for seed in seeds}
    found = list(groups([r for r in rows if key(r) in known]).items())

    def pick(estimator=None, betas=None, js=STRENGTH["js"]):
        return [(cell, rs) for cell, rs in found if cell[0] == "none" or cell[3] == "constant"
                and estimator in (None, cell[1])
                and (betas is None or cell[2] / (js if cell[0] == "js" else 1) in betas)]
    title = f"beta grid (js x {STRENGTH['js']})"
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), sharey=True, sharex=True, layout="constrained")
    for axis, estimator in zip(axes, ESTIMATORS):
        trace(axis, pick(estimator), entropy_kept, gain)
        axis.plot(1, 0, "s", color="grey", label="base")
        axis.axvspan(*LEVELS, color=".94", zorder=0, label="compared here")
        axis.set(title=f"{estimator}, {title}", xlabel="open-attribute entropy kept")
    axes[0].set_ylabel("judge reward gained")
    axes[0].legend(frameon=False)
    figure.savefig(os.path.join(folder, "frontier.png"), dpi=110)
    plt.close(figure)

    kept, judged = "open-attribute entropy kept", "judge reward gained"
    same = set(BETAS) & {STRENGTH["js"] * b for b in BETAS}
    figure, axes = plt.subplots(2, 3, figsize=(14, 8.4), layout="constrained")
    for axis, js, title in ((axes[0, 0], 1, "one beta for all"),
                            (axes[0, 1], STRENGTH["js"], f"matched strength (js x {STRENGTH['js']})")):
        trace(axis, pick("sampled", same, js), entropy_kept, gain)
        axis.set(title=f"sampled, {title}", xlabel=kept, ylabel=judged)
    trace(axes[0, 2], pick("sampled"), lambda r: r["kl_reverse"], gain)
    trace(axes[0, 2], pick("exact")[:-1], lambda r: r["kl_reverse"], gain, "o--", legend=False)
    axes[0, 2].set(title="reward and KL(policy || base); dashed: exact", xlabel="nat per picture",
                   ylabel=judged, xscale="log")
    trace(axes[1, 0], pick(), gain, lambda r: gain(r, "heldout_reward"), "o")
    axes[1, 0].set(title="what is trained and what is only watched", xlabel=judged,
                   ylabel="reader's score gained")
    trace(axes[1, 1], pick("sampled"), lambda r: r["beta"] / STRENGTH.get(r["divergence"], 1), steps_to)
    axes[1, 1].set(title=f"steps to a training reward of {TARGET}; 120: never",
                   xlabel=f"beta (js / {STRENGTH['js']})", ylabel="steps")
    trace(axes[1, 2], [c for c in found if c[0][3] == "linear"], entropy_kept, gain, "o")
    trace(axes[1, 2], pick("sampled"), entropy_kept, gain, ":", legend=False)
    axes[1, 2].set(title="a falling beta (dots) and constant ones (dotted)", xlabel=kept, ylabel=judged)
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(os.path.join(folder, "frontier_more.png"), dpi=110)
    plt.close(figure)


def report(rows, path):
    """frontier.md: the verdicts, the figures, then every cell."""
    betas, seeds = complete(rows)
    lines, others = verdicts(rows), verdicts(rows, OTHER_LEVELS)
    means = [[e] + [" / ".join(f"{np.mean([reach(rows, s, [(d, e)], betas, m) for s in seeds]):.3f}"
                               for m in REACHED) for d in DIVERGENCES] for e in ESTIMATORS]
    changed = [f"{a[0]} {a[1]}, {a[2]}: {a[4]} -> {b[4]}" for a, b in zip(lines, others) if a[4] != b[4]]
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f"# Performance against diversity\n\nBy `python frontier.py --only=figures` from frontier.csv: "
            f"{len(rows)} runs, device {rows[0]['device']}, base {rows[0]['base']}. Verdicts use the betas "
            f"of a KL {sorted(betas)} (js x {STRENGTH['js']}) and the seeds {seeds}; frontier.py says what "
            f"they mean.\n\n![reward against diversity](frontier.png)\n\n"
            f"{stats.judged(lines, len(seeds))}\n\n"
            f"**Another range.** Frontiers are compared where {LEVELS[0]} to {LEVELS[1]} of the diversity is "
            f"kept. From {OTHER_LEVELS[0]} to {OTHER_LEVELS[1]} the verdicts are the same"
            f"{' but for: ' * bool(changed)}{'; '.join(changed)}.\n\n"
            f"The frontiers themselves, mean reachable reward and the same for the reader:\n\n"
            f"{stats.table(['', *DIVERGENCES], means)}\n\n**Looked at afterwards,** so to be read as "
            f"questions for new runs:\n\n"
            f"{stats.table(stats.HEAD[1:], afterwards(rows))}\n\n"
            f"![more views](frontier_more.png)\n\n" +
            stats.table(["divergence", "estimator", "beta", "schedule", "seeds", "judge", "reader",
                         "entropy kept", "Vendi score", "KL to the base, nat a picture"],
                  [[d, e, f"{b:g}", how, str(len(rs))] + [stats.spread([r[m] for r in rs]) for m in (
                      "reward", "heldout_reward", "entropy_kept", "vendi", "kl_reverse")]
                   for (d, e, b, how), rs in groups(rows).items()]) + "\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    config.at_least(cfg, first_seed=0)
    if cfg.only != "figures":
        sweep.make(cfg, load(cfg.csv), [(*cell, seed) for cell, seed in plan(cfg.seeds, cfg.first_seed)],
                   FIELDS, lambda run, folder: command(run, folder, cfg.device), row_of)
    if cfg.only != "runs":
        rows, folder = load(cfg.csv), os.path.dirname(cfg.csv) or "."
        if not rows or not complete(rows)[1]:
            raise UserError(f"{cfg.csv} has no seed yet with all cells; go on with python frontier.py")
        figures(rows, folder)
        report(rows, os.path.join(folder, "frontier.md"))
        print(open(os.path.join(folder, "frontier.md"), encoding="utf-8").read())


if __name__ == "__main__":
    config.run(main)
