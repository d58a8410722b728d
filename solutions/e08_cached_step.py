"""Solution 8.

Row t of causal attention sees keys 0 .. t, which are cache[:t+1] once k is written. So a slice replaces the
mask, and later places are not read at all. At t = 0 the softmax runs over one number, so y = v.
All T steps compute 1 + 2 + .. + T logits. Without a cache, each step computes all rows again:
1 + 4 + .. + T^2 logits.
"""
import torch.nn.functional as F


def step(q, k, v, cache_k, cache_v, t):
    cache_k[:, :, t:t + 1] = k
    cache_v[:, :, t:t + 1] = v
    return F.scaled_dot_product_attention(q, cache_k[:, :, :t + 1], cache_v[:, :, :t + 1])
