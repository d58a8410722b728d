"""Solution 2.

To first order the numerator is, with x = log w,
    a -> 0:   a x - a w + a               over -a:       w - x - 1       reverse KL
    a -> 1:   (a - 1) (w x - w + 1)       over a - 1:    w x - w + 1     forward KL
f' = (w^(a-1) - 1) / (a - 1), so c = -w f' = (w - w^a) / (a - 1); a -> 1: -w x. At a = 0 nothing divides by 0.
D  = (sum pi^(1-a) rho^a - a - (1 - a)) / (a (a - 1)).
The force on the policy (section 3 of divergences.py) is f - w f' = (1 - w^a) / a: -x at a = 0, 1 - w at 1.
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
