"""Files: written atomically, loaded without running code, checked for damage.

`save` writes one dict of tensors and plain Python values. Configs are stored as dicts. `load` reads the dict
back with torch.load(weights_only=True), which refuses a pickle that would call a function. Any downloaded
.pt file could hold such a pickle. torch.load does not notice two kinds of damage, so `load` checks for them:
 1. Flipped bits. torch.save writes a zip with a checksum (CRC-32) of each part. Comparing the checksums takes
    a third of a second per GB.
 2. NaN and infinity, which would turn every image grey.
"""
import argparse
import dataclasses
import glob
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


def save(state, path, keep=0):
    """Write `state` to `path` atomically: after a crash the file is the old one or the new one, never a mix.

    keep > 0 also keeps copies of the newest `keep` files as path_STEP.pt, where STEP is state["step"].
    """
    temporary, stem = f"{path}.tmp", path.removesuffix(".pt")
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
    except OSError:                                # the disk may be full, so free the space again
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def verify(path):
    """Raise UserError if a part of the zip at `path` does not have its checksum. Other files pass: torch
    before version 1.6 wrote no zips and no checksums."""
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\3\4"         # torch.load looks at the same four bytes
    if is_zip:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():
                raise UserError(f"{path} is damaged: its part {part!r:.99} has a wrong checksum. Fetch it "
                                f"again, or use an earlier checkpoint.")


def examine(state, path, size=None):           # size: unused; clip.py and t5.py still pass it
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
    """Return the dict stored at `path`, with its tensors on `device`.

    lazy: tensors stay on the disk until they are used. Raises UserError if the file is missing or damaged, or
    holds more than a dict of tensors and plain values.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}.")
    try:
        verify(path)
        # Trainers store their options as an argparse.Namespace. Loading one only sets its fields.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")        # torch.load warns of pickles that torch.save did not write
            state = torch.load(path, map_location=device, weights_only=True, mmap=lazy)
        examine(state, path)
    except UserError:
        raise
    except Exception as error:                     # each kind of damage raises its own class
        raise UserError(f"{path} is damaged, or holds more than plain tensors ({type(error).__name__}). "
                        f"Fetch it again, or use an earlier checkpoint.") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict of tensors. It is another kind "
                        f"of file.")
    return state


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
    return build(make, options, dict(packed["state"]), torch.float32, path).to(device)


def load_weights(module, state, path):
    """Copy {name: tensor}, read from `path`, into a module. Raises UserError if the tensors do not fit."""
    try:
        if wrong := [k for k, v in state.items() if not v.is_floating_point()]:
            raise RuntimeError(f"{wrong[0]} is of {state[wrong[0]].dtype}")
        module.load_state_dict(state)
    except (AttributeError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no base or run of this version: {why}") from None


# ---- released weights ----------------------------------------------------------------------------------
TOLD = {"n_head": int, "block_size": int, "norm_eps": float}       # fields that no tensor's shape tells


def select(state, unused, path, beside=()):
    """Return the tensors of `state` whose names the regular expression `unused` does not match.

    Prints one line that names what is left out, with the entries `beside` the tensors in the file at `path`.
    Raises UserError if anything but tensors of floating point numbers remains.
    """
    for key, value in state.items():
        if not key.isprintable() or not (re.match(unused, key) or isinstance(value, torch.Tensor)
                                         and value.is_floating_point()):
            raise UserError(f"{path}: {key!r:.99} is {getattr(value, 'dtype', type(value).__name__)}, not a "
                            f"tensor of floating point numbers. It is another kind of file.")
    if left_out := [*beside, *(key for key in state if re.match(unused, key))]:
        print(f"{path}: left out {len(left_out)} entries that are not needed: {', '.join(left_out[:4])}"
              + ", ..." * (len(left_out) > 4))
    return {key: value for key, value in state.items() if not re.match(unused, key)}


def read_released(path, unused):
    """Return (state, told) of a file of released weights, {"model": state} or `state` alone.

    state: {name: tensor}, without the names that `unused` matches (see `select`). told: fields of TOLD from
    the file's entry "config", which `python -m full.weights --convert` writes. Raises UserError if the file
    is missing or damaged, or holds anything but tensors of floating point numbers.
    """
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
    return select({str(key): value for key, value in state.items()}, unused, path, beside), told


def _shape(value):
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return list(value.shape) if is_float else getattr(value, "dtype", type(value).__name__)


def build(make, config, state, dtype, path):
    """Return make(config) in eval mode, holding the tensors of `state` in `dtype`. config None: make().

    make: a class such as GPT. state: {name: tensor}, emptied on the way, so that memory peaks at the size of
    the file, or of the model if that is larger. dtype: float32, bfloat16 or float16, as text or as torch's.
    Raises UserError if there is no such model, or with the first 8 differences in names and shapes.
    """
    if (kind := str(dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    try:
        with torch.device("meta"):                 # names and shapes without memory
            module = make() if config is None else make(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: no such {make.__name__} can be built: {why}") from None
    want, have = ({k: _shape(v) for k, v in part.items()} for part in (module.state_dict(), state))
    if wrong := [f"{key!r:.99} should be {want.get(key, 'absent')}, but is {have.get(key, 'absent')}"
                 for key in {**want, **have} if have.get(key) != want.get(key)]:
        raise UserError(f"{path} differs from {make.__name__} in {len(wrong)} places: "
                        + "; ".join(wrong[:8]) + "; ..." * (len(wrong) > 8))
    module.load_state_dict({key: state.pop(key).to(getattr(torch, kind)) for key in want}, assign=True)
    return module.eval()


# ---- logs ----------------------------------------------------------------------------------------------
class Log:
    """A .jsonl file with one dict per line. When it is reopened, lines of steps from `start` on are dropped,
    and so is a line that a kill cut short."""

    def __init__(self, path, start):
        self.path, self.lines = path, []
        if os.path.exists(path):
            for text in open(path, encoding="utf-8"):
                try:
                    line = json.loads(text)
                except ValueError:
                    break                          # the process was killed while it wrote this line
                if line["step"] < start:
                    self.lines.append(line)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        os.replace(f"{path}.tmp", path)

    def write(self, line):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)                    # None, because JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
