"""Run: python -m pytest tests/common/test_runs.py       (and the long tests: -s -m slow)

What may happen to a run: kills, signals, full disks, a second process, rewards that are not finite.
"""
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

import evaluate
import grpo
import reward
import train
from common import files
from common.config import Fault, UserError, locate
from common.folder import HARMLESS, claim, open_run
from robustness import record

QUICK = ["--eval_interval=2", "--eval_prompts=1", "--eval_draws=64", "--prompts_per_step=2", "--group_size=4",
         "--micro_batch=8", "--device=cpu", "--max_steps=4"]


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])


def start(folder, base, *more):
    """Start a run in a process of its own."""
    options = [f"--out_dir={folder}", f"--init_from={base}", *QUICK] if base else [f"--out_dir={folder}"]
    said = tempfile.TemporaryFile("w+")            # a pipe would fill up with progress bars and block the run
    process = subprocess.Popen([sys.executable, locate("train.py"), *options, *more], stdout=said,
                               stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process.said = said
    return process


def end(process):
    """Wait for a process -> (exit code, all that it printed)."""
    process.wait()
    process.said.seek(0)
    return process.returncode, process.said.read()


def metrics(folder, name="metrics.jsonl"):
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(os.path.join(folder, name))]


def wait_for(happened, process):
    """Return when `happened()` is true, or when the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(.002)


def same_runs(a, b):
    """Check that two runs are equal bit for bit: weights, optimizer, logs without times, every image."""
    one, two = (files.load(os.path.join(f, "ckpt.pt")) for f in (a, b))
    assert all(torch.equal(v, two["model"][k]) for k, v in one["model"].items())
    for i, state in one["optimizer"]["state"].items():
        assert all(torch.equal(v, two["optimizer"]["state"][i][k]) for k, v in state.items())
    assert str(one["rng"]) == str(two["rng"]) and one["step"] == two["step"]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert metrics(a, name) == metrics(b, name)
    images = sorted(n for n in os.listdir(a) if n.endswith(".png") and n != "curves.png")     # it shows times
    assert images == sorted(n for n in os.listdir(b) if n.endswith(".png") and n != "curves.png")
    for name in images:
        assert open(os.path.join(a, name), "rb").read() == open(os.path.join(b, name), "rb").read(), name


@pytest.fixture(scope="module")
def whole(mini_base, tmp_path_factory):
    """Return the folder of a run that nothing happened to."""
    folder = str(tmp_path_factory.mktemp("whole") / "run")
    go(folder, mini_base)
    return folder


@pytest.fixture(autouse=True)
def handlers():
    """Restore the signal handlers of pytest's process, which a run replaces."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_asked_to_stop_it_finishes_the_step_and_saves(name, whole, mini_base, tmp_path, monkeypatch, capsys):
    folder, real = str(tmp_path / "run"), grpo.advantages

    def ask(*args):                                             # in every step
        os.kill(os.getpid(), getattr(signal, name))
        return real(*args)
    monkeypatch.setattr(grpo, "advantages", ask)
    with pytest.raises(Fault, match=f"stopped by {name}"):
        go(folder, mini_base)
    said = capsys.readouterr().out
    assert f"{name}: stopping after this step. A second signal ends the run at once." in said
    assert f"ckpt.pt after step 1 of 4; continue with `python train.py --resume --out_dir={folder}`" in said
    assert files.load(os.path.join(folder, "ckpt.pt"))["step"] == 1 == len(metrics(folder))
    monkeypatch.setattr(grpo, "advantages", real)
    cfg, _ = open_run(evaluate.options, [f"--out_dir={folder}", "--resume"])
    assert cfg.device == "cpu"                                 # that of the run, not the best of this machine
    train.main([f"--out_dir={folder}", "--resume"])
    same_runs(whole, folder)


def test_asked_twice_it_leaves_at_once(mini_base, tmp_path, monkeypatch):
    def ask(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(grpo, "advantages", ask)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", mini_base)
    assert files.load(str(tmp_path / "run" / "ckpt.pt"))["step"] == 0


def test_a_folder_is_claimed_by_one(whole, tmp_path):
    lock = claim(whole)
    with pytest.raises(UserError, match="another process works in"):
        train.main([f"--out_dir={whole}", "--resume"])
    lock.close()
    claim(whole).close()


def test_a_folder_that_cannot_be_written(mini_base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file/run.*choose another --out_dir"):
        go(tmp_path / "file" / "run", mini_base)


def test_a_full_disk_leaves_the_checkpoint_before(whole, mini_base, tmp_path, monkeypatch):
    real, saved = torch.save, []

    def full(state, file):
        saved.append(state["step"])
        if state["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        real(state, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Fault, match="No space left on device.*the one before remains.*--resume"):
        go(tmp_path / "run", mini_base)
    assert saved == [0, 2, 4] and not (tmp_path / "run" / "ckpt.pt.tmp").exists()
    assert files.load(str(tmp_path / "run" / "ckpt.pt"))["step"] == 2
    monkeypatch.setattr(torch, "save", real)
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume"])
    same_runs(whole, str(tmp_path / "run"))


def spoiled(monkeypatch, when, value=float("nan")):
    """Add the reward `spoiled`, which returns `value` in the calls `when`."""
    calls = []

    def f(images, prompts):
        calls.append(len(calls))
        rewards = images.mean((1, 2, 3))
        return torch.full_like(rewards, value) if calls[-1] in when else rewards
    monkeypatch.setitem(reward.REWARDS, "spoiled", f)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_reward_is_skipped_and_logged(value, mini_base, tmp_path, monkeypatch):
    spoiled(monkeypatch, {2}, value)                                    # 0: evaluation of the base; 1: step 0
    go(tmp_path / "run", mini_base, "--reward=spoiled", "--max_steps=3", "--eval_interval=9")
    log = metrics(tmp_path / "run")
    assert ["skipped" in line for line in log] == [False, True, False] and log[1]["skipped"] == "reward"
    assert log[1]["grad_norm"] is None and log[2]["grad_norm"] > 0
    for text in open(tmp_path / "run" / "metrics.jsonl"):
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    state = files.load(str(tmp_path / "run" / "ckpt.pt"))["model"]
    assert all(v.isfinite().all() for v in state.values())


def test_ten_such_steps_in_a_row_stop_the_run_with_a_saved_state(mini_base, tmp_path, monkeypatch):
    spoiled(monkeypatch, range(3, 99))
    with pytest.raises(Fault, match="10 of 12 steps were skipped, because their reward was not finite, "
                       "the last 10 in a row; saved .* after step 12 of 50"):
        go(tmp_path / "run", mini_base, "--reward=spoiled", "--max_steps=50", "--eval_interval=99")
    saved = files.load(str(tmp_path / "run" / "ckpt.pt"))
    assert saved["step"] == 12 and all(v.isfinite().all() for v in saved["model"].values())


def test_a_gradient_that_is_not_finite_is_skipped(mini_base, tmp_path, monkeypatch):
    real, calls = grpo.loss, []

    def sometimes(*args, **options):
        loss, stats = real(*args, **options)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 2 else 1), stats
    monkeypatch.setattr(grpo, "loss", sometimes)
    go(tmp_path / "run", mini_base, "--max_steps=3", "--eval_interval=9")
    assert [line.get("skipped") for line in metrics(tmp_path / "run")] == [None, "gradient", None]


@pytest.mark.parametrize("f, message", [
    (lambda images, prompts: 1 / 0, "reward 'mine' failed: ZeroDivisionError"),
    (lambda images, prompts: images.mean((2, 3)),
     r"'mine' must return .* one number for each of \d+ images, \[\d+\], got torch.float32 \[\d+, 3\]"),
    (lambda images, prompts: [1.0] * len(prompts), "reward 'mine' must return a float tensor .* got a list"),
])
def test_a_reward_that_fails_is_named(f, message, mini_base, tmp_path, monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "mine", f)
    with pytest.raises(Fault, match=message):
        go(tmp_path / "run", mini_base, "--reward=mine")
    assert files.load(str(tmp_path / "run" / "ckpt.pt"))["step"] == 0


def test_the_same_seed_gives_the_same_run(whole, mini_base, tmp_path):
    go(tmp_path / "again", mini_base)
    same_runs(whole, str(tmp_path / "again"))
    go(tmp_path / "other", mini_base, "--seed=1")
    assert metrics(whole) != metrics(tmp_path / "other")


@pytest.mark.slow
def test_real_processes_stop_and_lock(whole, mini_base, tmp_path):
    folder = str(tmp_path / "run")
    log = os.path.join(folder, "metrics.jsonl")
    first = start(folder, mini_base, "--max_steps=2000", "--eval_interval=2000")
    wait_for(lambda: os.path.exists(log) and os.path.getsize(log) > 0, first)
    code, said = end(start(folder, None, "--resume"))
    assert first.poll() is None and code == 2 and "another process works in" in said
    first.send_signal(signal.SIGTERM)
    code, said = end(first)
    assert code == 1 and "Traceback" not in said and "continue with `python train.py --resume" in said
    code, said = end(start(folder, None, "--resume", "--stop_after=1"))    # the system released the lock
    assert code == 0, said
    record("a run: SIGTERM, and a second process on its folder", 1, refused=1, harmless=1)


@pytest.mark.slow
def test_killed_at_random_moments_nothing_is_lost(whole, mini_base, tmp_path):
    """Kill at least 30 times, at least 10 of them while a checkpoint is written. Whatever is left loads, and
    resuming from it ends in the run that nothing happened to, bit for bit."""
    rng, kills, writing, started = random.Random(0), 0, 0, 0
    while kills < 30 or writing < 10:
        folder, started = str(tmp_path / str(started)), started + 1
        for attempt in range(100):
            begun = os.path.exists(os.path.join(folder, "ckpt.pt"))
            process = start(folder, None, "--resume") if begun else start(folder, mini_base)
            temporary, now = os.path.join(folder, "ckpt.pt.tmp"), time.time_ns()

            def writing_now():                      # the process before may have left a file as well
                try:
                    return os.stat(temporary).st_mtime_ns > now
                except OSError:
                    return False
            if attempt % 2:
                wait_for(writing_now, process)
            else:
                time.sleep(rng.uniform(3, 9))
            inside, alive = writing_now(), process.poll() is None
            process.kill()
            end(process)
            if not alive:
                break
            kills, writing = kills + 1, writing + inside
            path = os.path.join(folder, "ckpt.pt")
            if os.path.exists(path):
                assert files.load(path)["step"] <= 4
                metrics_path = os.path.join(folder, "metrics.jsonl")
                if os.path.exists(metrics_path):
                    assert all(json.loads(t) for t in open(metrics_path).read().split("\n")[:-1])
            else:                                   # before the first checkpoint
                assert set(os.listdir(folder) if os.path.isdir(folder) else []) <= HARMLESS
        code, said = end(start(folder, None, "--resume"))
        assert code == 0, said
        same_runs(whole, folder)
    record("a run: kill -9", f"{kills}, {writing} inside a checkpoint write", harmless=kills,
           lost="steps since the last checkpoint, repeated bit for bit")


@pytest.mark.slow
def test_memory_and_disk_stay_bounded_over_2000_steps(mini_base, tmp_path):
    folder = str(tmp_path / "run")
    process = start(folder, mini_base, "--max_steps=2000", "--eval_interval=500", "--keep=2")
    seen = []

    def resident():
        with open(f"/proc/{process.pid}/statm") as file:
            seen.append((len(open(os.path.join(folder, "metrics.jsonl")).readlines())
                         if os.path.exists(os.path.join(folder, "metrics.jsonl")) else 0,
                         4096 * int(file.read().split()[1])))
        time.sleep(.5)
        return False
    wait_for(resident, process)
    early = max(m for steps, m in seen if 500 < steps <= 1000)
    late = max(m for steps, m in seen if 1500 < steps < 2000)           # at the end matplotlib is loaded
    sizes = [len(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    assert late < 1.05 * early and len(sizes) == 2000 and max(sizes) < 1000
    kept = sorted(n for n in os.listdir(folder) if n.startswith("ckpt"))
    assert kept == ["ckpt.pt", "ckpt_001500.pt", "ckpt_002000.pt"]
    record("a run: 2,000 steps", 1, harmless=f"memory {early / 1e6:.0f} MB at first, {late / 1e6:.0f} MB at "
           f"last, metrics {sum(sizes) / 1e6:.2f} MB")
