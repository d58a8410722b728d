"""Group Relative Policy Optimisation: rewards to advantages, log-probabilities to a loss. First the pure
tensor functions, then the phases of a step that train.py's loop calls.

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
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from common import parallel
from critical import critical_tokens, dynamic_weight
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


def grpo_loss(logits, ref_logits, tokens, logp_old, adv, n_tokens, selected=None, *, own=None,
              divergence="js", estimator="sampled", beta=0.0, clip_eps=0.2, dynamic=False):
    """The loss of a micro-batch, as its share of the step's mean, and statistics of the same forward pass.

    logits, ref_logits [B,T,V] of policy and reference under the sampler's temperature and CFG; tokens
    [B,T]; logp_old [B,T] recorded by the sampler; adv [B]; n_tokens = N of the whole step; divergence: a
    name of DIVERGENCES, or "none"; estimator: sampled, unbiased or exact. selected [B,T], with mean 1 over
    the step: weights of the tokens; dynamic: weight of the policy term. own [B]: the row of the logits that
    each sequence has, where several share one (vapi.py). Returns (loss, stats): a scalar, and detached
    scalars that add up over micro-batches to means over the step (but max_ratio_error, of which the largest
    counts).
    """
    own = torch.arange(len(tokens), device=tokens.device) if own is None else own
    at = own[:, None], torch.arange(tokens.shape[1], device=own.device), tokens
    logp_all, ref_all = logits.log_softmax(-1), ref_logits.log_softmax(-1)             # [B, or less, T,V]
    logp, logp_ref = logp_all[at], ref_all[at]                                                   # [B,T]
    loss, ratio = policy_loss(logp, logp_old, adv, clip_eps)
    if dynamic:
        loss = loss * dynamic_weight(logp, logp_ref)
    if divergence != "none" and beta:
        d = DIVERGENCES[divergence]
        if estimator == "exact":
            loss = loss + beta * d.exact(logp_all, ref_all)[own]
        elif estimator == "unbiased":
            loss = loss + beta * d.unbiased(logp, logp_ref, logp_old)
        else:
            loss = loss + beta * d.sampled(logp, logp_ref)
    with torch.no_grad():
        pi = logp_all.exp()
        stats = {
            "kl_reverse": (pi * (logp_all - ref_all)).sum(-1)[own].sum() / n_tokens,   # exact, nat a token
            "entropy": -(pi * logp_all).sum(-1)[own].sum() / n_tokens,                 # exact, nat a token
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
        loss, part = piece(*columns) if not chunk else checkpoint(
            piece, *columns, use_reentrant=False, preserve_rng_state=False)        # nothing random is inside
        total = total + loss
        accumulate(stats, part)
    return total, stats


def accumulate(total, stats):
    """Adds a micro-batch's statistics to those of the step, in place; of the max_ ones the largest counts."""
    for key, value in stats.items():
        if key in total:
            value = torch.maximum(total[key], value) if key.startswith("max_") else total[key] + value
        total[key] = value


# ---- the phases of a step, as train.py calls them (those of another algorithm: vapi.py) --------------------
@dataclass
class Batch:
    """What one process draws in a step, its b of the B sequences, which begin at `first`."""
    captions: list                  # P captions
    cond: torch.Tensor              # what the policy reads of them, features [P,L,C] or class labels [P]
    mask: torch.Tensor              # [P,L], 1 = visible
    prompt: torch.Tensor            # [b], the caption of each sequence
    first: int
    tokens: torch.Tensor = None     # [b,T]
    logp_old: torch.Tensor = None   # [b,T], under the distribution that the loss is about
    mismatch: torch.Tensor = None   # largest abs(that / what really sampled - 1); 0 where they are one

    @classmethod
    def of(cls, cfg, captions, cond, mask):
        """The share of this process, before anything is drawn."""
        b, device = share(cfg), cond.device
        prompt = torch.arange(len(captions), device=device).repeat_interleave(cfg.group_size)        # [B]
        first = parallel.RANK * b
        return cls(captions, cond, mask, prompt[first:first + b], first,
                   mismatch=torch.zeros((), device=device))

    @property
    def mine(self):
        """The rows of these sequences among all B of the step."""
        return slice(self.first, self.first + len(self.prompt))

    def given(self, rows):
        """Rows of mine -> the conditions of `forward` (cond, mask, prompt), without those of others."""
        used, own = self.prompt[rows].unique(return_inverse=True)
        return self.cond[used], self.mask[used], own


def share(cfg):
    """How many sequences of a step this process draws: b = B / processes."""
    return cfg.prompts_per_step * cfg.group_size // parallel.SIZE


def at_once(cfg):
    """How many of these it draws at once: sample_batch, but never more than there are."""
    return min(cfg.sample_batch or share(cfg), share(cfg))


def distributions(cfg):
    """Keyword arguments of a policy -> (for the one that samples, for the one that the loss is about)."""
    sampling = dict(cfg_scale=cfg.cfg_scale, temperature=cfg.temperature)
    return sampling, sampling | dict(cfg_scale=cfg.score_cfg or cfg.cfg_scale)


def pieces(cfg, batch):
    """The rows of a batch, micro_batch at a time."""
    return torch.arange(len(batch.prompt), device=batch.prompt.device).split(cfg.micro_batch)


@torch.no_grad()
def log_probabilities(cfg, world, batch):
    """Yields for each micro-batch (its tokens [R,T], all log-probabilities [R,T,V] in the loss)."""
    _, scoring = distributions(cfg)
    for rows in pieces(cfg, batch):
        with world.autocast:
            logits = world.policy(batch.tokens[rows], *batch.given(rows), **scoring)
        yield batch.tokens[rows], logits.log_softmax(-1)


def sample(cfg, world, generator):
    """Phase 1: G pictures for each of some captions, in tokens -> Batch."""
    captions = world.draw(cfg.prompts_per_step)
    batch = Batch.of(cfg, captions, *world.encode(captions))                           # [P,L,C], [P,L]
    (sampling, scoring), drawn, noise = distributions(cfg), [], generator.get_state()
    parts = torch.arange(share(cfg), device=batch.prompt.device).split(at_once(cfg))
    with world.autocast, parallel.gathered(world.policy):
        for i, rows in enumerate(parts):
            generator.set_state(noise)              # each piece takes its own rows of the same noise
            part = parallel.RANK * len(parts) + i, parallel.SIZE * len(parts)
            drawn.append(world.policy.generate(*batch.given(rows), generator=generator, return_logp=True,
                                               part=part, **sampling))
    batch.tokens, batch.logp_old = map(torch.cat, zip(*drawn))                                       # [b,T]
    if scoring != sampling:         # the loss is about another distribution than the one that sampled, so the
        scored = torch.cat([logp.gather(-1, tokens[..., None])[..., 0]       # old one has to be that one too
                            for tokens, logp in log_probabilities(cfg, world, batch)])
        batch.mismatch, batch.logp_old = ((scored - batch.logp_old).exp() - 1).abs().max(), scored
    return batch


def score(cfg, world, batch, images):
    """Phase 2: what is trained, and what is only watched, of images [b,3,H,W] -> two [B]."""
    captions = [batch.captions[i] for i in batch.prompt.tolist()]
    return [parallel.gather(f(images, captions)) for f in world.rewards.values()]


def weigh(cfg, world, batch, scores):
    """Phase 3: each picture against the others of its caption; scores [B] -> (advantages [B], number of
    groups without spread, weights of the tokens [b,T], with mean 1 over the step)."""
    adv, zero_spread = advantages(scores, cfg.group_size)
    selected = torch.ones_like(batch.logp_old)
    if cfg.critical_tokens:
        # entropy of the policy, nat, at every token
        entropy = torch.cat([-(logp.exp() * logp).sum(-1) for _, logp in
                             log_probabilities(cfg, world, batch)])                                  # [b,T]
        picked = critical_tokens(*map(parallel.gather, (entropy, batch.tokens)),
                                 world.vqgan.quantize.codes(), cfg.group_size, world.policy.side)    # [B,T]
        selected = (picked / picked.float().mean())[batch.mine]
    return adv, zero_spread, selected


def loss_of(cfg, world, batch, rows, adv, selected, beta):
    """Phase 4: the loss of some rows of mine, as their share of the step's, and its statistics."""
    inputs, (_, scoring) = (batch.tokens[rows], *batch.given(rows)), distributions(cfg)
    guided, scale = scoring | dict(uncond_grad=cfg.uncond_grad), scoring["cfg_scale"]
    policy, reference = world.policy, world.reference
    with world.autocast:
        hidden = policy.hidden(*inputs, cfg_scale=scale)                                             # [R,T,D]
        with torch.no_grad():
            ref_hidden = reference.hidden(*inputs, cfg_scale=scale)
        return chunked_loss(
            (hidden, lambda h: policy.logits(h, **guided)),
            (ref_hidden, lambda h: reference.logits(h, **scoring)),
            batch.tokens[rows], batch.logp_old[rows], adv[batch.mine][rows], n_tokens(cfg, batch),
            selected[rows], chunk=cfg.chunk, beta=beta, divergence=cfg.divergence, estimator=cfg.estimator,
            clip_eps=cfg.clip_eps, dynamic=cfg.dynamic_weight)


def n_tokens(cfg, batch):
    """N, the tokens of the whole step."""
    return cfg.prompts_per_step * cfg.group_size * batch.tokens.shape[1]
