"""SiT: a transformer that predicts the velocity of flow matching (flow.py says what a velocity is).

SiT (arXiv 2401.08740) cuts an image, or latents of an image, into patches, and each patch is a row of a
transformer without causal mask. Time and prompt scale and shift the activations (adaLN-zero, arXiv
2212.09748). Modules have the official names, so that released files load. Time is in [0,1].

Symbols
    B samples                     C H W  channels, height and width of x
    D width, L prompt tokens      T patches of an image, p pixels per side of a patch

Departures from the official code:
 1. Released SiT files have t = 1 at the image. `reverse_time` turns the time, and `from_sit` negates v.
 2. Official SiT reads class labels only. A prompt is read as the mean of its tokens, in place of a label.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class SiTConfig:
    depth: int = 12
    dim: int = 768                # D
    heads: int = 12
    patch: int = 2                # p
    channels: int = 4             # C
    side: int = 32                # H = W
    num_classes: int = 1000       # used if caption_dim is 0; class `num_classes` stands for "no class"
    caption_dim: int = 0          # width of prompt features, or 0 for class labels
    reverse_time: bool = False    # True: the weights read 1 - t, as released SiT files do


PRESETS = {"S/2": (12, 384, 6), "B/2": (12, 768, 12), "L/2": (24, 1024, 16), "XL/2": (28, 1152, 16)}


def sincos_2d(side, dim):
    """Return fixed positions [side * side,dim] of a grid: the first half encodes columns, the second rows."""
    rates = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * rates                           # [side,dim/4]
    one = torch.cat([angles.sin(), angles.cos()], 1)                                            # [side,dim/2]
    return torch.cat([one.repeat(side, 1), one.repeat_interleave(side, 0)], 1).float()


class PatchEmbed(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Conv2d(c.channels, c.dim, c.patch, c.patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                           # [B,T,D]


class TimestepEmbedder(nn.Module):
    """Embed times in [0,1]: 128 cosines and 128 sines, then two linear layers."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        rates = (-math.log(10000) / 128 * torch.arange(128, device=t.device)).exp()
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1).type_as(self.mlp[0].weight))  # [B,D]


class ClassEmbedder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embedding_table = nn.Embedding(c.num_classes + 1, c.dim)

    def forward(self, labels, mask):                                                            # [B] -> [B,D]
        return self.embedding_table(labels)


class TextEmbedder(nn.Module):
    """Turn features [B,L,caption_dim] of prompts into [B,D]: a small network for each token, then the mean.

    The factor 10 makes the prompt matter from the start of pretraining, where weights are small. Without it,
    a tiny model learns to draw long before it uses the prompt."""

    def __init__(self, c):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(c.caption_dim, c.dim), nn.GELU("tanh"), nn.Linear(c.dim, c.dim))

    def forward(self, cond, mask):
        mask = mask[..., None].type_as(cond)
        return 10 * (self.mlp(cond) * mask).sum(1) / mask.sum(1).clamp_min(1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.qkv, self.proj = c.heads, nn.Linear(c.dim, 3 * c.dim), nn.Linear(c.dim, c.dim)

    def forward(self, x):
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, 2))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulate(x, shift, scale):
    """Normalize rows [B,T,D] without learned weights, then scale and shift them by [B,1,D] each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class SiTBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn, self.mlp = Attention(c), Mlp(c)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 6 * c.dim))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, 2)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1))
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.linear = nn.Linear(c.dim, c.patch ** 2 * c.channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c.dim, 2 * c.dim))

    def forward(self, x, c):
        return self.linear(modulate(x, *self.adaLN_modulation(c)[:, None].chunk(2, 2)))


class SiT(nn.Module):
    """The velocity network. All gates and the output start at zero, so v = 0 at first."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.x_embedder, self.t_embedder = PatchEmbed(c), TimestepEmbedder(c.dim)
        self.y_embedder = TextEmbedder(c) if c.caption_dim else ClassEmbedder(c)
        self.register_buffer("pos_embed", sincos_2d(c.side // c.patch, c.dim)[None])             # [1,T,D]
        self.blocks = nn.ModuleList(SiTBlock(c) for _ in range(c.depth))
        self.final_layer = FinalLayer(c)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for module in (*self.t_embedder.mlp[::2], *self.y_embedder.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=.02)
        for module in (*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1],
                       self.final_layer.linear):
            nn.init.zeros_(module.weight)

    def forward(self, x, t, cond, mask=None):
        """Return the velocity [B,C,H,W] at x [B,C,H,W] and times t [B].

        cond, mask: features [B,L,caption_dim] and 1 where the prompt has a token [B,L], or labels [B].
        """
        c = self.config
        side = c.side // c.patch
        time = self.t_embedder(1 - t if c.reverse_time else t) + self.y_embedder(cond, mask)     # [B,D]
        x = self.x_embedder(x) + self.pos_embed                                                  # [B,T,D]
        for block in self.blocks:
            x = block(x, time)
        x = self.final_layer(x, time)                                                            # [B,T,p*p*C]
        x = x.view(-1, side, side, c.patch, c.patch, c.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, c.channels, c.side, c.side)


def from_sit(state):
    """Turn the state dict of a released SiT to this file's convention. Use the result with
    SiTConfig(reverse_time=True) for an official file, and False for a file of REPA.

    Official files (github.com/willisma/SiT) have v = x0 - eps, so the output is negated. The output also has
    an unused half (learn_sigma), which is dropped. Files of REPA (github.com/sihyun-yu/REPA) have our
    convention and no such half, but projectors, which sampling does not need.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith("projectors.")}
    channels, patch = state["x_embedder.proj.weight"].shape[1:3]
    rows = torch.arange(len(state["final_layer.linear.bias"])).view(patch ** 2, -1)
    if rows.shape[1] == channels:                          # no learn_sigma: a file of REPA
        return state
    rows = rows[:, :channels].flatten()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = -state[name][rows]
    return state
