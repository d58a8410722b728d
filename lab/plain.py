"""The baseline of lab/bench.py: the usual way of running the weights of model.py's GPT.

It is built like LlamaGen's released sampler and most GRPO trainers. The prefix runs once per sequence. The
math kernel attends to all positions, filled or not, through a mask. Guidance (CFG) doubles the batch. Compare
it with `ImageTransformer.generate` in model.py, which leaves work out.

R rows: B sequences, or 2B under guidance   L length of the prefix   S positions   D width
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


# The released sampler is older than torch 2.5, whose math kernel computes half precision in fp32. Switch this
# off, on a CPU as well. model.py does not use this kernel.
torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


class Plain:
    """A GPT's weights, run the usual way. `generate` and `forward` give the results of the GPT's own."""

    def __init__(self, gpt):
        self.gpt, self.c = gpt, gpt.config

    def prefix(self, cond, cond_mask, prompt, cfg_scale):
        """Return the prefix [R,L,D], and the mask [R,1,S,S] and rotations [S,hd/2] of all S positions."""
        cond, cond_mask = cond[prompt], cond_mask[prompt]                  # once per sequence
        cond = cond * cond_mask[..., None].to(cond.dtype)
        if cfg_scale > 1:
            cond = torch.cat([cond, self.gpt.cls_embedding.uncond(cond)])
            cond_mask = torch.cat([cond_mask, cond_mask])
        x, S = self.gpt.cls_embedding(cond), self.c.cls_token_num + self.c.block_size - 1
        visible = F.pad(cond_mask.bool(), (0, S - cond_mask.shape[1]), value=True)[:, None]
        itself = torch.eye(S, dtype=torch.bool, device=x.device)
        rotations = F.pad(self.gpt.rotations(x), (0, 0, self.c.cls_token_num, 0))      # zeros for the prefix
        return x, (visible | itself).tril()[:, None], rotations

    def layers(self, x, mask, rotations, start=0, caches=None):
        """Run rows x [R,S,D] at positions start .. start+S-1. mask [R,1,S,all positions]."""
        end = start + x.shape[1]
        for i, layer in enumerate(self.gpt.layers):
            q, k, v = layer.attention.qkv(layer.attention_norm(x), rotations[start:end])
            if caches:
                for store, new in zip(caches[i], (k, v)):
                    store[:, :, start:end] = new
                k, v = caches[i]
            y = F.scaled_dot_product_attention(q, k, v, mask)
            x = x + layer.attention.wo(y.transpose(1, 2).flatten(2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return x

    @sdpa_kernel(SDPBackend.MATH)
    def forward(self, tokens, cond, cond_mask, prompt, cfg_scale=1.0):
        x, mask, rotations = self.prefix(cond, cond_mask, prompt, cfg_scale)
        inputs = self.gpt.tok_embeddings(tokens[:, :-1]).repeat(len(x) // len(tokens), 1, 1)
        x = self.layers(torch.cat([x, inputs], 1), mask, rotations)
        return self.gpt.logits(x[:, self.c.cls_token_num - 1:], cfg_scale)

    @torch.no_grad()
    @sdpa_kernel(SDPBackend.MATH)
    def generate(self, cond, cond_mask, prompt, *, cfg_scale=1.0, generator=None):
        x, mask, rotations = self.prefix(cond, cond_mask, prompt, cfg_scale)
        shape = (len(x), self.c.n_head, mask.shape[3], self.c.dim // self.c.n_head)
        caches, start = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in self.gpt.layers], 0
        tokens = torch.empty(len(prompt), self.c.block_size, dtype=torch.long, device=x.device)
        for t in range(self.c.block_size):
            end = start + x.shape[1]
            hidden = self.layers(x, mask[:, :, start:end], rotations, start, caches)[:, -1]
            logp = self.gpt.logits(hidden, cfg_scale).log_softmax(1)
            race = -torch.rand(logp.shape, generator=generator, device=x.device).log()
            tokens[:, t] = (logp.exp() / race).argmax(1)
            x, start = self.gpt.tok_embeddings(tokens[:, t:t + 1]).repeat(len(x) // len(tokens), 1, 1), end
        return tokens
