"""Intervals, verdicts, tables and figures for experiments with a few paired seeds.

The methods of an experiment share their seeds, so the statistics are about differences d [n], one per seed.
A difference is shown if two 95 % intervals of its mean exclude 0: the bootstrap's and Student's. The
bootstrap's interval alone is too narrow for a few seeds (`false_alarms`).
"""
import contextlib
import functools
import math

import numpy as np

from common.images import pyplot

HEAD = ["claim", "difference of", "in", "mean [95 % bootstrap interval] [Student's], seeds that agree",
        "shown"]


@functools.cache
def resamples(n):
    """Return the seeds that each of 10,000 bootstrap resamples contains, as indices [n,10000]."""
    return np.ascontiguousarray(np.random.RandomState(0).randint(0, n, (10000, n)).T)


@functools.cache
def student(n):
    """Return half the width of Student's 95 % interval of the mean of n >= 2 values, in standard errors."""
    k, t = n - 1, np.arange(1, 1_300_001) * 1e-5                # 12.7 is the largest quantile, of n = 2
    height = math.exp(math.lgamma(n / 2) - math.lgamma(k / 2)) / math.sqrt(k * math.pi)
    density = height * (1 + (t - .5e-5) ** 2 / k) ** (-n / 2)              # in the middle of each step
    return float(np.interp(.95 / 2, np.cumsum(density) * 1e-5, t))


def shows(d):
    """Return the bootstrap's percentile interval of the mean of d [n], (low, high), Student's, and the
    verdict: "more" or "less" if both exclude 0, else "not shown"."""
    error = student(len(d)) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else np.inf
    both = np.percentile(d[resamples(len(d))].mean(0), [2.5, 97.5]), (d.mean() - error, d.mean() + error)
    side = np.sign(d.mean()) * all(low > 0 or high < 0 for low, high in both)
    return *both, {0: "not shown", 1: "more", -1: "less"}[int(side)]


def say(differences):
    """Return ('mean [bootstrap] [Student's], seeds with the sign of the mean', verdict) of n differences.
    A difference that could not be measured is NaN. It is left out, and the text says how many there are."""
    every = np.asarray(differences, float)
    d = every[np.isfinite(every)]
    lost = f", {len(every) - len(d)} not measurable" if len(d) < len(every) else ""
    if not len(d):
        return lost[2:], "not shown"
    *both, shown = shows(d)
    intervals = " ".join(f"[{low:+.3f}, {high:+.3f}]" for low, high in both)
    return f"{d.mean():+.3f} {intervals}, {(d * d.mean() > 0).sum()} of {len(d)}{lost}", shown


@functools.cache
def false_alarms(n, trials=1000):
    """Return two shares of `trials` in which n normal differences of mean 0 seem to show something: by the
    bootstrap interval alone, and by both intervals."""
    found = [shows(d) for d in np.random.RandomState(1).randn(trials, n)]
    alone = np.mean([low > 0 or high < 0 for (low, high), *_ in found])
    return alone, np.mean([verdict != "not shown" for *_, verdict in found])


def judged(lines, n):
    """Return how far to trust lines (claim, comparison, measure, *say) over n seeds, and their table."""
    alone, both = false_alarms(n)
    return (f"**How far to trust a line.** Resampling {n} seeds cannot show what a further seed would do. "
            f"For {n} normal differences without any effect, a bootstrap interval excludes 0 in "
            f"{100 * alone:.0f} of 100 cases, not in 5 (`false_alarms` in lab/stats.py). So \"shown\" also "
            f"requires Student's interval, which leaves {100 * both:.0f} of 100 cases. Without any effect, "
            f"about {both * len(lines):.0f} of these {len(lines)} lines would still be \"shown\". The "
            f"bootstrap interval stays because it does not assume normal differences. All runs share one "
            f"base, one judge, one set of hyperparameters, and the prompts and random numbers of the "
            f"evaluations. A seed changes only the training prompts and the training samples. The intervals "
            f"cover only this variation.\n\n{table(HEAD, lines)}")


def spread(values):
    """Return 'mean ± standard deviation', or '-' if a value is not finite."""
    if not np.isfinite(values).all():
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def table(head, lines):
    """Return a Markdown table of rows of words and numbers."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *lines])


def publish(text, path):
    """Write a report to `path`, and print it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    print(text)


@contextlib.contextmanager
def panels(path, rows, columns, size, dpi=110, **shared):
    """Yield the axes of a new figure of rows x columns panels, then save it to `path`. size is in inches."""
    plt = pyplot()
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **shared)
    yield axes
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
