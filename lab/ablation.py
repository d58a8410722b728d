"""Ablation of VA-pi: does each of its parts help, and does a lower temperature help as much?

    python -m lab.ablation                  continue where results/ablation.csv ends; a run takes 2 minutes
    python -m lab.ablation --minutes=60     the same, but start no run after an hour
    python -m lab.ablation --only=figures   figure and verdicts from the csv files alone

In the published ablation (project page of VA-pi, arXiv 2512.19680; LlamaGen-XXL without guidance, one run
each), the reward alone collapses (FID 14 -> 39), the prior alone does nothing (14.2), and both together help
(7.7). VA-pi gains most without guidance, hardly anything with guidance, and loses recall. A *sharper* policy
behaves in this way, and a lower temperature or guidance sharpens a policy without any training. So we compare
the trained policies with the base under every temperature and guidance.

The tiny base is well calibrated at temperature 1, and its best temperature is .8. LlamaGen at 1 is far too
broad (FID 14, and 2.4 with guidance). So we train and evaluate the tiny policy at 1.4, where it is too broad
as well. The arm `calibrated` runs at temperature 1, for comparison. ARMS lists all arms.

Claims, each stated before it was tested, with its verdict in results/ablation.md:
  (i)   the reward alone makes images worse than the base's
  (ii)  the prior alone changes nothing
  (iii) both together make images better
  (iv)  noise in the context helps
  (v)   the trained policy is better than the base, each under its best temperature and guidance
Differences are paired by seed, or taken from the one base. lab/stats.py explains the intervals.
"""
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import evaluate
from common import config, files
from common.config import UserError, option, locate
from lab import stats, sweep

ARMS = {"reward only": ("--prior_weight=0",), "perceptual only": ("--prior_weight=0", "--mse_weight=0"),
        "prior only": ("--mse_weight=0", "--perceptual_weight=0"), "all": (),
        "all, noise .1": ("--context_noise=0.1",), "all, noise .5": ("--context_noise=0.5",),
        "calibrated": ("--temperature=1.0",)}
BROAD = 1.4                                    # the temperature of configs/tiny_vapi.py
# (temperature, guidance): each alone, then both, because a base that is too broad may need both.
SETTINGS = [(t, 1.0) for t in (BROAD, 1.2, 1.0, .9, .8, .7, .6)] + [(1.0, s) for s in (1.25, 1.5, 2.0, 3.0)]
SETTINGS += [(t, s) for t in (1.2, .8, .6) for s in (1.25, 1.5, 2.0)]
MEASURES = ("reward", "heldout_reward", "frechet", "precision", "recall", "entropy_kept", "unreadable",
            "reconstruction", "token_entropy", "kl_reverse")
NUMBERS = (*MEASURES, *(f"base_{m}" for m in MEASURES))        # after training, then before it
FIELDS = ("arm", "seed", *NUMBERS, *sweep.STAMP)
SETTING_FIELDS = ("seed", "temperature", "cfg_scale", *(m for m in MEASURES if m != "reconstruction"))


@dataclass(frozen=True)
class Config(sweep.Config):
    csv: str = option("results/ablation.csv", "the file of results, one line for each run", ending=".csv")
    out: str = option("out/ablation", "folder of the run folders; those of the arm `all` stay", ending="")


# ---- the runs ----------------------------------------------------------------------------------------------
def command(key, folder, device):
    """Return the command line of a run (arm, seed)."""
    arm, seed = key
    return [sys.executable, locate("train.py"), "configs/tiny_vapi.py", *ARMS[arm], f"--seed={seed}",
            f"--device={device}", f"--out_dir={folder}", "--eval_interval=150"]


def under_settings(cfg, path):
    """Evaluate the base (seed -1) and the policies of the arm `all` under SETTINGS, and append the missing
    lines to the csv file at `path`. All evaluations use the same random numbers."""
    rows = sweep.load(path, SETTING_FIELDS, SETTING_FIELDS, 3)
    done = {(r["seed"], r["temperature"], r["cfg_scale"]) for r in rows}
    todo = [(seed, *setting) for seed in range(-1, cfg.seeds) for setting in SETTINGS
            if (seed, *setting) not in done]
    if not todo:
        return
    runs = [evaluate.options_of(os.path.join(cfg.out, f"all_{seed}")) for seed in range(cfg.seeds)]
    world, pipeline = evaluate.open_world(runs[-1][0], torch.device(cfg.device))
    base = evaluate.evaluate(world, pipeline, pipeline.reference, temperature=BROAD)
    with open(path, "a" if rows else "w", encoding="utf-8") as file:
        if not rows:
            print(*SETTING_FIELDS, sep=",", file=file)
        for seed, temperature, cfg_scale in tqdm(todo, desc="settings", dynamic_ncols=True):
            policy = pipeline.policy if seed >= 0 else pipeline.reference
            if seed >= 0:
                files.load_weights(policy, runs[seed][1]["model"], f"all_{seed}")
            found = evaluate.evaluate(world, pipeline, policy, base, temperature=temperature,
                                      cfg_scale=cfg_scale)
            values = sweep.rounded(found.results, SETTING_FIELDS[3:])
            print(seed, temperature, cfg_scale, *values, sep=",", file=file, flush=True)


# ---- the verdicts ------------------------------------------------------------------------------------------
BETTER = {"heldout_reward": 1, "frechet": -1, "precision": 1}    # 1: more is better; -1: less is better
NAMES = {"heldout_reward": "reader", "reward": "judge", "frechet": "Frechet distance",
         "entropy_kept": "entropy kept", "token_entropy": "token entropy", "kl_reverse": "KL to the base"}


def best(rows, seed, measure):
    """Return the best value that the policy of a seed has under any of SETTINGS."""
    return max((r[measure] for r in rows if r["seed"] == seed), key=lambda value: BETTER[measure] * value)


def verdicts(rows, settings):
    """Return what the runs say about the claims: lines (claim, comparison, measure, difference, verdict)."""
    at, out = {(r["arm"], r["seed"]): r for r in rows}, []
    pairs = [("(i)", "reward only", "base"), ("(i)", "perceptual only", "base"),
             ("(ii)", "prior only", "base"), ("(iii)", "all", "base"), ("(iii) at 1", "calibrated", "base"),
             ("(iv)", "all, noise .1", "all"), ("(iv)", "all, noise .5", "all")]
    for measure, sign in BETTER.items():
        found = [(claim, f"{arm} - {other}", [
            r[measure] - (r["base_" + measure] if other == "base" else at[other, r["seed"]][measure])
            for r in rows if r["arm"] == arm]) for claim, arm, other in pairs]
        of_base, trained = best(settings, -1, measure), sorted({r["seed"] for r in settings} - {-1})
        found.append(("(v)", "all - base, each under its best setting",
                      [best(settings, s, measure) - of_base for s in trained]))
        words = dict(zip(("more", "less"), ("better", "worse")[::sign]))
        for claim, what, differences in found:
            text, shown = stats.say(differences)
            out.append((claim, what, NAMES.get(measure, measure), text, words.get(shown, shown)))
    return sorted(out, key=lambda line: line[0])               # the numerals up to (v) sort like words


def figure(rows, settings, path):
    """Write the figure to `path`. Left: the reader reward of each arm. Middle and right: quality against
    recall under every temperature and guidance, for the base and the trained policies."""
    at = {(r["seed"], r["temperature"], r["cfg_scale"]): r for r in settings}
    trained = sorted({r["seed"] for r in settings} - {-1})
    ways = (("o-", [s for s in SETTINGS if s[1] == 1], "temperature 1.4 to .6"),
            ("^--", [s for s in SETTINGS if s[0] == 1], "guidance 1 to 3"),
            ("s:", [s for s in SETTINGS if s[0] == .6], "guidance 1 to 2 at .6"))
    with stats.panels(path, 1, 3, (15, 4.6), dpi=100) as axes:
        for x, arm in enumerate(ARMS):
            for r in (r for r in rows if r["arm"] == arm):
                axes[0].plot(x, r["heldout_reward"], "o", color="tab:blue", ms=4, alpha=.7)
                axes[0].plot(x, r["base_heldout_reward"], "_", color="black", ms=16)
        axes[0].set_xticks(range(len(ARMS)), ARMS, rotation=30, ha="right")
        axes[0].set(ylabel="reader reward", title="dots: seeds; black: the base at their temperature")
        for axis, measure, title in ((axes[1], "heldout_reward", "reader reward"),
                                     (axes[2], "frechet", "Frechet distance, judge's features")):
            for name, seeds, color in (("base", [-1], "black"), ("VA-pi", trained, "tab:blue")):
                for style, chosen, what in ways:
                    xs, ys = (np.array([[at[s, *c][k] for c in chosen] for s in seeds])
                              for k in ("recall", measure))
                    axis.errorbar(xs.mean(0), ys.mean(0), ys.std(0), xs.std(0), fmt=style, color=color, ms=4,
                                  lw=1, elinewidth=.6, label=f"{name}, {what}")
            axis.set(xlabel="recall", ylabel=title)
        axes[1].legend(frameon=False, fontsize=8)


def report(rows, settings):
    """Return the report: the arms, the verdicts, and the settings."""
    def arm(name, prefix="", only="all"):
        of = [r for r in rows if r["arm"] == only]
        return [name, *(stats.spread([r[prefix + m] for r in (of[:1] if prefix else of)]) for m in MEASURES)]
    lines = [arm(f"base at {BROAD}", "base_"), *(arm(a, "", a) for a in ARMS if a != "calibrated"),
             arm("base at 1", "base_", "calibrated"), arm("all at 1", "", "calibrated")]

    def setting(t, s):
        found = [r for r in settings if (r["temperature"], r["cfg_scale"]) == (t, s)]
        return [f"{t:g}", f"{s:g}", *(stats.spread([r[m] for r in found if (r["seed"] >= 0) == trained])
                                      for m in ("heldout_reward", "frechet", "precision", "recall")
                                      for trained in (False, True))]
    return (f"# Ablation of VA-pi in the tiny world\n\nMade by `python -m lab.ablation --only=figures` from "
            f"ablation.csv and ablation_settings.csv: {len(rows)} runs, device {rows[0]['device']}, base "
            f"{rows[0]['base']}. Entries are mean ± standard deviation over seeds. lab/ablation.py states "
            f"the claims.\n\n{stats.table(['arm', *(NAMES.get(m, m) for m in MEASURES)], lines)}\n\n"
            f"{stats.judged(verdicts(rows, settings), len({r['seed'] for r in rows}))}\n\n"
            f"The base and the arm `all` under other temperatures and guidance:\n\n"
            + stats.table(["temperature", "guidance", *(f"{m}, {who}" for m in (
                "reader", "Frechet", "precision", "recall") for who in ("base", "VA-pi"))],
                [setting(*s) for s in SETTINGS]) + "\n")


def main(argv):
    cfg, _ = config.load(Config, argv)
    plan = [(arm, seed) for seed in range(cfg.seeds) for arm in ARMS]
    stem = cfg.csv.removesuffix(".csv")
    if cfg.only != "figures":
        sweep.make(cfg, sweep.load(cfg.csv, FIELDS, NUMBERS, 2), plan, FIELDS, command,
                   row_of=lambda key, folder: [*key, *sweep.measured(folder, MEASURES, MEASURES)],
                   keep=lambda key: key[0] == "all")
        under_settings(cfg, stem + "_settings.csv")
    if cfg.only != "runs":
        rows = sweep.load(cfg.csv, FIELDS, NUMBERS, 2)
        settings = sweep.load(stem + "_settings.csv", SETTING_FIELDS, SETTING_FIELDS, 3)
        if len(rows) < len(plan) or len(settings) < (cfg.seeds + 1) * len(SETTINGS):
            raise UserError(f"{cfg.csv} has not all runs and settings. Continue with python -m lab.ablation")
        figure(rows, settings, stem + ".png")
        stats.publish(report(rows, settings), stem + ".md")


if __name__ == "__main__":
    config.run(main)
