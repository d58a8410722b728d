"""Make many runs of train.py, several at a time, and write one line of a csv file for each finished run.

lab/frontier.py, lab/ablation.py and lab/chunks.py choose the runs. A run that has a line is finished and is
never made again, so a sweep that was stopped continues where it stopped. The run folder is removed, because
the line holds all that the experiment needs.

Every line names the device, the torch version and the base of its run. One csv file never mixes two devices
or two bases. Different rounding leads to different runs, and these experiments measure small differences.
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
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from common.config import Fault, UserError, locate, option
from common.folder import claim

STAMP = ("minutes", "device", "torch", "base", "date")         # the last columns of every csv file


@dataclass(frozen=True)
class Config:
    only: Literal["all", "runs", "figures"] = option("all", "all: the runs, then the figures and the report")
    seeds: int = option(5, "seeds of each method", low=1, high=1000)
    minutes: float = option(0.0, "start no run after this time; 0: no limit", low=0)
    jobs: int = option(2, "runs at a time, with one thread each", low=1)
    device: Literal["cuda", "mps", "cpu"] = option("cpu", "a tiny run is as fast on one core as on a GPU")


def load(path, fields, numbers, key):
    """Return the lines of a csv file as dicts. An absent file has none.

    fields: names of all columns. The first `key` of them identify a run. numbers: columns to read as floats.
    Raises UserError for other columns, an incomplete line, a run that occurs twice, two devices or two bases.
    """
    if not os.path.exists(path):
        return []
    found, rows = None, []
    with open(path, newline="", encoding="utf-8", errors="replace") as file, contextlib.suppress(csv.Error):
        reader = csv.DictReader(file)
        found, rows = reader.fieldnames, list(reader)
    if found != list(fields):
        raise UserError(f"{path} is not a csv of this version: its columns differ. Move it away")
    try:
        for n, row in enumerate(rows):
            row |= {k: float(row[k]) for k in numbers} | {"seed": int(row["seed"])}
            if None in row or None in row.values():
                raise ValueError
    except (ValueError, TypeError):                        # the process was killed while it wrote this line
        raise UserError(f"{path}: run {n + 1} is not whole. Remove its line, and it is made again") from None
    keys = [tuple(row[name] for name in fields[:key]) for row in rows]
    for twice in {k for k in keys if keys.count(k) > 1}:
        raise UserError(f"{path} has two lines of the run {' '.join(map(str, twice))}. Remove one of them")
    for name in ("device", "base"):
        if len(found := {row[name] for row in rows if name in row}) > 1:
            raise UserError(f"{path} mixes runs of {name} {' and '.join(sorted(found))}, which cannot be "
                            f"compared. Keep the runs of one {name}")
    return rows


def complete(rows, cells, cell_of=lambda row: row["arm"]):
    """Return the seeds for which every cell has a run. A sweep makes one seed after another, so a report of
    an unfinished sweep compares fewer seeds. cell_of(row): the cell of a line of the csv file."""
    done = {(cell_of(row), row["seed"]) for row in rows}
    return [s for s in sorted({seed for _, seed in done}) if all((cell, s) in done for cell in cells)]


def rounded(results, names):
    """Return these measures of an evaluation, rounded. JSON has no NaN, so an evaluation stores None."""
    return [round(float("nan") if results[name] is None else results[name], 5) for name in names]


def measured(folder, after, before):
    """Return the measures `after` of the last evaluation of a run, then `before` of its first, rounded."""
    with open(os.path.join(folder, "evaluations.jsonl"), encoding="utf-8") as file:
        first, *_, last = map(json.loads, file)
    return rounded(last, after) + rounded(first, before)


def make(cfg, rows, plan, fields, command, row_of, keep=lambda key: False, base="assets/tiny_base.pt"):
    """Make the missing runs, `cfg.jobs` at a time. A finished run is on disk before the next one starts.

    rows: the result of `load`. plan: all runs in order. A run is the tuple of its first fields, its key.
    command(key, folder, device): the command line of a run. row_of(key, folder): the values of `fields` up to
    STAMP. keep(key): whether the folder of this run stays. base: the file that all runs start from.
    Raises UserError for a csv file of another device or base, and Fault for a run that fails.
    """
    with open(locate(base), "rb") as file:
        base = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    if any((r["device"], r["base"]) != (cfg.device, base) for r in rows):
        raise UserError(f"{cfg.csv} has runs of another device or another base than {cfg.device}, {base}, "
                        f"which cannot be compared. Move the file away, or choose another --csv")
    signal.signal(signal.SIGTERM, signal.default_int_handler)              # like Ctrl-C: `finally` is reached
    done = {tuple(str(r[f]) for f in fields[:len(plan[0])]) for r in rows}
    todo, begin, running = [k for k in plan if tuple(map(str, k)) not in done], time.time(), {}
    os.makedirs(cfg.out, exist_ok=True)
    home, name = os.path.split(cfg.csv)
    locks = [claim(home or ".", name, "--csv"), claim(cfg.out, "lock", "--out")]
    if not rows:
        with open(cfg.csv, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(fields)
    bar = tqdm(total=len(plan), initial=len(plan) - len(todo), unit="run", dynamic_ncols=True,
               desc=name)
    try:
        while todo or running:
            if cfg.minutes and time.time() - begin > 60 * cfg.minutes:
                todo = []
            while todo and len(running) < cfg.jobs:
                key = todo.pop(0)
                folder = os.path.join(cfg.out, "_".join(map(str, key)))
                shutil.rmtree(folder, ignore_errors=True)                  # of a run that was killed earlier
                log = open(folder + ".log", "w", encoding="utf-8")
                process = subprocess.Popen(command(key, folder, cfg.device), stdout=log, stderr=log,
                                           env=os.environ | {"OMP_NUM_THREADS": "1"})
                running[process] = key, folder, time.time()
            time.sleep(1)
            for process in [p for p in running if p.poll() is not None]:
                key, folder, started = running.pop(process)
                if process.returncode:
                    raise Fault(f"the run {folder} failed. Read {folder}.log for the reason")
                stamp = (round((time.time() - started) / 60, 2), cfg.device, torch.__version__, base,
                         time.strftime("%Y-%m-%d"))
                row = dict(zip(fields, (*row_of(key, folder), *stamp), strict=True))
                with open(cfg.csv, "a", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow(row.values())
                if not keep(key):
                    shutil.rmtree(folder)
                os.remove(folder + ".log")
                bar.update()
                bar.set_postfix_str(f"{'/'.join(map(str, key))}: reward {row['reward']:.3f}")
    finally:
        for stop in (subprocess.Popen.terminate, subprocess.Popen.wait):   # no run outlives its sweep
            for process in running:
                stop(process)
        for lock in locks:
            lock.close()
