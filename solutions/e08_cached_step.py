"""Solution 8.

Row t of causal attention sees keys 0 .. t, which are cache[:t+1] once k is written. A slice replaces the
mask: the future is not hidden, it is not looked at. At t = 0 the softmax runs over one number, so y = v.
All T steps cost 1 + 2 + .. + T scores; running all rows again at each would cost 1 + 4 + .. + T^2.
"""
import torch.nn.functional as F


def step(q, k, v, cache_k, cache_v, t):
    cache_k[:, :, t:t + 1] = k
    cache_v[:, :, t:t + 1] = v
    return F.scaled_dot_product_attention(q, cache_k[:, :, :t + 1], cache_v[:, :, :t + 1])
