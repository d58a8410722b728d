"""Exercise 1. A fourth divergence: squared Hellinger.

Check yourself:   python -m pytest exercises/test_e01_hellinger.py

Read divergences.py first. There every divergence is D = E_pi[f(w)] with w = rho(a) / pi(a) and x = log w. It
has three functions: f, the coefficient c = -w f'(w) by which `sampled` multiplies grad log pi(a), and the
exact sum over all codes. Write these three functions for squared Hellinger:
    f(w) = (1 - sqrt w)^2,        D = sum_v (sqrt pi_v - sqrt rho_v)^2
D is symmetric in pi and rho. It is 0 where they are equal, and 2 where they share no code. (Some books have a
factor 1/2 in front, so that D ends at 1. We do not.)

Then say how strong this divergence is. Near pi = rho only the curvature f''(1) counts: D is about
f''(1)/2 sum_v (pi_v - rho_v)^2 / rho_v. Both KLs have f''(1) = 1. JS has f''(1) = 1/4, so its STRENGTH is 4:
JS needs 4 beta to pull as hard as a KL.

Hint: f and c get x, not w, and sqrt w = exp(x / 2). In `exact`, sqrt pi = exp(log pi / 2).
"""
from divergences import Divergence


def f(x):
    """Return f(w) for x = log w, in the shape of x."""
    raise NotImplementedError("your turn")


def c(x):
    """Return c(w) = -w f'(w) for x = log w, in the shape of x."""
    raise NotImplementedError("your turn")


def exact(logp, logq):
    """Return D [..] of log pi [..,V] and log rho [..,V]."""
    raise NotImplementedError("your turn")


def beta_factor():
    """Return STRENGTH of Hellinger: the factor for a KL's beta at which Hellinger pulls as hard."""
    raise NotImplementedError("your turn")


HELLINGER = Divergence(f, c, exact)
