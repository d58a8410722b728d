"""Solution 2.

To first order the numerator of f_a is, with x = log w,
    a -> 0:   a x - a w + a               divided by -a:       w - x - 1       reverse KL
    a -> 1:   (a - 1) (w x - w + 1)       divided by a - 1:    w x - w + 1     forward KL
f' = (w^(a-1) - 1) / (a - 1), so c = -w f' = (w - w^a) / (a - 1). For a -> 1, c = -w x. For a = 0,
c needs no limit.
D  = (sum pi^(1-a) rho^a - a - (1 - a)) / (a (a - 1)).
The coefficient g of the gradient of D (Divergence.unbiased) is f - w f' = (1 - w^a) / a. This is -x
at a = 0, and 1 - w at a = 1.
"""


def f(x, a):
    if a == 0:
        return x.exp() - x - 1
    if a == 1:
        return x.exp() * x - x.exp() + 1
    return ((a * x).exp() - a * x.exp() - (1 - a)) / (a * (a - 1))


def c(x, a):
    return -x.exp() * x if a == 1 else (x.exp() - (a * x).exp()) / (a - 1)


def exact(logp, logq, a):
    if a == 0:
        return (logp.exp() * (logp - logq)).sum(-1)
    if a == 1:
        return (logq.exp() * (logq - logp)).sum(-1)
    return (((1 - a) * logp + a * logq).exp().sum(-1) - 1) / (a * (a - 1))
