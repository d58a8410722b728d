"""The usual way of running the same weights: what bench.py holds model.py against.

Built as LlamaGen's released sampler and most GRPO trainers are. The prefix is run once per sequence, and keys
and values of all positions, filled or not, are attended to through a mask with the math kernel; CFG doubles
the batch. Read it beside `GPT.generate` in model.py: what is missing there is what is saved.
"""
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import rotate, truncated_logp


@contextlib.contextmanager
def math_kernel():
    """Attention by the math kernel, as the released sampler asks for it, and as that was when it was written:
    torch 2.5 and later send half precision through fp32 there unless told not to."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)               # on a CPU as well
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


class Plain:
    """The usual way, on a GPT's own weights. Same results as its `generate` and `forward`."""

    def __init__(self, gpt):
        self.gpt, self.c = gpt, gpt.config

    def prefix(self, cond, cond_mask, prompt, cfg_scale):
        cond, cond_mask = cond[prompt], cond_mask[prompt]                  # once per sequence
        cond = cond * cond_mask[..., None].to(cond.dtype)
        if cfg_scale > 1:
            cond = torch.cat([cond, self.gpt.cls_embedding.uncond(cond)])
            cond_mask = torch.cat([cond_mask, cond_mask])
        x, S = self.gpt.cls_embedding(cond), self.c.cls_token_num + self.c.block_size - 1
        visible = F.pad(cond_mask.bool(), (0, S - cond_mask.shape[1]), value=True)[:, None]
        own = torch.eye(S, dtype=torch.bool, device=x.device)
        table = F.pad(self.gpt._table(x), (0, 0, self.c.cls_token_num, 0))     # zeros for the prefix
        return x, (visible | own).tril()[:, None], table

    def layers(self, x, mask, table, start=0, caches=None):
        """x [R,S,D] at positions start .. start+S-1; mask [R,1,S,all positions]."""
        for i, layer in enumerate(self.gpt.layers):
            qkv = layer.attention.wqkv(layer.attention_norm(x)).unflatten(-1, (3, self.c.n_head, -1))
            q, k, v = qkv.unbind(2)
            q, k = (rotate(t, table[start:start + x.shape[1]]) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            if caches:
                for store, new in zip(caches[i], (k, v)):
                    store[:, :, start:start + x.shape[1]] = new
                k, v = caches[i]
            y = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + layer.attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return x

    @math_kernel()
    def forward(self, tokens, cond, cond_mask, prompt, cfg_scale=1.0):
        x, mask, table = self.prefix(cond, cond_mask, prompt, cfg_scale)
        inputs = self.gpt.tok_embeddings(tokens[:, :-1]).repeat(len(x) // len(tokens), 1, 1)
        x = self.layers(torch.cat([x, inputs], 1), mask, table)
        return self.gpt.logits(x[:, self.c.cls_token_num - 1:], cfg_scale)

    @torch.no_grad()
    @math_kernel()
    def generate(self, cond, cond_mask, prompt, *, cfg_scale=1.0, generator=None):
        x, mask, table = self.prefix(cond, cond_mask, prompt, cfg_scale)
        shape = (len(x), self.c.n_head, mask.shape[3], self.c.dim // self.c.n_head)
        caches, start = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in self.gpt.layers], 0
        tokens = torch.empty(len(prompt), self.c.block_size, dtype=torch.long, device=x.device)
        for t in range(self.c.block_size):
            end = start + x.shape[1]
            hidden = self.layers(x, mask[:, :, start:end], table, start, caches)[:, -1]
            logp = truncated_logp(self.gpt.logits(hidden, cfg_scale))
            race = -torch.rand(logp.shape, generator=generator, device=x.device).log()
            tokens[:, t] = (logp.exp() / race).argmax(1)
            x, start = self.gpt.tok_embeddings(tokens[:, t:t + 1]).repeat(len(x) // len(tokens), 1, 1), end
        return tokens
