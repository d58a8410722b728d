"""The policy: LlamaGen's transformer, which writes an image as a sequence of codes of the image tokenizer.

    prompt features [P,L,C] -> cls_embedding -> prefix [P,L,D]  |  tokens 0 .. T-2 -> embeddings [B,T-1,D]
    [prefix, tokens] -> layers: RMSNorm, causal attention with 2-D RoPE, RMSNorm, SwiGLU -> logits [B,T,V]

    B  sequences                     T  image tokens           L  length of the prefix
    P  prompts                       V  codes                  C  width of a prompt feature
    D  width                         hd  width of a head       n  visible rows of a prefix (not padding)
    R  sequences of a pass: B, or with guidance (see below) 2B, first all conditional, then all unconditional
    S  image positions in one pass   p  positions of the prompt in the cache of keys and values: 1 by rule 1

Row t of the logits predicts token t, and the last row of the prefix predicts token 0. The model is a Llama
(common/llama.py) except for the prefix, the rotation by position (RoPE) in two dimensions, and guidance.
Classifier-free guidance (CFG) computes two logits, `cond` with the prompt and `uncond` without it, and uses
uncond + cfg_scale * (cond - uncond). Source: LlamaGen, arXiv 2406.06525. Modules have the names of
LlamaGen's released checkpoints, so these load unchanged.

Three rules of the released model are unusual, and are kept exactly:
 1. The prompt acts as one token. RoPE multiplies the queries and keys of the prefix by a table of *zeros*
    (cos = sin = 0). So they are zero vectors, and every attention score that involves one of them is 0.
      - A prefix row attends evenly: its attention is the mean of the values of the visible rows up to it.
      - Claim: for an image token, the n visible prefix rows act as one token. Its key is the zero vector, log
        n is added to its score, and its value is the mean of their values v_j. Proof: each row has the weight
        exp(0) = 1, so together
            sum_j 1 v_j = n mean_j v_j = exp(log n) * mean_j v_j         (bf16 rounds log n: up to 1.5 % of n)
      - Consequence: the model reads its prompt as a bag of rows of equal weight. Word order reaches the image
        only through what the features themselves carry. The prompt is *one* vector per layer, and this vector
        does not depend on the image. So GPT.read_prompts computes it once per prompt. All images of a prompt
        then attend to 1 + t positions instead of L + t, and no image runs the prefix again.
 2. Prompts are padded on the left, and padded rows are hidden from all others. Each row still sees itself,
    because a softmax over nothing is undefined. An empty prompt predicts token 0 from its last padded row.
 3. The unconditional branch of CFG reads the constant `uncond_embedding` in place of the prompt's features,
    with the prompt's mask.
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import files, llama, lora, parallel, released
from common.interfaces import Rollout
from common.llama import Block, FeedForward, RMSNorm, at_least_fp32, rope_table, truncated_logp
from divergences import Categorical

PRESETS = {  # name: (n_layer, n_head, dim)
    "GPT-B": (12, 12, 768), "GPT-L": (24, 16, 1024), "GPT-XL": (36, 20, 1280), "GPT-XXL": (48, 24, 1536),
    "GPT-XXXL": (48, 40, 2560), "GPT-1B": (22, 32, 2048), "GPT-3B": (24, 32, 3200), "GPT-7B": (32, 32, 4096)}


@dataclass
class GPTConfig:                         # the defaults are GPT-B for 256-pixel images with T5 features
    dim: int = 768                       # D
    n_layer: int = 12
    n_head: int = 12
    multiple_of: int = 256               # the SwiGLU width is 2/3 * 4D, rounded up to a multiple of this
    norm_eps: float = 1e-5
    rope_base: float = 10000
    vocab_size: int = 16384              # V
    block_size: int = 256                # T, a square: 256 tokens are a 16 x 16 map
    model_type: str = "t2i"              # "t2i": conditions are text features; "c2i": class labels
    cls_token_num: int = 120             # L, length of the prefix; 1 for c2i
    caption_dim: int = 2048              # C
    num_classes: int = 1000              # c2i only
    initializer_range: float = 0.02      # standard deviation of initial weights
    token_dropout_p: float = 0.1         # these four act in pretraining only: GRPO keeps eval mode
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    class_dropout_prob: float = 0.1      # share of dropped prompts, which train the unconditional branch


class PrefixAttention(llama.Attention):
    def forward_prompt(self, x, visible):
        """Let the prefix rows x [P,L,D] attend to each other, by rule 1.

        visible [P,L+1,L] is 1 where a row sees a column. Its last row says what image tokens see. Return the
        output [P,L,D], and the prompt as one token for the image rows: (key, value), [P,heads,1,hd] each.
        """
        v = lora.last_outputs(self.wqkv, x, x.shape[2])               # queries and keys are zero: only values
        # Sum first, then divide: bf16 would round a mask that is already divided by n.
        mean = ((visible @ v) / visible.sum(2, keepdim=True).clamp_min(1)).type_as(v)             # [P,L+1,D]
        # contiguous: else torch may use different kernels with and without gradients. Then policy and
        # reference would differ by rounding at step 0.
        y = F.dropout(self.wo(mean[:, :-1].contiguous()), self.dropout, self.training)
        value = mean[:, -1:].unflatten(2, (self.n_head, -1)).transpose(1, 2)
        return y, (torch.zeros_like(value), value)


class TextEmbedding(nn.Module):
    """Turn features [P,L,C] into a prefix [P,L,D] by a two-layer MLP."""

    def __init__(self, c):
        super().__init__()
        self.cap_proj = nn.ModuleDict({"fc1": nn.Linear(c.caption_dim, c.dim, bias=False),
                                       "fc2": nn.Linear(c.dim, c.dim, bias=False)})
        # A buffer, as in the released code: it is in the state dict, but no optimizer ever sees it.
        uncond = torch.randn(c.cls_token_num, c.caption_dim) / c.caption_dim ** .5
        self.register_buffer("uncond_embedding", uncond)

    def uncond(self, cond):
        return self.uncond_embedding.to(cond.dtype).expand_as(cond)

    def forward(self, cond):
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](cond), approximate="tanh"))


class ClassEmbedding(nn.Module):
    """Turn class labels [P] into a prefix [P,1,D]. The last row of the table means "no class"."""

    def __init__(self, c):
        super().__init__()
        self.embedding_table = nn.Embedding(c.num_classes + 1, c.dim)

    def uncond(self, cond):
        return torch.full_like(cond, self.embedding_table.num_embeddings - 1)

    def forward(self, cond):
        return self.embedding_table(cond)[:, None]


class ImageTransformer(nn.Module):
    """What GPT and Janus (full/janus.py) share. Teacher forcing computes the logits of given tokens in one
    pass. Sampling makes tokens one by one. Teacher forcing and sampling use the same distribution.

    A subclass has the modules tok_embeddings, layers, norm, output, a `config`, and three methods:
        check_prompt(cond)          raises ValueError if `cond` has a wrong shape or type
        rotations(x)                the rotations of all image positions, [T,hd/2]
        read_prompts(cond, cond_mask, prompt, cfg_scale)    returns what image tokens need from their prompts:
            first [R,1,D]           the row that predicts token 0
            caches                  for each layer the prompt's keys and values, two of [R,heads,p,hd]
            bias [R or 1,1,1,p]     what is added to the attention scores of these keys
    """
    token_dropout = 0.0       # fraction of the numbers in token embeddings that train mode sets to zero
    recompute = False         # True: layers keep no activations, and the backward pass computes them again
    bf16 = False              # True: matrix products of forward, rollout, distribution in bf16 (autocast)
    compile_step = False      # True: `generate` compiles its step

    def check(self, cond, cond_mask, prompt, cfg_scale, temperature=1.0):
        self.check_prompt(cond)
        llama.check(cond, cond_mask, prompt, cfg_scale, temperature)

    def autocast(self):
        device = self.norm.weight.device.type
        return torch.autocast(device, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def run_layer(self, layer, *args):
        if self.recompute and torch.is_grad_enabled():
            return llama.recomputed(layer, *args)
        return layer(*args)

    def logits(self, hidden, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        """Turn rows [R,..,D] of `hidden` into the policy's logits [B,..,V], in at least fp32.
        With uncond_grad=False the logits are the same, but the unconditional branch gets no gradient."""
        logits = at_least_fp32(self.output(self.norm(hidden)))
        if cfg_scale > 1:
            cond, uncond = logits.chunk(2)
            uncond = uncond if uncond_grad else uncond.detach()
            logits = uncond + cfg_scale * (cond - uncond)
        return logits / temperature if temperature not in (0, 1) else logits

    def hidden(self, tokens, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0):
        """Run teacher forcing up to the last layer -> rows [R,T,D]. Arguments as in `forward`.
        `logits` accepts any slice of positions, so a loss need not hold all logits [B,T,V]."""
        self.check(cond, cond_mask, prompt, cfg_scale)
        B, T = len(cond) if prompt is None else len(prompt), self.config.block_size
        if tokens.dim() != 2 or len(tokens) != B or not 0 < tokens.shape[1] <= T:
            raise ValueError(f"tokens must be [{B}, 1 to {T}], got {tuple(tokens.shape)}")
        first, caches, prompt_bias = self.read_prompts(cond, cond_mask, prompt, cfg_scale)
        x = self.tok_embeddings(tokens[:, :-1])                            # the last token predicts nothing
        x = F.dropout(x.repeat(len(first) // B, 1, 1), self.token_dropout, self.training)  # R is B or 2B
        S, rotation = x.shape[1], self.rotations(x)[:x.shape[1]]
        # Every row sees its prompt, the earlier rows and itself. Later rows are hidden by -inf.
        later = torch.full((S, S), -torch.inf, device=x.device, dtype=prompt_bias.dtype).triu(1)
        bias = torch.cat([prompt_bias.expand(-1, 1, S, -1), later.expand(len(prompt_bias), 1, -1, -1)], 3)
        for layer, cache in zip(self.layers, caches):
            x = self.run_layer(layer, x, rotation, bias, cache)
        return torch.cat([first.type_as(x), x], 1)

    def forward(self, tokens, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0, temperature=1.0):
        """Return logits [B,T,V] by teacher forcing: row t is for token t, given the tokens before t.

        tokens [B,T] in 0..V-1, T <= block_size. cond: features [P,L,C], class labels [P], or for Janus text
        ids [P,L]. cond_mask [P,L]: 1 at visible rows; None: all are visible. prompt [B]: which row of cond
        belongs to each sequence; None: P = B, and row i belongs to sequence i. cfg_scale >= 1, where 1 is no
        guidance. temperature >= 0, where 0 leaves the logits unchanged. Raises ValueError if these do not
        fit.
        """
        self.check(cond, cond_mask, prompt, cfg_scale, temperature)
        with self.autocast():
            hidden = self.hidden(tokens, cond, cond_mask, prompt, cfg_scale=cfg_scale)
            return self.logits(hidden, cfg_scale, temperature)

    def step(self, token, rotation, bias, caches, place):
        """Run one step of sampling: token [B,1] through all layers -> rows [R,1,D]."""
        x = self.tok_embeddings(token).repeat(len(caches[0][0]) // len(token), 1, 1)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, rotation, bias, cache, place)
        return x

    @torch.no_grad()
    def generate(self, cond, cond_mask=None, prompt=None, *, cfg_scale=1.0, temperature=1.0, top_k=0,
                 top_p=1.0, generator=None, return_logp=False, part=(0, 1)):
        """Sample tokens [B,T]. With return_logp also return their logp [B,T] in the sampled distribution.

        cond, cond_mask, prompt: as in `forward`. temperature 0 takes the likeliest code, with logp 0. top_k 0
        and top_p 1 cut nothing. part (i, n): these sequences are part i of n equal parts of a batch. Each
        part draws the random numbers of the whole batch and uses its own rows of them. So the samples do not
        depend on how many processes share the batch. The cache has its full size from the start. With
        compile_step all shapes are fixed: `step` reads the whole cache, and bias hides places that are not
        filled yet. Raises ValueError if the arguments do not fit, and Fault if logits are not finite.
        """
        self.check(cond, cond_mask, prompt, cfg_scale, temperature)
        if top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"top_k must be at least 0 and top_p in (0,1], got {top_k} and {top_p}")
        B, T, device = len(cond) if prompt is None else len(prompt), self.config.block_size, cond.device
        first, caches, prompt_bias = self.read_prompts(cond, cond_mask, prompt, cfg_scale)
        p, rotations = prompt_bias.shape[3], self.rotations(first)
        # places 0 .. p-1 of the cache belong to the prompt, the others to tokens 0 .. T-2
        caches = [[F.pad(x, (0, 0, 0, T - 1)) for x in keys_values] for keys_values in caches]
        bias = F.pad(prompt_bias, (0, T - 1)).type_as(caches[0][0])                       # [R or 1,1,1,p+T-1]
        places = torch.arange(p + T - 1, device=device)
        step = llama.compiled(self.step, caches) if self.compile_step else self.step
        tokens = torch.zeros(B, T, dtype=torch.long, device=device)
        logp = torch.zeros(B, T, dtype=torch.promote_types(first.dtype, torch.float32), device=device)
        hidden = first.type_as(self.tok_embeddings(tokens[:, :1]))         # the precision of image rows
        for t in range(T):
            logits = self.logits(hidden[:, 0], cfg_scale, temperature)                            # [B,V]
            logp_all = truncated_logp(logits, top_k, top_p)
            if temperature == 0:
                token = logp_all.argmax(1, keepdim=True)                                          # [B,1]
            else:
                # torch.multinomial would make the CPU wait for the GPU. So divide each probability by its own
                # random number from Exp(1), which is -log(u) of a uniform u. The largest quotient wins.
                noise = torch.rand(part[1] * B, logits.shape[1], generator=generator, device=device)
                token = (logp_all.exp() / -noise[part[0] * B:][:B].log()).argmax(1, keepdim=True)
            logp[:, t:t + 1] = logp_all.gather(1, token) * (temperature > 0)       # NaN stays, for the check
            tokens[:, t:t + 1] = token
            if t < T - 1:                                                  # the last token predicts nothing
                place = places[p + t:p + t + 1]
                filled = bias[..., :p + t + 1]
                if self.compile_step:                                      # all places, for a fixed shape
                    filled = bias.masked_fill(places > place, -torch.inf)
                hidden = step(token, rotations[t:t + 1], filled, caches, place)                   # [R,1,D]
        llama.check_sampled(logp, cfg_scale, temperature)
        return (tokens, logp) if return_logp else tokens

    @torch.no_grad()
    def rollout(self, conditions, prompt, *, cfg_scale=1.0, temperature=1.0, at_once=0, generator=None,
                part=(0, 1)):
        """Sample an image for each entry of prompt [b], as Policy in common/interfaces.py says."""
        pieces = prompt.split(at_once or len(prompt))
        state, sampled = generator and generator.get_state(), []
        with self.autocast(), parallel.gathered(self):
            for i, piece in enumerate(pieces):
                if generator:
                    generator.set_state(state)         # each piece uses its own rows of the same numbers
                sampled.append(self.generate(
                    *conditions.of(piece), cfg_scale=cfg_scale, temperature=temperature, generator=generator,
                    return_logp=True, part=(part[0] * len(pieces) + i, part[1] * len(pieces))))
        tokens, logp = map(torch.cat, zip(*sampled))
        return Rollout(tokens, logp, prompt)

    def distribution(self, rollout, conditions, rows, *, cfg_scale=1.0, temperature=1.0, uncond_grad=True):
        """Return the Categorical of rows [r] of a rollout, as Policy in common/interfaces.py says."""
        def head(hidden):
            with self.autocast():
                return self.logits(hidden, cfg_scale, temperature, uncond_grad)
        with self.autocast():
            inputs = rollout.actions[rows], *conditions.of(rollout.prompt[rows])
            return Categorical(self.hidden(*inputs, cfg_scale=cfg_scale), head)


class GPT(ImageTransformer):
    """LlamaGen's transformer. Raises ValueError if the config is impossible."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.side, self.token_dropout = int(c.block_size ** .5), c.token_dropout_p
        if (self.side ** 2 != c.block_size or not 1 <= self.side <= 256 or c.n_head < 1
                or c.dim % (4 * c.n_head) or c.model_type not in ("t2i", "c2i")):
            raise ValueError(f"block_size must be a square, at most 256 x 256, dim a multiple of 4 * n_head, "
                             f"and model_type t2i or c2i, got {c}")
        self.tok_embeddings = nn.Embedding(c.vocab_size, c.dim)
        self.cls_embedding = TextEmbedding(c) if c.model_type == "t2i" else ClassEmbedding(c)
        self.layers = nn.ModuleList(Block(
            PrefixAttention(c.dim, c.n_head, c.resid_dropout_p),
            FeedForward(c.dim, c.multiple_of, c.ffn_dropout_p), c.dim, c.norm_eps) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, c.vocab_size, bias=False)
        self.rope = None          # made at first use; no buffer, because a cast would round its angles
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=c.initializer_range)
        nn.init.zeros_(self.output.weight)                                 # the first guess is uniform

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, **overrides):
        """Load a file in LlamaGen's layout into a GPT on the CPU, in eval mode, with parameters in `dtype`.

        dtype: a name such as "bfloat16", or torch.bfloat16. The config comes from shapes, PRESETS and the
        file's name (common/released.py), and overrides replace its fields. Raises UserError for a file that
        is missing, damaged or of another model, or that does not tell n_head or block_size (then pass these).
        """
        state, told = files.read_released(path, released.UNUSED)
        fields = released.fields(GPTConfig, released.gpt_shapes, state, told, overrides, path)
        released.add_heads_and_tokens(fields, PRESETS, path)
        return files.build(cls, GPTConfig(**fields), state, dtype, path)

    def check_prompt(self, cond):
        c = self.config
        L, C, shape = c.cls_token_num, c.caption_dim, tuple(cond.shape)
        if c.model_type == "t2i" and (cond.dim() != 3 or shape[1:] != (L, C)):
            raise ValueError(f"cond must be features [P,{L},{C}], got {shape}")
        if c.model_type == "c2i" and (cond.dim() != 1 or cond.is_floating_point()):
            raise ValueError(f"cond must be class labels [P], got {cond.dtype} {shape}")

    def rotations(self, x):
        """Return the rotations of all image positions, [T,hd/2], in the precision of x but at least fp32."""
        c, dtype = self.config, torch.promote_types(x.dtype, torch.complex64)
        if self.rope is None or (self.rope.device, self.rope.dtype) != (x.device, dtype):
            self.rope = rope_table(self.side, c.dim // c.n_head, c.rope_base).to(x.device, dtype)
        return self.rope

    def read_prompts(self, cond, cond_mask, prompt, cfg_scale):
        """Run the prefix, once per prompt. A cache is the prompt as one token (p = 1), and the bias is its
        score log n, or -inf for an empty prompt. ImageTransformer describes what is returned."""
        c, L, P = self.config, self.config.cls_token_num, len(cond)
        visible = cond.new_ones(1, L) if cond_mask is None else cond_mask                         # [P or 1,L]
        if cond_mask is not None and cond.is_floating_point():
            cond = cond * cond_mask[..., None].to(cond.dtype)              # features of padding become zero
        if self.training and c.class_dropout_prob:
            drop = torch.rand(P, device=cond.device) < c.class_dropout_prob
            cond = torch.where(drop.view(-1, *[1] * (cond.dim() - 1)), self.cls_embedding.uncond(cond), cond)
        row = torch.arange(P, device=cond.device) if prompt is None else prompt            # [B], its prompt
        if cfg_scale > 1:
            cond = torch.cat([cond, self.cls_embedding.uncond(cond)])
            visible = visible.repeat(2 if len(visible) > 1 else 1, 1)
            row = torch.cat([row, row + P])                                # [R]
        x = F.dropout(self.cls_embedding(cond), c.token_dropout_p, self.training)                 # [..,L,D]
        visible = visible.bool()[:, None]
        itself = torch.eye(L, dtype=torch.bool, device=x.device)           # rule 2
        sees = torch.cat([(visible | itself).tril(), visible], 1).to(x.dtype)                     # [..,L+1,L]
        caches = []
        for layer in self.layers:
            x, keys_values = self.run_layer(layer.forward_prompt, x, sees)
            caches.append([y[row] for y in keys_values])
        log_n = visible.sum(2).to(torch.promote_types(x.dtype, torch.float32)).log()[:, :, None, None]
        return x[row, -1:], caches, log_n if len(log_n) == 1 else log_n[row]
