"""The folder of a run: opened, locked, saved, stopped and taken up again, so that nothing is lost.

    out/tiny_js/ckpt.pt            all that going on needs; replaced whole, so there is always a good one
    out/tiny_js/metrics.jsonl      a line a step; going on drops lines of steps that will be made again
    out/tiny_js/lock               held while a process works on the folder; the system lets go when it dies

What may happen, and what is left:
  - killed (kill -9, power, out of memory): the last checkpoint, the one of step 0 at least; --resume makes
    the lost steps again, bit for bit on a CPU;
  - Ctrl-C or SIGTERM (a cluster that wants its GPU back): the step is finished and saved first. Asked a
    second time, the process leaves at once, and the last checkpoint stands;
  - a disk that is full: the checkpoint before stays as it is, and one line says so;
  - a second process on the same folder: refused.
On a GPU resuming is exact as far as the GPU is: sums of parallel threads come in any order, so two runs of
one seed differ in the last bits from the first step on, and visibly after some dozens.
"""
import dataclasses
import os
import signal

from common import files as checkpoint
from common import config
from common import parallel
from common.config import Fault, UserError

EMPTY = {"lock", "ckpt.pt.tmp"}                # what a run leaves that was killed before its first save
FREE = ("resume", "stop_after", "device", "out_dir")  # may differ when a run goes on


def restore(cls, check, stored, path):
    """Options that the checkpoint at `path` keeps, {key: value} -> a `cls`. UserError if they are none."""
    cfg = config.restore(cls, stored, path)
    try:
        check(cfg)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return cfg


def open_run(cls, check, argv):
    """Command line -> (options: a `cls`, checkpoint or None). A new run gets an empty folder, a resumed one
    its own options. check: raises UserError for options that make no sense; so does this for the folder."""
    cfg, given = config.load(cls, argv)
    check(cfg)
    path = os.path.join(cfg.out_dir, "ckpt.pt")
    if cfg.resume:
        if not os.path.isfile(path):
            raise UserError(f"nothing to resume: there is no {path}; leave out --resume to start there")
        saved = checkpoint.load(path)
        if not {"model", "optimizer", "step", "rng"} <= set(saved):
            raise UserError(f"{path} is no checkpoint of a run: it lacks model, optimizer, step or rng")
        was = restore(cls, check, saved.get("config"), path)
        for key, value in given.items():            # what the command line asks for must be what the run was
            if key not in FREE and value != getattr(was, key):
                raise UserError(f"the run in {cfg.out_dir} has {key} = {getattr(was, key)!r}; "
                                f"--{key}={value!r} would make it another run: leave it out, "
                                f"or start a new one with another --out_dir")
        cfg = dataclasses.replace(was, **{key: getattr(cfg, key) for key in FREE
                                          if key != "device" or key in given})
    elif parallel.RANK == 0 and os.path.isdir(cfg.out_dir) and set(os.listdir(cfg.out_dir)) - EMPTY:
        raise UserError(f"{cfg.out_dir} holds a run already: go on with it by --resume, or choose "
                        f"another folder by --out_dir=...")
    return cfg, saved if cfg.resume else None


def claim(folder, name="lock", option="--out_dir"):
    """Makes the folder and locks its file `name` -> the open file, which must be kept as long as the work
    goes on. UserError, naming the option, if another process has it or nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, name), "a")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another {option}") from None
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass                                        # Windows has no flock: there, take care yourself
    except OSError:
        raise UserError(f"another process is at work in {folder}: wait for it, or choose another "
                        f"{option}") from None
    return lock


def save(state, path, keep):
    """checkpoint.save, with a Fault in one line where the disk does not take it."""
    try:
        checkpoint.save(state, path, keep)
    except OSError as error:
        there = "the one before it stands" if os.path.exists(path) else "there is none before it"
        raise Fault(f"could not write {path} ({error.strerror}); {there}: make room, then go on with "
                    f"--resume") from None


class Stop:
    """Asked to stop by Ctrl-C or SIGTERM? `name` is then the signal's; asked twice, the process leaves."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
