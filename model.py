"""The policy: LlamaGen's autoregressive transformer, which writes an image as a sequence of VQ codes.

    caption features [B,L,C] -> cap_proj -> prefix [B,L,D]  |  image tokens 0 .. T-2 -> embeddings
    [prefix, tokens] -> n_layer x (RMSNorm, causal attention with 2-D RoPE, RMSNorm, SwiGLU) -> logits [B,T,V]

Row t of the logits predicts image token t, so the last prefix position predicts token 0. It is a Llama in
all but three things: the prefix, the rotation in two dimensions, and classifier-free guidance (CFG).
Source: LlamaGen, arXiv 2406.06525; names of modules are the released ones, so that its files load unchanged.
Shapes: B sequences, T image tokens, V codes, D width, L prefix length, C width of a caption feature.

What surprises everyone, and is kept exactly as released:
 1. The prefix is rotated with a table of *zeros* (cos = sin = 0), not left unrotated: its queries and keys
    are zero vectors. So each image token gives every visible prefix token the same score, 0, and reads the
    caption as an even mean of values: a bag. Word order reaches the image only through what the features
    themselves carry.
 2. Captions are padded on the left. Padded keys are masked, but each row still sees itself (no row may be
    empty).
 3. The unconditional branch of CFG is `uncond_embedding`, in the space of the features, under the *same*
    mask.
 4. Dropout and the dropping of conditions are live in train mode. They belong to pretraining: in GRPO the
    policy must stay in eval mode, or its log-probabilities are not those of the sampler (gradients flow
    there as well).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {  # name: (n_layer, n_head, dim)
    "GPT-B": (12, 12, 768), "GPT-L": (24, 16, 1024), "GPT-XL": (36, 20, 1280), "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560), "GPT-1B": (22, 32, 2048), "GPT-3B": (24, 32, 3200), "GPT-7B": (32, 32, 4096)}


@dataclass
class GPTConfig:                         # the defaults are GPT-B for 256-pixel images with T5 captions
    dim: int = 768                       # D
    n_layer: int = 12
    n_head: int = 12
    multiple_of: int = 256               # the SwiGLU width is 2/3 * 4D, rounded up to a multiple of this
    norm_eps: float = 1e-5
    rope_base: float = 10000
    vocab_size: int = 16384              # V
    block_size: int = 256                # T, a square: 256 tokens are a 16 x 16 map
    model_type: str = "t2i"              # "t2i": conditions are caption features; "c2i": class labels
    cls_token_num: int = 120             # L, length of the prefix; 1 for c2i
    caption_dim: int = 2048              # C
    num_classes: int = 1000              # c2i only
    initializer_range: float = 0.02      # standard deviation of initial weights
    token_dropout_p: float = 0.1         # these four act in train mode only
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    class_dropout_prob: float = 0.1      # of a condition, so that CFG has an unconditional branch


def at_least_fp32(x):
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # x / sqrt(mean(x^2) + eps), in fp32 and cast back *before* the weight, as released
        y = at_least_fp32(x)
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def rope_table(side, head_dim, base, prefix):
    """[prefix + side*side, head_dim/2, 2] of (cos, sin): half the pairs turn with the row, half with the
    column."""
    # angle = position * base^(-2j / (head_dim/2)),  j = 0 .. head_dim/4 - 1, the same for rows and columns
    freq = base ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))            # [hd/4]
    angle = torch.outer(torch.arange(side).double(), freq)                                    # [side,hd/4]
    angle = torch.cat([angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)], 2).flatten(0, 1)
    table = torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([torch.zeros(prefix, *table.shape[1:]), table])                              # surprise 1


def rotate(x, table):
    """x [B,S,heads,hd], table [S,hd/2,2]: turns the interleaved pairs (x0,x1), (x2,x3) ... in fp32."""
    a, b = at_least_fp32(x).unflatten(-1, (-1, 2)).unbind(-1)                             # [B,S,heads,hd/2]
    cos, sin = table[:, None].unbind(-1)                                                      # [S,1,hd/2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.resid_dropout_p
        self.wqkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)

    def forward(self, x, table, mask, cache=None, start=0):
        """x [B,S,D] at positions start .. start+S-1; mask [B,1,S,start+S], True where visible; cache (k, v)
        or None."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)                # [B,S,heads,hd]
        q, k = rotate(q, table), rotate(k, table)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                                    # [B,heads,S,hd]
        if cache is not None:                       # write in place, then look at the filled part only
            end = start + x.shape[1]
            for store, new in zip(cache, (k, v)):
                store[:, :, start:end] = new
            k, v = (store[:, :, :end] for store in cache)
        y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)              # [B,S,D]
        return F.dropout(self.wo(y), self.dropout, self.training)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden = -(-int(2 * 4 * c.dim / 3) // c.multiple_of) * c.multiple_of                      # rounded up
        self.w1, self.w3 = nn.Linear(c.dim, hidden, bias=False), nn.Linear(c.dim, hidden, bias=False)
        self.w2, self.dropout = nn.Linear(hidden, c.dim, bias=False), c.ffn_dropout_p

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.feed_forward = Attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, *args):
        x = x + self.attention(self.attention_norm(x), *args)
        return x + self.feed_forward(self.ffn_norm(x))


class CaptionEmbedding(nn.Module):
    """Features [B,L,C] -> prefix [B,L,D] by a two-layer MLP."""

    def __init__(self, c):
        super().__init__()
        self.cap_proj = nn.ModuleDict({"fc1": nn.Linear(c.caption_dim, c.dim, bias=False),
                                       "fc2": nn.Linear(c.dim, c.dim, bias=False)})
        # A buffer as released: it is in the state dict, but no optimizer ever sees it.
        self.register_buffer("uncond_embedding",
                             torch.randn(c.cls_token_num, c.caption_dim) / c.caption_dim ** .5)

    def uncond(self, cond):
        return self.uncond_embedding.to(cond.dtype).expand_as(cond)

    def forward(self, cond):
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](cond), approximate="tanh"))


class ClassEmbedding(nn.Module):
    """Labels [B] -> prefix [B,1,D]; the last row of the table means "no class"."""

    def __init__(self, c):
        super().__init__()
        self.embedding_table = nn.Embedding(c.num_classes + 1, c.dim)

    def uncond(self, cond):
        return torch.full_like(cond, self.embedding_table.num_embeddings - 1)

    def forward(self, cond):
        return self.embedding_table(cond)[:, None]


class GPT(nn.Module):
    """LlamaGen. Call it for teacher forcing, `generate` to sample; both speak of the same distribution."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.side = int(c.block_size ** .5)
        if self.side ** 2 != c.block_size or c.dim % (4 * c.n_head) or c.model_type not in ("t2i", "c2i"):
            raise ValueError(f"block_size must be a square, dim a multiple of 4 * n_head, "
                             f"and model_type t2i or c2i: {c}")
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.cls_embedding = CaptionEmbedding(c) if c.model_type == "t2i" else ClassEmbedding(c)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.rope = None          # made at first use; no buffer, or .bfloat16() would round the angles
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=c.initializer_range)
        nn.init.zeros_(self.output.weight)                                 # the first guess is uniform

    def _check(self, cond, cond_mask, cfg_scale, temperature):
        c, L = self.config, self.config.cls_token_num
        if c.model_type == "t2i" and (cond.dim() != 3 or tuple(cond.shape[1:]) != (L, c.caption_dim)):
            raise ValueError(f"cond must be features [B,{L},{c.caption_dim}], not {tuple(cond.shape)}")
        if c.model_type == "c2i" and (cond.dim() != 1 or cond.is_floating_point()):
            raise ValueError(f"cond must be class labels [B], not {cond.dtype} {tuple(cond.shape)}")
        if cond_mask is not None and tuple(cond_mask.shape) != (len(cond), L):
            raise ValueError(f"cond_mask must be [{len(cond)},{L}], not {tuple(cond_mask.shape)}")
        if cfg_scale < 1 or temperature < 0:
            raise ValueError(f"cfg_scale must be >= 1 and temperature >= 0, "
                             f"not {cfg_scale} and {temperature}")

    def _prefix(self, cond, cond_mask, cfg_scale):
        """-> prefix [R,L,D], mask [R,L] or None; R = 2B under CFG: conditional rows, then unconditional."""
        if cond_mask is not None and cond.is_floating_point():
            cond = cond * cond_mask[..., None].to(cond.dtype)              # surprise 2
        if self.training and self.config.class_dropout_prob:               # surprise 4
            drop = torch.rand(len(cond), device=cond.device) < self.config.class_dropout_prob
            cond = torch.where(drop.view(-1, *[1] * (cond.dim() - 1)), self.cls_embedding.uncond(cond), cond)
        if cfg_scale > 1:                                                  # surprise 3
            cond = torch.cat([cond, self.cls_embedding.uncond(cond)])
            cond_mask = None if cond_mask is None else torch.cat([cond_mask, cond_mask])
        return self.cls_embedding(cond), cond_mask

    def _mask(self, cond_mask, length, device):
        """[R or 1,1,length,length]: True where a row may look at a column."""
        rows, columns = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
        mask = (columns <= rows)[None]                                     # causal
        if cond_mask is not None:                                          # surprise 2
            visible = F.pad(cond_mask.bool(), (0, length), value=True)[:, None, :length]
            mask = mask & (visible | (columns == rows))
        return mask[:, None]

    def _layers(self, x, mask, start=0, caches=None):
        x = F.dropout(x, self.config.token_dropout_p, self.training)
        c = self.config
        if self.rope is None or self.rope.device != x.device:
            self.rope = rope_table(self.side, c.dim // c.n_head, c.rope_base, c.cls_token_num).to(x.device)
        table = self.rope[start:start + x.shape[1]].to(at_least_fp32(x[:0]).dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, table, mask, None if caches is None else caches[i], start)
        return x

    def _logits(self, x, cfg_scale, temperature):
        """x [R,...,D] -> the logits of the policy [B,...,V] in fp32."""
        logits = at_least_fp32(self.output(self.norm(x)))
        if cfg_scale > 1:
            # guided = uncond + scale * (cond - uncond)
            cond, uncond = logits.chunk(2)
            logits = uncond + cfg_scale * (cond - uncond)
        return logits / temperature if temperature not in (0, 1) else logits

    def forward(self, tokens, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0):
        """Teacher forcing: logits [B,T,V], row t for token t given tokens < t, at this CFG and temperature.

        tokens [B,T] in 0..V-1, T <= block_size; cond [B,L,C] features or [B] labels; cond_mask [B,L],
        1 = visible.
        cfg_scale >= 1 (1: no guidance); temperature > 0 (0 leaves the logits as they are). Raises ValueError.
        """
        self._check(cond, cond_mask, cfg_scale, temperature)
        if tokens.dim() != 2 or len(tokens) != len(cond) or not 0 < tokens.shape[1] <= self.config.block_size:
            raise ValueError(f"tokens must be [{len(cond)}, 1 to {self.config.block_size}], "
                             f"not {tuple(tokens.shape)}")
        prefix, cond_mask = self._prefix(cond, cond_mask, cfg_scale)
        inputs = tokens[:, :-1].repeat(len(prefix) // len(tokens), 1)      # the last token predicts nothing
        x = torch.cat([prefix, self.tok_embeddings(inputs)], 1)            # [R,L+T-1,D]
        x = self._layers(x, self._mask(cond_mask, x.shape[1], x.device))
        return self._logits(x[:, self.config.cls_token_num - 1:], cfg_scale, temperature)

    @torch.no_grad()
    def generate(self, cond, cond_mask=None, *, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0,
                 generator=None, return_logp=False):
        """Samples tokens [B,block_size]; with return_logp also logp [B,T] of the distribution really sampled.

        temperature 0 is greedy (log-probability 0); top_k 0 and top_p 1 cut nothing; generator lives on the
        model's device. Keys and values of all positions are kept in buffers made once, so a token costs one
        position.
        """
        self._check(cond, cond_mask, cfg_scale, temperature)
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k must be >= 0 and top_p in (0,1], not {top_k} and {top_p}")
        c, L, B = self.config, self.config.cls_token_num, len(cond)
        x, cond_mask = self._prefix(cond, cond_mask, cfg_scale)            # [R,L,D]
        shape = (2, len(x), c.n_head, L + c.block_size - 1, c.dim // c.n_head)
        caches = [x.new_empty(shape).unbind(0) for _ in self.layers]
        tokens = torch.empty(B, c.block_size, dtype=torch.long, device=x.device)
        logps = torch.zeros(B, c.block_size, device=x.device)
        mask, start = self._mask(cond_mask, L + c.block_size - 1, x.device), 0
        for t in range(c.block_size):
            end = start + x.shape[1]
            h = self._layers(x, mask[:, :, start:end, :end], start, caches)[:, -1]                # [R,D]
            logp = truncated_logp(self._logits(h, cfg_scale, temperature), top_k, top_p)
            if temperature == 0:
                tokens[:, t] = logp.argmax(1)
            else:
                # p_i / E_i with E_i ~ Exp(1) is largest at i with probability p_i; the CPU never waits for
                # the GPU
                race = torch.empty_like(logp).exponential_(generator=generator)
                tokens[:, t] = (logp.exp() / race).argmax(1)
                logps[:, t] = logp.gather(1, tokens[:, t:t + 1])[:, 0]
            x = self.tok_embeddings(tokens[:, t:t + 1]).repeat(len(x) // B, 1, 1)
            start = end
        return (tokens, logps) if return_logp else tokens


def truncated_logp(logits, top_k=0, top_p=1.0):
    """logits [B,V] -> log-probabilities [B,V] of the k likeliest codes, then of the fewest with
    mass >= top_p."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
    if top_p < 1:
        order = logits.sort(1, descending=True)
        mass = order.values.softmax(1).cumsum(1)
        cut = torch.zeros_like(mass, dtype=torch.bool)
        cut[:, 1:] = mass[:, :-1] >= top_p                                 # the code that reaches top_p stays
        logits = logits.masked_fill(cut.scatter(1, order.indices, cut), -torch.inf)
    return logits.log_softmax(1)
