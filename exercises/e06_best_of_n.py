"""Exercise 6. Best of n: how good it is, and how far it is from the base.

Check yourself:   python -m pytest exercises/test_e06_best_of_n.py

First read best-of-N in evaluate.py's docstring and the results in docs/results.md. The best of 8 samples of
the base is the baseline that training has to exceed. Answer two questions about it.

1. How good is the best of n, estimated from m >= n samples? evaluate.py cuts the m samples into m/n groups
and averages the maxima of the groups. This is unbiased, but it is one of very many ways to cut. Average over
*all* subsets of n samples instead. There are C(m,n) subsets, but you need not list them. Sort the rewards,
r_(1) <= ... <= r_(m). r_(i) is the maximum of each subset whose other n-1 members come from the i-1 below it.
The mean of the maxima is then
    estimate = sum_{i=n}^m  C(i-1, n-1) / C(m, n)  r_(i).
2. How far is the best of n from the base? For rewards without ties, whatever their distribution,
    KL(best of n || base) = log n - (n-1)/n    nat per image.
If there are few outcomes, so that samples coincide, the KL is smaller: the formula is an upper bound
(arXiv 2401.01879).

Hint: math.comb is exact for any size. Divide the two integers before you multiply by a reward. For the KL,
let u in [0,1] be the rank of a sample under the base. u is uniform, and the largest of n has density
n u^(n-1).
"""


def best_of_n(rewards, n):
    """Return the unbiased estimate of E[max of n new rewards] from rewards [m], n <= m, as a float."""
    raise NotImplementedError("your turn")


def kl_of_best_of_n(n):
    """Return KL(best of n || base) in nat for n >= 1, as a float."""
    raise NotImplementedError("your turn")
