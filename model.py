"""The policy: LlamaGen's autoregressive transformer, which writes an image as a sequence of VQ codes.

    caption features [P,L,C] -> cap_proj -> prefix [P,L,D]  |  image tokens 0 .. T-2 -> embeddings [B,T-1,D]
    [prefix, tokens] -> n_layer x (RMSNorm, causal attention with 2-D RoPE, RMSNorm, SwiGLU) -> logits [B,T,V]

Row t of the logits predicts image token t, so the last prefix position predicts token 0. It is a Llama in
all but three things: the prefix, the rotation in two dimensions, and classifier-free guidance (CFG).
(janus.py is a plain Llama in this mould: another `_read`.)
Source: LlamaGen, arXiv 2406.06525; names of modules are the released ones, so that its files load unchanged.
Shapes: P prompts, B sequences, R rows (B, or 2B under CFG: conditional, then unconditional), T image tokens,
V codes, D width, L prefix length, C width of a caption feature, S positions, hd width of a head.

What surprises everyone, and is kept exactly as released:
 1. The prefix is rotated with a table of *zeros* (cos = sin = 0), not left unrotated, so its queries and keys
    are zero vectors and every score that involves one is 0. Two things follow, exactly:
      - A prefix row attends evenly: its attention is the mean of the values of the visible rows up to it.
      - An image token gives each of the n visible prefix rows the weight exp(0) = 1, so together
            sum_j 1 v_j = n mean_j v_j = exp(log n) * mean_j v_j,
        as one token would have with key 0, a score raised by log n, and the mean for its value.
    So the model reads its caption as a bag, evenly; word order reaches the image only through what the
    features themselves carry. And the caption is *one* vector a layer. It does not depend on the image, so
    `read` computes it once a prompt, and all G images of the prompt attend to 1 + t positions in `forward`
    and `generate`, not L + t. The rows of the prefix that would be run again for each image are saved.
 2. Captions are padded on the left. Padded keys are masked, but each row still sees itself (no row may be
    empty): a caption of padding alone predicts token 0 from its last padded row.
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
import torch.utils.checkpoint

import graphs
from common.interfaces import Rollout
from divergences import Categorical

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
        return F.rms_norm(at_least_fp32(x), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def rope_table(side, head_dim, base):
    """[side*side, head_dim/2] of exp(i angle): half of the pairs turn with the row, half with the column."""
    # angle = position * base^(-2j / (head_dim/2)),  j = 0 .. head_dim/4 - 1, the same for rows and columns
    freq = base ** (-torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))            # [hd/4]
    angle = torch.outer(torch.arange(side).double(), freq)                                    # [side,hd/4]
    angle = torch.cat([angle[:, None].expand(-1, side, -1), angle.expand(side, -1, -1)], 2).flatten(0, 1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x, table):
    """x [R,S,heads,hd], table [S,hd/2]: turns the interleaved pairs (x0,x1), (x2,x3) ... in fp32."""
    # (x0 + i x1) exp(i angle): a product of complex numbers is a rotation, and one pass over memory
    pairs = torch.view_as_complex(at_least_fp32(x).unflatten(-1, (-1, 2)))                # [R,S,heads,hd/2]
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.resid_dropout_p
        self.wqkv = nn.Linear(c.dim, 3 * c.dim, bias=False)
        self.wo = nn.Linear(c.dim, c.dim, bias=False)

    def read(self, x, sees):
        """Prefix rows x [P,L,D]; sees [P,L+1,L], 1 where a row sees a column, row L for the image tokens.
        -> the rows' output [P,L,D], and for the image tokens (key, value) of the caption, [P,heads,1,hd]."""
        v = F.linear(x, self.wqkv.weight[-x.shape[2]:])               # queries and keys are zero: only values
        # mean over what is seen; 0/1 and sums of them are exact in bf16 as well, 1/n would not be
        mean = ((sees @ v) / sees.sum(2, keepdim=True).clamp_min(1)).type_as(v)                   # [P,L+1,D]
        # contiguous: else policy and reference may take different kernels, and differ at step 0
        y = F.dropout(self.wo(mean[:, :-1].contiguous()), self.dropout, self.training)
        caption = mean[:, -1:].unflatten(2, (self.n_head, -1)).transpose(1, 2)
        return y, (torch.zeros_like(caption), caption)

    def forward(self, x, table, bias, caption=None, cache=None):
        """Image rows x [R,S,D]; table their rotation; bias [R or 1,1,S,n+S'] to the scores, n columns (here
        one) for the caption. Teacher forcing: caption (k, v) [R,heads,n,hd] as `read` returned it. Sampling:
        cache, (k, v) [R,heads,n+T-1,hd] that begin with it, and the places [S] of these rows in them."""
        q, k, v = self.qkv(x, table)
        if cache is None:
            k, v = (torch.cat(pair, 2) for pair in zip(caption, (k, v)))
        else:                                       # write in place, then look at as much as bias speaks of
            *stores, place = cache
            k, v = (store.index_copy_(2, place, new.type_as(store))[:, :, :bias.shape[3]]
                    for store, new in zip(stores, (k, v)))
        return self.attend(q, k, v, bias)

    def qkv(self, x, table):
        """Rows x [R,S,D], their rotation -> queries, keys, values, [R,heads,S,hd] each."""
        qkv = self.wqkv(x).unflatten(-1, (3 * self.n_head, -1))                           # [R,S,3 heads,hd]
        qk, v = qkv.tensor_split([2 * self.n_head], 2)
        q, k = rotate(qk, table).chunk(2, 2)
        return [t.transpose(1, 2) for t in (q, k, v)]

    def attend(self, q, k, v, bias):
        y = F.scaled_dot_product_attention(q, k, v, bias.type_as(q)).transpose(1, 2).flatten(2)   # [R,S,D]
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
    def __init__(self, c, attention=Attention):
        super().__init__()
        self.attention, self.feed_forward = attention(c), FeedForward(c)
        self.attention_norm, self.ffn_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)

    def read(self, x, *args):
        y, caption = self.attention.read(self.attention_norm(x), *args)
        return self._feed(x + y), caption

    def forward(self, x, *args):
        return self._feed(x + self.attention(self.attention_norm(x), *args))

    def _feed(self, x):
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
        if (self.side ** 2 != c.block_size or not 1 <= self.side <= 256 or c.n_head < 1
                or c.dim % (4 * c.n_head) or c.model_type not in ("t2i", "c2i")):
            raise ValueError(f"block_size must be a square, at most 256 x 256, dim a multiple of 4 * n_head, "
                             f"and model_type t2i or c2i: {c}")
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.cls_embedding = CaptionEmbedding(c) if c.model_type == "t2i" else ClassEmbedding(c)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.rope = None          # made at first use; no buffer, or .bfloat16() would round the angles
        self.recompute = False    # True: keep no activations inside layers, run them again in the backward
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=c.initializer_range)
        nn.init.zeros_(self.output.weight)                                 # the first guess is uniform

    @classmethod
    def from_pretrained(cls, path, **overrides):
        """The policy in a released file, in eval mode; arguments and errors as `load_gpt` in weights.py."""
        from full import weights                                           # here, as it imports this file
        return weights.load_gpt(path, **overrides)

    def _check(self, cond, cond_mask, prompt, cfg_scale, temperature):
        c, L = self.config, cond.shape[1] if cond.dim() > 1 else 1
        if c.model_type == "t2i" and (cond.dim() != 3
                                      or tuple(cond.shape[1:]) != (c.cls_token_num, c.caption_dim)):
            raise ValueError(f"cond must be features [B,{c.cls_token_num},{c.caption_dim}], "
                             f"not {tuple(cond.shape)}")
        if c.model_type == "c2i" and (cond.dim() != 1 or cond.is_floating_point()):
            raise ValueError(f"cond must be class labels [B], not {cond.dtype} {tuple(cond.shape)}")
        if cond_mask is not None and tuple(cond_mask.shape) != (len(cond), L):
            raise ValueError(f"cond_mask must be [{len(cond)},{L}], not {tuple(cond_mask.shape)}")
        if prompt is not None and (prompt.dim() != 1 or prompt.is_floating_point()):
            raise ValueError(f"prompt must be indices [B] of rows of cond, not {tuple(prompt.shape)}")
        if cfg_scale < 1 or temperature < 0:
            raise ValueError(f"cfg_scale must be >= 1 and temperature >= 0, "
                             f"not {cfg_scale} and {temperature}")

    def _read(self, cond, cond_mask, prompt, cfg_scale):
        """Everything that image tokens need of their captions -> (hidden [R,1,D], which predicts token 0;
        a list of what each layer sees of the caption, (k, v) [R,heads,1,hd]; log n [R or 1,1,1,1])."""
        L, P = self.config.cls_token_num, len(cond)
        visible = cond.new_ones(1, L) if cond_mask is None else cond_mask
        if cond_mask is not None and cond.is_floating_point():
            cond = cond * cond_mask[..., None].to(cond.dtype)              # surprise 2
        if self.training and self.config.class_dropout_prob:               # surprise 4
            drop = torch.rand(P, device=cond.device) < self.config.class_dropout_prob
            cond = torch.where(drop.view(-1, *[1] * (cond.dim() - 1)), self.cls_embedding.uncond(cond), cond)
        row = torch.arange(P, device=cond.device) if prompt is None else prompt            # [B], in 0 .. P-1
        if cfg_scale > 1:                                                  # surprise 3
            cond = torch.cat([cond, self.cls_embedding.uncond(cond)])
            visible = visible.repeat(2 if len(visible) > 1 else 1, 1)
            row = torch.cat([row, row + P])
        x = F.dropout(self.cls_embedding(cond), self.config.token_dropout_p, self.training)       # [..,L,D]
        visible = visible.bool()[:, None]
        own = torch.eye(L, dtype=torch.bool, device=x.device)
        sees = torch.cat([(visible | own).tril(), visible], 1).to(x.dtype)                        # [..,L+1,L]
        captions = []
        for layer in self.layers:
            x, caption = self._run(layer.read, x, sees)
            captions.append([part[row] for part in caption])
        log_n = visible.sum(2).to(self._table(x).real.dtype).log()[:, :, None, None]   # -inf: no caption
        return x[row, -1:], captions, log_n if len(log_n) == 1 else log_n[row]

    def _run(self, layer, *args):
        if self.recompute and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def _bias(self, weight, length):
        """weight [R or 1,1,1,n], the logarithms -> bias [R or 1,1,length,n+length]: these towards the caption
        (log n, here), 0 towards earlier tokens, -inf to later ones."""
        future = torch.full((length, length), -torch.inf, device=weight.device, dtype=weight.dtype).triu(1)
        return torch.cat([weight.expand(-1, 1, length, -1), future.expand(len(weight), 1, -1, -1)], 3)

    def _table(self, x):
        """The rotations of all positions, [T,hd/2], on x's device and in its precision, but never below
        fp32."""
        c, dtype = self.config, torch.promote_types(x.dtype, torch.complex64)
        if self.rope is None or (self.rope.device, self.rope.dtype) != (x.device, dtype):
            self.rope = rope_table(self.side, c.dim // c.n_head, c.rope_base).to(x.device, dtype)
        return self.rope

    def logits(self, hidden, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        """hidden [R,..,D] of `hidden` -> the logits of the policy [B,..,V] in fp32.

        uncond_grad=False: the unconditional branch has its part in the value, but gets no gradient. The
        guided distribution is the same; only the conditional branch is trained to improve it."""
        logits = at_least_fp32(self.output(self.norm(hidden)))
        if cfg_scale > 1:
            # guided = uncond + scale * (cond - uncond)
            cond, uncond = logits.chunk(2)
            uncond = uncond if uncond_grad else uncond.detach()
            logits = uncond + cfg_scale * (cond - uncond)
        return logits / temperature if temperature not in (0, 1) else logits

    def hidden(self, tokens, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0):
        """Teacher forcing up to the logits, [R,T,D]: `logits` of it, or of a part of its positions, is what
        `forward` returns, so a loss can be computed without holding [B,T,V]. Arguments as in `forward`."""
        self._check(cond, cond_mask, prompt, cfg_scale, 1)
        B, T = len(cond) if prompt is None else len(prompt), self.config.block_size
        if tokens.dim() != 2 or len(tokens) != B or not 0 < tokens.shape[1] <= T:
            raise ValueError(f"tokens must be [{B}, 1 to {T}], not {tuple(tokens.shape)}")
        first, captions, weight = self._read(cond, cond_mask, prompt, cfg_scale)
        x = self.tok_embeddings(tokens[:, :-1])                            # the last token predicts nothing
        x = F.dropout(x.repeat(len(first) // B, 1, 1), self.config.token_dropout_p, self.training)
        table, bias = self._table(x)[:x.shape[1]], self._bias(weight, x.shape[1])
        for layer, caption in zip(self.layers, captions):
            x = self._run(layer, x, table, bias, caption)
        return torch.cat([first.type_as(x), x], 1)

    def forward(self, tokens, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0, temperature=1.0):
        """Teacher forcing: logits [B,T,V], row t for token t given tokens < t, at this CFG and temperature.

        tokens [B,T] in 0..V-1, T <= block_size; cond [P,L,C] features or [P] labels; cond_mask [P,L],
        1 = visible; prompt [B], the row of cond that each sequence belongs to (None: P = B, its own).
        cfg_scale >= 1 (1: no guidance); temperature > 0 (0 leaves the logits as they are). Raises ValueError.
        """
        self._check(cond, cond_mask, prompt, cfg_scale, temperature)
        return self.logits(self.hidden(tokens, cond, cond_mask, prompt, cfg_scale=cfg_scale),
                           cfg_scale, temperature)

    bf16 = False

    def _autocast(self, x):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def rollout(self, conditions, prompt, *, cfg_scale=1.0, temperature=1.0, at_once=0, generator=None,
                part=(0, 1)):
        parts, noise = prompt.split(at_once or len(prompt)), generator.get_state()
        drawn = []
        for i, some in enumerate(parts):
            generator.set_state(noise)
            drawn.append(self.generate(*conditions.of(some), cfg_scale=cfg_scale, temperature=temperature,
                                       generator=generator, return_logp=True,
                                       part=(part[0] * len(parts) + i, part[1] * len(parts))))
        tokens, logp = map(torch.cat, zip(*drawn))
        return Rollout(tokens, logp, prompt)

    def distribution(self, rollout, conditions, rows, *, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        with self._autocast(rows):
            hidden = self.hidden(rollout.actions[rows], *conditions.of(rollout.prompt[rows]), cfg_scale=cfg_scale)

        def head(h):
            with self._autocast(h):
                return self.logits(h, cfg_scale, temperature, uncond_grad)
        return Categorical(hidden, head)

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        with self._autocast(next(self.parameters())):
            return self._generate(*args, **kwargs)

    def _generate(self, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0, temperature=1.0, top_k=0,
                 top_p=1.0, generator=None, return_logp=False, part=(0, 1)):
        """Samples tokens [B,block_size]; with return_logp also logp [B,T] of the distribution really sampled.

        cond, cond_mask, prompt as in `forward`; temperature 0 is greedy (log-probability 0); top_k 0 and
        top_p 1 cut nothing; generator lives on the model's device. part (i, n): these sequences are the i-th
        of n equal parts of a batch, whose other parts other processes draw; the noise is that of the whole
        batch, so that n processes draw what one would. Keys and values of all positions are kept in buffers
        made once, so a token costs one position.
        """
        self._check(cond, cond_mask, prompt, cfg_scale, temperature)
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k must be >= 0 and top_p in (0,1], not {top_k} and {top_p}")
        T, B = self.config.block_size, len(cond) if prompt is None else len(prompt)
        first, captions, weight = self._read(cond, cond_mask, prompt, cfg_scale)                  # [R,1,D]
        # n places for the caption (one, but for Janus), then T-1 for tokens 0 .. T-2
        caches = [[F.pad(part, (0, 0, 0, T - 1)) for part in caption] for caption in captions]
        table, n, device = self._table(first), weight.shape[3], first.device
        bias, place = F.pad(weight, (0, T - 1)), torch.arange(n + T - 1, device=device)   # [R or 1,1,1,n+T-1]
        tokens = torch.empty(B, T, dtype=torch.long, device=device)
        logps = torch.zeros(B, T, device=device, dtype=torch.promote_types(first.dtype, torch.float32))
        # The state of a step is in tensors that it updates, so that graphs.py can record it.
        t = torch.zeros_like(place[:1])
        hidden = first.type_as(self.tok_embeddings(t)).contiguous()        # in the precision of image rows

        def choose():                                                      # token t [B,1], from `hidden`
            logp = truncated_logp(self.logits(hidden[:, -1], cfg_scale, temperature), top_k, top_p)
            if temperature == 0:
                token = logp.argmax(1, keepdim=True)
            else:
                # p_i / E_i with E_i ~ Exp(1) is largest at i with probability p_i, and -log of a uniform
                # number is Exp(1). No number goes back to the CPU, so it never waits for the GPU.
                noise = torch.rand(part[1] * B, logp.shape[1], generator=generator, device=device)
                race = -noise[part[0] * B:][:B].log()
                token = (logp.exp() / race).argmax(1, keepdim=True)
                logps.index_copy_(1, t, logp.gather(1, token))
            tokens.index_copy_(1, t, token)
            return token

        def step(length):                                                  # ... and what comes after it
            x = self.tok_embeddings(choose()).repeat(len(hidden) // B, 1, 1)
            at, turn = n + t, table[t]                                     # once, not once a layer
            seen = bias[..., :length].masked_fill(place[:length] > at, -torch.inf).type_as(caches[0][0])
            for layer, cache in zip(self.layers, caches):
                x = layer(x, turn, seen, None, (*cache, at))
            hidden.copy_(x)
            t.add_(1)
        advance = graphs.Replay(step, device, generator, record=not hasattr(self, "shards"))
        for i in range(T - 1):
            advance(graphs.places(n + i + 1, n + T - 1, device))
        choose()
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
