"""Exercise 6. Best of n: how good it is, and how far it goes.

Check yourself:   python -m pytest exercises/test_e06_best_of_n.py

Read the end of evaluate.py's docstring and the results in README.md first: best of 8 of the untouched base is
the bar that training has to clear. Two questions about it.

1. How good is the best of n, from m >= n samples? Cutting the m into m/n groups and averaging their maxima
(as evaluate.py does) is unbiased, but it is one of very many ways to cut them. Average over *all* subsets of
n instead. There are C(m,n) of them, but no need to list them. Sort the rewards, r_(1) <= ... <= r_(m): r_(i)
is the largest of each subset that takes its other n-1 from the i-1 below it, so
    estimate = sum_{i=n}^m  C(i-1, n-1) / C(m, n)  r_(i).
2. How far is the best of n from the base? For rewards without ties, whatever their distribution,
    KL(best of n || base) = log n - (n-1)/n    nat per picture.
If outcomes are few, so that samples coincide, it is less: the formula is an upper bound (arXiv 2401.01879).

Hint: math.comb is exact at any size; divide the two integers before you multiply by a reward. Why the KL: let
u in [0,1] be the rank of a sample under the base. u is uniform, and the largest of n has density n u^(n-1).
"""


def best_of_n(rewards, n):
    """rewards [m], n <= m -> the unbiased estimate of E[max of n fresh rewards], a float."""
    raise NotImplementedError("your turn")


def kl_of_best_of_n(n):
    """nat; n >= 1 -> a float."""
    raise NotImplementedError("your turn")
