"""Group Relative Policy Optimization: from rewards to advantages, from log-probabilities to a loss.

Symbols: pi the policy, rho the reference, pi_old the policy that sampled, a the sampled token, G samples of
each prompt, B samples and N tokens in the whole step, T tokens of an image, V codes (the vocabulary of image
tokens).

GRPO (arXiv 2402.03300 eq. 3, applied to image tokens by arXiv 2606.21498) samples G images of one prompt. The
mean reward of the group serves as the baseline of its images, so no critic has to be trained. For sample i
and token t, with the ratio r = pi(a) / pi_old(a):
    A_i   = (R_i - mean of the group) / (standard deviation of the group + eps)
    loss  = -(1/N) sum_{i,t} min(r A_i, clip(r, 1 - clip_eps, 1 + clip_eps) A_i)
            + beta (1/N) sum_{i,t} D_{i,t}
D is a divergence to the reference (divergences.py). On the first pass over a batch r = 1, and the gradient of
the first term is REINFORCE with a baseline: -A grad log pi(a).

The value of the loss says nothing about progress. At r = 1 the first term is -mean(A) without weights,
which is 0 by construction of A, whatever the rewards are. So the value is beta D, and it grows while the
policy learns. Watch the reward.

Apart from the options, this file has only functions of tensors. The loop is in train.py. The
distributions pi and rho are objects with log_prob, entropy and divergence, such as Categorical in
divergences.py.

Departures from the paper:
 1. N counts the tokens of the whole step, not of a micro-batch or of a sample. So the losses of
    micro-batches add up to the same loss however the step is cut. All images have the same number of tokens,
    so per-token and per-sample averages are equal.
 2. A group whose rewards are all equal gets advantages of exactly zero. The computed mean has a rounding
    error. Without this rule, the error divided by eps = 1e-4 would be a false advantage: 7e-5 if all rewards
    of a group of 8 are .1, and .019 if all are 21.3. Such groups are counted, because they teach nothing.
The paper's released script averages the loss over "critical tokens" only (`weights` below). It also
multiplies the policy term by a factor (`dynamic` below). Both are off by default, and critical.py explains
them.
"""
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.checkpoint import checkpoint

from common.config import UserError, option
from critical import dynamic_weight
from divergences import CLAMP, DIVERGENCES


@dataclass(frozen=True)
class RolloutOptions:                    # its docstring is the heading of these options in --help
    """---- rollout"""
    prompts_per_step: int = option(8, "P, prompts of a step; --algorithm=vapi: images", low=1)
    group_size: int = option(8, "G, samples of each prompt", low=2)
    temperature: float = option(1.0, "of rollout, loss and reference alike, above 0")

    def check(cfg):                      # cfg: all options of the run
        if cfg.temperature <= 0:
            raise UserError(f"--temperature must be above 0, got {cfg.temperature}")


@dataclass(frozen=True)
class SamplingOptions:
    """---- sampling of tokens"""
    cfg_scale: float = option(1.0, "guidance of rollout, loss and reference; 1 = none, half the cost", low=1)
    sample_batch: int = option(0, "images sampled at once; 0 = all; changes memory, not the result", low=0)
    compile = False                 # an option of released models


@dataclass(frozen=True)
class TokenOptions:
    """---- GRPO on tokens"""
    logit_chunk: int = option(0, "positions whose logits exist at once; 0 = all; changes memory only", low=0)
    chunk_size: int = option(0, "tokens in a row that share a ratio (policy_loss); 0 = single tokens", low=0)
    # These are constants in the tiny world. ReleasedOptions makes them options, for the papers' extras.
    uncond_grad, score_cfg, critical_tokens, dynamic_weight = True, 0.0, False, False
    action_batch = 0                # an option of flow policies

    def check(cfg):
        if cfg.chunk_size and cfg.logit_chunk:
            raise UserError("--chunk_size needs all tokens of an image at once: leave --logit_chunk at 0")


@dataclass(frozen=True)
class ReleasedOptions:
    """---- GRPO on released models"""
    compile: bool = option(False, "compile a sampling step by torch.compile; not yet measured on a GPU")
    uncond_grad: bool = option(True, "with guidance: does the unconditional branch get a gradient?")
    score_cfg: float = option(0.0, "guidance of the loss; 0 = that of the rollout (full/janus.py)", low=0)
    critical_tokens: bool = option(False, "average the loss over selected tokens only (critical.py)")
    dynamic_weight: bool = option(False, "multiply the policy term by a factor (critical.py)")

    def check(cfg):
        if 0 < cfg.score_cfg < 1:
            raise UserError(f"--score_cfg must be at least 1, or 0 for the rollout's, got {cfg.score_cfg}")
        if cfg.dynamic_weight and cfg.logit_chunk:
            raise UserError("--dynamic_weight needs all tokens of an image at once: leave --logit_chunk at 0")


@dataclass(frozen=True)
class LossOptions:
    """---- loss"""
    divergence: Literal["js", "forward_kl", "reverse_kl", "none"] = option(
        "js", "which divergence to the reference is added to the loss (divergences.py)")
    estimator: Literal["sampled", "unbiased", "exact"] = option(
        "sampled", "how the divergence is estimated; sampled is the paper's form")
    beta: float = option(0.4, "weight of the divergence; JS at 4 times the beta is as strong as a KL", low=0)
    beta_schedule: Literal["constant", "linear", "cosine"] = option("constant", "from beta to beta_end")
    beta_end: float = option(0.0, "beta at the end of a linear or cosine schedule", low=0)
    clip_eps: float = option(0.2, "clip ratios to 1 +- this (see flow.py: / sqrt(n))", low=0)


@dataclass(frozen=True)
class UpdateOptions:
    """---- update"""
    inner_epochs: int = option(1, "gradient steps on each batch of samples", low=1)
    micro_batch: int = option(64, "samples per forward pass; changes memory, not the result", low=1)


def advantages(rewards, group_size, eps=1e-4):
    """Turn rewards [B] into (advantages [B], number of groups without spread).

    The G samples of a group are consecutive. The standard deviation divides by G - 1.
    """
    groups = rewards.view(-1, group_size)                                                        # [B/G,G]
    spread = groups.amax(1) > groups.amin(1)                                                     # [B/G]
    std = groups.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(groups)
    adv = (groups - groups.mean(1, keepdim=True)) / (std + eps)
    return (adv * spread[:, None]).flatten(), int((~spread).sum())


def micro_batches(b, T, samples, actions=0, chunks=()):
    """Cut b samples of T actions into micro-batches: yield (rows, (start, stop), chunks inside).

    A micro-batch has at most `samples` samples and `actions` actions of each (0: all), and a
    chunk that is larger is a micro-batch of its own.
    chunks: sizes of consecutive chunks, which are never cut, or () for single actions.
    """
    parts = [(0, T, tuple(chunks))]
    if actions:
        parts = []
        for size in chunks or (1,) * T:
            start, stop, inside = parts.pop() if parts else (0, 0, ())
            if stop > start and stop + size - start > actions:
                parts.append((start, stop, inside))
                start, inside = stop, ()
            parts.append((start, stop + size, inside + (size,) * bool(chunks)))
    for rows in torch.arange(b).split(samples):
        for start, stop, inside in parts:
            yield rows, (start, stop), inside


def policy_loss(logp, logp_old, adv, clip_eps, chunks=(), whole=None, per=1, shared=True):
    """Turn logp, logp_old [b,T] and adv [b] into (clipped surrogate loss [b,T], ratio [b,T]).

    whole: (number of actions, number of chunks) of a whole sample, if logp is a part of it. per: divide
    the log-ratio by this number. If per = n, the number of components of an action, the ratio is
        (pi / pi_old)^(1/n) = exp( mean over the components of (log pi - log pi_old) ),
    as in the published code of Flow-GRPO. It is no density ratio: its mean over pi_old is below 1. For two
    Gaussians whose means are q standard deviations apart (q: root mean square over the components), the log
    of the ratio has mean -q^2/2 and standard deviation q/sqrt(n).          [test_the_ratio_per_component]

    chunks: sizes c_1 .. c_J of consecutive chunks of actions, which add up to T. () means single actions.
    This is Chunk-GRPO (arXiv 2510.21583). All actions of chunk j share one ratio, their geometric mean
        r_j  = (prod_{t in chunk j} pi(a_t) / pi_old(a_t))^(1 / c_j)
             = exp( mean_{t in chunk j} (log pi(a_t) - log pi_old(a_t)) ),
        loss = -(1/J) sum_j min(r_j A, clip(r_j) A).
    The result has the loss of chunk j at each of its c_j actions, times T / (J c_j). So its mean over T is
    this loss. One chunk of all actions has the ratio of GSPO (arXiv 2507.18071). For tokens,
    --chunk_size=8 makes rows of the tiny image and --chunk_size=64 is GSPO. On the first pass r_j = 1, and
    the gradient is that of single actions with weights T / (J c_j). [test_chunks_on_the_first_pass]
    So chunks weigh actions. From the second pass on, they also average the ratios. The noise of an average is
    smaller, by about 1/sqrt(c_j), but clip_eps stays. So fewer ratios are clipped.
    shared = False: chunks only weigh the actions, and each action keeps its own ratio.
    """
    log_ratio, adv = (logp - logp_old) / per, adv[:, None]
    sizes = torch.tensor(chunks, device=logp.device)
    if chunks and shared:
        pooled = torch.stack([part.mean(1) for part in log_ratio.split(list(chunks), 1)], 1)     # [b,J]
        log_ratio = pooled.repeat_interleave(sizes, 1)
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)
    if chunks:
        T, J = whole or (logp.shape[1], len(chunks))
        loss = loss * (T / (J * sizes)).repeat_interleave(sizes)
    return loss, ratio


def loss(pi, rho, actions, logp_old, adv, n_actions, weights=None, *, logit_chunk=0, **options):
    """Return what a micro-batch adds to the loss of the step, and statistics of the same forward pass.

    pi, rho: distributions of policy and reference at the [b,T] positions, under the sampler's temperature and
    guidance. actions: the sampled tokens [b,T], or all states of a flow policy. logp_old [b,T]: recorded by
    the sampler. adv [b]. n_actions: N of the whole step. weights [b,T] with mean 1 over the step, or None.
    options: as in `loss_at`. The losses and statistics of all micro-batches add up to those of the step,
    except max_ratio_error: its value for the step is the largest one.

    logit_chunk: compute the logits of this many positions at a time (0: of all). With 16,384 codes and a
    width of 1,280, the logits are 13 times as large as the hidden states. The logits are in fp32, once for
    the policy and once for the reference. The log-probabilities of each need the same memory again. With
    logit_chunk, the logits of a chunk are made, used and dropped. They are made once more when the backward
    pass comes to the chunk. So memory grows with the chunk only, and the output matrix is applied twice. The
    result is the same:
    test_chunks_do_not_change_loss_gradient_or_statistics.
    """
    if not logit_chunk:
        return loss_at(pi, rho, actions, logp_old, adv, n_actions, weights, **options)

    def part(start, stop):
        return loss_at(pi.at(start, stop), rho.at(start, stop), actions[:, start:stop],
                       logp_old[:, start:stop], adv, n_actions,
                       None if weights is None else weights[:, start:stop], **options)
    total, stats = 0.0, {}
    for start in range(0, actions.shape[1], logit_chunk):
        some, found = checkpoint(part, start, start + logit_chunk, use_reentrant=False,
                                 preserve_rng_state=False)                  # nothing random is inside
        total = total + some
        accumulate(stats, found)
    return total, stats


def loss_at(pi, rho, actions, logp_old, adv, n_actions, weights=None, *, divergence="js", estimator="sampled",
            beta=0.0, clip_eps=0.2, dynamic=False, chunks=(), whole=None, per=1, shared=True):
    """Compute `loss` for all positions that pi and rho hold, with all logits at once.

    divergence: a name of DIVERGENCES, or "none". estimator: sampled, unbiased or exact. dynamic: multiply the
    policy term by a factor (critical.py). chunks, whole, per, shared: as in `policy_loss`; chunks
    need logit_chunk = 0. `per` divides the penalty as well, so the balance of policy term and penalty stays.
    clip_eps is divided by sqrt(per): see the standard deviation in `policy_loss`.
    """
    logp, logp_ref = pi.log_prob(actions), rho.log_prob(actions)                                 # [b,T]
    clip_eps = clip_eps / per ** .5
    per_action, ratio = policy_loss(logp, logp_old, adv, clip_eps, chunks, whole, per, shared)   # [b,T]
    if dynamic:
        per_action = per_action * dynamic_weight(logp, logp_ref)
    if divergence != "none" and beta:
        penalty = (pi.divergence(divergence, rho) if estimator == "exact" else
                   DIVERGENCES[divergence].unbiased(logp, logp_ref, logp_old) if estimator == "unbiased" else
                   DIVERGENCES[divergence].sampled(logp, logp_ref))
        per_action = per_action + beta / per * penalty
    if weights is not None:
        per_action = per_action * weights
    with torch.no_grad():
        stats = {
            # exact, in nat (units of the natural logarithm) per action
            "kl_reverse": pi.divergence("reverse_kl", rho).sum() / n_actions,
            "entropy": pi.entropy().sum() / n_actions,
            # the share of actions where the min takes the clipped term: there the policy term has no gradient
            "clip_share": ((ratio - 1) * adv[:, None].sign() > clip_eps).sum() / n_actions,
            "outside_share": ((ratio - 1).abs() > clip_eps).sum() / n_actions,      # on either side
            "clamp_share": ((logp_ref - logp).abs() > CLAMP).sum() / n_actions,
            "max_ratio_error": ((logp - logp_old).exp() - 1).abs().max(),       # of actions, not of chunks
        }
    return per_action.sum() / n_actions, stats


def accumulate(total, stats):
    """Add a micro-batch's statistics to the step's, in place. For names with max_, keep the larger value."""
    for key, value in stats.items():
        if key in total:
            value = torch.maximum(total[key], value) if key.startswith("max_") else total[key] + value
        total[key] = value
