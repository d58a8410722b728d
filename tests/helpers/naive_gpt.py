"""LlamaGen's transformer once more, slowly: tests/core/test_model.py compares model.py with it.

It is written from the facts about the released checkpoints, not from model.py, and shares no code with it.
Every attention matrix is spelt out, every pair is rotated by itself, and nothing is cached. So each rule of
the architecture stands in one visible place. The arithmetic is done in the dtype of the state dict.
Letters: B sequences, S positions (prefix and image), L prefix length, T image tokens, D width, h head size.
"""
import math

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def linear(x, weight):
    """No matrix in this model has a bias."""
    return torch.einsum("...i,oi->...o", x, weight)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x / (1 + torch.exp(-x))


def prefix_features(state, cfg, cond, cond_mask):
    """The L prefix vectors [B,L,D]: one row of a table for a class, projected T5 features for a text."""
    if cfg.model_type == "c2i":
        return state["cls_embedding.embedding_table.weight"][cond][:, None]
    # Padded features become zero *before* the projection, and stay zero after it since it has no bias.
    hidden = linear(cond * cond_mask[:, :, None].to(cond.dtype), state["cls_embedding.cap_proj.fc1.weight"])
    return linear(gelu_tanh(hidden), state["cls_embedding.cap_proj.fc2.weight"])


def visible_keys(cond_mask, length):
    """visible[b,i,j]: may position i look at position j? Causal, without padding, but always at itself."""
    batch, prefix = cond_mask.shape
    visible = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                padding = j < prefix and not cond_mask[b, j]
                # The diagonal keeps rows of padded positions from being empty (a softmax over nothing).
                visible[b, i, j] = i == j or not padding
    return visible


def rotation(position, prefix, pair, cfg):
    """(cos, sin) for one pair of one position."""
    # The released table holds zeros in the prefix, cosines too: rotating by it erases the vector.
    if position < prefix:
        return 0.0, 0.0
    head_size = cfg.dim // cfg.n_head
    row, column = divmod(position - prefix, math.isqrt(cfg.block_size))
    # The first half of the pairs turns with the row, the second with the column, at the same speeds.
    half = head_size // 4
    place, j = (row, pair) if pair < half else (column, pair - half)
    angle = place * cfg.rope_base ** (-2 * j / (head_size / 2))
    return math.cos(angle), math.sin(angle)


def rotate(x, prefix, cfg):
    """x [B,S,h] of one head; pair number p is the neighbours (x[2p], x[2p+1])."""
    out = torch.empty_like(x)
    for position in range(x.shape[1]):
        for pair in range(x.shape[2] // 2):
            cos, sin = rotation(position, prefix, pair, cfg)
            first, second = x[:, position, 2 * pair], x[:, position, 2 * pair + 1]
            out[:, position, 2 * pair] = first * cos - second * sin
            out[:, position, 2 * pair + 1] = first * sin + second * cos
    return out


def head_qkv(state, cfg, layer, x, head):
    """q, k, v [B,S,h] of one head, not yet rotated. The rows of wqkv are all q, then all k, then all v."""
    projected = linear(x, state[f"layers.{layer}.attention.wqkv.weight"])
    h = cfg.dim // cfg.n_head
    return [projected[..., part * cfg.dim + head * h : part * cfg.dim + (head + 1) * h] for part in range(3)]


def attention(state, cfg, layer, x, visible, prefix):
    heads = []
    for head in range(cfg.n_head):
        q, k, v = head_qkv(state, cfg, layer, x, head)
        q, k = rotate(q, prefix, cfg), rotate(k, prefix, cfg)
        scores = torch.einsum("bih,bjh->bij", q, k) / math.sqrt(q.shape[-1])
        weights = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
        heads.append(torch.einsum("bij,bjh->bih", weights, v))
    return linear(torch.cat(heads, dim=-1), state[f"layers.{layer}.attention.wo.weight"])


def feed_forward(state, layer, x):
    w1, w2, w3 = (state[f"layers.{layer}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
    return linear(silu(linear(x, w1)) * linear(x, w3), w2)


def naive_logits(state, cfg, tokens, cond, cond_mask=None):
    """Logits [B,T,V]; row t predicts tokens[:, t] from the condition and the tokens before it.

    cond: [B,L,C] features for t2i, [B] labels for c2i; cond_mask [B,L] is true where a feature is real.
    """
    prefix = cfg.cls_token_num
    if cond_mask is None:
        cond_mask = torch.ones(len(tokens), prefix, dtype=torch.bool)
    # The last token is only ever predicted. The last *prefix* position predicts token 0, hence L-1 below.
    image = state["tok_embeddings.weight"][tokens[:, :-1]]
    x = torch.cat([prefix_features(state, cfg, cond, cond_mask), image], dim=1)
    visible = visible_keys(cond_mask, x.shape[1])
    for layer in range(cfg.n_layer):
        normed = rms_norm(x, state[f"layers.{layer}.attention_norm.weight"], cfg.norm_eps)
        x = x + attention(state, cfg, layer, normed, visible, prefix)
        normed = rms_norm(x, state[f"layers.{layer}.ffn_norm.weight"], cfg.norm_eps)
        x = x + feed_forward(state, layer, normed)
    logits = linear(rms_norm(x, state["norm.weight"], cfg.norm_eps), state["output.weight"])
    return logits[:, prefix - 1 :]
