"""A flow-matching policy: it turns noise into an image in K steps, and each noisy step is a sampled action.

    x = (1 - t) x0 + t eps        an image x0, mixed with noise eps ~ N(0, 1).  t = 0: the image, t = 1: noise
    v = dx/dt = eps - x0          the velocity, which a network learns to predict from (x, t, prompt)

Flow matching (arXiv 2210.02747) trains v(x, t) by squared error, so v is the mean of eps - x0 over all images
and noises that mix to x. Sampling starts from noise at t = 1 and follows v to t = 0. Two estimates follow:
    x0(x) = x - t v               the mean of the images that mix to x
    eps(x) = x + (1 - t) v        the mean of the noises that mix to x

Symbols
    B samples, P prompts          C H W  channels, height and width of x
    K denoising steps             N <= K noisy steps, the first ones. They are the actions that are trained
    D width, L prompt tokens      T patches of an image, p pixels per side of a patch
    s noise level, z ~ N(0, 1)    p(x) density of x at time t

Why noise. A policy gradient needs the probability of what was sampled. Following v is deterministic, so it
has no density. Flow-GRPO (arXiv 2505.05470) samples a stochastic differential equation (SDE) that has the
*same* density of x at every t. Sampling runs backwards, so let r = 1 - t be its time.
  1. Following v moves density:    dp/dr = div(v p)                                the continuity equation
  2. Noise s dw diffuses it:       dp/dr = (s^2/2) div(grad p)                     Fokker-Planck
  3. A further drift u moves it:   dp/dr = -div(u p)
  4. With u = (s^2/2) grad log p, u p is (s^2/2) grad p. Then lines 2 and 3 add up to 0, and line 1 remains.
  5. Given x0, x is normal with mean (1 - t) x0 and standard deviation t. So the score is
     grad log p = -E[eps | x] / t = -(x + (1 - t) v) / t.                          [test_score_of_a_gaussian]
  6. One step from t to t' < t is, with dt = t' - t < 0,
     x' = x + [v + s^2/(2t) (x + (1 - t) v)] dt + s sqrt(-dt) z.                   [test_steps_keep_the_data]
So each noisy step is a Gaussian whose mean is c_x x + c_v v. `step_table` lists c_x, c_v and the standard
deviation for four samplers. [test_name] names a test of tests/core/test_flow.py.

The network is SiT (arXiv 2401.08740), a transformer over patches. Time and prompt scale and shift its
activations (adaLN-zero, arXiv 2212.09748). Modules have the official names, so that released files load.

Departures:
 1. Released SiT files have t = 1 at the image. `from_sit` turns them to the convention above.
 2. A prompt is read as tokens beside the patches, and its mean is added to the embedding of time. Official
    SiT reads class labels only.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.interfaces import Rollout
from divergences import Gaussian


# ---- steps -------------------------------------------------------------------------------------------------
def time_grid(steps, shift=1.0):
    """Return the K + 1 times of a sampler, from 1 to 0. shift > 1 spends more steps near the noise."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)


def step_table(times, sampler="sde", noise=.7, noisy=None):
    """Return c_x, c_v and std, [K] each. Step k goes from times[k] to times[k+1], to N(c_x x + c_v v, std^2).

    sampler     ode       follow v, without noise                    [test_without_noise_all_are_the_ode]
                sde       Flow-GRPO: s = noise * sqrt(t / (1 - t))   [test_first_std_is_the_noise]
                constant  DanceGRPO (arXiv 2505.07818): s = noise
                cps       arXiv 2509.05952: go to x0(x), and back to t' with partly new noise. x has the right
                          noise level, but the images are less diverse                 [test_cps_narrows]
    noisy: only the first `noisy` steps have noise, the others follow v. The default is all steps but the
    last, because noise at t = 0 would stay in the image. Raises ValueError for an unknown sampler.
    """
    if sampler not in ("ode", "sde", "constant", "cps"):
        raise ValueError(f"sampler must be ode, sde, constant or cps, got {sampler!r}")
    t, end = times[:-1], times[1:]
    dt = end - t
    level = torch.full_like(t, noise)                                  # of noise, for each step
    level[len(t) - 1 if noisy is None else noisy:] = 0
    if sampler in ("ode", "cps"):
        std = end * torch.sin(level * (math.pi / 2 if sampler == "cps" else 0))
        rest = (end ** 2 - std ** 2).clamp_min(0).sqrt()               # of the old noise
        return ((1 - end) + rest).float(), (rest * (1 - t) - (1 - end) * t).float(), std.float()
    s2 = level ** 2
    if sampler == "sde":
        s2 = s2 * t / (1 - torch.where(t == 1, end, t))               # t = 1: the next time, as in their code
    return ((1 + s2 / (2 * t) * dt).float(), ((1 + s2 * (1 - t) / (2 * t)) * dt).float(),
            (s2 * -dt).sqrt().float())


# ---- the network -------------------------------------------------------------------------------------------
@dataclass
class SiTConfig:
    depth: int = 12
    dim: int = 768                # D
    heads: int = 12
    patch: int = 2                # p
    channels: int = 4             # C
    side: int = 32                # H = W
    num_classes: int = 1000       # used if caption_dim is 0; class `num_classes` stands for "no class"
    caption_dim: int = 0          # width of prompt features, or 0 for class labels
    reverse_time: bool = False    # True: the weights read 1 - t, as released SiT files do


PRESETS = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}


def sincos_2d(side, dim):
    """Return the fixed positions [side * side,dim] of a grid: first half of the columns, then of the rows."""
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates                           # [side,dim/4]
    one = torch.cat([angles.sin(), angles.cos()], 1)                                            # [side,dim/2]
    return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], 1).float()


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                           # [B,T,D]


class TimestepEmbedder(nn.Module):
    """Embed times in [0,1]: 128 cosines and 128 sines, then two linear layers."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        rates = (-math.log(10000) / 128 * torch.arange(128, device=t.device)).exp()
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).type_as(self.mlp[0].weight))  # [B,D]


class ClassEmbedder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding_table = nn.Embedding(c.num_classes + 1, c.dim)

    def forward(self, labels, mask):
        """Return (no tokens beside the patches, [B,D] to add to the time)."""
        return None, self.embedding_table(labels)


class TextEmbedder(nn.Module):
    """Read features [B,L,C] of a prompt: tokens beside the patches, and their mean, added to the time."""

    def __init__(self, c):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c.caption_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))

    def forward(self, cond, mask):
        mask = mask[..., None].type_as(cond)
        words = self.mlp(cond) * mask                                                            # [B,L,D]
        return words, words.sum(1) / mask.sum(1).clamp_min(1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.qkv, self.proj = c.heads, nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)

    def forward(self, x, mask):
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """Normalize rows [B,S,D] without learned weights, then scale and shift them by [B,1,D] each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SiTBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), Mlp(c)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))

    def forward(self, x, c, mask):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1), mask)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear = nn.Linear(c.dim, c.patch ** 2 * c.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 2 * c.dim))

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, 2)))


class SiT(nn.Module):
    """The velocity network. All gates and the output start at zero, so v = 0 at first."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder, self.t_embedder = PatchEmbed(c), TimestepEmbedder(c.dim)
        self.y_embedder = TextEmbedder(c) if c.caption_dim else ClassEmbedder(c)
        self.register_buffer("pos_embed", sincos_2d(c.side // c.patch, c.dim)[None])             # [1,T,D]
        self.blocks = nn.ModuleList(SiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for module in (*self.t_embedder.mlp[::2], *self.y_embedder.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=.02)
        for module in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1],
                       self.final_layer.linear):
            nn.init.zeros_(module.weight)

    def forward(self, x, t, cond, mask=None):
        """Return the velocity [B,C,H,W] at x [B,C,H,W] and times t [B].

        cond, mask: features [B,L,caption_dim] and 1 where the prompt has a token [B,L], or labels [B].
        """
        c = self.config
        side = c.side // c.patch
        words, pooled = self.y_embedder(cond, mask)
        time = self.t_embedder(1 - t if c.reverse_time else t) + pooled                          # [B,D]
        x, sees = self.x_embedder(x) + self.pos_embed, None
        if words is not None:                             # every row sees all patches and the prompt's tokens
            x = torch.cat([x, words], 1)
            sees = F.pad(mask.bool(), (side * side, 0), value=True)[:, None, None]               # [B,1,1,T+L]
        for block in self.blocks:
            x = block(x, time, sees)
        x = self.final_layer(x[:, :side * side], time)                                           # [B,T,p*p*C]
        x = x.view(-1, side, side, c.patch, c.patch, c.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, c.channels, c.side, c.side)


def from_sit(state):
    """Turn the state dict of an official SiT to this file's convention. The official v is x0 - eps, so the
    output is negated. Its unused half (learn_sigma) is dropped. Use it with SiTConfig(reverse_time=True)."""
    state = dict(state)
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    rows = torch.arange(len(state["final_layer.linear.bias"])).view(patch ** 2, -1)[:, :channels].flatten()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name][rows]
    return state


# ---- the policy --------------------------------------------------------------------------------------------
class Transitions(Gaussian):
    """The Gaussians of the N noisy steps of b samples. Actions are all states [b,K+1,C,H,W] of a rollout."""

    def at(self, start, stop):
        return self

    def log_prob(self, states):
        """Return the log-densities [b,N] of the states that the noisy steps led to."""
        return super().log_prob(states[:, 1:len(self.std) + 1])


class FlowPolicy(SiT):
    """A SiT that samples: the Policy of common/interfaces.py. times [K+1] and table: as above."""
    bf16 = False

    def __init__(self, config, times, table):
        super().__init__(config)
        self.times, (self.c_x, self.c_v, self.std) = times.float(), table
        self.noisy = int((self.std > 0).sum())                                                   # N

    def autocast(self):
        device = self.pos_embed.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def velocity(self, x, t, cond, mask, cfg_scale=1.0, uncond_grad=True):
        """Return the velocity [B,C,H,W], in fp32, with guidance: v_u + cfg_scale (v_c - v_u)."""
        with self.autocast():
            if cfg_scale == 1:
                return self(x, t, cond, mask).float()
            empty = (cond, torch.zeros_like(mask)) if self.config.caption_dim else (
                torch.full_like(cond, self.config.num_classes), mask)
            with torch.set_grad_enabled(torch.is_grad_enabled() and uncond_grad):
                without = self(x, t, *empty).float()
            return without + cfg_scale * (self(x, t, cond, mask).float() - without)

    def means(self, states, cond, mask, **guidance):
        """Return the means [b,N,C,H,W] of the noisy steps from states [b,N,C,H,W], in one forward pass."""
        N = states.shape[1]
        of_steps = lambda values: values[:N].to(states.device)
        t = of_steps(self.times).repeat(len(states))
        cond, mask = (y.repeat_interleave(N, 0) for y in (cond, mask))
        v = self.velocity(states.flatten(0, 1), t, cond, mask, **guidance)
        return (of_steps(self.c_x).view(-1, 1, 1, 1) * states
                + of_steps(self.c_v).view(-1, 1, 1, 1) * v.view_as(states))

    @torch.no_grad()
    def rollout(self, conditions, prompt, *, cfg_scale=1.0, temperature=1.0, at_once=0, generator=None,
                part=(0, 1)):
        """Sample an image for each entry of prompt [b]. actions: the K + 1 states [b,K+1,C,H,W]. A flow
        policy has no temperature: raises ValueError unless it is 1."""
        if temperature != 1:
            raise ValueError(f"a flow policy has no temperature; it must be 1, got {temperature}")
        c, b, device = self.config, len(prompt), prompt.device
        cond, mask = conditions.cond[prompt], conditions.mask[prompt]

        def noise():                                       # of the whole step, of which b rows are ours
            return torch.randn(part[1] * b, c.channels, c.side, c.side, generator=generator,
                               device=device)[part[0] * b:][:b]
        states, means = [noise()], []
        for k, (c_x, c_v, std) in enumerate(zip(*(y.tolist() for y in (self.c_x, self.c_v, self.std)))):
            x, t = states[-1], self.times[k].to(device).expand(b)
            v = torch.cat([self.velocity(*some, cfg_scale) for some in zip(
                *(y.split(at_once or b) for y in (x, t, cond, mask)))])
            means.append(c_x * x + c_v * v)
            states.append(means[-1] + std * noise() if std else means[-1])
        states, means = torch.stack(states, 1), torch.stack(means[:self.noisy], 1)
        logp = Transitions(means, self.std[:self.noisy].to(device)).log_prob(states)
        return Rollout(states, logp, prompt)

    def distribution(self, rollout, conditions, rows, *, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        """Return the Transitions of rows [r] of a rollout."""
        prompt, states = rollout.prompt[rows], rollout.actions[rows, :self.noisy]
        means = self.means(states, conditions.cond[prompt], conditions.mask[prompt], cfg_scale=cfg_scale,
                           uncond_grad=uncond_grad)
        return Transitions(means, self.std[:self.noisy].to(means.device))
