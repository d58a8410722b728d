"""python -m pytest exercises/test_e11_rounded_states.py          (-s shows the ratio)

The first two tests pass with the bug. The first test is the loose check that people usually write.
"""
from functools import lru_cache

import torch

from divergences import Gaussian
from flow import step_table, time_grid

B, N, STEPS = 4, 16 * 64 * 64, 9                              # n of the latents of SD3.5 at 512 x 512 pixels
TIMES = time_grid(STEPS + 1, 3.).float()
TABLE = [column[:STEPS] for column in step_table(time_grid(STEPS + 1, 3.), noise=.4)]    # the noisy steps


def velocity(x, t):
    """A velocity that is not linear, and no component depends on its own place alone."""
    return (x + .3 * torch.tanh(x.roll(1, -1)) * t) / (1 + t)


@lru_cache(maxsize=1)
def sampled(exercise, store=torch.bfloat16):
    """Return your states and log-probabilities, and the noise."""
    noise = torch.randn(B, STEPS + 1, N, generator=torch.Generator().manual_seed(0))
    states, logp = exercise.rollout(velocity, TIMES[:-1], TABLE, noise, store)
    assert states.shape == (B, STEPS + 1, N) and logp.shape == (B, STEPS), (
        f"states must be [B,K+1,n] and log-probabilities [B,K]; yours are {list(states.shape)} and "
        f"{list(logp.shape)}")
    return states, logp, noise


def of_the_loss(states):
    """Return the Gaussians of all steps, as the loss computes them from the stored states."""
    x = states.float()
    means = [c_x * x[:, k] + c_v * velocity(x[:, k], TIMES[k]) for k, (c_x, c_v, _) in enumerate(zip(*TABLE))]
    return Gaussian(torch.stack(means, 1), TABLE[2])


def ratios(states, logp):
    return (of_the_loss(states).log_prob(states[:, 1:].float()) / N - logp).exp()                # [B,K]


def test_to_three_digits_the_ratio_is_one(exercise):
    states, logp, _ = sampled(exercise)
    error = (ratios(states, logp) - 1).abs().max().item()
    assert error < 1e-3, f"the ratio is off by {error:.2g}. It was off by less before. What did you change?"


def test_states_stay_in_bf16(exercise):
    states, logp, _ = sampled(exercise)
    assert states.dtype == torch.bfloat16, (
        f"the states must be stored in bf16, yours are {states.dtype}. fp32 would hide the bug, "
        "at twice the memory")
    assert logp.dtype == torch.float32, (
        f"the log-probabilities must be fp32, yours are {logp.dtype}: bf16 has two or three digits")


def test_after_the_rollout_the_ratio_is_one(exercise):
    for store in (torch.bfloat16, torch.float16):
        states, logp, _ = sampled(exercise, store)
        r = ratios(states, logp)
        print(f"{store}: mean ratio {r.mean():.7f}, {(r < 1).float().mean():.0%} of the ratios below 1")
        wrong = [k for k, error in enumerate((r - 1).abs().amax(0).tolist()) if not error <= 1e-6]
        assert not wrong, (
            f"states in {store}: the mean ratio is {r.mean():.7f}, and some ratio is off by "
            f"{(r - 1).abs().max():.1e}; all must be 1 to 1e-6. Wrong steps: {wrong}. (All steps: round x "
            "before its log-probability is computed. Only step 0: what about the first state? All but step "
            "0: continue with the rounded x.)")


def test_each_state_is_sampled_from_the_stored_one_before_it(exercise):
    """A stored state is the mean of its step, plus std z, rounded once. Rounding changes it by 1/256 at most,
    relative to its value."""
    states, _, noise = sampled(exercise)
    first = (states[:, 0].float() - noise[:, 0]).abs() / noise[:, 0].abs()
    assert first.max() <= 1 / 256 + 1e-6, "the first state must be noise[:, 0], rounded"
    step = of_the_loss(states)
    right = step.mean + step.std * noise[:, 1:]
    off = ((states[:, 1:].float() - right).abs() > right.abs() / 256 + 1e-6).float().mean().item()
    assert off == 0, (
        f"{off:.0%} of the components of the states differ from mean + std z by more than one rounding, with "
        "the mean computed from the stored state before. So the policy that sampled is not the one whose "
        "probability you return. Continue with the rounded x")
