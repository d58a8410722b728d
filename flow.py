"""A flow-matching policy: it turns noise into an image in K steps, and each noisy step is a sampled action.

    x = (1 - t) x0 + t eps        an image x0, mixed with noise eps ~ N(0, 1).  t = 0: the image, t = 1: noise
    v = dx/dt = eps - x0          the velocity, which a network learns to predict from (x, t, prompt)

Flow matching (arXiv 2210.02747) trains v(x, t) by squared error, so v is the conditional mean
E[eps - x0 | x]. Sampling starts from noise at t = 1 and follows v to t = 0. Two estimates follow:
    x0(x) = x - t v               the mean of the images that mix to x
    eps(x) = x + (1 - t) v        the mean of the noises that mix to x

Symbols
    B samples, P prompts          C H W  channels, height and width of x
    K denoising steps             T < K noisy steps, the first ones. They are the actions that are trained
    L prompt tokens               n = C H W components of x
    J chunks of steps             c_x, c_v, std: a step samples from N(c_x x + c_v v, std^2)
    s noise level, z ~ N(0, 1)    p(x) density of x at time t

Why noise. A policy gradient needs the probability of what was sampled. Following v is deterministic, so it
has no density. Flow-GRPO (arXiv 2505.05470) samples a stochastic differential equation (SDE) that has the
*same* density of x at every t. Sampling runs backwards, so let r = 1 - t be its time.
  1. Following v moves density:    dp/dr = div(v p)                                the continuity equation
  2. Brownian noise s dw blurs it:       dp/dr = (s^2/2) div(grad p)                     Fokker-Planck
  3. A further drift u moves it:   dp/dr = -div(u p)
  4. With u = (s^2/2) grad log p, u p is (s^2/2) grad p. Then lines 2 and 3 cancel, and line 1 remains.
  5. Given x0, x is normal with mean (1 - t) x0 and standard deviation t, so its score, the gradient
     of log p in x, is -eps / t. The score of p is its mean over the x0 that mix to x:
     grad log p = -E[eps | x] / t = -(x + (1 - t) v) / t.                          [test_score_of_a_gaussian]
  6. Let dt = t' - t < 0. An Euler step from t to t' < t is exact as dt -> 0 only:
     x' = x + [v + s^2/(2t) (x + (1 - t) v)] dt + s sqrt(-dt) z.                   [test_steps_keep_the_data]
So each noisy step is a Gaussian whose mean is c_x x + c_v v. `step_table` lists c_x, c_v and the standard
deviation for four samplers. [test_name] names a test of tests/core/test_flow.py. The network that predicts
v is in common/sit.py.

Departures from Flow-GRPO and Chunk-GRPO (arXiv 2510.21583):
 1. Noise may stop after T steps. Then the ODE finishes the image, and only the T noisy steps are trained.
 2. With estimator = exact, a KL is d^2/2, where d is the distance of two means in units of std. The published
    code omits abs(dt) from the variance, so its KL is abs(dt) times ours.
 3. Advantages use the standard deviation of the group, and are not clamped to +-5.
 4. All chunks are computed, and those that were not drawn have weight 0. The published code skips them.
 5. With logp_per_dim, the clip is clip_eps/sqrt(n). The published 1e-4 is .0256/sqrt(65,536).
"""
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from common.config import UserError, option
from common.interfaces import Rollout
from common.sit import SiT
from divergences import Gaussian


# ---- steps -------------------------------------------------------------------------------------------------
def time_grid(steps, shift=1.0, least=0.0):
    """Return the K + 1 times of a sampler, from 1 to 0. shift > 1 spends more steps near the noise.
    least > 0: K times go from 1 to least, which is shifted twice. Then follows 0. diffusers has .001."""
    def shifted(u):
        return shift * u / (1 + (shift - 1) * u)
    if least:
        u = torch.linspace(1, shifted(least), steps, dtype=torch.float64)
        return torch.cat([shifted(u), torch.zeros(1, dtype=torch.float64)])
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64))


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
        s2 = s2 * t / (1 - torch.where(t == 1, end, t))     # t = 1 divides by 0. Their code takes `end`
    return ((1 + s2 / (2 * t) * dt).float(), ((1 + s2 * (1 - t) / (2 * t)) * dt).float(),
            (s2 * -dt).sqrt().float())


# ---- options and chunks ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options:
    """---- flow matching"""
    denoise_steps: int = option(8, "K, steps from noise to an image in training", low=2)
    noisy_steps: int = option(5, "T, the first steps, which have noise and are trained; below K", low=1)
    eval_steps: int = option(10, "steps of the ODE, which draws the images of evaluations", low=1)
    shift: float = option(3.0, "above 1: more steps near the noise", low=1)
    grid: Literal["linear", "diffusers"] = option("linear", "diffusers: with its tiny last step")
    sampler: Literal["sde", "constant", "cps"] = option("sde", "where the noise goes (flow.step_table)")
    noise: float = option(0.7, "its level", low=0)
    likelihood: Literal["transitions", "elbo"] = option("transitions", "log-probability in the ratio")
    step_weights: Literal["equal", "noise"] = option("equal", "noise: weigh a step by std/abs(c_v), mean 1")
    logp_per_dim: bool = option(True, "divide log-ratios by n, and clip to 1 +- clip_eps/sqrt(n)")
    chunks: tuple = option((), "sizes of consecutive steps that share a ratio, such as (2, 3); () = single")
    adaptive_chunks: bool = option(False, "find the sizes by flow.adaptive_chunks")
    chunk_ratio: bool = option(True, "False: chunks only weigh their steps")
    chunk_share: float = option(1.0, "share of the chunks that a sample trains in each step", high=1)
    chunk_draw: Literal["uniform", "change"] = option("uniform", "change: prefer chunks where x changes much")
    action_batch: int = option(0, "steps of a sample per forward pass; 0 = all; memory only", low=0)
    cfg_scale: float = option(1.0, "guidance of rollout, loss and reference; 1 = none, half the cost", low=1)
    sample_batch: int = option(0, "images sampled at once; 0 = all; changes memory, not the result", low=0)
    # The loop also reads options of token policies. For flow policies they are fixed.
    uncond_grad, score_cfg, critical_tokens, dynamic_weight, logit_chunk = True, 0.0, False, False, 0

    def check(cfg):
        if cfg.temperature != 1:
            raise UserError(f"a flow policy has no --temperature: leave it at 1, got {cfg.temperature}")
        if cfg.noisy_steps >= cfg.denoise_steps or not cfg.noise:
            raise UserError("--noisy_steps must be below --denoise_steps, and --noise above 0: noise in the "
                            "last step would stay in the image, and without noise there is no density")
        whole = all(type(c) is int and c > 0 for c in cfg.chunks) and sum(cfg.chunks) == cfg.noisy_steps
        if cfg.chunks and (cfg.adaptive_chunks or not whole):
            raise UserError(f"--chunks must add up to --noisy_steps={cfg.noisy_steps}, without "
                            f"--adaptive_chunks; got {cfg.chunks}")
        if not 0 < cfg.chunk_share <= 1 or cfg.chunk_share < 1 and not (cfg.chunks or cfg.adaptive_chunks):
            raise UserError(f"--chunk_share must be above 0 and at most 1. Below 1 it needs --chunks; got "
                            f"{cfg.chunk_share}")


def relative_change(states):
    """Return |x_{k+1} - x_k| / |x_{k+1}|, in L1 norm, of states [b,K+1,..] at each step: [b,K]."""
    states = states.flatten(2)
    return states.diff(dim=1).abs().sum(2) / states[:, 1:].abs().sum(2)


def adaptive_chunks(change, least=.02):
    """Return sizes of chunks for the relative changes [T] of T steps, by the rule of Chunk-GRPO.

    The paper cuts where the change begins to rise or to fall. It repeats this inside each chunk with higher
    differences, until they are "sufficiently small", without a number. Its code has only fixed sizes. Our
    reading: a chunk stays whole if it has up to two steps, or if no difference exceeds `least`. Else cut it
    at the first change of sign. If there is none, cut in the middle if the differences vary by over `least`.
    """
    slopes = [b - a for a, b in zip(change, change[1:])]
    if len(change) < 3 or max(map(abs, slopes)) <= least:
        return (len(change),)
    turns = [i + 1 for i in range(len(slopes) - 1) if slopes[i] * slopes[i + 1] < 0]
    if turns:
        cut = turns[0]
    elif max(slopes) - min(slopes) > least:
        cut = len(change) // 2
    else:
        return (len(change),)
    return adaptive_chunks(change[:cut], least) + adaptive_chunks(change[cut:], least)


def chunk_weights(states, chunks, share, draw, u):
    """Draw which chunks each sample trains -> weights of its actions [b,T]. The mean over chunks is 1.

    states [b,K+1,..]. u [b,J]: uniform random numbers in (0,1]. A sample trains k = max(1, int(J * share)) of
    its J chunks, without repetition. draw = "change" prefers chunks whose relative change is large (arXiv
    2510.21583 sec. 3.3): the weight of a chunk is the mean of its steps. This preference is part of the
    method, so the loss does not correct for it: every drawn chunk weighs J / k.
    """
    sizes, k = torch.tensor(chunks, device=u.device), max(1, int(len(chunks) * share))
    preferred = torch.ones_like(u)
    if draw == "change":
        change = relative_change(states)[:, :sum(chunks)]
        preferred = torch.stack([part.mean(1) for part in change.split(list(chunks), 1)], 1)     # [b,J]
    # Exponential times with these rates: the k smallest are a draw in proportion to the rates.
    rank = (-u.log() / preferred).argsort(1).argsort(1)
    return ((rank < k) * (len(chunks) / k)).repeat_interleave(sizes, 1)


def sizes(o, reference, conditions):
    """Return the sizes of the chunks that the Options o ask for. conditions: prompts of a trial rollout."""
    if not o.adaptive_chunks:
        return tuple(o.chunks)
    where = conditions.cond.device
    rollout = reference.rollout(conditions, torch.arange(len(conditions.mask), device=where),
                                generator=torch.Generator(where).manual_seed(0))
    return adaptive_chunks(relative_change(rollout.actions)[:, :o.noisy_steps].mean(0).tolist())


def action_weights(o, policy, chunks, rollout, rows, B, generator):
    """Return the weights [b,T] of the actions of a rollout. rows [b]: which of the step's B samples they are.
    All processes draw the random numbers of the whole step, so that nothing depends on their number."""
    c_x, c_v, std = policy.trained
    weights = torch.ones(len(std))
    if o.step_weights == "noise":
        weights = std / c_v.abs()
    weights = (weights / weights.mean()).to(rollout.logp.device).expand(rollout.logp.shape)
    if o.chunk_share < 1:
        u = 1 - torch.rand(B, len(chunks), generator=generator, device=weights.device)[rows]
        weights = weights * chunk_weights(rollout.actions, chunks, o.chunk_share, o.chunk_draw, u)
    return weights


# ---- the policy --------------------------------------------------------------------------------------------
class Transitions(Gaussian):
    """The Gaussians of noisy steps of b samples, from step `start` on. means(start, stop) computes means
    [b,stop-start,C,H,W], when they are first needed. `log_prob` gets all states [b,K+1,C,H,W] of a rollout.
    target: for each step, the index of the state that it reached. These states are the actions."""

    def __init__(self, means, std, target, start=0):
        self.means, self.stds, self.target, self.start = means, std, target, start
        self.std = std.view(-1, 1, 1, 1)

    @cached_property
    def mean(self):
        return self.means(self.start, self.start + len(self.stds))

    def at(self, start, stop):
        return Transitions(self.means, self.stds[start:stop], self.target[start:stop], self.start + start)

    def log_prob(self, states):
        """Return the log-densities [b,T] of the states that the noisy steps led to."""
        return super().log_prob(states[:, self.target])


class FlowPolicy:
    """The Policy of common/interfaces.py for a velocity network. A subclass is a torch.nn.Module with
        shape                          (C, H, W) of x
        predict(x, t, cond, mask)      the velocity [B,C,H,W] at x and times t [B]
        without(cond, mask)            (cond, mask) of no prompt, for guidance
    and calls set_sampler.

    likelihood = "elbo" (arXiv 2602.04663): images are sampled by following v, without noise. Their
    exact log-probability would be expensive. A negative denoising error takes its place in the ratio, at T
    times t_k with new noises eps_k. (Weighted means of them bound it from below: the ELBO.)
        -|x0(x_k) - x0|^2 / (2 std_k^2),   x_k = (1 - t_k) x0 + t_k eps_k,
    up to a constant. With std_k = t_k / sqrt(2) this is -|v - (eps_k - x0)|^2, the negative loss of
    flow matching. It is also the log-density of x0 under N(x_k - t_k v, std_k^2): a transition from x_k to x0
    with c_x = 1 and c_v = -t_k. So only states and coefficients change.  [test_elbo_is_the_pretraining_loss]
    """
    bf16 = compile_step = False

    def set_sampler(self, o):
        """Set the sampler to the Options o."""
        self.elbo, T = o.likelihood == "elbo", o.noisy_steps
        least = .001 if o.grid == "diffusers" else 0
        self.ode = time_grid(o.eval_steps, o.shift, least).float()
        self.times = time_grid(o.denoise_steps, o.shift, least)
        self.table = step_table(self.times, o.sampler, 0 if self.elbo else o.noise, T)
        self.times = self.times.float()
        c_x, c_v, std = (y[:T] for y in self.table)
        if self.elbo:
            c_x, c_v, std = torch.ones(T), -self.times[:T], self.times[:T] / 2 ** .5
        self.trained = c_x, c_v, std
        self.target = [-1] * T if self.elbo else list(range(1, T + 1))

    def autocast(self):
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)

    def velocity(self, x, t, cond, mask, cfg_scale=1.0, uncond_grad=True):
        """Return the velocity [B,C,H,W], in fp32, with guidance: v_u + cfg_scale (v_c - v_u)."""
        with self.autocast():
            if cfg_scale == 1:
                return self.predict(x, t, cond, mask).float()
            with torch.set_grad_enabled(torch.is_grad_enabled() and uncond_grad):
                without = self.predict(x, t, *self.without(cond, mask)).float()
            return without + cfg_scale * (self.predict(x, t, cond, mask).float() - without)

    def means(self, states, cond, mask, start, stop, **guidance):
        """Return the means [b,n,C,H,W] of the n noisy steps from `start` on, from all states [b,K+1,..]."""
        x, n, where = states[:, start:stop], stop - start, states.device
        t, c_x, c_v = (y[start:stop].to(where) for y in (self.times, *self.trained[:2]))
        cond, mask = (y.repeat_interleave(n, 0) for y in (cond, mask))
        v = self.velocity(x.flatten(0, 1), t.repeat(len(x)), cond, mask, **guidance)
        return c_x.view(-1, 1, 1, 1) * x + c_v.view(-1, 1, 1, 1) * v.view_as(x)

    def transitions(self, states, cond, mask, **guidance):
        return Transitions(lambda *span: self.means(states, cond, mask, *span, **guidance),
                           self.trained[2].to(states.device), self.target)

    @torch.no_grad()
    def rollout(self, conditions, prompt, *, cfg_scale=1.0, temperature=1.0, at_once=0, generator=None,
                part=(0, 1)):
        """Sample an image for each entry of prompt [b]. actions: all states. The last one is the image.
        [b,K+1,C,H,W], or with elbo [b,T+1,C,H,W]: the T mixtures x_k, then x0. A flow policy has no
        temperature: raises ValueError unless it is 1."""
        if temperature != 1:
            raise ValueError(f"a flow policy has no temperature; it must be 1, got {temperature}")
        b, where = len(prompt), prompt.device
        cond, mask = conditions.cond[prompt], conditions.mask[prompt]

        def noise():                                       # for all processes. part = (ours, of how many)
            return torch.randn(part[1] * b, *self.shape, generator=generator, device=where)[part[0] * b:][:b]

        def in_parts(f, *tensors):
            return torch.cat([f(*some) for some in zip(*(y.split(at_once or b) for y in tensors))])
        states, means = [noise()], []
        for k, (c_x, c_v, std) in enumerate(zip(*(y.tolist() for y in self.table))):
            x = states[-1]
            v = in_parts(lambda *some: self.velocity(*some, cfg_scale), x, self.times[k].to(where).expand(b),
                         cond, mask)
            means.append(c_x * x + c_v * v)
            states.append(means[-1] + std * noise() if std else means[-1])
        if self.elbo:
            x0, times = states[-1], self.times[:len(self.target)].tolist()
            states = torch.stack([*((1 - t) * x0 + t * noise() for t in times), x0], 1)
            logp = in_parts(lambda *some: self.transitions(*some, cfg_scale=cfg_scale).log_prob(some[0]),
                            states, cond, mask)
            return Rollout(states, logp, prompt)
        states, means = torch.stack(states, 1), torch.stack(means[:len(self.target)], 1)
        return Rollout(states, Transitions(lambda start, stop: means, self.trained[2].to(where),
                                           self.target).log_prob(states), prompt)

    def distribution(self, rollout, conditions, rows, *, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        """Return the Transitions of rows [r] of a rollout."""
        prompt = rollout.prompt[rows]
        return self.transitions(rollout.actions[rows], conditions.cond[prompt], conditions.mask[prompt],
                                cfg_scale=cfg_scale, uncond_grad=uncond_grad)

    @torch.no_grad()
    def generate(self, cond, mask, prompt, *, cfg_scale=1.0, temperature=1.0, generator=None, noise=None,
                 top_k=0, top_p=1.0):
        """Draw an image for each entry of prompt [b], without noise on the way -> [b,1,C,H,W].
        noise [b,C,H,W]: where to start; by default new noise. A flow policy has no codes, so temperature,
        top_k and top_p must keep their defaults, or it raises ValueError."""
        if (temperature, top_k, top_p) != (1, 0, 1):
            raise ValueError("a flow policy has no temperature, top_k or top_p: leave them out")
        cond, mask = cond[prompt], mask[prompt]
        x = noise if noise is not None else torch.randn(len(prompt), *self.shape, generator=generator,
                                                        device=prompt.device)
        for t, end in zip(self.ode.tolist(), self.ode.tolist()[1:]):
            x = x + (end - t) * self.velocity(x, torch.full_like(x[:, 0, 0, 0], t), cond, mask, cfg_scale)
        return x[:, None]


class SiTPolicy(FlowPolicy, SiT):
    """A SiT that samples, with the sampler of the Options o."""

    def __init__(self, config, o=Options()):
        super().__init__(config)
        self.shape = config.channels, config.side, config.side
        self.set_sampler(o)

    predict = SiT.forward

    def without(self, cond, mask):
        if self.config.caption_dim:
            return cond, torch.zeros_like(mask)
        return torch.full_like(cond, self.config.num_classes), mask
