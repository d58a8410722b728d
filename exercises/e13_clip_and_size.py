"""Exercise 13. One clip for all sizes.

Check yourself:   python -m pytest exercises/test_e13_clip_and_size.py         (-s shows a table)

First read policy_loss in grpo.py. Flow-GRPO divides the log-ratio of a step by n, the number of components of
x. It clips the ratio to 1 +- eps, with eps = .0001. This eps belongs to n = 65,536, the latents of SD3.5 at
512 x 512 pixels. Copied to a smaller world, it does something else. Symbols:
    std      of the step
    d        [n]: by how much an update has moved the mean of each component, in units of std
    q        the root mean square of d
    z        [n]: the noise of the sample, z ~ N(0, 1)
    L        the log-ratio per component. A sample is outside if e^L < 1 - eps or e^L > 1 + eps
A component contributes d z - d^2 / 2 to the log-ratio. The mean over n components is exactly normal:
    L ~ N(-q^2 / 2, q^2 / n).
The noise of L shrinks like 1/sqrt(n). So eps = .0001 is too small at n = 512, for latents of 8 x 8 x 8. There
it puts 45 % of the samples outside at q = .003, and 97 % at q = .05. Write the rule that scales eps, so that
the noise of L is outside equally often at every n. Then measure how often L itself is outside.

The rule is not the whole truth. The noise of L shrinks with n, but its mean -q^2 / 2 does not. So no rule
for eps makes the shares of L equal at every n, whatever q is. The table that -s shows compares both.

A sample outside does not always lose its gradient: see the four cases of exercise 4.

Hint: statistics.NormalDist has a cdf. A simulation of L with 200,000 draws is also precise enough.
"""


def clip(n):
    """Return the eps of n components, a float, with clip(65536) = 1e-4.

    For each q, the noise L + q^2 / 2 must be outside (nearly) equally often at every n.
    """
    raise NotImplementedError("your turn")


def share_outside(q, n, eps, centred=False):
    """Return the shares of samples below 1 - eps and above 1 + eps, two floats.

    centred: of L + q^2 / 2, the noise alone, instead of L.
    """
    raise NotImplementedError("your turn")
