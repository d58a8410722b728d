"""Many runs of train.py, a line of a csv each: made once, a few at a time, and gone on with where it stopped.

frontier.py and ablation.py say which runs; this makes them. A line appended to the csv is a run that is done
and never made again; its folder goes, as the line says what the experiment needs. A line carries the device,
the version of torch and the base it was made with, and a csv never mixes two devices or two bases: sums that
are rounded otherwise lead to other runs, and the differences that matter here are small.
"""
import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time

from tqdm import tqdm

from common import config
from common.config import Fault, UserError, locate

MOST_SEEDS = 1000
STAMP = ("minutes", "device", "torch", "base", "date")         # the last columns of every csv


def load(path, fields, numbers, key):
    """Lines of the csv as dicts, those of `numbers` as floats; the first `key` fields say which run it is.
    UserError for other columns, half a line, a run that is there twice, two devices or two bases."""
    if not os.path.exists(path):
        return []
    found, rows = None, []
    with open(path, newline="", encoding="utf-8", errors="replace") as file, contextlib.suppress(csv.Error):
        reader = csv.DictReader(file)
        found, rows = reader.fieldnames, list(reader)
    if found != list(fields):
        raise UserError(f"{path} is not a csv of this version; move it away")
    try:
        for n, row in enumerate(rows):
            row |= {k: float(row[k]) for k in numbers} | {"seed": int(row["seed"])}
            if None in row or None in row.values():
                raise ValueError
    except (ValueError, TypeError):                        # killed while it wrote this
        raise UserError(f"{path}: run {n + 1} is not whole: remove its line, and it is made again") from None
    keys = [tuple(row[name] for name in fields[:key]) for row in rows]
    for twice in {k for k in keys if keys.count(k) > 1}:
        raise UserError(f"{path} has two lines of the run {' '.join(map(str, twice))}: remove one of them")
    for name in ("device", "base"):
        if len(found := {row[name] for row in rows if name in row}) > 1:
            raise UserError(f"{path} mixes runs of {name} {' and '.join(sorted(found))}, which cannot be "
                            f"compared: keep those of one")
    return rows


def check(cfg):
    """UserError for options of a sweep that make no sense."""
    config.at_least(cfg, seeds=1, jobs=1, minutes=0)
    config.named(cfg, csv=".csv", out="")
    if cfg.seeds > MOST_SEEDS:
        raise UserError(f"seeds must be at most {MOST_SEEDS}, not {cfg.seeds}: each takes more than an hour "
                        f"of a core")


def fingerprint():
    """The first digits of the base's hash."""
    with open(locate("assets/tiny_base.pt"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]


def evaluations(folder):
    """All evaluations of a run, as dicts."""
    with open(os.path.join(folder, "evaluations.jsonl"), encoding="utf-8") as file:
        return [json.loads(text) for text in file]


def make(cfg, rows, plan, fields, command, row_of, keep=lambda key: False):
    """Makes what is missing, `cfg.jobs` at a time; every finished run is on disk before the next one starts.

    rows: what `load` found; plan: the runs in order, each by its key, the first of the `fields`;
    command(key, folder) -> command line; row_of(key, folder) -> values of `fields` up to STAMP; keep(key):
    leave the folder of that run?
    Raises UserError for a csv of another device or base, Fault for a run that fails.
    """
    base, done = fingerprint(), {tuple(str(r[f]) for f in fields[:len(next(iter(plan)))]) for r in rows}
    if any((r["device"], r["base"]) != (cfg.device, base) for r in rows):
        raise UserError(f"{cfg.csv} has runs of another device or another base than {cfg.device}, {base}; "
                        f"a comparison must not mix them: move it away, or choose another --csv")
    import torch
    from common import run as runs
    signal.signal(signal.SIGTERM, signal.default_int_handler)              # as Ctrl-C: on to `finally`
    todo, begin, running = [k for k in plan if tuple(map(str, k)) not in done], time.time(), {}
    os.makedirs(cfg.out, exist_ok=True)
    lock = runs.claim(os.path.dirname(cfg.csv) or ".", os.path.basename(cfg.csv), "--csv")
    if not rows:
        with open(cfg.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(fields)
    bar = tqdm(total=len(plan), initial=len(plan) - len(todo), unit="run", ncols=110,
               desc=os.path.basename(cfg.csv))
    try:
        while todo or running:
            late = cfg.minutes and time.time() - begin > 60 * cfg.minutes
            while todo and len(running) < cfg.jobs and not late:
                key = todo.pop(0)
                folder = os.path.join(cfg.out, "_".join(map(str, key)))
                shutil.rmtree(folder, ignore_errors=True)                      # half of a run that was killed
                log = open(folder + ".log", "w", encoding="utf-8")
                process = subprocess.Popen(command(key, folder), stdout=log, stderr=log,
                                           env=os.environ | {"OMP_NUM_THREADS": "1"})
                running[process] = key, folder, time.time()
            if late and not running:
                break
            time.sleep(1)
            for process in [p for p in running if p.poll() is not None]:
                key, folder, started = running.pop(process)
                if process.returncode:
                    raise Fault(f"the run {folder} failed; {folder}.log says why")
                stamp = (round((time.time() - started) / 60, 2), cfg.device, torch.__version__, base,
                         time.strftime("%Y-%m-%d"))
                row = dict(zip(fields, (*row_of(key, folder), *stamp), strict=True))
                with open(cfg.csv, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, fields).writerow(row)
                if not keep(key):
                    shutil.rmtree(folder)
                os.remove(folder + ".log")
                bar.update()
                bar.set_postfix_str(f"{'/'.join(map(str, key))}: reward {row['reward']:.3f}")
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.wait):   # no run goes on without its sweep
            for process in running:
                stop(process)
        lock.close()
