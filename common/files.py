"""Files: written atomically, loaded without running code, checked for damage.

`save` writes one dict of tensors and plain Python values. Configs are stored as dicts. `load` reads the dict
back with torch.load(weights_only=True), which refuses a pickle that would call a function. Any downloaded .pt
file could hold such a pickle. torch.load does not notice two kinds of damage, so `load` checks for them:
 1. Flipped bits. torch.save writes a zip with a checksum (CRC-32) of each part, which takes 1/3 s per GB.
 2. NaN and infinity, which would turn every image grey.
"""
import argparse
import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import random
import re
import shutil
import warnings
import zipfile

import torch

from common import config
from common.config import UserError


@contextlib.contextmanager
def explain(what, advice="", text=True):
    """Turn every exception inside into a UserError: `what`, the exception (if text: its text), `advice`."""
    try:
        yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"no package {error.name}: pip install -r requirements-full.txt") from None
    except Exception as error:
        why = f": {' '.join(str(error).split())[:200]}" * text
        raise UserError(f"{what} ({type(error).__name__}{why}){advice}") from None


def save(state, path, keep=0):
    """Write `state` to `path` atomically: after a crash the file is the old one or the new one, never a mix.
    keep > 0 also keeps copies of the newest `keep` files as path_STEP.pt, where STEP is state["step"]."""
    temporary, stem = f"{path}.tmp", path.removesuffix(".pt")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                # the data must reach the disk before the name points to it
        os.replace(temporary, path)
        if keep:
            shutil.copyfile(path, temporary)
            os.replace(temporary, f"{stem}_{state['step']:06d}.pt")
            for old in sorted(glob.glob(glob.escape(stem) + "_[0-9]*.pt"))[:-keep]:
                os.remove(old)
    finally:                                       # the disk may be full, so free the space again
        if os.path.exists(temporary):
            os.remove(temporary)


def verify(path):
    """Raise UserError if a part of the zip at `path` does not have its checksum. Other files pass: torch
    before version 1.6 wrote no zips and no checksums."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"         # torch.load looks at the same four bytes
        if part := is_zip and zipfile.ZipFile(file).testzip():
            raise UserError(f"{path} is damaged: its part {part!r:.99} has a wrong checksum. Fetch it again, "
                            f"or use an earlier checkpoint.")


def examine(state, path):
    """Raise UserError if a floating point tensor anywhere in `state`, read from `path`, is not finite."""
    todo, seen = [("", state)], set()
    while todo:
        name, value = todo.pop()
        if id(value) in seen:                      # a list may contain itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            # A minimum over NaN is NaN. So one pass suffices, without the copy that isfinite() would make.
            if not torch.stack(torch.aminmax(value)).isfinite().all():
                raise UserError(f"{path}: {name[1:]!r:.99} holds NaN or infinity. Fetch the file again, or "
                                f"use an earlier checkpoint.")
        elif isinstance(value, (dict, list, tuple)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [(f"{name}.{key}", part) for key, part in parts]


def load(path, device="cpu", lazy=False):
    """Return the dict of tensors and plain values at `path`, its tensors on `device`. lazy: tensors stay on
    the disk until they are used. Raises UserError if the file is missing, damaged or of another kind."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}.")
    # The text of torch's exception is not shown, because it advises to allow the file to run code.
    with explain(f"{path} is damaged, or holds more than plain tensors",
                 ". Fetch it again, or use an earlier checkpoint.", text=False):
        verify(path)
        # Trainers store their options as an argparse.Namespace. Loading one only sets its fields.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")        # torch.load warns of pickles that torch.save did not write
            state = torch.load(path, map_location=device, weights_only=True, mmap=lazy)
        examine(state, path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict. It is another kind of file.")
    return state


# ---- is it the file that it was? -------------------------------------------------------------------------
def fingerprint(path):
    """Return a short hash of a file, or of the weight files of a folder: of its size and of 64 pieces of it.

    Files of up to 4 MB are read whole. Another training changes all weights, so pieces show it. Reading all
    of a file of gigabytes would take longer than loading it.
    """
    if os.path.isdir(path):
        names = [n for n in sorted(glob.glob("**", root_dir=path, recursive=True))     # also in subfolders
                 if n.endswith((".safetensors", ".bin", ".pt", ".pth"))]
        parts = "".join(name + fingerprint(os.path.join(path, name)) for name in names)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]
    size, piece = os.path.getsize(path), 2 ** 16
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(max(i * piece, i * (size - piece) // 63))
            found.update(file.read(piece))
    return found.hexdigest()[:16]


def check_made_from(saved, paths, run):
    """Raise UserError unless the files {name: path} are those that the checkpoint `saved` was made from.

    saved["made_from"]: {name: fingerprint}. Checkpoints of earlier versions lack it, which gets a warning.
    """
    if "made_from" not in saved:
        return print(f"warning: {run} does not tell which files it was made from. Make sure that these are "
                     f"the same: {', '.join(paths.values())}")
    for name, path in paths.items():
        if name in saved["made_from"] and saved["made_from"][name] != fingerprint(path):
            raise UserError(f"{path} is not the file that {run} was made from; its content differs. Restore "
                            f"the earlier file, or start a new run in another --out_dir.")


def rng_state(generator):
    """Return the state of each random stream: Python's, torch's, the GPU's (for dropout), the generator's."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "generator": generator.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if generator.device.type == "cuda" else {})


def set_rng_state(state, generator):
    """Restore what `rng_state` returned. Raises UserError if it comes from another kind of device."""
    if len(state["generator"]) != len(generator.get_state()):
        raise UserError(f"this run cannot resume on {generator.device.type}: its random state belongs to "
                        f"another kind of device. Choose that device with --device.")
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    torch.set_rng_state(state["torch"].cpu())
    generator.set_state(state["generator"].cpu())
    if generator.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def pack(module, config, dtype=None):
    """Return a module and its config dataclass as plain data, its floating point tensors in `dtype`."""
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in module.state_dict().items()}
    return {"config": dataclasses.asdict(config) if config else {}, "state": state}


def unpack(make, make_config, packed, device, path):
    """Return the module that `pack` stored, in fp32 and eval mode. make_config: None if it has no config.
    Raises UserError if config and tensors do not fit together."""
    if not isinstance(packed, dict) or not isinstance(packed.get("state"), dict) or "config" not in packed:
        raise UserError(f"{path} is no base of this version: {make.__name__} lacks its config or its state.")
    options = config.restore(make_config, packed["config"], path) if make_config else None
    return build(make, options, select(packed["state"], path), torch.float32, path).to(device)


def load_weights(module, state, path, wrong="no base or run of this version"):
    """Copy {name: tensor}, read from `path`, into a module. If it does not fit: UserError `wrong`."""
    with explain(f"{path} is {wrong}"):
        module.load_state_dict(select(state, path))


# ---- released weights ----------------------------------------------------------------------------------
TOLD = {"n_head": int, "block_size": int, "norm_eps": float}       # fields that no tensor's shape tells


def select(state, path, unused="(?!)", beside=()):
    """Return the tensors of `state` whose names `unused` does not match. The default matches no name. Prints
    one line that names what is left out, with the entries `beside` the tensors in the file at `path`. Raises
    UserError if anything but tensors of floating point numbers remains."""
    state = {str(key): value for key, value in state.items()}
    left_out = [key for key in state if re.match(unused, key)]
    for key, value in state.items():
        if not key.isprintable() or not (key in left_out or isinstance(value, torch.Tensor)
                                         and value.is_floating_point()):
            raise UserError(f"{path}: {key!r:.99} is {getattr(value, 'dtype', type(value).__name__)}, not a "
                            f"tensor of floating point numbers. It is another kind of file.")
    if said := [*beside, *left_out]:
        print(f"{path}: left out {len(said)} entries that are not needed: {', '.join(said[:4])}"
              + ", ..." * (len(said) > 4))
    return {key: value for key, value in state.items() if key not in left_out}


def read_released(path, unused):
    """Return (state, told) of a file of released weights, {"model": state} or `state` alone. state: what
    `select` returns. told: fields of TOLD from the entry "config", which full/weights.py --convert writes.
    Raises UserError if the file is missing or damaged, or holds other things than tensors of floats."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}. `python -m full.weights` lists the released files, and "
                        f"its option --convert converts a folder to a file.")
    state, told, beside = load(path), {}, []
    if isinstance(state.get("model"), dict) and state["model"]:
        fields = state["config"] if isinstance(state.get("config"), dict) else {}
        told = {key: value for key, value in fields.items() if type(value) is TOLD.get(key) and value}
        beside = [str(key) for key in state if key != "model" and (key != "config" or not told)]
        state = state["model"]
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path} holds no tensors, neither at its top level nor under 'model'. For other "
                        f"layouts: `python -m full.weights --convert=FILE --to=FILE.pt`.")
    return select(state, path, unused, beside), told


def build(make, config, state, dtype, path):
    """Return make(config), or make() without a config, in eval mode, with the tensors of `state` in `dtype`.

    state: what `select` returned. It is emptied on the way, so that memory peaks at the size of the file, or
    of the model if that is larger. dtype: float32, bfloat16 or float16, as text or as torch's. Raises
    UserError if there is no such model, or with the first 8 differences in names and shapes.
    """
    if (kind := str(dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    with explain(f"{path}: no such {make.__name__} can be built"), torch.device("meta"):      # without memory
        module = make() if config is None else make(config)
    want, have = ({k: list(v.shape) for k, v in part.items()} for part in (module.state_dict(), state))
    if wrong := [f"{key!r:.99} should be {want.get(key, 'absent')}, but is {have.get(key, 'absent')}"
                 for key in {**want, **have} if have.get(key) != want.get(key)]:
        raise UserError(f"{path} differs from {make.__name__} in {len(wrong)} places: "
                        + "; ".join(wrong[:8]) + "; ..." * (len(wrong) > 8))
    module.load_state_dict({key: state.pop(key).to(getattr(torch, kind)) for key in want}, assign=True)
    return module.eval()


# ---- logs ----------------------------------------------------------------------------------------------
class Log:
    """A .jsonl file with one dict per line. When it is reopened, lines of steps from `start` on are dropped,
    and so is a line that a kill cut short. Before other damaged lines are dropped, the file is copied."""

    def __init__(self, path, start):
        self.path, self.lines, damaged = path, [], []
        if os.path.exists(path):
            with open(path, "rb") as file:
                texts = file.read().split(b"\n")
            for number, text in enumerate(texts, 1):
                try:
                    if (line := json.loads(text))["step"] < start:
                        self.lines.append(line)
                except (ValueError, TypeError, KeyError):
                    damaged += [str(number)] * (number < len(texts))    # a kill may cut the last line short
        if damaged:
            shutil.copyfile(path, f"{path}.damaged")
            print(f"warning: {path}: dropped damaged lines {', '.join(damaged)}; {path}.damaged is a copy")
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        os.replace(f"{path}.tmp", path)

    def write(self, line):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)                    # None, because JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
