"""python -m pytest exercises/test_e13_clip_and_size.py          (-s shows a table)

All shares have a tolerance of .005, so a simulation with 200,000 draws passes.
"""
import pytest
import torch

from divergences import Gaussian

SIZES = 512, 8192, 65536
NOISE = {.01: .0105, .02: .2005, .05: .6087}               # {q: share of the noise outside, with the rule}


def shares(exercise, *args, **options):
    """Return your shares (below, above)."""
    found = exercise.share_outside(*args, **options)
    assert len(found) == 2, "return two shares: below 1 - eps, and above 1 + eps"
    return found


def test_the_rule(exercise):
    assert exercise.clip(65536) == pytest.approx(1e-4), "the published clip, 1e-4, is that of n = 65,536"
    for n in (512, 3072, 16384):
        assert exercise.clip(n) == pytest.approx(2 * exercise.clip(4 * n), rel=1e-3), (
            f"clip({n}) is {exercise.clip(n):.3g}, and clip({4 * n}) is {exercise.clip(4 * n):.3g}. With 4 "
            "times the components, the standard deviation of the noise is half, so eps must be half")


def test_the_noise_is_outside_equally_often(exercise):
    for q, right in NOISE.items():
        for n in SIZES:
            below, above = shares(exercise, q, n, exercise.clip(n), centred=True)
            assert below + above == pytest.approx(right, abs=.005), (
                f"q = {q}, n = {n}: {right:.1%} of the noise is outside at every n, you give "
                f"{below + above:.1%}")
            assert below == pytest.approx(above, abs=.005), (
                f"q = {q}, n = {n}: noise is below as often as above; you give {below:.1%} and {above:.1%}")


def simulated(q, n, samples):
    """Return ratios [samples]: x is sampled from a Gaussian, and the mean of another one has moved by q."""
    g, std = torch.Generator().manual_seed(0), torch.tensor([.3], dtype=torch.float64)
    d = torch.randn(n, generator=g, dtype=torch.float64)
    old = Gaussian(torch.zeros(samples, 1, n, dtype=torch.float64), std)
    new = Gaussian(old.mean + std * d * q / d.square().mean().sqrt(), std)
    x = std * torch.randn(samples, 1, n, generator=g, dtype=torch.float64)
    return ((new.log_prob(x) - old.log_prob(x)) / n).exp()[:, 0]


def test_agrees_with_gaussians_of_divergences_py(exercise):
    for q, n, samples, tolerance in ((.02, 512, 2000, .04), (.05, 512, 2000, .04), (.02, 8192, 250, .1)):
        eps = exercise.clip(n)
        yours, ratio = shares(exercise, q, n, eps), simulated(q, n, samples)
        right = [outside.double().mean().item() for outside in (ratio < 1 - eps, ratio > 1 + eps)]
        assert yours == pytest.approx(right, abs=tolerance), (
            f"q = {q}, n = {n}, eps = {eps:.2g}: of {samples} samples, {right[0]:.1%} are below and "
            f"{right[1]:.1%} above; you give {yours[0]:.1%} and {yours[1]:.1%}. (The mean of L is -q^2 / 2, "
            "so more are below. The standard deviation of L is q / sqrt(n).)")


def test_the_copied_clip_is_too_small(exercise):
    for q, copied, rule in ((.003, .451, 0), (.02, .912, .212), (.05, .969, .662)):
        for eps, right in ((1e-4, copied), (exercise.clip(512), rule)):
            yours = sum(shares(exercise, q, 512, eps))
            assert yours == pytest.approx(right, abs=.005), (
                f"q = {q}, n = 512, eps = {eps:.2g}: {right:.1%} of the samples are outside; you give "
                f"{yours:.1%}")


def test_the_mean_does_not_scale_like_the_noise(exercise):
    """So the shares of L differ. Only while q sqrt(n) is small, they are those of the noise."""
    print("\n     q        n    noise outside    L below    L above")
    for q, sizes in {.01: (.0113, .0191, .1000), .02: (.2123, .3680, .9000)}.items():
        for n, right in zip(SIZES, sizes):
            eps = exercise.clip(n)
            below, above = shares(exercise, q, n, eps)
            noise = sum(shares(exercise, q, n, eps, centred=True))
            print(f"{q:6} {n:8} {noise:15.1%} {below:11.1%} {above:10.1%}")
            assert below + above == pytest.approx(right, abs=.005), (
                f"q = {q}, n = {n}: {right:.1%} of the samples are outside, you give {below + above:.1%}. "
                f"(The noise alone: {NOISE[q]:.1%}. In standard deviations of the noise, the mean is "
                f"{-q * n ** .5 / 2:.2f}.)")
    below, above = shares(exercise, .02, 65536, 1e-4)
    assert below > .89 and above < .001, "at full size, the samples outside are all below 1 - c"
    for q, n in ((.02, 64), (.01, 512)):
        assert sum(shares(exercise, q, n, exercise.clip(n))) == pytest.approx(NOISE[q], abs=.006)


def test_at_the_same_kl_the_rule_is_one_over_n(exercise):
    """If q sqrt(n) = 1 at every n, mean and noise both shrink like 1/n. Then eps = 1/n gives equal shares."""
    for n in SIZES:
        yours = shares(exercise, n ** -.5, n, 1 / n)
        assert yours == pytest.approx((.3085, .0668), abs=.005), (
            f"q = 1/sqrt(n), n = {n}, eps = 1/n: 30.9 % are below and 6.7 % above; you give {yours[0]:.1%} "
            f"and {yours[1]:.1%}")
