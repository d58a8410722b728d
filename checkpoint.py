"""Files that survive: one dict a file, written whole or not at all, and loaded without running any code.

`torch.load(weights_only=True)` rebuilds tensors and plain Python values only. A pickle that would call a function, as
any downloaded .pt file can, is refused instead of obeyed. So everything stored here is made of tensors, dicts, lists,
tuples, texts and numbers; configs are stored as dicts.
"""
import dataclasses
import os
import random
import zipfile

import torch

from config import UserError
from model import GPT, GPTConfig
from reward import Judge
from vqgan import VQGAN, VQConfig


def save(state, path):
    """Writes `state` to `path` atomically: a reader, or a crash, meets the old file or the new one, never half of one."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())                    # on the disk before the name points to it
    os.replace(temporary, path)


def load(path, device="cpu"):
    """The dict stored at `path`, its tensors on `device`. Raises UserError if it is missing, damaged or not plain."""
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, __import__("pickle").UnpicklingError) as e:
        raise UserError(f"{path} is damaged, or no file of plain tensors ({type(e).__name__})") from None


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
    """A module and its config dataclass as plain data; weights in `dtype` (half precision halves the file)."""
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in module.state_dict().items()}
    return {"config": dataclasses.asdict(config) if config else {}, "state": state}


def unpack(make, make_config, packed, device):
    """The module of `pack`, in fp32 and eval mode."""
    module = make(make_config(**packed["config"])) if make_config else make()
    module.load_state_dict(packed["state"])
    return module.float().to(device).eval()


def load_base(path, device):
    """A file made by pretrain.py -> (policy GPT, tokenizer VQGAN, Judge), frozen weights in fp32, eval mode."""
    parts = load(path)
    try:
        return (unpack(GPT, GPTConfig, parts["gpt"], device), unpack(VQGAN, VQConfig, parts["vqgan"], device),
                unpack(Judge, None, parts["judge"], device))
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is no base of this version: {str(error).splitlines()[0]}") from None
