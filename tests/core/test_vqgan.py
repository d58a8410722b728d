"""python -m pytest tests/core/test_vqgan.py"""
import random
import re

import pytest
import torch

from tiny import shapes
from common.config import locate
from vqgan import VQGAN, VQConfig
from tiny.world import load_models

TINY = VQConfig(codebook_size=64, ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, num_groups=8,
                entropy_weight=.1, collage_weight=.1, temperature=.1)


def released_keys(levels, blocks, widths):
    """Return {name: shape} of a LlamaGen VQ file. It follows a description of the files, not vqgan.py."""
    keys = {}

    def conv(name, n_in, n_out, k):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = (n_out, n_in, k, k), (n_out,)

    def norm(name, n):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = (n,), (n,)

    def res(name, n_in, n_out):
        norm(f"{name}.norm1", n_in), conv(f"{name}.conv1", n_in, n_out, 3)
        norm(f"{name}.norm2", n_out), conv(f"{name}.conv2", n_out, n_out, 3)
        if n_in != n_out:
            conv(f"{name}.nin_shortcut", n_in, n_out, 1)

    def attn(name, n):
        norm(f"{name}.norm", n)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", n, n, 1)
    for side, n_blocks in (("encoder", blocks), ("decoder", blocks + 1)):
        order = range(levels) if side == "encoder" else reversed(range(levels))
        n = widths[0] if side == "encoder" else widths[-1]
        conv(f"{side}.conv_in", 3 if side == "encoder" else 256, n, 3)
        for i, level in enumerate(order):
            for j in range(n_blocks):
                res(f"{side}.conv_blocks.{i}.res.{j}", n, widths[level])
                n = widths[level]
                if level == levels - 1:
                    attn(f"{side}.conv_blocks.{i}.attn.{j}", n)
            if side == "encoder" and level < levels - 1:
                conv(f"encoder.conv_blocks.{i}.downsample.conv", n, n, 3)
            if side == "decoder" and level > 0:
                conv(f"decoder.conv_blocks.{i}.upsample.conv", n, n, 3)
        res(f"{side}.mid.0", widths[-1], widths[-1]), res(f"{side}.mid.2", widths[-1], widths[-1])
        attn(f"{side}.mid.1", widths[-1])
        norm(f"{side}.norm_out", n if side == "decoder" else widths[-1])
        conv(f"{side}.conv_out", n, 256 if side == "encoder" else 3, 3)
    conv("quant_conv", 256, 8, 1), conv("post_quant_conv", 8, 256, 1)
    keys["quantize.embedding.weight"] = (16384, 8)
    return keys


@pytest.mark.parametrize("mult", [(1, 1, 2, 2, 4), (1, 2, 2, 4)])                 # VQ-16 and VQ-8
def test_keys_and_shapes_as_released(mult):
    with torch.device("meta"):
        state = VQGAN(VQConfig(ch_mult=mult)).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == released_keys(
        len(mult), 2, [128 * m for m in mult])
    if len(mult) == 5:
        assert sum(v.numel() for v in state.values()) == pytest.approx(72e6, rel=.01)


def test_round_trip_of_the_shipped_tokenizer():
    """Images survive 64 codes: the reader finds every attribute in at least 95 % of them (see LOG.md)."""
    _, vqgan, _, _ = load_models(locate("assets/tiny_base.pt"), "cpu")
    scenes = [s for _, s in shapes.random_scenes(400, random.Random(11), allow_unseen=True)]
    images = shapes.render(scenes)
    tokens = vqgan.encode(images)
    assert tokens.shape == (400, 64) and tokens.dtype == torch.long
    assert 0 <= tokens.min() and tokens.max() < 256
    painted = vqgan.decode(tokens)
    assert painted.shape == images.shape and (painted - images).abs().mean() < .04
    assert min(shapes.reader_accuracy(scenes, painted).values()) >= .95
    assert (vqgan.encode(painted) == tokens).float().mean() > .8                  # nearly a fixed point


def test_nearest_code_is_nearest():
    """The largest cosine is the smallest distance between unit vectors, which is computed one by one here."""
    torch.manual_seed(0)
    model, images = VQGAN(TINY), torch.rand(2, 3, 8, 8) * 2 - 1
    z = torch.nn.functional.normalize(model.quant_conv(model.encoder(images)), dim=1)       # [2,8,4,4]
    code = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=1)
    nearest = [[((code - z[b, :, i // 4, i % 4]) ** 2).sum(1).argmin().item() for i in range(16)]
               for b in range(2)]
    assert model.encode(images).tolist() == nearest
    assert torch.equal(model.decode(torch.tensor(nearest)).detach(),
                       model.decode_vectors(code[torch.tensor(nearest)], 4, 4).detach())


def test_loss_terms_and_straight_through():
    torch.manual_seed(0)
    model, images = VQGAN(TINY), torch.rand(4, 3, 8, 8) * 2 - 1
    loss, terms, tokens = model.loss(images)
    c = TINY
    weights = dict(codebook=c.codebook_weight, commit=c.commit_weight, entropy=c.entropy_weight,
                   l1=c.l1_weight, l2=c.l2_weight)
    assert loss.item() == pytest.approx(sum(weights[k] * v.item() for k, v in terms.items()), rel=1e-6)
    assert terms["l2"].item() == pytest.approx(
        (model.decode(tokens) - images).square().mean().item(), rel=1e-4)
    # entropy loss = E[H(p)] - H(E[p]), by torch.distributions
    z = torch.nn.functional.normalize(model.quant_conv(model.encoder(images)), dim=1)
    z = z.flatten(2).transpose(1, 2)
    p = torch.distributions.Categorical(
        logits=-torch.cdist(z, model.quantize.codes().expand(4, -1, -1)) ** 2 / .1)
    mean = torch.distributions.Categorical(probs=p.probs.mean((0, 1)))
    assert terms["entropy"].item() == pytest.approx((p.entropy().mean() - mean.entropy()).item(), abs=1e-2)
    (g,) = torch.autograd.grad(
        terms_l2 := (model.decode_vectors(z + (model.quantize.codes()[tokens] - z).detach(), 4, 4)
                     - images).square().mean(), z)
    assert terms_l2.item() == pytest.approx(terms["l2"].item(), rel=1e-5) and g.abs().sum() > 0


def test_collages():
    """Each image and each token of a collage: what is shown, which token is asked for, and its loss."""
    torch.manual_seed(0)
    model, images, mask = VQGAN(TINY), torch.rand(3, 3, 8, 8) * 2 - 1, torch.rand(3, 4, 4) < .5
    collages = images.clone()
    for b in range(3):
        for y in range(8):
            for x in range(8):
                collages[b, :, y, x] = images[b if mask[b, y // 2, x // 2] else 2 - b, :, y, x]
    loss, terms, tokens = model.loss(images, mask)
    both = torch.cat([images, collages])
    assert torch.equal(tokens, model.encode(both))
    assert terms["l2"].item() == pytest.approx((model.decode(tokens) - both).square().mean().item(), rel=1e-4)
    z = torch.nn.functional.normalize(model.quant_conv(model.encoder(collages)), dim=1)
    cost = 0
    for b in range(3):
        for t in range(16):
            asked = tokens[b if mask[b, t // 4, t % 4] else 2 - b, t]
            distance = (model.quantize.codes() - z[b, :, t // 4, t % 4]).square().sum(1)
            cost -= torch.log_softmax(-distance / TINY.temperature, 0)[asked].item() / 48
    assert terms["collage"].item() == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 3, 9, 9), (1, 3, 8, 16), (0, 3, 8, 8), ()])
def test_encode_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=f"encode takes.*{re.escape(str(shape))}"):
        VQGAN(TINY).encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 15), (16,), (0, 16), (1, 0), (1, 16, 1), ()])
def test_decode_refuses_what_is_no_square(shape):
    with pytest.raises(ValueError, match=f"decode takes.*{re.escape(str(shape))}"):
        VQGAN(TINY).decode(torch.zeros(shape, dtype=torch.long))
