"""Solution 7.

sum_j exp(0) p_j = n mean_j(p_j) = exp(log n) mean_j(p_j). So the token has the value mean_j(p_j) and the
logit 0 + log n, and weighs as much as n tokens. The denominator agrees as well: exp(log n) = n.
Without log n the prompt would weigh 1 / (1 + ...) instead of n / (n + ...), and the model would nearly
ignore the prompt.
"""
import math

import torch


def collapsed(q, k, v, prefix_v):
    logits = (k @ q[:, :, None])[..., 0] / math.sqrt(q.shape[1])                                 # [B,t]
    log_n = torch.full_like(q[:, :1], math.log(prefix_v.shape[1]))                               # [B,1]
    weights = torch.cat([log_n, logits], 1).softmax(1)                                           # [B,1+t]
    values = torch.cat([prefix_v.mean(1, keepdim=True), v], 1)                                   # [B,1+t,hd]
    return (weights[:, None] @ values)[:, 0]
