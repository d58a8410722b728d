"""Exercise 1. A fourth divergence: squared Hellinger.

Check yourself:   python -m pytest exercises/test_e01_hellinger.py

Read divergences.py first. There every divergence is D = E_pi[f(w)] with w = rho(a) / pi(a) and x = log w, and
is a triple of functions: f, the coefficient c = -w f'(w) by which `sampled` multiplies grad log pi(a), and
the exact sum over all codes. Give squared Hellinger the same three:
    f(w) = (1 - sqrt w)^2,        D = sum_v (sqrt pi_v - sqrt rho_v)^2
It is symmetric in pi and rho and lies between 0 (equal) and 2 (they share no code). (Some books put 1/2 in
front, so that it ends at 1. We do not.)

Then say how strong it is. Near pi = rho only the curvature f''(1) counts: D is about f''(1)/2 sum_v (pi_v -
rho_v)^2 / rho_v. Both KLs have f''(1) = 1, js has 1/4 and so needs 4 beta to pull as hard.

Hint: f and c get x, not w, and sqrt w = exp(x / 2). In `exact`, sqrt pi = exp(log pi / 2).
"""
from divergences import Divergence


def f(x):
    """x = log w, any shape -> f(w), the same shape."""
    raise NotImplementedError("your turn")


def c(x):
    """x = log w, any shape -> c(w) = -w f'(w), the same shape."""
    raise NotImplementedError("your turn")


def exact(logp, logq):
    """log pi and log rho, [..,V] each -> D [..]."""
    raise NotImplementedError("your turn")


def beta_factor():
    """The number by which a KL's beta must be multiplied for Hellinger to pull as hard near pi = rho."""
    raise NotImplementedError("your turn")


HELLINGER = Divergence(f, c, exact)
