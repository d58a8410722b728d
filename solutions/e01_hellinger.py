"""Solution 1.

f(w) = 1 - 2 sqrt w + w, and f'(w) = 1 - 1/sqrt w, which is 0 at w = 1 as required. So c = -w f' = sqrt w - w.
pi f(rho/pi) = (sqrt pi - sqrt rho)^2. The sum over all codes equals 2 - 2 sum sqrt(pi rho), but a sum of
squares loses no digits where pi is near rho.
f''(w) = 1/2 w^(-3/2), so f''(1) = 1/2. Hellinger is half as strong as a KL, so beta must be doubled.
Note the shape of c. A suppressed token (w large) is pulled back in proportion to w. For a boosted token (w
small) c goes to 0.
"""
from divergences import Divergence


def f(x):
    return (1 - (x / 2).exp()) ** 2


def c(x):
    return (x / 2).exp() - x.exp()


def exact(logp, logq):
    return ((logp / 2).exp() - (logq / 2).exp()).square().sum(-1)


def beta_factor():
    return 2.0


HELLINGER = Divergence(f, c, exact)
