"""The interfaces between an algorithm, a policy, and a world: what each may ask of the others.

    World      prompts, rewards, and what can be measured      tiny/world.py, full/world.py
    Pipeline   models that belong together, and their glue     tiny/world.py, full/llamagen.py, full/janus.py
    Policy     samples images, and knows their probabilities   model.py, full/janus.py
    Reward     rates images                                    reward.py

An algorithm (train.py, vapi.py) uses only what stands here, so a new world or a new policy needs no change in
it. A Protocol is a description for readers. Nothing has to inherit from it.

Shapes: B samples in a step, b of them on this process, P prompts, T tokens, V codes.
"""
from dataclasses import dataclass
from typing import Callable, Protocol

import torch
from torch import Tensor

# images [b,3,H,W] in [-1,1], b prompts -> rewards [b], higher is better
Reward = Callable[[Tensor, list], Tensor]


@dataclass
class Conditions:
    """What a policy reads of P prompts."""
    cond: Tensor        # features [P,L,C], class labels [P], or text ids [P,L]
    mask: Tensor        # [P,L], 1 where the prompt has a token

    def of(self, prompt):
        """prompt [b], rows of the conditions -> (cond, mask, prompt) of only those prompts that are used."""
        used, row = prompt.unique(return_inverse=True)
        return self.cond[used], self.mask[used], row


@dataclass
class Rollout:
    """What a policy sampled."""
    actions: Tensor     # tokens [b,T]
    logp: Tensor        # [b,T], log-probability of each token under the distribution that sampled it
    prompt: Tensor      # [b], the row of the conditions that each sample belongs to


class Policy(Protocol):
    """A model in eval mode: with dropout the loss would see another distribution than the sampler."""

    def rollout(self, conditions: Conditions, prompt: Tensor, *, cfg_scale=1.0, temperature=1.0, at_once=0,
                generator: torch.Generator = None, part=(0, 1)) -> Rollout:
        """Sample one image for each entry of `prompt` [b], at most `at_once` at a time (0: all). These b
        samples are part i of n equal parts of a step, (i, n) = part. The random numbers are those of the
        whole step, so n processes together draw what one process would draw."""

    def distribution(self, rollout: Rollout, conditions: Conditions, rows: Tensor, *, cfg_scale=1.0,
                     temperature=1.0, uncond_grad=True):
        """The distribution over every action of some rows of a rollout: a Categorical of divergences.py."""


class Pipeline(Protocol):
    """Models that were released or pretrained together (diffusers' word)."""
    policy: Policy          # trained
    reference: Policy       # its frozen copy
    tokens: int             # T, tokens of an image
    codebook: Tensor        # [V,n], the unit vector of each code

    def encode(self, prompts: list) -> Conditions: ...

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [b,T] -> images [b,3,H,W], about [-1,1]."""

    def encode_images(self, images: Tensor) -> Tensor:
        """images [b,3,H,W] in [-1,1] -> tokens [b,T]."""


class World(Protocol):
    """Prompts, the rewards of their images, and what can be measured."""
    reward: Reward          # what a run trains on
    heldout: Reward         # what a run only reports
    columns: list           # names of the measurements of `measure` that tables show
    images: "Images"        # real images with their captions, or None where an algorithm needs none

    def draw(self, n: int) -> list:
        """n training prompts, from Python's random stream."""

    def fixed_prompts(self, n: int) -> list:
        """The prompts of every evaluation."""

    def embed(self, images: Tensor) -> Tensor:
        """images [b,3,H,W] -> unit vectors [b,d], on which diversity is measured."""

    def measure(self, prompts: list, images: Tensor, rewards: dict, base: dict, sample: Callable) -> dict:
        """What only this world can measure. images [P*n,3,H,W], n of each prompt in a row; rewards {name:
        [P,n]}; base: the results of the base on the same prompts, or None; sample(prompts, n) draws further
        images."""

    def picture(self, path: str, prompts: list, columns: list) -> None:
        """Write a grid of images: a row for each prompt, side by side the columns (heading, images)."""


class Images(Protocol):
    """Real images with their captions, for algorithms that learn from images (vapi.py)."""

    def draw(self, n: int) -> list:
        """n training images, as pairs (caption, what `load` takes), from Python's random stream."""

    def load(self, items: list) -> Tensor:
        """What `draw` returned -> images [n,3,H,W] in [-1,1]."""

    def held_back(self):
        """(captions, images [n,3,H,W]) that are never trained on."""

    def perceptual(self, images: Tensor, originals: Tensor) -> Tensor:
        """A perceptual distance of each image to its original, or of all to one -> [b]."""
