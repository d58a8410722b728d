"""Experiment: do chunks of steps help a flow policy, and which divergence keeps it diverse?

    python -m lab.chunks                  continue where results/chunks.csv ends; a run takes 5 to 10 minutes
    python -m lab.chunks --minutes=60     the same, but start no run after an hour
    python -m lab.chunks --only=figures   figure and verdicts from the csv file alone

Chunk-GRPO (arXiv 2510.21583) reports single runs whose results differ by about 1 %. Here every arm has five
seeds. With one update per rollout all ratios are 1. Then chunks only weigh the steps, and one chunk of all
steps has the gradient of single steps (tests/core/test_chunks.py). So the arms about ratios take three
updates on each rollout. All else is configs/tiny_flow.py, but for two points. Chunks weigh steps themselves,
so the arms about ratios have step_weights = equal, as in the papers. Three updates have 4/10 of the learning
rate of one, because at the full rate a trial run with two updates moved far and gained little (LOG.md).

Arms about the ratio, all with the KL of the config:
    one update, equal   single steps, one update per rollout
    step                single steps
    step, weighted      single steps with the weights of chunks. The paper lacks this control
    chunk               chunks of 1, 2 and 2 steps
    sample              one chunk of all steps
    elbo                another likelihood (arXiv 2602.04663; flow.FlowPolicy explains it)
Arms about the divergence, with one update and the step weights of the config: none, and KL and JS at three
strengths. "config" is the KL of configs/tiny_flow.py. JS has four times the beta
of a KL, because its curvature at the reference is a quarter (STRENGTH in divergences.py).

Claims, each stated before its runs were made, with its verdict in results/chunks.md:
  (i)    chunks beat single steps
  (ii)   chunks beat single steps with the same weights, so the shared ratio matters
  (iii)  small chunks beat one chunk of all steps
  (iv)   the ELBO beats the likelihood of the steps
  (v)    three updates per rollout, each smaller, beat one
  (vi)   JS beats a KL of the same strength
  (vii)  a KL keeps more diversity than no divergence
  (viii) the step weights of the config beat equal weights
Differences are paired by seed. lab/stats.py explains the intervals.
"""
import json
import os
import sys
from dataclasses import dataclass

import numpy as np

from common import config
from common.config import UserError, locate, option
from divergences import STRENGTH
from lab import stats, sweep

STRENGTHS = (.0125, .05, .2)                   # betas of a KL, the config's in the middle; JS: times STRENGTH
EQUAL = ("--step_weights=equal",)
THREE, CHUNKS = (*EQUAL, "--inner_epochs=3", "--learning_rate=4e-4"), "--chunks=(1,2,2)"
ARMS = {"config": (), "one update, equal": EQUAL, "step": THREE, "chunk": (*THREE, CHUNKS),
        "step, weighted": (*THREE, CHUNKS, "--chunk_ratio=False"), "sample": (*THREE, "--chunks=(5,)"),
        "elbo": (*THREE, "--likelihood=elbo"), "none": ("--divergence=none", "--beta=0")}
ARMS |= {f"kl {b}": (f"--beta={b}",) for b in STRENGTHS if b != STRENGTHS[1]}
ARMS |= {f"js {b}": ("--divergence=js", f"--beta={b * STRENGTH['js']:g}") for b in STRENGTHS}
CLAIMS = (("(i)", "chunk", "step"), ("(ii)", "chunk", "step, weighted"), ("(iii)", "chunk", "sample"),
          ("(iv)", "elbo", "step"), ("(v)", "step", "one update, equal"),
          *(("(vi)", f"js {b}", f"kl {b}" if f"kl {b}" in ARMS else "config") for b in STRENGTHS),
          ("(viii)", "config", "one update, equal"))
MEASURES = ("reward", "heldout_reward", "sampler_reward", "sampler_heldout_reward", "unseen", "open_entropy",
            "entropy_kept", "unreadable", "kl_reverse")
LOGGED = ("outside_share", "clip_share", "grad_norm")          # of metrics.jsonl, means over the run
BEFORE = ("reward", "heldout_reward", "sampler_heldout_reward", "unreadable", "open_entropy")
NUMBERS = (*MEASURES, *LOGGED, *(f"base_{m}" for m in BEFORE))
FIELDS = ("arm", "seed", *NUMBERS, *sweep.STAMP)


@dataclass(frozen=True)
class Config(sweep.Config):
    csv: str = option("results/chunks.csv", "the file of results, one line for each run", ending=".csv")
    out: str = option("out/chunks", "folder of the run folders; each is removed after its run", ending="")


# ---- the runs ----------------------------------------------------------------------------------------------
def command(key, folder, device):
    """Return the command line of a run (arm, seed)."""
    arm, seed = key
    return [sys.executable, locate("train.py"), "configs/tiny_flow.py", *ARMS[arm], f"--seed={seed}",
            f"--device={device}", f"--out_dir={folder}", "--eval_interval=1000"]


def row_of(key, folder):
    """Return the values of a finished run's line in the csv file."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(text) for text in file]
    after_and_before = sweep.measured(folder, MEASURES, BEFORE)
    logged = [round(float(np.mean([line[m] for line in lines])), 5) for m in LOGGED]
    return [*key, *after_and_before[:len(MEASURES)], *logged, *after_and_before[len(MEASURES):]]


# ---- the report --------------------------------------------------------------------------------------------
def verdicts(rows, seeds):
    """Return the lines of stats.judged: for each claim the differences of the reader, and of diversity."""
    at = {(r["arm"], r["seed"]): r for r in rows}
    out = []
    for claim, one, other in CLAIMS:
        for measure in ("heldout_reward", "entropy_kept"):
            d = [at[one, s][measure] - at[other, s][measure] for s in seeds]
            out.append([claim, f"{one} - {other}", measure, *stats.say(d)])
    d = [at["config", s]["entropy_kept"] - at["none", s]["entropy_kept"] for s in seeds]
    out.append(["(vii)", "config - none", "entropy_kept", *stats.say(d)])
    main = [at["config", s] for s in seeds]
    gained = [r["heldout_reward"] - r["base_heldout_reward"] for r in main]
    return out + [["goal: +.10", "config - base", "heldout_reward", *stats.say(gained)]]


def figure(rows, seeds, path):
    """Write the figure: reader gained against diversity kept, and the share of ratios outside the clip."""
    with stats.panels(path, 1, 2, (12, 4.6), dpi=100) as axes:
        for i, arm in enumerate(ARMS):
            of = [r for r in rows if r["arm"] == arm and r["seed"] in seeds]
            x, y = ([r["entropy_kept"] for r in of],
                    [r["heldout_reward"] - r["base_heldout_reward"] for r in of])
            marker = "s" if arm.startswith("js") else "^" if arm.startswith("kl") else "o"
            axes[0].errorbar(np.mean(x), np.mean(y), np.std(y), np.std(x), fmt=marker, color=f"C{i % 10}",
                             ms=6, elinewidth=.7, label=arm)
            if "--inner_epochs=3" in ARMS[arm]:
                axes[1].plot([arm] * len(of), [r["outside_share"] for r in of], "o", color=f"C{i % 10}")
        axes[0].set(xlabel="diversity kept (entropy_kept)", ylabel="reader reward gained")
        axes[0].axhline(0, color="black", lw=.6)
        axes[0].legend(frameon=False, fontsize=8, ncol=2)
        axes[1].set(ylabel="share of ratios outside the clip", ylim=(0, 1), title="in the third update")


def report(rows, seeds):
    """Return the report: a row of means for each arm, and the verdicts."""
    rows = [r for r in rows if r["seed"] in seeds]
    shown = (*MEASURES, *LOGGED)
    lines = [["base", *(stats.spread([rows[0][f"base_{m}"]]) if m in BEFORE else "-" for m in shown)]]
    lines += [[arm, *(stats.spread([r[m] for r in rows if r["arm"] == arm]) for m in shown)] for arm in ARMS]
    return (f"# Chunks and divergences of a flow policy in the tiny world\n\nMade by `python -m lab.chunks "
            f"--only=figures` from chunks.csv: {len(rows)} runs, device {rows[0]['device']}, base "
            f"{rows[0]['base']}. Entries are mean ± standard deviation over {len(seeds)} seeds. "
            f"lab/chunks.py states the claims and explains the arms. Images come from the ODE, except in "
            f"columns that begin with sampler.\n\n{stats.table(['arm', *shown], lines)}\n\n"
            f"{stats.judged(verdicts(rows, seeds), len(seeds))}\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    plan = [(arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    plan.sort(key=lambda run: run[0] != "config")          # configs/tiny_flow.py itself comes first
    if cfg.only != "figures":
        sweep.make(cfg, sweep.load(cfg.csv, FIELDS, NUMBERS, 2), plan, FIELDS, command, row_of,
                   base="assets/tiny_flow_base.pt")
    if cfg.only != "runs":
        rows = sweep.load(cfg.csv, FIELDS, NUMBERS, 2)
        if len(seeds := sweep.complete(rows, ARMS)) < 2:
            raise UserError(f"{cfg.csv} has no two seeds with all arms. Continue with python -m lab.chunks")
        stem = cfg.csv.removesuffix(".csv")
        figure(rows, seeds, stem + ".png")
        stats.publish(report(rows, seeds), stem + ".md")


if __name__ == "__main__":
    config.run(main)
