"""The image tokenizer: LlamaGen's VQ model, which turns an image into T integers, and back.

    image [B,3,H,W] -> encoder -> z [B,n,h,w] -> nearest code -> tokens [B,T]
    tokens [B,T] -> vectors of the codebook [B,T,n] -> decoder -> image [B,3,H,W]

    B  images   T = h*w  tokens of an image, row by row   V  codes   n  latent dimensions (8 as released)

A convolutional encoder shrinks the image, 16 times per side in VQ-16, the released model. Each of its T
output vectors is replaced by the nearest of V learned code vectors. A decoder turns the code vectors into an
image. The policy in model.py sees only the indices of the codes. Modules have the released names, so
`vq_ds16_t2i.pt` loads unchanged. Sources: VQGAN, arXiv 2012.09841; LlamaGen, arXiv 2406.06525 sec. 3.1;
ViT-VQGAN (unit codes of few dimensions), arXiv 2110.04627 sec. 3.2.

Departures from LlamaGen's training:
 1. There is no perceptual loss (LPIPS, on features of a network) and no GAN loss. The flat shapes of the tiny
    world need neither of them, but photographs do.
 2. `num_groups` is an option. With 32 groups, each group of a 32-channel layer is one channel. GroupNorm is
    then InstanceNorm, which erases flat colors.
 3. Initial weights: residual branches start at zero, and convolutions keep the scale of their input. In the
    tiny world the squared error after 300 steps is a third of the error with PyTorch's defaults (LOG.md).
 4. `loss` can make collages. A collage consists of patches of two images, and every patch has to keep the
    token that it had in its own image. Without collages a token may depend on the whole image instead of its
    own patch, because GroupNorm and attention see the whole image. A plain patch of background then takes one
    of several codes, depending on the rest of the image. The reconstruction does not suffer, but a policy has
    to predict these codes. Given its patch, a token has an entropy of 1.4 nat in the tiny world without
    collages, .08 with them (LOG.md).
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import files, released


@dataclass
class VQConfig:                            # the defaults are VQ-16 as released (72M parameters)
    codebook_size: int = 16384             # V
    codebook_embed_dim: int = 8            # n
    ch: int = 128                          # channels at full resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)       # of each level, in units of `ch`; between levels the side halves
    num_res_blocks: int = 2                # per level of the encoder; a level of the decoder has one more
    z_channels: int = 256
    num_groups: int = 32                   # of GroupNorm
    l1_weight: float = 0.0                 # mean |error|
    l2_weight: float = 1.0                 # mean error^2
    codebook_weight: float = 1.0
    commit_weight: float = 0.25
    entropy_weight: float = 0.0            # > 0: all codes stay in use
    collage_weight: float = 0.0            # > 0: a patch keeps its token in another image (departure 4)
    temperature: float = 0.01              # of softmax(-distance / temperature), for entropy and collages


class ResnetBlock(nn.Module):
    def __init__(self, n_in, n_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, n_in, eps=1e-6)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, n_out, eps=1e-6)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x):                                                  # [B,n_in,h,w] -> [B,n_out,h,w]
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head attention between all positions. It is used only at the lowest resolution."""

    def __init__(self, n, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):                                                  # [B,n,h,w]
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # [B,1,h*w,n]
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, stride=2)

    def forward(self, x):                                                  # pads at the right and bottom only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """ResNet blocks at one resolution, then a change of resolution. attend: attention follows each block."""

    def __init__(self, n_in, n_out, blocks, groups, attend, **resample):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(n_in if j == 0 else n_out, n_out, groups) for j in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(n_out, groups) for _ in range(blocks if attend else 0))
        for name, module in resample.items():                        # `downsample` or `upsample`, as released
            setattr(self, name, module)
        self.resample = list(resample)

    def forward(self, x):
        for j, res in enumerate(self.res):
            x = res(x)
            if len(self.attn):
                x = self.attn[j](x)
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


def _mid(n, groups):
    return nn.ModuleList([ResnetBlock(n, n, groups), AttnBlock(n, groups), ResnetBlock(n, n, groups)])


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, last = [c.ch * m for m in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(3, c.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(([c.ch] + widths)[i], n, c.num_res_blocks, c.num_groups, attend=i == last,
                  **({} if i == last else {"downsample": Downsample(n)})) for i, n in enumerate(widths))
        self.mid = _mid(widths[-1], c.num_groups)
        self.norm_out = nn.GroupNorm(c.num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x):                                                  # [B,3,H,W] -> [B,z,h,w]
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        widths, last = [c.ch * m for m in c.ch_mult], len(c.ch_mult) - 1
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = _mid(widths[-1], c.num_groups)
        self.conv_blocks = nn.ModuleList(                                  # stored lowest resolution first
            Level(widths[min(i + 1, last)], widths[i], c.num_res_blocks + 1, c.num_groups, attend=i == last,
                  **({} if i == 0 else {"upsample": Upsample(widths[i])})) for i in reversed(range(last + 1)))
        self.norm_out = nn.GroupNorm(c.num_groups, c.ch * c.ch_mult[0], eps=1e-6)
        self.conv_out = nn.Conv2d(c.ch * c.ch_mult[0], 3, 3, padding=1)

    def forward(self, z):                                                  # [B,z,h,w] -> [B,3,H,W]
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The nearest of V codes. All vectors have length 1, so the nearest code has the largest cosine."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.codebook_size, c.codebook_embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / c.codebook_size, 1 / c.codebook_size)

    def codes(self):
        return F.normalize(self.embedding.weight, dim=1)

    def forward(self, z):
        """z [B,n,h,w] -> (tokens [B,T], unit vectors of z [B,T,n], their cosines to all codes [B,T,V])."""
        z = F.normalize(z, dim=1).flatten(2).transpose(1, 2)
        cosine = z @ self.codes().T
        return cosine.argmax(2), z, cosine


class VQGAN(nn.Module):
    """LlamaGen's tokenizer: `encode`, `decode`, and the `loss` that pretrain.py minimizes."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.encoder, self.decoder, self.quantize = Encoder(c), Decoder(c), Quantizer(c)
        self.quant_conv = nn.Conv2d(c.z_channels, c.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.codebook_embed_dim, c.z_channels, 1)
        for name, p in self.named_parameters():                            # departure 3
            if name.endswith(("conv2.weight", "proj_out.weight")):
                nn.init.zeros_(p)                                          # a block starts as the identity
            elif p.dim() == 4:
                nn.init.kaiming_normal_(p, nonlinearity="linear")          # a convolution keeps the scale

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, **overrides):
        """Load a file in LlamaGen's layout into a VQGAN on the CPU, in eval mode, with parameters in `dtype`.
        dtype: a name such as "bfloat16", or torch.bfloat16. overrides: fields of VQConfig. Raises UserError
        for a file that is missing, damaged or of another model."""
        state, told = files.read_released(path, released.UNUSED)
        fields = released.fields(VQConfig, released.vq_shapes, state, told, overrides, path)
        return files.build(cls, VQConfig(**fields), state, dtype, path)

    @torch.no_grad()
    def encode(self, images):
        """Turn square images [B,3,H,H] in [-1,1] into tokens [B,T] in 0..V-1, row by row.
        Raises ValueError unless B > 0 and H is a multiple of 2**(levels-1)."""
        factor, H = 2 ** (len(self.config.ch_mult) - 1), images.shape[-1] if images.dim() else 0
        if not images.numel() or images.shape[1:] != (3, H, H) or H % factor:
            raise ValueError(f"encode takes square images [B,3,H,H], B > 0, H a multiple of {factor}, got "
                             f"{tuple(images.shape)}")
        return self.quantize(self.quant_conv(self.encoder(images)))[0]

    def codes(self):
        """Return the unit vectors of all codes, [V,n]."""
        return self.quantize.codes()

    def decode(self, tokens):
        """Turn tokens [B,T] of square images into images [B,3,H,W], about in [-1,1] but not clipped.
        Raises ValueError unless B > 0 and T is a square."""
        side = int(tokens.shape[-1] ** .5) if tokens.dim() else 0
        if not tokens.numel() or tokens.shape[1:] != (side * side,):
            raise ValueError(f"decode takes the tokens [B,T] of square images, B > 0, got "
                             f"{tuple(tokens.shape)}")
        return self.decode_vectors(F.embedding(tokens, self.quantize.codes()), side, side)

    def decode_vectors(self, vectors, h, w):
        """Turn code vectors [B,h*w,n] into images [B,3,H,W]."""
        return self.decoder(self.post_quant_conv(vectors.transpose(1, 2).reshape(len(vectors), -1, h, w)))

    def loss(self, images, collage=None):
        """Return (loss, {name: detached term}, tokens) of images [B,3,H,W]. VQ-VAE, arXiv 1711.00937 eq. 3.

        collage [B,h,w], bool: also train on B collages. Collage b shows image b at tokens where collage[b] is
        True, and image B-1-b elsewhere. With collages the returned tokens are [2B,T], otherwise [B,T].
        """
        c, B = self.config, len(images)
        if collage is not None:
            pixels = F.interpolate(collage[:, None].float(), images.shape[2:]) > .5               # [B,1,H,W]
            images = torch.cat([images, torch.where(pixels, images, images.flip(0))])
        z = self.quant_conv(self.encoder(images))
        tokens, unit, cosine = self.quantize(z)
        code = F.embedding(tokens, self.quantize.codes())                  # [B or 2B,T,n]
        terms = {"codebook": (c.codebook_weight, F.mse_loss(code, unit.detach())),    # moves codes to vectors
                 "commit": (c.commit_weight, F.mse_loss(unit, code.detach()))}        # moves vectors to codes
        if c.entropy_weight or collage is not None:
            # p = softmax(-distance / temperature). On the unit sphere the squared distance is 2 - 2 cosine.
            logp = F.log_softmax(2 * cosine / c.temperature, 2)            # [B or 2B,T,V]
        if c.entropy_weight:
            # E[H(p)] - H(E[p]), H the entropy, is low if each choice is certain and all codes are used.
            mean = logp.exp().mean((0, 1))
            terms["entropy"] = (c.entropy_weight,
                                -(logp.exp() * logp).sum(2).mean() + (mean * (mean + 1e-5).log()).sum())
        if collage is not None:
            # -log p(the token that the patch has in its own image)
            kept = torch.where(collage.flatten(1), tokens[:B], tokens[:B].flip(0))
            terms["collage"] = (c.collage_weight, F.nll_loss(logp[B:].flatten(0, 1), kept.flatten()))
        # Straight-through: the decoder gets the code, and its gradient goes to the encoder's vector `unit`.
        decoded = self.decode_vectors(unit + (code - unit).detach(), *z.shape[2:])
        terms["l1"] = c.l1_weight, F.l1_loss(decoded, images)
        terms["l2"] = c.l2_weight, F.mse_loss(decoded, images)
        return sum(w * v for w, v in terms.values()), {k: v.detach() for k, (w, v) in terms.items()}, tokens
