"""python -m pytest exercises/test_e10_guided_ratio.py"""
import pytest
import torch

from model import GPT, GPTConfig

SCALE = 3.


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def sampled(request):
    """Return gpt, tokens, logp, cond, mask: a tiny GPT with random weights, and 8 images sampled at SCALE."""
    cfg = GPTConfig(dim=32, n_layer=2, n_head=2, multiple_of=8, vocab_size=37, block_size=16, caption_dim=12,
                    cls_token_num=5)
    gpt, g = GPT(cfg), torch.Generator().manual_seed(0)
    gpt.load_state_dict({name: torch.randn(t.shape, generator=g) * .2 + ("norm" in name)
                         for name, t in gpt.state_dict().items()})
    gpt.to(request.param).eval()
    cond = torch.randn(8, 5, 12, generator=g).to(request.param)
    mask = torch.arange(5) >= torch.tensor([0, 2, 4, 1] * 2)[:, None]                     # padded on the left
    tokens, logp = gpt.generate(cond, mask, cfg_scale=SCALE, generator=g, return_logp=True)
    return gpt, tokens, logp, cond, mask


def by_hand(sampled, scale):
    """Return the largest |pi/pi_old - 1|, with two separate forward passes that are combined here."""
    gpt, tokens, logp, cond, mask = sampled
    with torch.no_grad():
        conditional = gpt(tokens, cond, mask)
        empty = gpt(tokens, gpt.cls_embedding.uncond_embedding.expand_as(cond), mask)
    pi = (empty + scale * (conditional - empty)).softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return (pi / logp.exp() - 1).abs().max().item()


def test_computed_as_sampled_the_ratio_is_one(exercise, sampled):
    yours = exercise.ratio_error(*sampled, SCALE)
    assert isinstance(yours, float), "return a float (.item())"
    assert 0 <= yours < 1e-4, (
        f"sampled and computed at scale {SCALE}, the ratio must be 1 to 1e-4; yours is off by {yours:.2g}. "
        f"(Without guidance it is off by {by_hand(sampled, 1):.2g}. Did you pass cfg_scale on?)")


def test_computed_without_guidance_it_is_not(exercise, sampled):
    yours, right = exercise.conditional_only_error(*sampled, SCALE), by_hand(sampled, 1)
    guided = exercise.ratio_error(*sampled, SCALE)
    print(f"largest |pi/pi_old - 1|: with guidance {guided:.1e}, without {yours:.1f}")
    assert yours == pytest.approx(right, rel=1e-3), (
        f"with the conditional logits, the largest |pi/pi_old - 1| is {right:.4g}; you give {yours:.4g}")
    assert yours > 1, "the error is large: some token has over twice the probability that it was sampled with"


def test_each_scale_has_its_own_ratio(exercise, sampled):
    """A scale that is nearly right is wrong as well. At scale 1 both functions are equal."""
    gpt, _, _, cond, mask = sampled
    for scale in (2.5, 4.):
        yours, right = exercise.ratio_error(*sampled, scale), by_hand(sampled, scale)
        assert yours == pytest.approx(right, rel=1e-3), (
            f"sampled at {SCALE}, computed at {scale}: the error is {right:.4g}; you give {yours:.4g}")
    plain = gpt.generate(cond, mask, generator=torch.Generator().manual_seed(1), return_logp=True)
    for f in (exercise.ratio_error, exercise.conditional_only_error):
        assert f(gpt, *plain, cond, mask, 1.) < 1e-4, (
            "without guidance in the sampler, both functions must find a ratio of 1")
