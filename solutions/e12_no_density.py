"""Solution 12.

With dt = end - t < 0, sort equation 6 of flow.py,
    x' = x + [v + s^2/(2t) (x + (1 - t) v)] dt + s sqrt(-dt) z
       = [1 + s^2 dt/(2t)] x + [1 + s^2 (1 - t)/(2t)] dt v + s sqrt(-dt) z.
The step shrinks x before it adds noise. Both effects on the variance are of order s^2 dt, and they cancel.
What remains is of order dt^2 per step, so the density is kept exactly only in the limit of small steps. For
normal data of standard deviation .64 and 8 steps, the samples have .610 with noise, and .539 without.

The density of a vector with independent components is a product, so its logarithm is a sum. At x' = mean it
is -n log(std) + constant, which has no limit as s goes to 0. The log-ratio of two policies there is
-|difference of the means|^2 / (2 std^2), which has none either.
"""
import math


def step(t, end, s):
    dt = end - t
    return 1 + s ** 2 * dt / (2 * t), (1 + s ** 2 * (1 - t) / (2 * t)) * dt, s * math.sqrt(-dt)


def log_density(after, x, v, t, end, s):
    c_x, c_v, std = step(t, end, s)
    if std == 0:
        raise ValueError(f"a step without noise has no density: s must be above 0, got {s}")
    z = (after - c_x * x - c_v * v) / std
    return (-z ** 2 / 2 - math.log(std) - math.log(2 * math.pi) / 2).flatten(1).sum(1)
