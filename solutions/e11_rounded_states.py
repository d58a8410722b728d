"""Solution 11.

The log-probability was that of x before x was rounded, but the loss sees x after it was rounded. Let e be
the rounding error of x, and d the shift of the mean that follows from the error of the state before. With z
independent of them, a component of the log-ratio is
    -(z + (e - d)/std)^2 / 2 + z^2 / 2 = -z (e - d)/std - (e - d)^2 / (2 std^2).
The first term averages to 0. The second term is never positive, so the ratios lie below 1. The fix has two
parts. Round the first state. Round each next state *before* its log-probability is computed, and continue
with the rounded state. Then the loss repeats the computation of the rollout on the same numbers.

Computing the log-probabilities again from the stored states also gives a ratio of 1. But if the rollout
continued with the unrounded x, these are not the log-probabilities of the policy that sampled.

One inaccuracy is left. A rounded state is not quite a sample of the Gaussian. bf16 has a spacing of 1/128
between 1 and 2, and std is .15 or more in the checker. So the density hardly changes over one rounding.
"""
import torch

from divergences import Gaussian


def rollout(velocity, times, table, noise, store=torch.bfloat16):
    x = noise[:, 0].to(store).float()
    states, logp = [x.to(store)], []
    for k, (c_x, c_v, std) in enumerate(zip(*table)):
        mean = c_x * x + c_v * velocity(x, times[k])
        x = (mean + std * noise[:, k + 1]).to(store).float()
        step = Gaussian(mean[:, None], std[None])
        logp.append(step.log_prob(x[:, None])[:, 0] / x.shape[1])
        states.append(x.to(store))
    return torch.stack(states, 1), torch.stack(logp, 1)
