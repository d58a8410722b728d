"""Files that survive: one dict a file, written whole or not at all, and loaded without running any code.

`torch.load(weights_only=True)` rebuilds tensors and plain Python values only. A pickle that would call a
function, as any downloaded .pt file can, is refused instead of obeyed. So everything stored here is made of
tensors, dicts, lists, tuples, texts and numbers; configs are stored as dicts.
"""
import dataclasses
import glob
import json
import math
import os
import pickle
import random
import shutil
import zipfile

import torch

from config import UserError, locate
from model import GPT, GPTConfig
from reward import Judge
from vqgan import VQGAN, VQConfig


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


def load(path, device="cpu"):
    """The dict stored at `path`, its tensors on `device`. UserError if missing, damaged or not plain."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError,
            zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is damaged, or no file of plain tensors ({type(error).__name__})") from None


def rng_state(generator):
    """The state of all random streams, as tensors and plain values: Python's, torch's and one generator's."""
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "generator": generator.get_state()}


def set_rng_state(state, generator):
    """Puts back what `rng_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    torch.set_rng_state(state["torch"].cpu())
    generator.set_state(state["generator"].cpu())


def pack(module, config, dtype=None):
    """A module and its config dataclass as plain data; weights in `dtype` (half precision: half the file)."""
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in module.state_dict().items()}
    return {"config": dataclasses.asdict(config) if config else {}, "state": state}


def unpack(make, make_config, packed, device):
    """The module of `pack`, in fp32 and eval mode."""
    module = make(make_config(**packed["config"])) if make_config else make()
    module.load_state_dict(packed["state"])
    return module.float().to(device).eval()


def freeze(module, dtype):
    """Makes a module one that is only used, never trained, and adapts it to the precision of a run.

    "bfloat16": matrices and convolutions are stored rounded. Autocast rounds them at every use anyway, so the
    results are the same bit for bit and the module takes half the memory; all else stays in fp32. So a frozen
    copy of the policy gives exactly the policy's logits, until the policy moves.
    """
    module.requires_grad_(False).eval()
    if dtype == "float64":
        module.double()
    if dtype == "bfloat16":
        for part in module.modules():
            if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)):
                part.bfloat16()


def load_models(path, device):
    """Policy, tokenizer, judge (fp32, eval mode) and the run's options ({} for a base), all on `device`.

    path: a base made by pretrain.py, a run's folder, or a checkpoint in one. Raises UserError.
    """
    path = os.path.join(path, "ckpt.pt") if os.path.isdir(path) else path
    parts = load(path, device)
    try:
        if "gpt" in parts:
            return (unpack(GPT, GPTConfig, parts["gpt"], device),
                    unpack(VQGAN, VQConfig, parts["vqgan"], device),
                    unpack(Judge, None, parts["judge"], device), {})
        policy, vqgan, judge, _ = load_models(locate(parts["config"]["init_from"]), device)
        policy.load_state_dict(parts["model"])
        return policy, vqgan, judge, parts["config"]
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no base or run of this version: {str(error).splitlines()[0]}") from None


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
