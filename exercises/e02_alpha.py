"""Exercise 2. One family with both KLs in it: the alpha-divergences.

Check yourself:   python -m pytest exercises/test_e02_alpha.py

Read divergences.py first. For any real a but 0 and 1,
    f_a(w) = (w^a - a w - (1 - a)) / (a (a - 1)),        D_a = E_pi[f_a(w)],        w = rho(v) / pi(v).
All have f(1) = 0, f'(1) = 0 and f''(1) = 1, so one beta fits the whole family. Members you know:
    a = 1/2    twice the squared Hellinger divergence of exercise 1
    a = 2      half of the chi-square,  1/2 sum (rho - pi)^2 / pi
    a -> 0 and a -> 1    the two KLs, one each. Which is which in our convention is for you to find.
Write f, c = -w f' and the exact sum for a general a, limits included: at a = 0 and a = 1 return the limit,
not 0/0. (a is a Python float; compare it with == there.)

Hint: w^a = exp(a x) = 1 + a x + O(a^2), and w^a = w exp((a-1) x) = w + (a-1) w x + O((a-1)^2).
For `exact`, pi w^a = pi^(1-a) rho^a, and E_pi[w] = 1 takes care of the rest.
"""


def f(x, a):
    """x = log w, any shape; a float -> f_a(w), the same shape."""
    raise NotImplementedError("your turn")


def c(x, a):
    """x = log w, any shape; a float -> c(w) = -w f_a'(w), the same shape."""
    raise NotImplementedError("your turn")


def exact(logp, logq, a):
    """log pi and log rho, [..,V] each; a float -> D_a [..]."""
    raise NotImplementedError("your turn")
