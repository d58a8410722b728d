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

import torch
import torch.nn as nn
import torch.nn.functional as F

from tiny import shapes
from tiny import text
from common.config import Fault, UserError


class Judge(nn.Module):
    """Two encoders into one space, arXiv 2103.00020, trained with the sigmoid loss of SigLIP,
    arXiv 2303.15343 eq. 1."""

    def __init__(self, width=64, caption_dim=text.DIM):
        super().__init__()
        self.image = nn.Sequential(                                        # [B,3,32,32] -> [B,width]
            nn.Conv2d(3, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 4, 2, 1), nn.GELU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(64 * 16, 128), nn.GELU(), nn.Linear(128, width))
        self.word = nn.Sequential(nn.Linear(caption_dim, 128), nn.GELU(), nn.Linear(128, 128))
        self.caption = nn.Sequential(nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, width))
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-4.))

    def embed_images(self, images):
        """images [B,3,32,32] in [-1,1] -> unit vectors [B,width]; evaluate.py's diversity uses them too."""
        return F.normalize(self.image(images.clamp(-1, 1)), dim=1)

    def activations(self, images):
        """What the three convolutions see: list of [B,C,h,w]."""
        x, found = images.clamp(-1, 1), []
        for layer in self.image[:6]:
            x = layer(x)
            found += [x] if isinstance(layer, nn.GELU) else []
        return found

    def embed_captions(self, captions):
        """B captions -> unit vectors [B,width]. Words are summed, so order reaches us by their features."""
        features, mask = text.encode(captions, self.scale.device, times=1)
        words = self.word(features.to(self.scale.dtype)) * mask[..., None]
        return F.normalize(self.caption(words.sum(1)), dim=1)

    def loss(self, images, captions, truth):
        """truth [B,N] in {0,1}: is caption n true of image b? -> mean over pairs of
        -log sigmoid(+-(s cos + bias))."""
        logits = self.scale.exp() * self.embed_images(images) @ self.embed_captions(captions).T + self.bias
        return F.binary_cross_entropy_with_logits(logits, truth)

    @torch.no_grad()
    def forward(self, images, captions):
        """The reward: cosine in [-1,1] of each image [B,3,32,32] with its own caption -> [B]."""
        return (self.embed_images(images) * self.embed_captions(captions)).sum(1)


def reader(images, captions):
    """1.0 where the exact reader finds just what the caption says, else 0.0 -> [B]. Grammar captions only."""
    right = [shapes.matches(s, shapes.parse(c)) for s, c in zip(shapes.read(images), captions)]
    return torch.tensor(right, dtype=torch.float, device=images.device)


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
