"""Run: python -m pytest tests/common/test_trust.py

What breaking the project on purpose has found: errors that nobody saw, and work that was lost.
"""
import os
import signal
import shutil
import subprocess
import sys

import pytest
import torch
from tqdm import tqdm

import evaluate
import grpo
import pretrain
import reward
import sample
import train
from common import config, files, tables
from common.config import Fault, UserError, locate
from common.folder import claim, open_run
from common.run import BAR, SHOWN
from lab import sweep
from robustness import record
from test_runs import metrics, same_runs
from tiny import world

CPU = torch.device("cpu")
QUICK = ["--eval_interval=9", "--prompts_per_step=2", "--group_size=4",
         "--micro_batch=8", "--device=cpu", "--max_steps=3"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Skip evaluations and figures, and restore the signal handlers that a run replaces."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    found = dict.fromkeys((*tables.COLUMNS, "best_of_n_reward", "best_of_n_heldout_reward"), .5)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **options: evaluate.Evaluated(found, None, None))
    monkeypatch.setattr(world.World, "picture", lambda *args: None)
    monkeypatch.setattr(train, "report", lambda *args: None)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def base(mini_base, tmp_path):
    """Return the path of a base that a test may replace."""
    return str(shutil.copy(mini_base, tmp_path / "base.pt"))


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])


def other(base):
    """Replace the weights of a base, as a new pretraining does."""
    saved = files.load(base)
    saved["gpt"]["state"]["output.weight"] += 1
    files.save(saved, base)


# ---- 1. the base behind a run was replaced -----------------------------------------------------------------
def test_a_replaced_base_is_noticed_everywhere(base, tmp_path, capsys):
    run = str(tmp_path / "run")
    go(run, base, "--stop_after=1")
    looks = {"resume": lambda: train.main(["--resume", f"--out_dir={run}"]),
             "evaluate": lambda: evaluate.main([run, "--device=cpu", f"--picture={tmp_path / 'p.png'}"]),
             "sample": lambda: sample.open_pipeline(sample.Config(ckpt=run), [], CPU)}
    looks["sample"](), looks["evaluate"]()                         # all is well so far
    assert "warning" not in capsys.readouterr().out
    shutil.copy(base, tmp_path / "kept.pt")
    other(base)
    for look in looks.values():
        with pytest.raises(UserError, match="base.pt is not the file that .*run.* was made from"):
            look()
    shutil.copy(tmp_path / "kept.pt", base)
    looks["resume"]()
    assert files.load(run + "/ckpt.pt")["step"] == 3
    saved = files.load(run + "/ckpt.pt")
    del saved["made_from"]                                         # a checkpoint of an earlier version
    files.save(saved, run + "/ckpt.pt")
    looks["sample"]()
    assert "does not tell which files it was made from" in capsys.readouterr().out


def test_pretrain_replaces_no_base_unasked(base):
    with pytest.raises(UserError, match="base.pt exists already.*--overwrite"):
        pretrain.main([f"--out={base}"])


# ---- 4. results that are not finite ------------------------------------------------------------------------
def test_a_run_whose_steps_were_all_skipped_fails(base, tmp_path, monkeypatch):
    monkeypatch.setitem(reward.REWARDS, "broken", lambda images, prompts: images.mean((1, 2, 3)) * torch.nan)
    with pytest.raises(Fault, match="3 of 3 steps were skipped, because their reward was not finite"):
        go(tmp_path / "run", base, "--reward=broken")


def test_skipped_steps_are_reported_at_the_end(base, tmp_path, monkeypatch, capsys):
    real, calls = grpo.loss, []

    def spoiled(*args, **options):
        loss, stats = real(*args, **options)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 2 else 1), stats
    monkeypatch.setattr(grpo, "loss", spoiled)
    go(tmp_path / "run", base)
    assert "warning: 1 of 3 steps were skipped, because their gradient was" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--cfg_scale=1e300"], ["--cfg_scale=1e300", "--temperature=0"],
                                     ["--temperature=1e-300"]])
def test_logits_that_are_not_finite_are_a_failure(options, base, tmp_path):
    with pytest.raises(Fault, match="not finite"):
        sample.main([f"--ckpt={base}", "--n=1", "--device=cpu", f"--out={tmp_path / 's.png'}", *options])
    assert not (tmp_path / "s.png").exists()


# ---- 5. and 6. options that another run has, or that mean nothing ------------------------------------------
def test_resume_compares_the_config_file_too(base, tmp_path):
    run = tmp_path / "run"
    go(run, base, "--divergence=js", "--stop_after=1")
    none = tmp_path / "none.py"
    none.write_text(f'out_dir = "{run}"\ndivergence = "none"\n')
    with pytest.raises(UserError, match="has divergence = 'js', but this command or its config file asks for "
                                        "'none'. Resume it with `python train.py --resume --out_dir="):
        open_run(evaluate.options, [str(none), "--resume"])
    none.write_text(f'out_dir = "{run}"\ndivergence = "js"\n')
    cfg, _ = open_run(evaluate.options, [str(none), "--resume", "--micro_batch=4"])
    assert cfg.divergence == "js" and cfg.micro_batch == 4         # what changes only memory may differ


@pytest.mark.parametrize("argv, message", [
    (["--lora_rank=4"], "no option 'lora_rank'"), (["--shard"], "only one process"),
    (["configs/tiny_vapi.py", "--data=x"], "no option 'data'"),
    (["--world=llamagen", "--data=x"], "no option 'data'"),
    (["--compile"], "no option 'compile'"),
    (["configs/llamagen_js.py", "--compile", "--shard"], "--compile .* --shard"),
    (["--reward=judge:1,judge:2"], "named twice")])
def test_options_that_would_be_ignored_are_refused(argv, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_run(evaluate.options, [*argv, f"--out_dir={tmp_path / 'run'}"])


def test_sample_refuses_what_a_checkpoint_already_knows(base):
    with pytest.raises(UserError, match="--world would be ignored without --gpt_ckpt"):
        sample.main([f"--ckpt={base}", "--world=janus"])


# ---- 8. two sweeps -----------------------------------------------------------------------------------------
def test_two_sweeps_do_not_share_a_folder(tmp_path):
    cfg = type("Cfg", (sweep.Config,), {"csv": str(tmp_path / "a.csv"), "out": str(tmp_path / "out")})
    held = claim(cfg.out)
    with pytest.raises(UserError, match="another process works in .*out.*choose another --out"):
        sweep.make(cfg(), [], [("js", 0)], ("name", "seed"), None, None)
    held.close()


# ---- 9. work that was lost ---------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs, left", [(1, 2), (2, 0)])
def test_a_step_that_fails_loses_only_itself(epochs, left, base, tmp_path, monkeypatch, capsys):
    """Fail in the last backward pass of step 2. With two inner epochs the policy has already changed then, so
    the last checkpoint remains."""
    run, real, calls = str(tmp_path / "run"), grpo.loss, []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == 3 * epochs:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(*args, **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(grpo, "loss", fails)
        go(run, base, f"--inner_epochs={epochs}")
    assert files.load(run + "/ckpt.pt")["step"] == left
    said = f"saved {run}/ckpt.pt after step {left}; continue with `python train.py --resume --out_dir={run}`"
    assert (said in capsys.readouterr().out) == (left > 0)
    train.main(["--resume", f"--out_dir={run}"])
    go(tmp_path / "whole", base, f"--inner_epochs={epochs}")
    same_runs(run, str(tmp_path / "whole"))


def test_an_evaluation_that_fails_loses_no_step(base, tmp_path, monkeypatch):
    run, real = str(tmp_path / "run"), evaluate.evaluate

    def fails(world, pipeline, model, before, **options):
        if before:
            raise Fault("reward 'mine' failed")
        return real()
    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(evaluate, "evaluate", fails)
        go(run, base)
    assert files.load(run + "/ckpt.pt")["step"] == 3 == len(metrics(run))
    train.main(["--resume", f"--out_dir={run}"])
    assert [line["step"] for line in metrics(run, "evaluations.jsonl")] == [0, 3]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_what_to_lower(error, monkeypatch, capsys):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as end:
        config.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1
    assert all(name in said for name in ("--micro_batch", "--logit_chunk", "--sample_batch", "--recompute"))
    error = RuntimeError("a bug")                                  # keeps its traceback
    with pytest.raises(RuntimeError, match="a bug"):
        config.run(main)


# ---- 12. and 14. the first minutes -------------------------------------------------------------------------
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_without_a_checkpoint_names_the_way_out(resume, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has files such as notes.txt, but no ckpt.pt.*Move them away"):
        open_run(evaluate.options, [f"--out_dir={tmp_path}", *resume])


def test_files_are_looked_for_before_options_are_printed(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no file .*nope.pt"):
        go(tmp_path / "run", tmp_path / "nope.pt")
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_the_bar_shows_the_rewards_on_80_columns():
    text = tqdm.format_meter(119, 120, 4000, ncols=80, prefix="grpo, reverse_kl", bar_format=BAR,
                             postfix=", ".join(f"{short}=0.58" for short in SHOWN.values()) + ", out=0.34")
    assert len(text) <= 80 and text.endswith("r=0.58, held=0.58, kl=0.58, out=0.34")


# ---- 16. to 18. messages -----------------------------------------------------------------------------------
@pytest.mark.parametrize("argv, message", [
    (["-beta=0.1"], "options start with two dashes: --beta=0.1"),
    (["tiny_js"], "no config file 'tiny_js'; did you mean configs/tiny_js.py?"),
    (["configs/tiny_js"], "did you mean configs/tiny_js.py?"),
    (["tinyjs.py"], "did you mean configs/tiny_js.py?"),
    (["xyzzy"], "in configs/ there are: janus_forward_kl, janus_js, ")])
def test_what_people_type_is_understood(argv, message):
    with pytest.raises(UserError) as error:
        config.load(evaluate.options, argv)
    assert message in str(error.value)


def test_a_config_file_of_windows_is_read(tmp_path):
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfbeta = 0.125\r\n")
    assert config.load(evaluate.options, [str(tmp_path / "c.py")])[0].beta == .125


def test_errors_are_at_most_300_characters(capsys):
    def main(argv):
        raise UserError("no such file: " + "x" * 5000 + " choose another")
    with pytest.raises(SystemExit):
        config.run(main)
    said = capsys.readouterr().err
    assert len(said) < 310 and said.endswith(" choose another\n")


def test_only_one_process_of_torchrun_reports_what_all_found(tmp_path):
    """torchrun ends the others as soon as one has ended, so two seconds are enough to say nothing."""
    command = [sys.executable, "-c", "from common import config\ndef main(argv):\n"
               "    raise config.UserError('wrong')\nconfig.run(main)"]
    ranks = [subprocess.Popen(command, cwd=locate("."), env=os.environ | {"RANK": str(rank)},
                              stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    assert ranks[0].wait() == 2 and ranks[0].stderr.read() == "error: wrong\n"
    assert ranks[1].poll() is None
    ranks[1].terminate()                                           # as torchrun does
    assert ranks[1].communicate()[1] == ""


# ---- the rows of results/robustness.md ---------------------------------------------------------------------
@pytest.mark.slow
def test_rows_of_the_table(base, tmp_path, monkeypatch, capsys):
    """Run the tests above once more, each in a folder of its own, and record how they ended."""
    def fresh(name):
        (tmp_path / name).mkdir()
        return str(shutil.copy(base, tmp_path / name / "base.pt")), tmp_path / name
    test_a_replaced_base_is_noticed_everywhere(*fresh("1"), capsys)
    record("a run: another base, seen by --resume, evaluate.py and sample.py", 3, refused=3)
    test_a_run_whose_steps_were_all_skipped_fails(*fresh("2"), monkeypatch)
    record("a run: no step is finite", 1, refused=1)
    for epochs, left in ((1, 2), (2, 0)):
        test_a_step_that_fails_loses_only_itself(epochs, left, *fresh(f"3_{epochs}"), monkeypatch, capsys)
    record("a run: a GPU without memory, in mid-step", 2, harmless=2,
           lost="the step; with inner epochs, steps since the last checkpoint")
    test_an_evaluation_that_fails_loses_no_step(*fresh("4"), monkeypatch)
    record("a run: a reward that fails in an evaluation", 1, harmless=1)
    garbage = (b"[1,2]", b'{"a": 1}', b'{"step": "x"}', b"\xff", b"null", b"12 x")
    for i, text in enumerate(garbage):
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(text + b'\n{"step": 0}\n' + text + b'\n{"step": 1}\n')
        assert [line["step"] for line in files.Log(str(path), 9).lines] == [0, 1]
    record("a run: damaged lines in metrics.jsonl", len(garbage), harmless=len(garbage))
