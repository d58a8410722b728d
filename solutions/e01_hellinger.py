"""Solution 1.

f(w) = 1 - 2 sqrt w + w;  f'(w) = 1 - 1/sqrt w, which is 0 at w = 1 as it should;  c = -w f' = sqrt w - w.
pi f(rho/pi) = (sqrt pi - sqrt rho)^2. Summed, that is 2 - 2 sum sqrt(pi rho); as a sum of squares it loses no
digits where pi is near rho.
f''(w) = 1/2 w^(-3/2), so f''(1) = 1/2: half as strong as a KL, and beta must be doubled.
Worth seeing: a lost token (w large) is pulled back in proportion to w, an overdone one (w small) is let go.
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
