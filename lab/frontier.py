"""Experiment: which divergence, in which estimator, gives the most reward for the diversity that it costs?

    python -m lab.frontier                  continue where results/frontier.csv ends; a run takes 2 minutes
    python -m lab.frontier --minutes=60     the same, but start no run after an hour
    python -m lab.frontier --only=figures   figures and verdicts from the csv file alone
    python -m lab.frontier --csv=out/new/frontier.csv --first_seed=5      the whole experiment on new seeds

A comparison at one strength says little: a weaker divergence usually gains more reward and keeps less
diversity. So every divergence and estimator runs over a grid of strengths, and we compare *frontiers* of
(diversity kept, reward gained). JS takes four times the beta of a KL, because its curvature at the reference
is a quarter of theirs (STRENGTH in divergences.py). All else is configs/tiny_js.py: 120 GRPO steps in the
tiny world. All runs of a seed train on the same prompts in the same order.

    cells = none  +  {reverse_kl, forward_kl, js} x {sampled, unbiased, exact} x 5 betas
                  +  {reverse_kl, forward_kl, js} with a sampled beta that falls from 2b to 0 (mean b)

Claims, each stated before a run of the csv file was made, with its verdict in results/frontier.md:
  (i)   at one beta, JS beats both KLs
  (ii)  at matched strength (whole frontiers), JS beats both KLs
  (iii) the exact estimator gains more than the sampled estimator at equal diversity
  (iv)  the unbiased estimator gains more than the sampled estimator at equal diversity
  (v)   a beta that falls from strong to weak gains more than a constant beta at equal diversity
Differences are paired by seed. The report says how far five seeds can be trusted, and which verdicts change
over another range of diversity. (v) compares frontiers of one run each, with `none` and the base. Among five
constant betas, one falling run would win wherever it lies between two of them, because their frontier is only
a straight line there. The position of the single runs along the curve still matters a little.

One control was not planned. Unbiased forward KL and sampled reverse KL are the same method (divergences.py),
so the grid contains it twice, and its two runs differ only by rounding. `afterwards` uses the pair to
separate what (iii) and (iv) mix: the noise of a gradient, and the function whose gradient it is.
"""
import json
import os
import sys
from dataclasses import dataclass
from itertools import groupby, product

import numpy as np

from common import config
from common.config import UserError, option, locate
from divergences import STRENGTH
from lab import stats, sweep

DIVERGENCES, ESTIMATORS = ("reverse_kl", "forward_kl", "js"), ("sampled", "unbiased", "exact")
BETAS = (.03125, .0625, .125, .25, .5)         # of a KL; JS: times STRENGTH
SCHEDULED = .125                               # mean beta of the falling schedule, of a KL
SAME = [b for b in BETAS if b / STRENGTH["js"] in BETAS]        # betas that a KL and JS have in common
TARGET = .2                                    # training reward; the report's figure shows when it is reached
LEVELS, OTHER_LEVELS = (.7, .95), (.8, .98)    # ranges of diversity kept: of all verdicts, of a check
REACHED = {"reward": "mean reachable reward", "heldout_reward": "mean reachable held-out reward"}   # gained
MEASURES = ("reward", "heldout_reward", "unseen", "open_entropy", "entropy_kept", "pairwise", "vendi",
            "token_entropy", "kl_reverse", "kl_forward", "unreadable")
FIELDS = ("divergence", "estimator", "beta", "schedule", "seed", *MEASURES, "base_reward",
          "base_heldout_reward", "curve", *sweep.STAMP)
COLORS = {"none": "black", "reverse_kl": "tab:blue", "forward_kl": "tab:orange", "js": "tab:green"}


@dataclass(frozen=True)
class Config(sweep.Config):
    first_seed: int = option(0, "the lowest seed; with another csv, a test on new seeds", low=0)
    csv: str = option("results/frontier.csv", "the file of results, one line for each run", ending=".csv")
    out: str = option("out/frontier", "folder of the run folders; each is removed after its run", ending="")


# ---- the runs ----------------------------------------------------------------------------------------------
CELLS = [(d, e, b * STRENGTH[d], "constant") for b, e, d in product(BETAS, ESTIMATORS, DIVERGENCES)]
CELLS += [(d, "sampled", SCHEDULED * STRENGTH[d], "linear") for d in DIVERGENCES]
CELLS += [NONE := ("none", "sampled", 0.0, "constant")]        # (divergence, estimator, beta, schedule)


def plan(seeds, first=0):
    """Return all runs (*cell, seed), one seed after another."""
    return [(*cell, seed) for seed in range(first, first + seeds) for cell in CELLS]


def load(path):
    """Return the lines of the csv file at `path` as dicts. Raises UserError as sweep.load does."""
    return sweep.load(path, FIELDS, (*MEASURES, "beta", "base_reward", "base_heldout_reward"), key=5)


def key(row):
    """Return (cell, seed) of a line."""
    return tuple(row[name] for name in FIELDS[:4]), row["seed"]


def command(run, folder, device):
    """Return the command line of a run (divergence, estimator, beta, schedule, seed)."""
    divergence, estimator, beta, schedule, seed = run
    falling = [f"--beta={2 * beta}", "--beta_schedule=linear", "--beta_end=0.0"]
    return [sys.executable, locate("train.py"), "configs/tiny_js.py", f"--divergence={divergence}",
            f"--estimator={estimator}", f"--seed={seed}", f"--device={device}", f"--out_dir={folder}",
            "--eval_interval=120", *(falling if schedule == "linear" else [f"--beta={beta}"])]


def row_of(run, folder):
    """Return the values of a finished run's line in the csv file, up to its curve."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        rewards = np.array([json.loads(text)["reward"] for text in file]).reshape(-1, 10).mean(1)
    return [*run, *sweep.measured(folder, MEASURES, REACHED), " ".join(f"{r:.4f}" for r in rewards)]


# ---- the statistics ----------------------------------------------------------------------------------------
entropy_kept = lambda row: row["entropy_kept"]             # the diversity of a run, as a share of its base's


def gain(row, measure="reward"):
    """Return the reward that a run gained over its base."""
    return row[measure] - row["base_" + measure]


def complete(rows):
    """Return the seeds for which every cell has a run."""
    return sweep.complete(rows, CELLS, lambda row: key(row)[0])


def frontier(rows, seed, betas, measure, divergence, estimator, schedule="constant"):
    """Return points (diversity kept, gain) of a seed: base, `none`, and the runs with these betas of a KL."""
    wanted = {NONE, *((divergence, estimator, b * STRENGTH[divergence], schedule) for b in betas)}
    return [(1.0, 0.0)] + [(entropy_kept(r), gain(r, measure)) for r in rows
                           if r["seed"] == seed and key(r)[0] in wanted]


def reachable(points, level):
    """Return the largest gain at diversity `level` or more, on the upper convex hull of the points. A policy
    between two runs exists: for each prompt, a coin chooses one of their policies."""
    best = max((g for k, g in points if k >= level), default=-np.inf)
    mixed = [g + (g2 - g) * (level - k) / (k2 - k) for k, g in points for k2, g2 in points if k < level <= k2]
    return max([best, *mixed])


def area(points, levels=LEVELS):
    """Return one number for a frontier: its mean reachable gain over a range of diversity kept."""
    return float(np.mean([reachable(points, level) for level in np.linspace(*levels, 51)]))


def reach(rows, forms, measure, betas=BETAS, levels=LEVELS):
    """Return for each seed the mean `area` over forms (divergence, estimator), or (.., schedule)."""
    return [np.mean([area(frontier(rows, s, betas, measure, *form), levels) for form in forms])
            for s in complete(rows)]


def compared(rows, pairs, levels=LEVELS):
    """Yield a line (*words, measure, difference, verdict) for each measure of REACHED and each of the pairs
    (*words, forms, other forms, betas of a KL). The difference is between what the two `reach`."""
    for measure, name in REACHED.items():
        for *words, one, other, betas in pairs:
            a, b = (reach(rows, forms, measure, betas, levels) for forms in (one, other))
            yield *words, name, *stats.say(np.subtract(a, b))


def verdicts(rows, levels=LEVELS):
    """Return what the runs say about the claims: lines (claim, comparison, measure, difference, verdict)."""
    seeds, at, out = complete(rows), {key(r): r for r in rows}, []
    # (i): all three get the same beta. To beat a KL means more reward and no less diversity.
    for b, kl in product(SAME, DIVERGENCES[:2]):
        for name, value in (("reward gained", gain), ("diversity kept", entropy_kept)):
            js, other = ([value(at[(d, "sampled", b, "constant"), s]) for s in seeds] for d in ("js", kl))
            words = "(i)", f"js - {kl}, sampled, both beta {b:g}", name
            out.append((*words, *stats.say(np.subtract(js, other))))
    pairs = [("(ii)", f"js - {kl}, {e}", [("js", e)], [(kl, e)], BETAS)
             for e in ESTIMATORS for kl in DIVERGENCES[:2]]
    pairs += [(claim, f"{e} - sampled, {d}", [(d, e)], [(d, "sampled")], BETAS)
              for claim, e in (("(iii)", "exact"), ("(iv)", "unbiased")) for d in DIVERGENCES]
    pairs += [("(v)", f"falling - constant, {d}", [(d, "sampled", "linear")], [(d, "sampled")], [SCHEDULED])
              for d in DIVERGENCES]
    return out + list(compared(rows, pairs, levels))


def afterwards(rows):
    """Return comparisons that were chosen after the runs were seen: lines of `verdicts` without a claim."""
    seeds, at = complete(rows), {key(r): r for r in rows}
    twice = [("forward_kl", "unbiased"), ("reverse_kl", "sampled")]            # one method
    pairs = [("one method run twice: unbiased forward_kl - sampled reverse_kl", twice[:1], twice[1:]),
             ("the same function, less noise: exact forward_kl - the method run twice",
              [("forward_kl", "exact")], twice),
             ("another function, also of single samples: unbiased reverse_kl - the method run twice",
              [("reverse_kl", "unbiased")], twice)]
    for a, b in (("exact", "sampled"), ("unbiased", "sampled"), ("exact", "unbiased")):
        pairs.append((f"{a} - {b}, mean over divergences", *([(d, e) for d in DIVERGENCES] for e in (a, b))))
    for a, b in (("reverse_kl", "js"), ("reverse_kl", "forward_kl"), ("js", "forward_kl")):
        pairs.append((f"{a} - {b}, mean over estimators", *([(d, e) for e in ESTIMATORS] for d in (a, b))))
    out = list(compared(rows, [(*pair, BETAS) for pair in pairs]))
    weak = [(d, "exact", b * STRENGTH[d], "constant") for d in DIVERGENCES for b in BETAS[:2]]
    for name, value in (("reward gained", gain), ("held-out reward gained",
                        lambda r: gain(r, "heldout_reward")), ("diversity kept", entropy_kept)):
        out.append((f"none - the {len(weak)} weakest exact cells", name, *stats.say([
            value(at[NONE, s])
            - np.mean([value(at[cell, s]) for cell in weak]) for s in seeds])))
    return out


# ---- the report --------------------------------------------------------------------------------------------
def groups(rows):
    """Return {cell: its lines}, sorted by name and by beta, with the cell without a divergence last."""
    in_order = sorted(rows, key=lambda r: (r["divergence"] == "none", r["divergence"], r["estimator"],
                                           r["schedule"], r["beta"]))
    return {cell: list(lines) for cell, lines in groupby(in_order, lambda r: key(r)[0])}


def steps_to(row):
    """Return the step at which the mean reward has been at least TARGET in two blocks of ten steps in a row.
    For a run that never reaches TARGET this is the number of its steps, so a mean is a lower bound."""
    over = np.array(row["curve"].split(), float) >= TARGET
    twice = over[1:] & over[:-1]
    return 10.0 * (twice.argmax() + 2 if twice.any() else len(over))


def trace(axis, found, x, y, style="o-", legend=True):
    """Draw a line through the cells of each divergence, with crosses of one standard deviation."""
    for d, color in COLORS.items():
        if cells := [rs for (name, *_), rs in found if name == d]:
            xs, ys = (np.array([[value(r) for r in rs] for rs in cells]) for value in (x, y))  # [cells,seeds]
            dx, dy = (values.std(1, ddof=min(1, len(cells[0]) - 1)) for values in (xs, ys))
            axis.errorbar(xs.mean(1), ys.mean(1), dy, dx, fmt=style, ms=3, lw=1, elinewidth=.6, color=color,
                          label=d if legend else None)


def figures(rows, folder):
    """Write frontier.png, the main result, and frontier_more.png, further views, into `folder`."""
    kept, judged, strong = "open-attribute entropy kept", "judge reward gained", STRENGTH["js"]
    main_figure, more_views = (os.path.join(folder, name) for name in ("frontier.png", "frontier_more.png"))
    seeds = complete(rows)
    found = [*groups([r for r in rows if r["seed"] in seeds]).items()]

    def pick(estimator=None, betas=None, js=strong):
        return [(cell, rs) for cell, rs in found if cell[0] == "none" or cell[3] == "constant"
                and estimator in (None, cell[1])
                and (betas is None or cell[2] / (js if cell[0] == "js" else 1) in betas)]
    with stats.panels(main_figure, 1, 3, (14, 4.4), sharey=True, sharex=True) as axes:
        for axis, estimator in zip(axes, ESTIMATORS):
            trace(axis, pick(estimator), entropy_kept, gain)
            axis.plot(1, 0, "s", color="grey", label="base")
            axis.axvspan(*LEVELS, color=".94", zorder=0, label="compared here")
            axis.set(title=f"{estimator}, beta grid (js x {strong})", xlabel=kept)
        axes[0].set_ylabel(judged)
        axes[0].legend(frameon=False)

    with stats.panels(more_views, 2, 3, (14, 8.4)) as axes:
        for axis, js, title in ((axes[0, 0], 1, "one beta for all"),
                                (axes[0, 1], strong, f"matched strength (js x {strong})")):
            trace(axis, pick("sampled", SAME, js), entropy_kept, gain)
            axis.set(title=f"sampled, {title}", xlabel=kept, ylabel=judged)
        trace(axes[0, 2], pick("sampled"), lambda r: r["kl_reverse"], gain)
        trace(axes[0, 2], pick("exact")[:-1], lambda r: r["kl_reverse"], gain, "o--", legend=False)
        axes[0, 2].set(title="reward and KL(policy || base); dashed: exact", xlabel="nat per image",
                       ylabel=judged, xscale="log")
        trace(axes[1, 0], pick(), gain, lambda r: gain(r, "heldout_reward"), "o")
        axes[1, 0].set(title="trained and held-out reward", xlabel=judged, ylabel="reader reward gained")
        trace(axes[1, 1], pick("sampled"), lambda r: r["beta"] / STRENGTH.get(r["divergence"], 1), steps_to)
        axes[1, 1].set(title=f"steps to a training reward of {TARGET}; 120: never",
                       xlabel=f"beta (js / {strong})", ylabel="steps")
        trace(axes[1, 2], [c for c in found if c[0][3] == "linear"], entropy_kept, gain, "o")
        trace(axes[1, 2], pick("sampled"), entropy_kept, gain, ":", legend=False)
        axes[1, 2].set(title="falling beta (dots), constant betas (dotted)", xlabel=kept, ylabel=judged)
        for axis in axes.flat:
            axis.legend(frameon=False, fontsize=8)


def report(rows):
    """Return the report: the verdicts, the figures, then every cell."""
    lines, others = verdicts(rows), verdicts(rows, OTHER_LEVELS)
    means = [[e, *(" / ".join(f"{np.mean(reach(rows, [(d, e)], m)):.3f}" for m in REACHED)
                   for d in DIVERGENCES)] for e in ESTIMATORS]
    changed = [f"{a[0]} {a[1]}, {a[2]}: {a[4]} -> {b[4]}" for a, b in zip(lines, others) if a[4] != b[4]]
    every = [[d, e, f"{b:g}", how, len(rs)] + [stats.spread([r[m] for r in rs]) for m in (
             "reward", "heldout_reward", "entropy_kept", "vendi", "kl_reverse")]
             for (d, e, b, how), rs in groups(rows).items()]
    return (f"# Performance against diversity\n\nMade by `python -m lab.frontier --only=figures` from "
            f"frontier.csv: {len(rows)} runs, device {rows[0]['device']}, base {rows[0]['base']}. Verdicts "
            f"use the betas of a KL {[*BETAS]} (js x {STRENGTH['js']}) and the seeds {complete(rows)}. The "
            f"claims are stated in lab/frontier.py.\n\n![reward against diversity](frontier.png)\n\n"
            f"{stats.judged(lines, len(complete(rows)))}\n\n**Another range.** Frontiers are compared where "
            f"{LEVELS[0]} to {LEVELS[1]} of the diversity is kept. From {OTHER_LEVELS[0]} to "
            f"{OTHER_LEVELS[1]} the verdicts are the same{' except for: ' * bool(changed)}"
            f"{'; '.join(changed)}.\n\n"
            f"The frontiers themselves, as mean reachable reward / mean reachable held-out reward:\n\n"
            f"{stats.table(['', *DIVERGENCES], means)}\n\n**Chosen after the runs were seen.** These "
            f"comparisons are questions for new runs:\n\n{stats.table(stats.HEAD[1:], afterwards(rows))}\n\n"
            f"![more views](frontier_more.png)\n\n" + stats.table(
                ["divergence", "estimator", "beta", "schedule", "seeds", "judge", "reader", "entropy kept",
                 "Vendi score", "KL to the base, nat per image"], every) + "\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    if cfg.only != "figures":
        sweep.make(cfg, load(cfg.csv), plan(cfg.seeds, cfg.first_seed), FIELDS, command, row_of)
    if cfg.only != "runs":
        rows, folder = load(cfg.csv), os.path.dirname(cfg.csv) or "."
        if not complete(rows):
            raise UserError(f"{cfg.csv} has no seed with all cells yet. Continue with python -m lab.frontier")
        figures(rows, folder)
        stats.publish(report(rows), os.path.join(folder, "frontier.md"))


if __name__ == "__main__":
    config.run(main)
