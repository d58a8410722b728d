"""python -m pytest tests/common/test_parallel.py

One process against two, which talk by gloo: the same run, picture for picture and weight for weight.
"""
import json
import os
import subprocess
import sys

import pytest
import torch

from common import files as checkpoint
from common.config import locate

QUICK = ["--eval_interval=3", "--eval_prompts=1", "--eval_draws=64", "--prompts_per_step=3", "--group_size=4",
         "--micro_batch=3", "--device=cpu", "--dtype=float64", "--max_steps=3", "--learning_rate=0.01",
         "--cfg_scale=2.0", "--inner_epochs=2"]


def go(folder, base, size, *more):
    """A run of `size` processes, as torchrun starts them; 3 prompts x 4 pictures: a group is cut in two."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29000 + os.getpid() % 900),
             "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size)}
    processes = [subprocess.Popen(
        [sys.executable, locate("train.py"), f"--out_dir={folder}", f"--init_from={base}", *more],
        env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for r in range(size)]
    outputs = [p.communicate(timeout=120) for p in processes]
    return [p.returncode for p in processes], outputs


def metrics(folder):
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(os.path.join(folder, "metrics.jsonl"))]


@pytest.fixture(scope="module")
def one(mini_base, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("one") / "run")
    assert go(folder, mini_base, 1, *QUICK)[0] == [0]
    return folder


def close(a, b):
    a, b = (checkpoint.load(os.path.join(f, "ckpt.pt"))["model"] for f in (a, b))
    return max((a[k] - b[k]).abs().max().item() for k in a)


def test_two_processes_make_the_run_of_one(one, mini_base, tmp_path):
    folder = str(tmp_path / "two")
    codes, outputs = go(folder, mini_base, 2, *QUICK)
    assert codes == [0, 0], outputs
    assert outputs[1][0] == ""                                  # only the first one speaks
    assert close(one, folder) < 1e-9                            # asked for: 1e-6
    for a, b in zip(metrics(one), metrics(folder), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_two_processes_learn_from_the_pictures_of_one(mini_base, tmp_path):
    """vapi.py: each process holds the pictures that its own samples need; one of the three is in both."""
    quick = [o for o in QUICK if "cfg_scale" not in o] + ["--algorithm=vapi", "--prior_weight=0.3"]
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for size, folder in enumerate(folders, 1):
        codes, outputs = go(folder, mini_base, size, *quick)
        assert codes == [0] * size, outputs
    assert close(*folders) < 1e-9
    for a, b in zip(*map(metrics, folders), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    assert metrics(folders[0])[0]["prior"] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(one, mini_base, tmp_path):
    folder = str(tmp_path / "changed")
    assert go(folder, mini_base, 2, *QUICK, "--stop_after=1")[0] == [0, 0]
    assert go(folder, mini_base, 1, "--resume", "--stop_after=1")[0] == [0]
    assert go(folder, mini_base, 2, "--resume")[0] == [0, 0]
    assert close(one, folder) < 1e-9 and len(metrics(folder)) == 3


@pytest.mark.slow
def test_shares_of_the_weights_make_the_run_of_one(one, mini_base, tmp_path):
    """FSDP2: each of two processes has half of each weight; the files are those of a whole run, which can go
    on from them, and the other way round."""
    folder = str(tmp_path / "shard")
    codes, outputs = go(folder, mini_base, 2, *QUICK, "--shard", "--recompute", "--chunk=5")
    assert codes == [0, 0], outputs
    assert close(one, folder) < 1e-9
    for a, b in zip(metrics(one), metrics(folder), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    folder = str(tmp_path / "changed")
    for size, more in ((2, [*QUICK, "--shard"]), (1, ["--resume"]), (2, ["--resume"])):
        assert go(folder, mini_base, size, *more, "--stop_after=1")[0] == [0] * size
    assert close(one, folder) < 1e-9 and len(metrics(folder)) == 3


def test_pictures_that_cannot_be_shared_out_are_refused(mini_base, tmp_path):
    codes, outputs = go(str(tmp_path / "run"), mini_base, 2, *QUICK, "--prompts_per_step=1", "--group_size=3")
    assert codes == [2, 2] and "cannot be shared out" in outputs[0][1] and not (tmp_path / "run").exists()
    assert all("Traceback" not in err for _, err in outputs)


def test_a_process_draws_at_most_sample_batch_at_once(one, mini_base, tmp_path):
    """With more processes the share of each may be smaller than that: configs/llamagen_js.py draws 32 of 128
    at once on one GPU, and 16 on each of eight. Here 12 pictures: 6 each, where 8 might be drawn."""
    folder = str(tmp_path / "two")
    codes, outputs = go(folder, mini_base, 2, *QUICK, "--sample_batch=8")
    assert codes == [0, 0], outputs
    assert close(one, folder) < 1e-9


def test_without_torchrun_nothing_happens():
    from common import parallel
    x = torch.arange(3.)
    assert parallel.gather(x) is x
    assert parallel.combine({"a": x[1], "max_b": x[2]}) == {"a": 1.0, "max_b": 2.0}
