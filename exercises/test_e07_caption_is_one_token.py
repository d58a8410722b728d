"""python -m pytest exercises/test_e07_caption_is_one_token.py"""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def batch(t, n, B=3, hd=8, seed=0):
    """Return q [B,hd], k and v [B,t,hd], and prefix_v [B,n,hd], all with gradient, in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()
            for shape in ((B, hd), (B, t, hd), (B, t, hd), (B, n, hd))]


def plain(q, k, v, prefix_v):
    """Return plain attention over all n + t positions, where the prompt tokens have keys of zero."""
    keys, values = torch.cat([torch.zeros_like(prefix_v), k], 1), torch.cat([prefix_v, v], 1)
    weights = ((keys @ q[:, :, None])[..., 0] / math.sqrt(q.shape[1])).softmax(1)
    return (weights[:, None] @ values)[:, 0]


def diagnosis(yours, q, k, v, prefix_v):
    """Return a sentence that names the mistake, if y shows a common one."""
    n, hd = prefix_v.shape[1:]
    logits = (k @ q[:, :, None])[..., 0]
    values = torch.cat([prefix_v.mean(1, keepdim=True), v], 1)
    for first, scale, value, what in (
            (0., hd ** -.5, values, f"log n is missing: {n} prompt tokens have the weight of one, "
             f"1 / (1 + ...) instead of {n} / ({n} + ...), so the model nearly ignores the prompt."),
            (float(n), hd ** -.5, values, "You add n. exp(logit) must be n, so the logit is log n."),
            (math.log(n), 1., values, "The logits of the image tokens lack the factor 1 / sqrt(hd)."),
            (math.log(n) * hd ** -.5, hd ** -.5, values, "Add log n *after* the division by sqrt(hd)."),
            (math.log(n), hd ** -.5, torch.cat([prefix_v.sum(1, keepdim=True), v], 1),
             "n counts twice: in the logit, and in a value that is a sum instead of a mean.")):
        weights = torch.cat([torch.full_like(q[:, :1], first), logits * scale], 1).softmax(1)
        if torch.allclose(yours, (weights[:, None] @ value)[:, 0]):
            return what
    return "The one token has key 0, the logit log n, and the mean of the prompt's values."


@pytest.mark.parametrize("t, n", [(10, 5), (1, 120), (64, 24), (7, 1)])
def test_equals_plain_attention(exercise, t, n):
    inputs = batch(t, n)
    right, yours = plain(*inputs), exercise.collapsed(*inputs)
    assert yours.shape == right.shape, f"y is [B,hd] = {tuple(right.shape)}, not {tuple(yours.shape)}"
    assert torch.allclose(yours, right, atol=1e-10), (
        f"{n} prompt tokens, {t} image tokens: y is off by up to {(yours - right).abs().max():.3f}. "
        + diagnosis(yours, *inputs))


class Sizes(TorchDispatchMode):
    """Record the sizes of all tensors that are computed inside."""

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
        "the result is right, but it uses a tensor of n + t = 73 places: the plain form. Turn the prompt "
        "into one token, so that nothing is longer than 1 + t = 51.")
    assert 51 in sizes.seen, "there is no softmax over 1 + t = 51 logits"


def test_before_the_first_image_token(exercise):
    inputs = batch(0, 5)
    yours = exercise.collapsed(*inputs)
    assert torch.allclose(yours, inputs[3].mean(1)), "without image tokens (t = 0), y is the prompt's mean"


def test_gradients_too(exercise):
    inputs = batch(10, 5, seed=1)
    right, yours = (torch.autograd.grad(f(*inputs).square().sum(), inputs)
                    for f in (plain, exercise.collapsed))
    for name, a, b in zip(("q", "k", "v", "prefix_v"), right, yours):
        assert torch.allclose(a, b, atol=1e-10), (
            f"the gradient of sum y^2 with respect to {name} is off by up to {(a - b).abs().max():.3f}: "
            + diagnosis(exercise.collapsed(*inputs), *inputs))
    spread = yours[3].std(1).max().item()
    assert spread < 1e-12, f"all prompt tokens must get the same gradient, yours differ by {spread:.1e}"
