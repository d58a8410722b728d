"""Rewards: functions (images[B,3,H,W] in [-1,1], captions) -> scores[B], higher is better.

Of the tiny world (those of the full-size one are in clip.py):
  reader   1 if the picture shows exactly what the caption says, else 0. Verifiable: geometry, no learning
           (shapes.py).
  judge    cosine of picture and caption under a small CLIP-like model that pretrain.py trains in the tiny
           world. Like HPS or CLIPScore it is a learned opinion, good on pictures like those it has seen,
           and it can be hacked.

A run trains on a weighted sum of some (`--reward=judge` or `--reward=judge:1,reader:0.5`) and always
reports at least one that it does not train on (`--heldout_reward=reader`): the gap between the two is what
reward hacking looks like.

To add a reward, write its function and put it into REWARDS (see "Your own reward" in README.md).
"""
import math

from common.config import Fault, UserError


REWARDS = {}                               # name: function (images, captions) -> scores [B]; yours go here
OF_WORLD = {"tiny": ("judge", "reader"), "llamagen": ("hps", "pickscore", "clipscore", "aesthetic")}
OF_WORLD["janus"] = OF_WORLD["llamagen"]


def parse(spec, world="tiny"):
    """'judge:1,reader:0.5' -> {'judge': 1.0, 'reader': 0.5}; a weight left out is 1. Raises UserError."""
    known = (*OF_WORLD[world], *REWARDS)
    weights = {}
    for part in spec.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in known:
            raise UserError(f"the {world} world has no reward {name!r}; it has: {', '.join(known)}")
        try:
            weights[name] = float(weight or 1)
            if not math.isfinite(weights[name]):
                raise ValueError
        except ValueError:
            raise UserError(f"the weight of reward {name!r} must be a number, not {weight!r}") from None
    return weights


def build(weights, functions):
    """{name: weight} of `parse` and {name: function} -> one function, the weighted sum of the rewards [B].
    That raises Fault, naming the reward, for one that fails or does not return a score for each picture."""
    def total(images, captions):
        scores = []
        for name in weights:
            try:
                scores.append(functions[name](images, captions))
                shape = tuple(scores[-1].shape)
            except UserError:
                raise
            except Exception as error:
                raise Fault(f"reward {name!r} failed: {type(error).__name__}: {error}") from error
            if shape != (len(captions),):
                raise Fault(f"reward {name!r} must return a score for each of {len(captions)} pictures, "
                            f"[{len(captions)}], not {list(shape)}")
        return sum(w * s for w, s in zip(weights.values(), scores))
    return total
