"""A world, a pipeline and a policy so small that everything about them can be computed by hand, in float64.

The policy is a table: the logits of a token depend on the prompt and on the token before. Guidance mixes the
table with an unconditional one. common/interfaces.py says what worlds, pipelines and policies offer.
"""
import contextlib
import random

import torch

from common.interfaces import Conditions, Rollout, SingleActions
from divergences import Categorical

SIDE, V, FIRST = 4, 5, 5                    # FIRST: what stands before the first token


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Table(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.cond = torch.nn.Parameter(.4 * normal(2, V + 1, V, seed=seed))
        self.uncond = torch.nn.Parameter(.4 * normal(V + 1, V, seed=seed + 1))

    def autocast(self):
        return contextlib.nullcontext()

    def logits(self, tokens, prompt, cfg_scale, temperature, uncond_grad=True):
        """tokens [b,T], prompt [b] -> [b,T,V]"""
        before = torch.cat([torch.full_like(tokens[:, :1], FIRST), tokens[:, :-1]], 1)
        cond, uncond = self.cond[prompt[:, None], before], self.uncond[before]
        uncond = uncond if uncond_grad else uncond.detach()
        return (uncond + cfg_scale * (cond - uncond)) / temperature

    @torch.no_grad()
    def generate(self, cond, mask, prompt, *, cfg_scale, temperature, generator):
        tokens = torch.zeros(len(prompt), SIDE * SIDE, dtype=torch.long)
        for t in range(SIDE * SIDE):
            p = self.logits(tokens, cond[prompt], cfg_scale, temperature)[:, t].softmax(1)
            tokens[:, t] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return tokens

    def rollout(self, conditions, prompt, *, generator, at_once, part, **sampling):
        tokens = self.generate(*conditions.of(prompt), generator=generator, **sampling)
        rollout = Rollout(tokens, None, prompt)
        pi = self.distribution(rollout, conditions, torch.arange(len(tokens)), **sampling)
        rollout.logp = pi.log_prob(tokens).detach()
        self.kept = rollout
        return rollout

    def distribution(self, rollout, conditions, rows, *, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        prompt = conditions.cond[rollout.prompt[rows]]
        return Categorical(self.logits(rollout.actions[rows], prompt, cfg_scale, temperature, uncond_grad))


class Pipeline(SingleActions):
    tokens = SIDE * SIDE
    codebook = torch.nn.functional.normalize(normal(V, 3, seed=9), dim=1)

    def __init__(self):
        self.policy, self.reference = Table(0), Table(10).requires_grad_(False)

    def encode(self, prompts):
        number = torch.tensor([World.prompts.index(p) for p in prompts])
        return Conditions(number, torch.ones(len(prompts), 1))

    def decode(self, tokens):
        return self.codebook[tokens].transpose(1, 2).unflatten(2, (SIDE, SIDE))      # [b,3,4,4]


class World:
    prompts, images = ["dark", "bright"], None

    def draw(self, n):
        return random.sample(self.prompts, n)

    def fixed_prompts(self, n):
        return self.prompts[:n]

    def reward(self, images, prompts):
        return images.mean((1, 2, 3)) * torch.tensor([1. if p == "bright" else -1. for p in prompts])

    def heldout(self, images, prompts):
        return images[:, 0, 0, 0]

    def embed(self, images):
        return torch.nn.functional.normalize(images.flatten(1), dim=1)

    def measure(self, prompts, images, rewards, base, sample):
        return {"base": base}
