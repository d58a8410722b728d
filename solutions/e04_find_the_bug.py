"""Solution 4.

min(r, clip r) A is not min(r A, clip(r) A): a negative A turns the order round, so the smaller r gives the
*better* offer. With the bug, tokens with A < 0 had no brake on the way down (r < 1 - eps kept its gradient)
and no pull back on the way up (r > 1 + eps had none). So: first multiply, then take the minimum.
At r = 1 both are the same, so no run with one inner epoch can show it.
"""
import torch

from divergences import DIVERGENCES


def grpo_loss(logp, logp_old, logp_ref, rewards, group_size, *, divergence="js", beta=0.0, clip_eps=0.2,
              eps=1e-4):
    groups = rewards.view(-1, group_size)                                                        # [B/G,G]
    spread = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)                         # [B/G,1]
    centred = groups - groups.mean(1, keepdim=True)
    adv = centred / (groups.std(1, keepdim=True) + eps) * spread
    adv = adv.view(-1, 1)                                                                        # [B,1]

    ratio = (logp - logp_old).exp()                                                              # [B,T]
    loss = -torch.minimum(ratio * adv, ratio.clamp(1 - clip_eps, 1 + clip_eps) * adv)

    if divergence != "none" and beta:
        loss = loss + beta * DIVERGENCES[divergence].sampled(logp, logp_ref)
    return loss
