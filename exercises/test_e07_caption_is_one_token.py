"""python -m pytest exercises/test_e07_caption_is_one_token.py"""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def batch(t, n, B=3, hd=8, seed=0):
    """q [B,hd], k and v [B,t,hd], prefix_v [B,n,hd], all with gradient, in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
            for shape in ((B, hd), (B, t, hd), (B, t, hd), (B, n, hd))]


def plain(q, k, v, prefix_v):
    """All n + t positions, the caption's with keys of zero."""
    keys, values = torch.cat([torch.zeros_like(prefix_v), k], 1), torch.cat([prefix_v, v], 1)
    weights = ((keys @ q[:, :, None])[..., 0] / math.sqrt(q.shape[1])).softmax(1)
    return (weights[:, None] @ values)[:, 0]


def diagnosis(yours, q, k, v, prefix_v):
    """A sentence on which near miss it is, if any."""
    n, hd = prefix_v.shape[1:]
    scores = (k @ q[:, :, None])[..., 0]
    values = torch.cat([prefix_v.mean(1, keepdim=True), v], 1)
    for first, scale, value, what in (
            (0., hd ** -.5, values, f"This comes out without log n: {n} caption tokens weigh as much as "
             f"one, 1 / (1 + ...) in place of {n} / ({n} + ...), and the model goes nearly deaf."),
            (float(n), hd ** -.5, values, "You add n. exp(score) is to be n, so the score is log n."),
            (math.log(n), 1., values, "The scores of the image tokens lack their 1 / sqrt(hd)."),
            (math.log(n) * hd ** -.5, hd ** -.5, values, "log n is added *after* the division by sqrt(hd)."),
            (math.log(n), hd ** -.5, torch.cat([prefix_v.sum(1, keepdim=True), v], 1),
             "n is in twice: in the score, and in a value that is a sum and not a mean.")):
        weights = torch.cat([torch.full_like(q[:, :1], first), scores * scale], 1).softmax(1)
        if torch.allclose(yours, (weights[:, None] @ value)[:, 0]):
            return what
    return "One token with key 0, a score of log n and the mean of the caption's values."


@pytest.mark.parametrize("t, n", [(10, 5), (1, 120), (64, 24), (7, 1)])
def test_equals_plain_attention(exercise, t, n):
    inputs = batch(t, n)
    right, yours = plain(*inputs), exercise.collapsed(*inputs)
    assert yours.shape == right.shape, f"y is [B,hd] = {tuple(right.shape)}, not {tuple(yours.shape)}"
    assert torch.allclose(yours, right, atol=1e-10), (
        f"{n} caption tokens, {t} image tokens: off by up to {(yours - right).abs().max():.3f}. "
        + diagnosis(yours, *inputs))


class Sizes(TorchDispatchMode):
    """Notes the sizes of all that is computed inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= set(out.shape) if isinstance(out, torch.Tensor) else set()
        return out


def test_a_softmax_over_1_plus_t(exercise):
    with Sizes() as sizes:
        exercise.collapsed(*batch(50, 23))
    assert 50 + 23 not in sizes.seen, (
        "right, but with a tensor of n + t = 73 places: that is the plain form. Make one token of the "
        "caption, so that nothing is longer than 1 + t = 51.")
    assert 51 in sizes.seen, "where is the softmax over 1 + t = 51 scores?"


def test_before_the_first_image_token(exercise):
    inputs = batch(0, 5)
    yours = exercise.collapsed(*inputs)
    assert torch.allclose(yours, inputs[3].mean(1)), "without image tokens (t = 0) y is the caption's mean"


def test_gradients_too(exercise):
    inputs = batch(10, 5, seed=1)
    right, yours = (torch.autograd.grad(f(*inputs).square().sum(), inputs)
                    for f in (plain, exercise.collapsed))
    for name, a, b in zip(("q", "k", "v", "prefix_v"), right, yours):
        assert torch.allclose(a, b, atol=1e-10), (
            f"the gradient of sum y^2 with respect to {name} is off by up to {(a - b).abs().max():.3f}: "
            + diagnosis(exercise.collapsed(*inputs), *inputs))
    spread = yours[3].std(1).max().item()
    assert spread < 1e-12, f"read evenly, all caption tokens get one gradient; yours differ by {spread:.1e}"
