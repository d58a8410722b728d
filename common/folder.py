"""The folder of a run: which command may start a run in it, and which may resume it.

    out/tiny_js/ckpt.pt            all that resuming needs; replaced whole, so that it is always good
    out/tiny_js/config.py          all options of the run, as a config file
    out/tiny_js/metrics.jsonl      one line per step; resuming drops lines of steps that will be repeated
    out/tiny_js/evaluations.jsonl  one line per evaluation
    out/tiny_js/lock               held while a process works in the folder; the system releases it on exit
"""
import dataclasses
import os
import shlex

from common import config, files, parallel
from common.config import UserError

HARMLESS = {"lock", "config.py", "ckpt.pt.tmp"}      # files of a run that was killed before its first save
# Options that may differ when a run is resumed. The second line changes memory only.
FREE = ("resume", "stop_after", "device", "out_dir", "keep",
        "micro_batch", "sample_batch", "logit_chunk", "recompute")


def open_run(choose, argv):
    """Read the command line -> (options, checkpoint or None). A resumed run keeps its own options.

    choose: as in config.load. Raises UserError for invalid options, a used folder, or nothing to resume.
    """
    cfg, given = config.load(choose, argv)
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    there = set(os.listdir(cfg.out_dir)) - HARMLESS if os.path.isdir(cfg.out_dir) else set()
    if there and not os.path.isfile(path):
        raise UserError(f"{cfg.out_dir} has files such as {min(there):.50}, but no ckpt.pt to resume. Move "
                        f"them away, or choose another folder with --out_dir=...")
    if cfg.resume:
        if not there:
            raise UserError(f"nothing to resume: there is no {path}; leave out --resume to start a run there")
        saved = files.load(path)
        if not {"model", "optimizer", "step", "rng"} <= set(saved):
            raise UserError(f"{path} is no checkpoint of a run: it lacks model, optimizer, step or rng")
        old = config.restore(choose, saved.get("config"), path)
        for key, value in given.items():            # what is asked for must be what the run has
            if key not in FREE and value != getattr(old, key, None):
                raise UserError(f"the run in {cfg.out_dir} has {key} = {getattr(old, key, None)!r}, but this "
                                f"command or its config file asks for {value!r}. Resume it with "
                                f"`{resume_command(cfg)}`, or choose another --out_dir.")
        new = {key: getattr(cfg, key) for key in FREE if key in given or key == "stop_after"}
        return dataclasses.replace(old, **new), saved
    if parallel.RANK == 0 and there:
        raise UserError(f"{cfg.out_dir} holds a run already. Resume it with `{resume_command(cfg)}`, or "
                        f"choose another folder with --out_dir=...")
    if cfg.shard and getattr(cfg, "compile", False):
        raise UserError("--compile does not work with --shard: leave one of them out")
    if cfg.shard and parallel.SIZE == 1:
        raise UserError("--shard divides the weights among the processes of torchrun, and this is only one "
                        "process: leave it out")
    return cfg, None


def checkpoint_of(path):
    """Return the path of the file that a run folder, a checkpoint or a base is, here or in this project."""
    path = config.locate(path)
    return os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path


def resume_command(cfg):
    return f"python train.py --resume --out_dir={shlex.quote(cfg.out_dir)}"


def claim(folder, name="lock", option="--out_dir"):
    """Make the folder and lock its file `name` -> the open file. Keep it open as long as the work lasts.

    Raises UserError, naming the option, if another process has the lock or nothing can be written there.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, name), "a")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another {option}") from None
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass                                        # Windows has no flock: take care yourself there
    except OSError:
        raise UserError(f"another process works in {folder}: wait for it, or choose another "
                        f"{option}") from None
    return lock
