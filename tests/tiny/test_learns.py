"""python -m pytest tests/tiny/test_learns.py           a few real steps, about 30 s
python -m pytest -m slow tests/tiny/test_learns.py   the main results over five seeds, 13 minutes on 2 cores

The slow tests also write results/main.csv, which the tables of docs/results.md are computed from.
"""
import csv
import json
import os
import subprocess
import sys

import pytest
import torch

import train
from common.config import locate
from tiny import shapes


MEASURES = ["reward", "heldout_reward", "open_entropy", "entropy_kept", "vendi", "kl_reverse",
            "best_of_n_reward", "best_of_n_heldout_reward",
            *(f"heldout_reward/{category}" for category in shapes.CATEGORIES)]


def evaluations(folder):
    return [json.loads(text) for text in open(os.path.join(folder, "evaluations.jsonl"), encoding="utf-8")]


def test_a_few_steps_raise_the_reward_that_is_trained(tmp_path):
    """Without warm-up, 12 steps raise the reward of the judge by more than chance does."""
    train.main([f"--out_dir={tmp_path / 'run'}", "--max_steps=12", "--warmup=0",
                "--eval_prompts=1", "--divergence=none", "--device=cpu", "--eval_interval=12"])
    before, after = evaluations(tmp_path / "run")
    assert .35 <= before["heldout_reward"] <= .65                   # the base is imperfect on purpose
    assert after["reward"] > before["reward"] + .03


@pytest.fixture(scope="module")
def five_seeds():
    """Return {"js" or "none": [(first, last evaluation) of seeds 0-4]}. Finished runs in out/claims are used
    as they are."""
    jobs = [(name, seed, locate(".") + f"/out/claims/{name}_{seed}")
            for seed in range(5) for name in ("js", "none")]
    missing = [[sys.executable, "train.py", f"configs/tiny_{name}.py", f"--seed={seed}",
                f"--out_dir={folder}"]
               for name, seed, folder in jobs if not os.path.exists(os.path.join(folder, "table.md"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}                    # two at a time, one core each
    while missing:
        running = [subprocess.Popen(c, cwd=locate("."), env=environment, stderr=subprocess.DEVNULL)
                   for c in missing[:2]]
        assert all(process.wait() == 0 for process in running)
        missing = missing[2:]
    out = {"js": [], "none": []}
    for name, _, folder in jobs:
        found = evaluations(folder)
        out[name].append((found[0], found[-1]))
    with open(locate("results/main.csv"), "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "seed", *MEASURES])
        rows.writerow(["base", "", *(round(out["js"][0][0][m], 5) for m in MEASURES)])
        for name, pairs in out.items():
            rows.writerows([name, seed, *(round(after[m], 5) for m in MEASURES)]
                           for seed, (_, after) in enumerate(pairs))
    return out


@pytest.mark.slow
def test_reader_reward_rises_in_every_seed(five_seeds):
    gains = [after["heldout_reward"] - before["heldout_reward"] for before, after in five_seeds["js"]]
    print("gain of js in the reader's reward, seeds 0-4:", [round(g, 3) for g in gains])
    assert min(gains) >= .15


@pytest.mark.slow
def test_js_gains_most_of_the_reward_and_keeps_most_of_the_diversity(five_seeds):
    def mean(name, key, which):
        return torch.tensor([pair[which][key] for pair in five_seeds[name]],
                            dtype=torch.float64).mean().item()
    share = ((mean("js", "reward", 1) - mean("js", "reward", 0)) /
             (mean("none", "reward", 1) - mean("none", "reward", 0)))
    kept = {name: mean(name, "entropy_kept", 1) for name in five_seeds}
    print(f"js: {share:.0%} of none's gain in the trained reward; "
          f"entropy kept: js {kept['js']:.0%}, none {kept['none']:.0%}")
    assert share >= .7 and kept["js"] >= .85 and kept["none"] <= .7
