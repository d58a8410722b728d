"""The parts of a Llama that model.py and full/janus.py share: norm, rotation, attention, SwiGLU.

    R sequences of a pass   S positions   D width   hd width of a head

Each model adds a method `forward_prompt` to `Attention`. It processes the rows of the prompt.
Sources: Llama, arXiv 2302.13971; RMSNorm, 1910.07467; rotary positions, 2104.09864; SwiGLU, 2002.05202.
"""
import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.config import Fault


def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps) in fp32. It is cast back *before* the weight is applied, as released.
        return F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def rotate(x, rotation):
    """Rotate the pairs (x0,x1), (x2,x3) ... of x [R,S,heads,hd] by rotation [S,hd/2], in fp32."""
    # (x0 + i x1) exp(i angle): a product of complex numbers is a rotation, and needs one pass over memory.
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))                # [R,S,heads,hd/2]
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).type_as(x)


def rope_table(side, head_dim, base):
    """Return exp(i angle), [side*side,hd/2]. Half of the pairs turn with the row, half with the column."""
    # angle = position * base^(-2j / (head_dim/2)),  j = 0 .. head_dim/4 - 1, the same for rows and columns
    freq = base ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))            # [hd/4]
    angle = torch.outer(torch.arange(side).double(), freq)                                    # [side,hd/4]
    angle = torch.cat([angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)], 2).flatten(0, 1)
    return torch.polar(torch.ones_like(angle), angle)


class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout=0.0):
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x, rotation, bias, cache, place=None):
        """Let image rows x [R,S,D] attend to their prompt and to earlier image rows. Return [R,S,D].

        bias [R or 1,1,S,positions] is added to the scores. cache: keys and values, two of [R,heads,..,hd].
        Teacher forcing (place None): the cache holds keys and values of the prompt. Those of x are appended.
        Sampling (S = 1): the key and value of x are written into the cache at `place`, a tensor [1].
        """
        q, k, v = self.qkv(x, rotation)
        if place is None:
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v)))
        else:
            for stored, new in zip(cache, (k, v)):
                stored.index_copy_(2, place, new.type_as(stored))
            k, v = (stored[:, :, :bias.shape[3]] for stored in cache)
        return self.attend(q, k, v, bias)

    def qkv(self, x, rotation):
        """Return queries, keys and values of rows x [R,S,D], three tensors [R,heads,S,hd]."""
        qkv = self.wqkv(x).unflatten(-1, (3 * self.n_head, -1))                           # [R,S,3 heads,hd]
        qk, v = qkv.tensor_split([2 * self.n_head], 2)
        q, k = rotate(qk, rotation).chunk(2, 2)
        return [t.transpose(1, 2) for t in (q, k, v)]

    def attend(self, q, k, v, bias):
        y = F.scaled_dot_product_attention(q, k, v, bias.type_as(q)).transpose(1, 2).flatten(2)   # [R,S,D]
        return F.dropout(self.wo(y), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, dim, multiple_of, dropout=0.0):
        super().__init__()
        width = -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of                             # rounded up
        self.w1, self.w3 = nn.Linear(dim, width, bias=False), nn.Linear(dim, width, bias=False)
        self.w2, self.dropout = nn.Linear(width, dim, bias=False), dropout

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, attention, feed_forward, dim, eps):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward
        self.attention_norm, self.ffn_norm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward_prompt(self, x, *args):
        """Run prompt rows x. Return the new rows, and the keys and values that image rows attend to."""
        y, keys_values = self.attention.forward_prompt(self.attention_norm(x), *args)
        return self._feed_forward(x + y), keys_values

    def forward(self, x, *args):
        return self._feed_forward(x + self.attention(self.attention_norm(x), *args))

    def _feed_forward(self, x):
        return x + self.feed_forward(self.ffn_norm(x))


def recomputed(layer, *args):
    """Return layer(*args), but keep no activations. The backward pass computes them again, in the mode (train
    or eval) that the layer has now. layer: a module, or a method of a module."""
    module = getattr(layer, "__self__", layer)
    mode = module.training

    @contextlib.contextmanager
    def same_mode():
        later = module.training
        module.train(mode)
        try:                       # checkpoint leaves the layer by an exception, once it has what it needs
            yield
        finally:
            module.train(later)
    return checkpoint(layer, *args, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), same_mode()))


def truncated_logp(logits, top_k=0, top_p=1.0):
    """Keep the top_k likeliest codes, and of these the fewest whose probabilities add up to at least top_p.
    logits [B,V] -> log-probabilities [B,V], which are -inf at all other codes."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
    if top_p < 1:
        order = logits.sort(1, descending=True)
        mass = order.values.softmax(1).cumsum(1)
        cut = torch.zeros_like(mass, dtype=torch.bool)
        cut[:, 1:] = mass[:, :-1] >= top_p                                 # the code that reaches top_p stays
        logits = logits.masked_fill(cut.scatter(1, order.indices, cut), -torch.inf)
    return logits.log_softmax(1)


def check_sampled(logp, cfg_scale, temperature):
    """Raise Fault if a log-probability of a sampled token is not finite. Such a token is always code 0."""
    if not logp.isfinite().all():
        raise Fault(f"logits are not finite at guidance {cfg_scale} and temperature {temperature}: choose "
                    f"values nearer to 1, or other weights")


def check(cond, cond_mask, prompt, cfg_scale, temperature):
    """Raise ValueError if the arguments of a policy's `forward` do not fit together."""
    L = cond.shape[1] if cond.dim() > 1 else 1
    if not cond.numel() or not cond.isfinite().all():
        raise ValueError(f"cond must have at least one prompt, and be finite, got {tuple(cond.shape)}")
    if cond_mask is not None and tuple(cond_mask.shape) != (len(cond), L):
        raise ValueError(f"cond_mask must be [{len(cond)},{L}], got {tuple(cond_mask.shape)}")
    if prompt is not None and (prompt.dim() != 1 or prompt.is_floating_point() or not len(prompt)
                               or prompt.min() < 0 or prompt.max() >= len(cond)):
        raise ValueError(f"prompt must be indices [B] of the {len(cond)} rows of cond, B > 0, got "
                         f"{tuple(prompt.shape)} with {prompt.tolist()!s:.99}")
    if cfg_scale < 1 or temperature < 0:
        raise ValueError(f"cfg_scale must be at least 1 and temperature at least 0, got {cfg_scale} and "
                         f"{temperature}")


def compiled(step, caches):
    """Return `step` compiled for fixed shapes, as in github.com/pytorch-labs/gpt-fast. Not tested on a GPU.

    On CUDA the compiled step uses CUDA graphs. They need tensors whose addresses never change, so the caches
    (pairs of tensors) are marked as such."""
    for x in (x for keys_values in caches for x in keys_values):
        torch._dynamo.mark_static_address(x, guard=False)
    return torch.compile(step, dynamic=False, mode="reduce-overhead" if x.is_cuda else None)
