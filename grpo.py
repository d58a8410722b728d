"""Group Relative Policy Optimisation: rewards to advantages, log-probabilities to a loss.
Pure tensor functions.

GRPO (arXiv 2402.03300 eq. 3, applied to image tokens by arXiv 2606.21498) samples G images of one prompt
and lets them be each other's baseline. For sequence i and token t, with r = pi(a) / pi_old(a):
    A_i    = (R_i - mean of group) / (std of group + eps)
    loss   = -(1/N) sum_{i,t} min(r A_i, clip(r, 1-clip_eps, 1+clip_eps) A_i)  +  beta (1/N) sum_{i,t} D_{i,t}
D is a divergence of divergences.py. On the first pass over a batch r = 1, and the gradient is that of
REINFORCE with a baseline: -A grad log pi(a).

Departures:
 1. N is the number of tokens of the whole step, not of a micro-batch or a sequence: sums over micro-batches
    then add up to the same loss however the step is cut. Image sequences have one length, so no paper's
    average changes.
 2. A group whose rewards are all equal gets advantages of exactly zero (rounding in the mean would leave
    +-eps-sized noise), and such groups are counted: they teach nothing.
The paper's released script also averages the loss over "critical tokens" only, and weights the policy term:
`selected` and `dynamic` below, off by default; critical.py says what they are.
"""
import torch
from torch.utils.checkpoint import checkpoint

from critical import dynamic_weight
from divergences import CLAMP, DIVERGENCES


def advantages(rewards, group_size, eps=1e-4):
    """rewards [B], groups of G in a row -> (advantages [B], number without spread). std is over G - 1."""
    groups = rewards.view(-1, group_size)                                                        # [B/G,G]
    spread = groups.amax(1) > groups.amin(1)                                                     # [B/G]
    std = groups.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(groups)
    adv = (groups - groups.mean(1, keepdim=True)) / (std + eps)
    return (adv * spread[:, None]).flatten(), int((~spread).sum())


def policy_loss(logp, logp_old, adv, clip_eps):
    """logp, logp_old [B,T], adv [B] -> (clipped surrogate loss [B,T], ratio [B,T])."""
    ratio, adv = (logp - logp_old).exp(), adv[:, None]
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv), ratio


def grpo_loss(logits, ref_logits, tokens, logp_old, adv, n_tokens, selected=None, *, divergence="js",
              estimator="sampled", beta=0.0, clip_eps=0.2, dynamic=False):
    """The loss of a micro-batch, as its share of the step's mean, and statistics of the same forward pass.

    logits, ref_logits [B,T,V] of policy and reference under the sampler's temperature and CFG; tokens
    [B,T]; logp_old [B,T] recorded by the sampler; adv [B]; n_tokens = N of the whole step; divergence: a
    name of DIVERGENCES, or "none"; estimator: sampled, unbiased or exact. selected [B,T], with mean 1 over
    the step: weights of the tokens; dynamic: weight of the policy term. Returns (loss, stats): a scalar,
    and detached scalars that add up over micro-batches to means over the step (but max_ratio_error, of
    which the largest counts).
    """
    logp_all, ref_all = logits.log_softmax(-1), ref_logits.log_softmax(-1)                       # [B,T,V]
    logp = logp_all.gather(-1, tokens[..., None])[..., 0]                                        # [B,T]
    logp_ref = ref_all.gather(-1, tokens[..., None])[..., 0]
    loss, ratio = policy_loss(logp, logp_old, adv, clip_eps)
    if dynamic:
        loss = loss * dynamic_weight(logp, logp_ref)
    if divergence != "none" and beta:
        d = DIVERGENCES[divergence]
        if estimator == "exact":
            loss = loss + beta * d.exact(logp_all, ref_all)
        elif estimator == "unbiased":
            loss = loss + beta * d.unbiased(logp, logp_ref, logp_old)
        else:
            loss = loss + beta * d.sampled(logp, logp_ref)
    with torch.no_grad():
        pi = logp_all.exp()
        stats = {
            "kl_reverse": (pi * (logp_all - ref_all)).sum() / n_tokens,     # exact, nat a token
            "entropy": -(pi * logp_all).sum() / n_tokens,                   # exact, nat a token
            # where the clipped branch is the smaller one, so that the advantage has no gradient
            "clip_share": ((ratio - 1) * adv[:, None].sign() > clip_eps).sum() / n_tokens,
            "clamp_share": ((logp_ref - logp).abs() > CLAMP).sum() / n_tokens,
            "max_ratio_error": (ratio - 1).abs().max(),
        }
    return (loss if selected is None else loss * selected).sum() / n_tokens, stats


def chunked_loss(policy, reference, tokens, logp_old, adv, n_tokens, selected=None, *, chunk=0, **options):
    """grpo_loss of a micro-batch, `chunk` positions at a time (0: all at once), with the same result.

    Logits are a hundred times larger than what they are made from: 16,384 codes against a width of 1,280, in
    fp32 and for two models. So those of a piece are made, used and dropped, and made once more when the
    backward pass comes to the piece: memory grows with the chunk, at the price of a second product with the
    output matrix. policy, reference: (hidden [R,T,D], function from a piece of it to logits [B,t,V]).
    """
    def piece(h, ref_h, tokens, logp_old, selected):
        with torch.no_grad():
            ref_logits = reference[1](ref_h)
        return grpo_loss(policy[1](h), ref_logits, tokens, logp_old, adv, n_tokens, selected, **options)

    T = tokens.shape[1]
    total, stats = 0.0, {}
    for i in range(0, T, chunk or T):
        columns = [x if x is None else x[:, i:i + (chunk or T)]
                   for x in (policy[0], reference[0], tokens, logp_old, selected)]
        loss, part = checkpoint(piece, *columns, use_reentrant=False) if chunk else piece(*columns)
        total = total + loss
        accumulate(stats, part)
    return total, stats


def accumulate(total, stats):
    """Adds a micro-batch's statistics to those of the step, in place; of the max_ ones the largest counts."""
    for key, value in stats.items():
        if key in total:
            value = torch.maximum(total[key], value) if key.startswith("max_") else total[key] + value
        total[key] = value
