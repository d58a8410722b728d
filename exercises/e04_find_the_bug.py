"""Exercise 4. It trains, so it must be right?

Check yourself:   python -m pytest exercises/test_e04_find_the_bug.py

The function below is a whole GRPO loss, and it runs. On the first pass over a batch, r = pi/pi_old = 1, and
its gradient is exactly that of REINFORCE. So with one inner epoch it trains just as our code does. Yet one
line is wrong. Find the line and fix it, without a look at policy_loss in grpo.py if you can.

What it should do. The surrogate of PPO (arXiv 1707.06347 eq. 7) takes the *worse* of two values,
    min(r A, clip(r, 1-eps, 1+eps) A).
So the policy gains nothing from moving further than eps in the direction that A asks for. But a policy that
has moved in the *wrong* direction always feels the pull back. This gives four cases for a clipped r:
                 r > 1 + eps                           r < 1 - eps
    A > 0        has gone far enough: gradient 0       wrong direction: gradient -A r
    A < 0        wrong direction: gradient -A r        has gone far enough: gradient 0
(gradient of the loss with respect to log pi).

Hint: try the four cases on paper, with A = 1 and A = -1. The first row of the table is right.
"""
import torch

from divergences import DIVERGENCES


def grpo_loss(logp, logp_old, logp_ref, rewards, group_size, *, divergence="js", beta=0.0, clip_eps=0.2,
              eps=1e-4):
    """Return the loss of every token [B,T]. The step's loss is its mean.

    logp, logp_old, logp_ref [B,T] are those of the sampled tokens under policy, sampler, and reference.
    rewards [B], with the G images of a group in adjacent places.
    """
    # your turn: one of the lines below is wrong (remove this comment when you have fixed it)
    groups = rewards.view(-1, group_size)                                                        # [B/G,G]
    spread = groups.amax(1, keepdim=True) > groups.amin(1, keepdim=True)                         # [B/G,1]
    centred = groups - groups.mean(1, keepdim=True)
    adv = centred / (groups.std(1, keepdim=True) + eps) * spread
    adv = adv.view(-1, 1)                                                                        # [B,1]

    ratio = (logp - logp_old).exp()                                                              # [B,T]
    pessimistic = torch.minimum(ratio, ratio.clamp(1 - clip_eps, 1 + clip_eps))
    loss = -pessimistic * adv

    if divergence != "none" and beta:
        loss = loss + beta * DIVERGENCES[divergence].sampled(logp, logp_ref)
    return loss
