"""Exercise 2. One family with both KLs in it: the alpha-divergences.

Check yourself:   python -m pytest exercises/test_e02_alpha.py

Read divergences.py first. For any real number a except 0 and 1, define
    f_a(w) = (w^a - a w - (1 - a)) / (a (a - 1)),        D_a = E_pi[f_a(w)],        w = rho(v) / pi(v).
All members have f(1) = 0, f'(1) = 0 and f''(1) = 1, so one beta fits the whole family. Known members:
    a = 1/2              twice the squared Hellinger divergence of exercise 1
    a = 2                half of the chi-square divergence, 1/2 sum (rho - pi)^2 / pi
    a -> 0 and a -> 1    the two KLs. It is your task to find which limit is which KL.
Write f, c = -w f' and the exact sum for a general a, including the limits: at a = 0 and a = 1 return the
limit, not 0/0. (a is a Python float, so compare it by a == 0 and a == 1.)

Hint: w^a = exp(a x) = 1 + a x + O(a^2), and w^a = w exp((a-1) x) = w + (a-1) w x + O((a-1)^2).
For `exact`, use pi w^a = pi^(1-a) rho^a and E_pi[w] = 1.
"""


def f(x, a):
    """Return f_a(w) for x = log w, in the shape of x. a is a float."""
    raise NotImplementedError("your turn")


def c(x, a):
    """Return c(w) = -w f_a'(w) for x = log w, in the shape of x. a is a float."""
    raise NotImplementedError("your turn")


def exact(logp, logq, a):
    """Return D_a [..] of log pi [..,V] and log rho [..,V]. a is a float."""
    raise NotImplementedError("your turn")
