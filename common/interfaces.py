"""The interfaces between an algorithm, a policy, and a world: what each may ask of the others.

    World      prompts, rewards, and what can be measured      tiny/world.py, full/world.py
    Pipeline   policy, reference and image tokenizer           tiny/world.py, full/llamagen.py, full/janus.py
    Policy     samples images, and knows their probabilities   model.py, flow.py, full/janus.py
    Reward     rates images                                    reward.py

An algorithm (train.py, vapi.py) uses only what stands here, so a new world or a new policy needs no change
there. A Protocol is a description for readers. Nothing has to inherit from it.

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
        """Keep only the prompts that occur in prompt [b] -> (cond, mask, prompt), prompt renumbered to
        them."""
        used, row = prompt.unique(return_inverse=True)
        return self.cond[used], self.mask[used], row


@dataclass
class Rollout:
    """What a policy sampled: T actions for each sample."""
    actions: Tensor     # tokens [b,T], each the number of one of V codes; or the states of a flow policy
    logp: Tensor        # [b,T], log-probability of each action under the distribution that sampled it
    prompt: Tensor      # [b], not a text: the row of the conditions that each sample belongs to


class Policy(Protocol):
    """A torch.nn.Module in eval mode: with dropout the loss would see another distribution than the sampler.

    Its attribute compile_step turns on torch.compile in `generate`.
    """

    def rollout(self, conditions: Conditions, prompt: Tensor, *, cfg_scale=1.0, temperature=1.0, at_once=0,
                generator: torch.Generator = None, part=(0, 1)) -> Rollout:
        """Sample one image for each entry of `prompt` [b], at most `at_once` at a time (0: all).

        part = (i, n): the step is cut into n equal parts, and these b samples are part i. Every process draws
        the random numbers of the whole step and uses its own, so the samples do not depend on n.
        """

    def distribution(self, rollout: Rollout, conditions: Conditions, rows: Tensor, *, cfg_scale=1.0,
                     temperature=1.0, uncond_grad=True):
        """Return the distribution over every action of some rows of a rollout: a Categorical or a Gaussian
        (divergences.py)."""

    def generate(self, cond, mask, prompt, *, cfg_scale, temperature, generator, top_k, top_p) -> Tensor:
        """Sample tokens [b,T] for evaluations, where the distribution may be cut (model.py)."""


class Pipeline(Protocol):
    """Models that were released or pretrained together (the word of the library diffusers)."""
    policy: Policy          # trained
    reference: Policy       # its frozen copy
    tokens: int             # tokens of an image, or patches that a flow policy reads
    codebook: Tensor        # [V,n], the unit vector of each code; flow policies have none
    made_from: dict         # {name: path} of its files of weights
    generates_actions: bool # are samples of policy.generate actions, whose probability is known?
    chunks: tuple           # sizes of chunks of actions that share a ratio (grpo.policy_loss), or ()
    shared: bool            # False: chunks only weigh their actions
    per: int                # numbers in an action over which its log-ratio is averaged; 1 for tokens

    def weights(self, rollout: Rollout, rows: Tensor, B: int, generator: torch.Generator):
        """Return the weights of actions in the loss [b,T] with mean 1, or None. rows [b]: which of the step's
        B samples the rollout holds."""

    def encode(self, prompts: list) -> Conditions: ...

    def decode(self, actions: Tensor) -> Tensor:
        """tokens [b,T], or states of which the last is the image -> images [b,3,H,W], about [-1,1]."""

    def encode_images(self, images: Tensor) -> Tensor:
        """images [b,3,H,W] in [-1,1] -> tokens [b,T]."""


class SingleActions:
    """What pipelines of tokens inherit: every token has its own ratio, and all tokens weigh the same."""
    generates_actions, chunks, shared, per = True, (), True, 1

    def weights(self, rollout, rows, B, generator):
        return None


class World(Protocol):
    """Prompts, the rewards of their images, and what can be measured."""
    reward: Reward          # what a run trains on
    heldout: Reward         # what a run only reports
    columns: list           # names of the measurements of `measure` that tables show
    images: "Images"        # real images with their captions, or None where an algorithm needs none

    def draw(self, n: int) -> list:
        """Draw n training prompts with Python's global `random`, so that seeding and resuming work."""

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
        """Turn the second elements of these pairs into images [n,3,H,W] in [-1,1]."""

    def fixed_images(self):
        """Return (captions, images [n,3,H,W]) of every evaluation. A run may also train on them."""

    def perceptual(self, images: Tensor, originals: Tensor) -> Tensor:
        """Return the perceptual distance [b] of images to originals [b,3,H,W], or to one original
        [1,3,H,W]."""
