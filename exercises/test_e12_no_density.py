"""python -m pytest exercises/test_e12_no_density.py"""
import math

import pytest
import torch

from flow import step_table, time_grid

GRIDS = [(4, 1.), (10, 3.), (17, 2.)]                      # steps and shift


def level(t, end, noise=.7):
    """Return s of Flow-GRPO. At t = 1 its denominator takes the next time."""
    return noise * math.sqrt(t / (1 - (end if t == 1 else t)))


def grid(steps, shift):
    """Return [(t, end), ...] of a grid."""
    times = time_grid(steps, shift).tolist()
    return list(zip(times, times[1:]))


def spread_of_samples(step, steps, spread, s_of):
    """Return the standard deviation of samples, by an exact recursion. The data are N(0, spread^2), for which
    the best velocity is known. The last step has no noise."""
    variance = 1.
    for t, end in grid(steps, 1.):
        slope = (t - (1 - t) * spread ** 2) / ((1 - t) ** 2 * spread ** 2 + t ** 2)              # v = slope x
        c_x, c_v, std = step(t, end, s_of(t, end) if end else 0.)
        variance = (c_x + c_v * slope) ** 2 * variance + std ** 2
    return variance ** .5


def test_agrees_with_step_table(exercise):
    for steps, shift in GRIDS:
        for sampler, s_of in (("sde", level), ("constant", lambda t, end: .3)):
            table = step_table(time_grid(steps, shift), sampler, .3 if sampler == "constant" else .7)
            for k, (t, end) in enumerate(grid(steps, shift)[:-1]):
                yours = exercise.step(t, end, s_of(t, end))
                assert len(yours) == 3, "return c_x, c_v, std"
                for name, found, right in zip(("c_x", "c_v", "std"), yours, (y[k].item() for y in table)):
                    assert found == pytest.approx(right, abs=1e-5), (
                        f"from t = {t:.3f} to {end:.3f} with s = {s_of(t, end):.3f}: {name} is {right:.5f}, "
                        f"you give {found:.5f}. (c_x is below 1 and c_v below 0, because dt is negative. "
                        "std is s sqrt(-dt).)")


def test_noise_keeps_the_distribution(exercise):
    """Any noise level keeps the distribution, if the steps are small."""
    levels = {"s of Flow-GRPO": level, "s = .5": lambda t, end: .5, "s = .2 + t": lambda t, end: .2 + t}
    for name, s_of in levels.items():
        for spread in (.3, .64, 1.5):
            yours = spread_of_samples(exercise.step, 1000, spread, s_of)
            assert yours == pytest.approx(spread, rel=.015), (
                f"{name}, 1000 steps: data of standard deviation {spread} come out with {yours:.3f}. (Too "
                "wide: the drift that takes the noise back is missing, too weak, or has the wrong sign. Too "
                "narrow: it is too strong, or std is too small.)")


def test_few_steps_keep_it_only_nearly(exercise):
    found = [spread_of_samples(exercise.step, 8, .64, s_of) for s_of in (level, lambda t, end: 0.)]
    assert found == pytest.approx([.610, .539], abs=6e-4), (
        "8 steps, data of standard deviation .64: .610 comes out with noise, and .539 without; yours are "
        f"{found[0]:.3f} and {found[1]:.3f}")


def batch():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, 2, 3, generator=g, dtype=torch.float64) for _ in range(3)]


def test_log_density_is_that_of_a_normal_distribution(exercise):
    after, x, v = batch()
    t, end, s = .8, .7, 1.4
    c_x, c_v, std = 1 - s * s * .1 / 1.6, -(1 + s * s * .2 / 1.6) * .1, s * .1 ** .5
    right = torch.distributions.Normal(c_x * x + c_v * v, std).log_prob(after).sum((1, 2))
    yours = exercise.log_density(after, x, v, t, end, s)
    assert yours.shape == (5,), f"one number for each sample: [5], yours is {list(yours.shape)}"
    lost = (6 * (math.log(std) + math.log(2 * math.pi) / 2), 6 * math.log(std), 3 * math.log(2 * math.pi))
    hint = ("The mean over the components is not the density of the vector: take the sum."
            if torch.allclose(yours, right / 6) else
            "It does not integrate to 1: a term that depends on neither x' nor v is missing."
            if any(torch.allclose(yours, right + term) for term in lost) else
            "It is -(x' - mean)^2 / (2 std^2) - log std - log(2 pi)/2, summed over the components.")
    assert torch.allclose(yours, right, atol=1e-8), f"off by up to {(yours - right).abs().max():.4f}. {hint}"


def test_it_integrates_to_one(exercise):
    after = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    one = torch.ones_like(after)
    for t, end, s in ((1., .9, .7), (.5, .3, .7), (.2, .1, .4)):
        total = exercise.log_density(after, one, -one, t, end, s).exp().sum().item() * 16 / 4000
        assert total == pytest.approx(1, abs=1e-6), f"over x', your density integrates to {total:.6f}, not 1"


def test_without_noise_there_is_no_density(exercise):
    after, x, v = batch()
    assert exercise.step(.5, .3, 0.) == pytest.approx((1, -.2, 0)), "at s = 0 the step is x + v dt; it exists"
    for point in (after, x - .2 * v):                      # any point, and the point that the step leads to
        with pytest.raises(ValueError, match="density"):   # not the "math domain error" of log(0)
            exercise.log_density(point, x, v, .5, .3, 0.)


def test_the_log_ratio_has_no_limit_without_noise(exercise):
    """A velocity that differs by a little, at the mean of the first: -|difference of means|^2 / (2 std^2)."""
    _, x, v = batch()
    found = []
    for s in (1e-2, 1e-3):
        c_x, c_v, _ = exercise.step(.5, .3, s)
        after = c_x * x + c_v * v
        old, new = (exercise.log_density(after, x, y, .5, .3, s) for y in (v, v + .01))
        found.append((new - old)[0].item())
    assert found[0] == pytest.approx(-.6, rel=1e-2) and found[1] == pytest.approx(-60, rel=1e-2), (
        "with a tenth of the noise, the log-ratio is 100 times as large: -.6 at s = .01 and -60 at s = .001; "
        f"yours are {found[0]:.4g} and {found[1]:.4g}")
