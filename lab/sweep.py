"""Make many runs of train.py, several at a time, and write one line of a csv file for each finished run.

lab/frontier.py and lab/ablation.py choose the runs. A run that has a line is finished and is never made
again, so a sweep that was stopped continues where it stopped. The run folder is removed, because the line
holds all that the experiment needs.

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

import torch
from tqdm import tqdm


from common.config import Fault, UserError, locate
from common.run import claim

STAMP = ("minutes", "device", "torch", "base", "date")         # the last columns of every csv file


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


def fingerprint():
    """Return the first 8 hexadecimal digits of the SHA-256 hash of the base."""
    with open(locate("assets/tiny_base.pt"), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:8]


def evaluations(folder):
    """Return all evaluations of the run in `folder` as dicts, oldest first."""
    with open(os.path.join(folder, "evaluations.jsonl"), encoding="utf-8") as file:
        return [json.loads(text) for text in file]


def make(cfg, rows, plan, fields, command, row_of, keep=lambda key: False):
    """Make the missing runs, `cfg.jobs` at a time. A finished run is on disk before the next one starts.

    rows: the result of `load`. plan: all runs in order. A run is the tuple of its first fields, its key.
    command(key, folder): the command line of a run. row_of(key, folder): the values of `fields` up to STAMP.
    keep(key): whether the folder of this run stays.
    Raises UserError for a csv file of another device or base, and Fault for a run that fails.
    """
    base, done = fingerprint(), {tuple(str(r[f]) for f in fields[:len(next(iter(plan)))]) for r in rows}
    if any((r["device"], r["base"]) != (cfg.device, base) for r in rows):
        raise UserError(f"{cfg.csv} has runs of another device or another base than {cfg.device}, {base}, "
                        f"which cannot be compared. Move the file away, or choose another --csv")
    signal.signal(signal.SIGTERM, signal.default_int_handler)              # like Ctrl-C: `finally` is reached
    todo, begin, running = [k for k in plan if tuple(map(str, k)) not in done], time.time(), {}
    os.makedirs(cfg.out, exist_ok=True)
    lock = claim(os.path.dirname(cfg.csv) or ".", os.path.basename(cfg.csv), "--csv")
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
                shutil.rmtree(folder, ignore_errors=True)                  # of a run that was killed earlier
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
                    raise Fault(f"the run {folder} failed. Read {folder}.log for the reason")
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
        for stop in (subprocess.Popen.terminate, subprocess.Popen.wait):   # no run outlives its sweep
            for process in running:
                stop(process)
        lock.close()
