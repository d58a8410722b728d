"""Solution 14.

The log-probability of a sequence is the sum over its tokens. The usual loss is their mean, which must be
multiplied by T. The mean of e^-cost must not be replaced by e^-(mean cost): by Jensen's inequality that is
too small. From (1 - p)^n = 1 - s follows
    n = log(1 - s) / log(1 - p), which is about -log(1 - s) / p for a small p.

A right image of a seen pair costs the base about 5 nat. This is the entropy of place, size and background. A
right image of an unseen pair costs about 79 nat on average. The cheapest of the checker's 48 images costs 34
nat, and carries nearly all of the mean. So the estimate depends on the images that are drawn: over five sets
of 48 it was between 10^-14 and 10^-9. A run of 120 steps samples 7,680 images.

What follows, and what does not. If a reward is 0 for every wrong image, these samples almost surely give no
signal. A graded reward may still help: it can prefer half-right images, and so raise p step by step. Our
judge is graded, and in our runs that did not happen.
"""
import math

import torch
import torch.nn.functional as F


def costs(gpt, tokens, cond, mask):
    return F.cross_entropy(gpt(tokens, cond, mask).transpose(1, 2), tokens, reduction="none").sum(1)


def log_chance(cost, entropy):
    return entropy + (torch.logsumexp(-cost, 0) - math.log(len(cost))).item()


def samples_needed(log_p, s=.95):
    return math.log(1 - s) / math.log1p(-math.exp(log_p))
