"""python -m pytest tests/lab/test_bench.py

lab/bench.py compares the speed of model.py with the plain path of lab/plain.py. The comparison is valid only
if both compute the same. These tests check this on random weights in the released layout: 120 prompt features
of width 2,048, and heads of width 64.
"""
import pytest
import torch
from torch.testing import assert_close

from lab import bench, measure

CPU = torch.device("cpu")
LAYOUT = dict(n_layer=3, n_head=2, dim=128, vocab_size=512, block_size=64)         # the rest is as released


def setup(dtype=torch.float32, n=2, samples=3, scale=4):
    torch.manual_seed(0)
    gpt = bench.build("", CPU, dtype, **LAYOUT)
    for p in gpt.parameters():                     # with larger weights, attention is far from a plain mean
        if p.dim() == 2:
            p.mul_(scale)
    return gpt, bench.Plain(gpt), bench.prompts(gpt, n, CPU, dtype, samples)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("cfg_scale", [1.0, 7.5])
def test_both_paths_give_the_same_logits(cfg_scale, dtype, error):
    """error is in units of the largest logit: guidance makes large logits, and rounding grows with them."""
    gpt, plain, cond = setup(dtype)
    tokens = torch.randint(512, (6, 64))
    a, b = gpt(tokens, *cond, cfg_scale=cfg_scale), plain.forward(tokens, *cond, cfg_scale)
    assert b.std() > .5
    assert_close(a, b, rtol=0, atol=error * max(1, b.abs().max().item()))
    # The logits depend on the prompt.
    assert (plain.forward(tokens, cond[0].flip(0), *cond[1:], cfg_scale) - b).abs().max() > .1


@pytest.mark.parametrize("cfg_scale", [1.0, 7.5])
def test_both_paths_draw_the_same_tokens(cfg_scale):
    gpt, plain, cond = setup()
    a, b = (f.generate(*cond, cfg_scale=cfg_scale, generator=torch.Generator().manual_seed(3))
            for f in (gpt, plain))
    assert torch.equal(a, b) and len(a.unique()) > 20


def test_bf16_is_no_further_from_the_truth_than_the_plain_path():
    """bf16 rounds log n in model.py, while the plain path has exact zeros. This error must not dominate."""
    gpt, plain, cond = setup(torch.float32)
    tokens = torch.randint(512, (6, 64))
    truth = gpt(tokens, *cond)
    gpt.bfloat16()
    cond = cond[0].bfloat16(), *cond[1:]
    ours, theirs = ((f(tokens, *cond) - truth).square().mean().sqrt() for f in (gpt, plain.forward))
    assert ours < 1.1 * theirs and theirs < .1 * truth.std()


def test_peak_bytes_counts_what_is_alive_at_once():
    def f():
        a = torch.zeros(2 ** 20)                                        # 4 MiB
        b = a + 1                                                       # 8 MiB
        del a
        return (b * 2).sum()                                            # 8 MiB again
    assert measure.peak_bytes(f, CPU) == pytest.approx(8 * 2 ** 20, rel=.01)


def test_sampling_memory_is_linear_in_images_with_the_slope_of_the_cache():
    gpt, _, _ = setup()
    few, many = (measure.peak_bytes(lambda: gpt.generate(*bench.prompts(gpt, 1, CPU, torch.float32, n)), CPU)
                 for n in (16, 32))                                    # below 16, reading the prompt peaks
    cache = 2 * 4 * 64 * 128 * 3                                        # k and v, fp32, T, D, layers
    assert (many - few) / 16 == pytest.approx(cache, rel=.25)
