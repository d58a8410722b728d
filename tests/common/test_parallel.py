"""Run: python -m pytest tests/common/test_parallel.py            (-m slow: VA-pi, resuming, --shard)

One process against two processes, which communicate by gloo. Both must make the same run.

The runs are in fp32. Two processes add up the same gradients in another order, so weights differ by rounding.
After 3 steps the largest difference measured is 2e-6, and 1.1e-5 with --shard. AdamW divides each gradient by
its own size, so an error in a gradient would show as a difference of about the learning rate, .01.
"""
import json
import os
import subprocess
import sys

import pytest
import torch

from common import files, parallel
from common.config import locate

QUICK = ["--eval_interval=3", "--eval_prompts=1", "--eval_draws=64", "--prompts_per_step=3", "--group_size=4",
         "--micro_batch=3", "--device=cpu", "--max_steps=3", "--learning_rate=0.01", "--cfg_scale=2.0",
         "--inner_epochs=2"]


def go(folder, base, size, *more):
    """Start a run of `size` processes as torchrun does, and return their exit codes and what they printed.
    There are 3 prompts x 4 images, so one group is split between two processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 900),
             "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    processes = [subprocess.Popen(
        [sys.executable, locate("train.py"), f"--out_dir={folder}", f"--init_from={base}", *more],
        env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for r in range(size)]
    outputs = [p.communicate(timeout=300) for p in processes]
    return [p.returncode for p in processes], outputs


def metrics(folder):
    """Return the lines of metrics.jsonl as dicts, without times."""
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(os.path.join(folder, "metrics.jsonl"))]


@pytest.fixture(scope="module")
def one(mini_base, tmp_path_factory):
    """Return the folder of the run of one process."""
    folder = str(tmp_path_factory.mktemp("one") / "run")
    assert go(folder, mini_base, 1, *QUICK)[0] == [0]
    return folder


def assert_same_run(a, b):
    """Check two run folders: equal images in every step, and weights and statistics equal up to rounding."""
    one, two = (files.load(os.path.join(f, "ckpt.pt"))["model"] for f in (a, b))
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-4
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for key in ("step", "reward", "heldout_reward", "zero_spread", "beta", "learning_rate"):
            assert x[key] == pytest.approx(y[key], rel=1e-6, abs=1e-9)     # one other token would change more
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)


def test_two_processes_make_the_run_of_one(one, mini_base, tmp_path):
    folder = str(tmp_path / "two")
    codes, outputs = go(folder, mini_base, 2, *QUICK)
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""                                  # only rank 0 prints
    assert_same_run(one, folder)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--prior_dropout"]])
def test_two_processes_learn_from_the_images_of_one(more, mini_base, tmp_path):
    """vapi.py: each process holds the images that its own samples need. One of three images is on both."""
    quick = [o for o in QUICK if "cfg_scale" not in o] + ["--algorithm=vapi", "--prior_weight=0.3", *more]
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for size, folder in enumerate(folders, 1):
        codes, outputs = go(folder, mini_base, size, *quick)
        assert codes == [0] * size, outputs
    assert_same_run(*folders)
    assert metrics(folders[0])[0]["prior"] > 0


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(one, mini_base, tmp_path):
    folder = str(tmp_path / "changed")
    assert go(folder, mini_base, 2, *QUICK, "--stop_after=1")[0] == [0, 0]
    assert go(folder, mini_base, 1, "--resume", "--stop_after=1")[0] == [0]
    assert go(folder, mini_base, 2, "--resume")[0] == [0, 0]
    assert_same_run(one, folder)


@pytest.mark.slow
def test_a_sharded_run_is_the_run_of_one(one, mini_base, tmp_path):
    """FSDP2: each of two processes has half of each weight. Checkpoints hold whole weights, so a run can
    resume with and without --shard, and with another number of processes."""
    folder = str(tmp_path / "shard")
    codes, outputs = go(folder, mini_base, 2, *QUICK, "--shard", "--recompute", "--logit_chunk=5")
    assert codes == [0, 0], outputs
    assert_same_run(one, folder)
    folder = str(tmp_path / "changed")
    for size, more in ((2, [*QUICK, "--shard"]), (1, ["--resume"]), (2, ["--resume"])):
        assert go(folder, mini_base, size, *more, "--stop_after=1")[0] == [0] * size
    assert_same_run(one, folder)


def test_samples_that_cannot_be_divided_among_processes_are_refused(mini_base, tmp_path):
    codes, outputs = go(str(tmp_path / "run"), mini_base, 2, *QUICK, "--prompts_per_step=1", "--group_size=3")
    assert codes == [2, 2] and "do not divide evenly" in outputs[0][1] and not (tmp_path / "run").exists()
    assert all("Traceback" not in err for _, err in outputs)


def test_a_process_samples_at_most_sample_batch_at_once(one, mini_base, tmp_path):
    """With more processes, a process may have fewer samples than --sample_batch. configs/llamagen_js.py
    samples 32 of 128 at once on one GPU, and 16 on each of eight. Here each process has 6 of 12, below 8."""
    folder = str(tmp_path / "two")
    codes, outputs = go(folder, mini_base, 2, *QUICK, "--sample_batch=8")
    assert codes == [0, 0], outputs
    assert_same_run(one, folder)


def test_without_torchrun_nothing_happens():
    x = torch.arange(3.)
    assert parallel.gather(x) is x
    assert parallel.combine({"a": x[1], "max_b": x[2]}) == {"a": 1.0, "max_b": 2.0}
