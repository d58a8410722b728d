"""Solution 4.

min(r, clip r) A is not min(r A, clip(r) A). A negative A reverses the order, so the smaller r then gives the
*better* value. With the bug, tokens with A < 0 kept their gradient at r < 1 - eps, so nothing stopped them on
the way down. At r > 1 + eps they had no gradient, so nothing pulled them back. The fix: first multiply, then
take the minimum. At r = 1 both forms are equal, so no run with one inner epoch can show the bug.
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
