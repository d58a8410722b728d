"""python -m pytest tests/core/test_vqgan_by_hand.py

Parts of the tokenizer written out, and where each term of its loss sends its gradient.
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vqgan import VQGAN, AttnBlock, Downsample, Upsample, VQConfig

TINY = VQConfig(codebook_size=64, ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, num_groups=8)


def test_halving_pads_at_the_right_and_bottom_and_doubling_repeats():
    down, up, x = Downsample(1), Upsample(1), torch.arange(16.).view(1, 1, 4, 4)
    torch.nn.init.ones_(down.conv.weight), torch.nn.init.zeros_(down.conv.bias)
    sums = [[sum(x[0, 0, i, j] for i in range(a, min(a + 3, 4)) for j in range(b, min(b + 3, 4)))
             for b in (0, 2)] for a in (0, 2)]                  # windows of 3 x 3 from places 0 and 2 on
    assert down(x)[0, 0].tolist() == sums
    up.conv.weight.data.zero_()[0, 0, 1, 1] = 1
    torch.nn.init.zeros_(up.conv.bias)                          # a convolution that changes nothing
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_attention_by_hand():
    torch.manual_seed(0)
    block, x = AttnBlock(8, 2), torch.randn(1, 8, 2, 3)
    h = block.norm(x)
    q, k, v = (f(h)[0].flatten(1).T for f in (block.q, block.k, block.v))                # [6,8]
    rows = torch.stack([sum((q[i] @ k[j] / 8 ** .5).exp() * v[j] for j in range(6))
                        / sum((q[i] @ k[j] / 8 ** .5).exp() for j in range(6)) for i in range(6)])
    assert torch.allclose(block(x), x + block.proj_out(rows.T.view(1, 8, 2, 3)), atol=1e-5)


def gradients(images, **weights):
    """Return a model, and the gradients of its loss with these weights at encoder and codebook."""
    torch.manual_seed(0)
    none = dict(l1_weight=0., l2_weight=0., codebook_weight=0., commit_weight=0.)
    model = VQGAN(replace(TINY, **none | weights)).double()
    inside = model.encoder.conv_in.weight, model.quantize.embedding.weight
    return model, inside, torch.autograd.grad(model.loss(images)[0], inside)


def parts(model, images):
    """Return unit vectors of the encoder [B,T,n], and their nearest codes [B,T,n]."""
    z = F.normalize(model.quant_conv(model.encoder(images)), dim=1).flatten(2).transpose(1, 2)
    codes = F.normalize(model.quantize.embedding.weight, dim=1)
    return z, codes[torch.cdist(z, codes.expand(len(z), -1, -1)).argmin(2)]


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("term, moves", [("codebook", 1), ("commit", 0)])
def test_one_term_moves_the_codes_and_the_other_moves_the_vectors(term, moves):
    model, inside, found = gradients(IMAGES, **{f"{term}_weight": 1.})
    z, code = parts(model, IMAGES)
    by_hand = torch.autograd.grad((z - code).square().mean(), inside)
    assert torch.allclose(found[moves], by_hand[moves]) and found[moves].abs().max() > 0
    assert not found[1 - moves].any()


def test_the_gradient_of_the_decoder_goes_straight_to_the_vectors():
    """The decoder reads codes. Its gradient there is handed to the vectors, as if they were the codes."""
    model, inside, found = gradients(IMAGES, l2_weight=1.)
    z, code = parts(model, IMAGES)
    code = code.detach().requires_grad_()
    (g,) = torch.autograd.grad((model.decode_vectors(code, 4, 4) - IMAGES).square().mean(), code)
    (by_hand,) = torch.autograd.grad(z, inside[0], g)
    assert torch.allclose(found[0], by_hand) and found[0].abs().max() > 0
    assert not found[1].any()                                            # and none to the codebook
