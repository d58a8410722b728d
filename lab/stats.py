"""Intervals, verdicts and tables of experiments with a few paired seeds."""
import functools
import math

import numpy as np


# ---- the statistics ----------------------------------------------------------------------------------------
def interval(d, resamples=10000):
    """The 95 % percentile bootstrap interval of the mean of d [n], n seeds."""
    means = np.random.RandomState(0).choice(d, (resamples, len(d))).mean(1)
    return np.percentile(means, [2.5, 97.5])


@functools.cache
def student(n):
    """Half the width of Student's 95 % interval of the mean of n values, in standard errors."""
    k, step = n - 1, 1e-4                                                  # degrees of freedom; of the sum
    t = np.arange(step / 2, 20, step)
    # density gamma((k+1)/2) / (gamma(k/2) sqrt(k pi)) (1 + t^2/k)^(-(k+1)/2); .475 of it lies in [0, half]
    height = math.exp(math.lgamma((k + 1) / 2) - math.lgamma(k / 2)) / math.sqrt(k * math.pi)
    return t[np.searchsorted(np.cumsum(height * step * (1 + t * t / k) ** (-(k + 1) / 2)), .475)]


def shows(d):
    """Differences d [n] -> (low, high) of `interval`, (low, high) of Student, and what is shown: more, less,
    or nothing, where one of them holds 0. Both are asked, as the bootstrap of few seeds is too sure of
    itself."""
    error = student(len(d)) * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else np.inf
    both = interval(d), (d.mean() - error, d.mean() + error)
    side = np.sign(d.mean()) * all(low > 0 or high < 0 for low, high in both)
    return *both, {0: "not shown", 1: "more", -1: "less"}[int(side)]


def say(differences):
    """Paired differences -> 'mean [bootstrap] [Student], seeds that agree with the mean', what it shows."""
    d = np.asarray(differences, float)
    *both, shown = shows(d)
    intervals = " ".join(f"[{low:+.3f}, {high:+.3f}]" for low, high in both)
    return f"{d.mean():+.3f} {intervals}, {(d * d.mean() > 0).sum()} of {len(d)}", shown


def false_alarms(n, trials=1000):
    """How often a bootstrap interval, and how often `shows`, finds something in n normal differences of mean
    0, drawn `trials` times."""
    found = [shows(d) for d in np.random.RandomState(1).randn(trials, n)]
    return (np.mean([low > 0 or high < 0 for (low, high), *_ in found]),
            np.mean([what != "not shown" for *_, what in found]))


HEAD = ["claim", "difference of", "in", "mean [95 % bootstrap interval] [Student's], seeds that agree",
        "shown"]


def judged(lines, n):
    """Lines (claim, comparison, measure, *say) over n seeds -> how far to trust them, and a table."""
    alone, both = false_alarms(n)
    return (f"**How far to trust a line.** Resampling {n} seeds cannot show what a further seed would do: "
            f"of {n} normal differences without effect, a bootstrap interval excludes 0 in "
            f"{100 * alone:.0f} of 100 cases, not in 5 (sweep.false_alarms). So \"shown\" asks for Student's "
            f"interval as well, which leaves {100 * both:.0f}: about {both * len(lines):.0f} of these "
            f"{len(lines)} lines would still be \"shown\" if there were nothing at all. (The bootstrap "
            f"stays, as it assumes no normal differences.) And all runs share one base, one judge, one set "
            f"of hyperparameters, the prompts and the draws of the evaluations: a seed changes which "
            f"captions are trained on and what is sampled there, and the intervals speak of that alone.\n\n"
            f"{table(HEAD, lines)}")


def spread(values):
    """'mean ± standard deviation'; '-' where a value is not a number."""
    if not np.isfinite(values).all():
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def table(head, lines):
    """Rows of words and numbers -> a table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *lines])
