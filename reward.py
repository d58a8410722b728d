"""Rewards: functions (images [b,3,H,W] in [-1,1], b prompts) -> rewards [b], higher is better.

Each world has its own rewards:
  tiny world     judge and reader, in tiny/judge.py
  full size      hps, pickscore, clipscore and aesthetic, in full/clip.py

A GRPO run trains on a weighted sum (`--reward=judge` or `--reward=judge:1,reader:0.5`). It always reports a
held-out reward that it does not train on (`--heldout_reward=reader`). If the reward rises and the held-out
reward falls, the policy exploits the errors of the reward.

To add a reward, write its function here and put it into REWARDS. See "Your own reward" in README.md.
Wrong options raise UserError (common/config.py). A reward that fails, or returns a wrong shape, raises Fault.
"""
import math
from dataclasses import dataclass

import torch

from common.config import Fault, UserError, option

REWARDS = {}                    # name: function (images, prompts) -> rewards [b]; yours go here


@dataclass(frozen=True)
class Options:
    """---- reward"""
    reward: str = option("judge", "what GRPO trains on; a weighted sum is judge:1,reader:0.5")
    heldout_reward: str = option("reader", "what is only reported; VA-pi trains on neither reward")


def parse(spec, known):
    """'judge:1,reader:0.5' -> {'judge': 1.0, 'reader': 0.5}. A weight that is left out is 1.
    known: the names of a world's rewards. Those of REWARDS are known in every world. Raises UserError."""
    known, weights = (*known, *REWARDS), {}
    for part in spec.split(","):
        name, _, weight = part.strip().partition(":")
        if name in weights:
            raise UserError(f"reward {name!r} is named twice in {spec!r:.99}: give it one weight")
        if name not in known:
            raise UserError(f"this world has no reward {name!r}; it has: {', '.join(known)}")
        try:
            weights[name] = float(weight or 1)
            if not math.isfinite(weights[name]):
                raise ValueError
        except ValueError:
            raise UserError(f"the weight of reward {name!r} must be a number, got {weight!r}") from None
    return weights


def check(cfg, known):
    """Raise UserError if a reward is unknown, or if the held-out reward is also trained on."""
    if set(parse(cfg.heldout_reward, known)) & set(parse(cfg.reward, known)):
        raise UserError(f"--heldout_reward={cfg.heldout_reward} must not be trained on as well: "
                        f"--reward is {cfg.reward}")


def weighted(spec, functions):
    """Return the weighted sum of rewards that `spec` names, as one function (images, prompts) -> [b].

    functions: {name: function}. The sum raises Fault with the name of a reward that fails or does not return
    one number for each image.
    """
    weights = parse(spec, functions)

    def total(images, prompts):
        rewards = []
        for name in weights:
            try:                                           # a copy, because a reward may edit its images
                found = functions[name](images.clone(), list(prompts))
            except UserError:
                raise
            except Exception as error:                     # a reward may be code of a user
                raise Fault(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
            real = isinstance(found, torch.Tensor) and not found.is_complex()
            if not real or found.shape != (len(prompts),):
                what = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else (
                    f"a {type(found).__name__}")
                raise Fault(f"reward {name!r} must return a float tensor with one number for each of "
                            f"{len(prompts)} images, [{len(prompts)}], got {what}")
            rewards.append(found)
        return sum(w * r for w, r in zip(weights.values(), rewards))
    return total
