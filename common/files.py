"""Files that survive: one dict a file, written whole or not at all, and loaded without running any code.

`torch.load(weights_only=True)` rebuilds tensors and plain Python values only. A pickle that would call a
function, as any downloaded .pt file can, is refused instead of obeyed. So everything stored here is made of
tensors, dicts, lists, tuples, texts and numbers; configs are stored as dicts. What torch.load lets pass all
the same is looked for here:
 1. A flipped bit. torch.save writes a zip with a checksum (CRC-32) of each part, which torch.load does not
    compare. `load` does, before anything else is done with the file: a third of a second a GB.
 2. What is larger than its file: a tensor of 4 TB that repeats one number (steps of length 0), a zip that
    was packed, a bytearray. (A pickle that copies one list very often still gets by.)
 3. NaN and infinity, which would make every picture grey long after anybody remembers the file.
"""
import argparse
import dataclasses
import glob
import json
import math
import mmap
import os
import random
import re
import shutil
import warnings
import zipfile

import torch
from tqdm import tqdm

from common import config
from common.config import UserError

ANY_SIZE = re.compile(rb"c(builtins|__builtin__)\nbytearray\n")    # of 10^12 bytes: torch.load would make it
VERIFY = True                       # compare checksums; --no_verify is for large files on slow disks


def save(state, path, keep=0):
    """Writes `state` to `path` atomically: a reader, or a crash, meets the old or the new, never half of one.

    keep > 0 also leaves the newest `keep` as path_STEP.pt beside it, STEP being state["step"].
    """
    temporary, stem = f"{path}.tmp", path.removesuffix(".pt")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())                # on the disk before the name points to it
        os.replace(temporary, path)
        if keep:
            shutil.copyfile(path, temporary)
            os.replace(temporary, f"{stem}_{state['step']:06d}.pt")
            for old in sorted(glob.glob(glob.escape(stem) + "_[0-9]*.pt"))[:-keep]:
                os.remove(old)
    except OSError:                                # a full disk: leave it less full
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def verify(path):
    """UserError for a zip, as torch.save writes them, of which a byte is not as it was written, or which
    would be larger in memory than on the disk. (Files of torch before 1.6 are no zips and have no sums.)"""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":                              # that is how torch.load knows a zip too
            if ANY_SIZE.search(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)):
                raise UserError(f"{path} asks for memory of any size: fetch it again")
            return
    with zipfile.ZipFile(path) as file:
        total = sum(part.file_size for part in file.infolist())
        if total > os.path.getsize(path):
            raise UserError(f"{path} is packed: it would be larger in memory than it is; fetch it again")
        pickles = [part for part in file.infolist() if part.filename.endswith(".pkl")]
        if any(ANY_SIZE.search(file.read(part)) for part in pickles):
            raise UserError(f"{path} asks for memory of any size: fetch it again")
        with tqdm(desc=f"checking {os.path.basename(path)}", total=total, unit="B", unit_scale=True,
                  ncols=110, leave=False, disable=total < 2 ** 30) as bar:
            for part in file.infolist() if VERIFY else ():
                with file.open(part) as stream:
                    while block := stream.read(2 ** 20):            # at its end zipfile compares the sum
                        bar.update(len(block))


def examine(state, path, size=None):
    """UserError for a tensor anywhere in `state`, read from `path`, that is not finite or cannot be in it, as
    it has only `size` bytes."""
    room = 4 * (size or os.path.getsize(path))                      # 4: tensors may share their numbers
    todo, seen = [("", state)], set()
    while todo:
        name, value = todo.pop()
        if id(value) in seen:                                       # a list may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            room -= value.numel() * value.element_size()
            if room < 0:
                raise UserError(f"{path}: {name[1:]!r:.99} is larger than the file: fetch it again")
            if value.numel() and (value.is_floating_point() or value.is_complex()):
                # NaN wins in a minimum: one pass and no copy, which isfinite() would make
                flat = torch.view_as_real(value) if value.is_complex() else value
                if not torch.stack(torch.aminmax(flat)).isfinite().all():
                    raise UserError(f"{path}: {name[1:]!r:.99} holds NaN or infinity: fetch the file again, "
                                    f"or use an earlier checkpoint")
        elif isinstance(value, (dict, list, tuple)):
            todo += [(f"{name}.{key}", part) for key, part in
                     (value.items() if isinstance(value, dict) else enumerate(value))]


def load(path, device="cpu", lazy=False):
    """The dict stored at `path`, its tensors on `device`. UserError if missing, damaged or not plain. lazy:
    leave tensors on the disk until they are used."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        verify(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                         # of pickles that are not torch.save's
            state = torch.load(path, map_location=device, weights_only=True, mmap=lazy)
        examine(state, path)
    except UserError:
        raise
    except Exception as error:                                      # damage shows in a dozen ways
        skip = "; --no_verify loads it as it is" if "CRC" in str(error) else ""
        raise UserError(f"{path} is damaged, or holds more than plain tensors ({type(error).__name__}): "
                        f"fetch it again, or use an earlier checkpoint{skip}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a dict of tensors: it is another kind "
                        f"of file")
    return state


def rng_state(generator):
    """The state of all random streams, as tensors and plain values: Python's, torch's, that of the GPU (from
    which dropout draws there), and one generator's."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state(), "generator": generator.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if generator.device.type == "cuda" else {})


def set_rng_state(state, generator):
    """Puts back what `rng_state` returned. UserError if that was on another kind of device."""
    if len(state["generator"]) != len(generator.get_state()):
        raise UserError(f"this run cannot go on on {generator.device.type}: its random numbers are those of "
                        f"another kind of device; ask for that one by --device")
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    torch.set_rng_state(state["torch"].cpu())
    generator.set_state(state["generator"].cpu())
    if generator.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def pack(module, config, dtype=None):
    """A module and its config dataclass as plain data; weights in `dtype` (half precision: half the file)."""
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in module.state_dict().items()}
    return {"config": dataclasses.asdict(config) if config else {}, "state": state}


def load_weights(module, state, path):
    """Puts the {name: tensor} read from `path` into a module. UserError if names, shapes or types differ."""
    try:
        if wrong := [k for k, v in state.items() if not v.is_floating_point()]:
            raise RuntimeError(f"{wrong[0]} is of {state[wrong[0]].dtype}")
        # The tensors of a module on the meta device have no memory yet: it takes those of the file.
        module.load_state_dict(state, assign=any(p.is_meta for p in module.parameters()))
    except (AttributeError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no base or run of this version: {why}") from None


def unpack(make, make_config, packed, device, path):
    """The module of `pack`, in fp32 and eval mode. UserError if config and weights do not fit together."""
    if not isinstance(packed, dict) or not isinstance(packed.get("state"), dict) or "config" not in packed:
        raise UserError(f"{path} is no base of this version: {make.__name__} lacks config or state")
    options = [config.restore(make_config, packed["config"], path)] if make_config else []
    # A layer takes time even without memory, and none is without a tensor.
    counts = [value if key in ("n_layer", "num_res_blocks") else len(value) if key == "ch_mult" else 0
              for o in options for key, value in vars(o).items()]
    if max(counts, default=0) > len(packed["state"]):
        raise UserError(f"{path}: its {make.__name__} has more layers than tensors: fetch it again")
    try:
        with torch.device("meta"):                 # a config can ask for any amount of memory, a file cannot
            module = make(*options)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{path}: no such {make.__name__} can be built: {why}") from None
    load_weights(module, packed["state"], path)
    return module.float().to(device).eval()


TOLD = {"n_head": int, "block_size": int, "norm_eps": float}       # what no shape of a tensor tells


def select(state, unused, path, beside=()):
    """Return the tensors of `state` whose names the regular expression `unused` does not match.

    One printed line names what is left out, and the entries `beside` the tensors in the file at `path`.
    Raises UserError if anything else than tensors of floating point numbers remains.
    """
    for key, value in state.items():
        if not key.isprintable() or not (re.match(unused, key) or isinstance(value, torch.Tensor)
                                         and value.is_floating_point()):
            raise UserError(f"{path}: {key!r:.99} is {getattr(value, 'dtype', type(value).__name__)}, not a "
                            f"tensor of floating point numbers. It may be another kind of file, or a layout "
                            f"that `python -m full.weights --convert={path} --to=FILE.pt` reads.")
    out = [*beside, *(key for key in state if re.match(unused, key))]
    if out:
        print(f"{path}: left out {len(out)} entries that are not needed: {', '.join(out[:4])}"
              + ", ..." * (len(out) > 4))
    return {key: value for key, value in state.items() if not re.match(unused, key)}


def read_released(path, unused):
    """Read a file of released weights and return (state, told).

    The file holds {"model": state} or `state` alone. state: {name: tensor}, selected by `select`. told: the
    entries of TOLD that `python -m full.weights --convert` wrote into the file under "config", else {}.
    Raises UserError if the file is missing or damaged, or holds other things than floating point tensors.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}. `python -m full.weights` lists the released files; with "
                        f"--convert=FOLDER --to=FILE.pt it converts a folder.")
    # Trainers store their options as an argparse.Namespace. Loading it only sets its fields.
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = load(path)
    told, beside = {}, []
    if isinstance(state.get("model"), dict) and state["model"]:
        kept = state.get("config")
        if isinstance(kept, dict) and set(kept) <= set(TOLD):      # a run's own options are something else
            told = kept
        beside = [str(key) for key in state if key != "model" and (key != "config" or kept is not told)]
        state = state["model"]
    if wrong := [key for key, value in told.items() if type(value) is not TOLD[key]]:
        raise UserError(f"{path}: {wrong[0]} must be {TOLD[wrong[0]].__name__}, got {told[wrong[0]]!r:.99}.")
    return select({str(key): value for key, value in state.items()}, unused, path, beside), told


def build(make, config, state, dtype, path):
    """Return the module make(config) in eval mode, on the CPU, with the tensors of `state` in `dtype`.

    make: a class such as GPT. state: {name: tensor}; it is emptied on the way, so that memory peaks at the
    size of the file, or of the model where the model is larger. dtype: float32, bfloat16 or float16, as text
    or as torch's. Raises UserError that lists the first 8 differences if names or shapes do not fit.
    """
    if (kind := str(dtype).removeprefix("torch.")) not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    try:
        with torch.device("meta"):                 # names and shapes without memory
            module = make(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(f"{path}: no such {make.__name__} can be built: {str(error).splitlines()[0]}") from None
    want = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    have = {key: list(getattr(value, "shape", ())) for key, value in state.items()}
    if wrong := [f"{key}: expected {want.get(key, 'no tensor')}, got {have.get(key, 'no tensor')}"
                 for key in {**want, **have} if have.get(key) != want.get(key)]:
        raise UserError(f"{path} differs from {make.__name__} in {len(wrong)} places: "
                        + "; ".join(wrong[:8]) + "; ..." * (len(wrong) > 8))
    module.load_state_dict({key: state.pop(key).to(getattr(torch, kind)) for key in want}, assign=True)
    return module.eval()


class Log:
    """A .jsonl file, a dict a line. Reopened, it keeps lines of steps below `start`, and drops a torn one."""

    def __init__(self, path, start):
        self.path, self.lines = path, []
        if os.path.exists(path):
            for text in open(path, encoding="utf-8"):
                try:
                    line = json.loads(text)
                except ValueError:
                    break                          # the run was killed while it wrote this
                if line["step"] < start:
                    self.lines.append(line)
        with open(f"{path}.tmp", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        os.replace(f"{path}.tmp", path)

    def write(self, line):
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)                    # JSON knows no NaN
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
