"""Exercise 9. The same strength, measured.

Check yourself:   python -m pytest exercises/test_e09_same_strength.py

First read the comment "Strength" in divergences.py, and configs/. Why is beta .4 for js and .1 for the KLs?
At the same beta, one divergence pulls harder than another. Near pi = rho, where training starts, divergences
differ only by a factor. Measure this factor, without a formula for f. Move pi away from rho by a little,
    log pi_eps = log_softmax(log rho + eps u),        u a random direction of the logits,
and see how D grows. D(pi_0) = 0 is a minimum, so
    D(pi_eps) = k eps^2 / 2 + O(eps^3),        k = f''(1) Var_rho(u).
STRENGTH of a divergence is the factor for beta with which it pulls as hard as a KL: k of reverse_kl, divided
by k of the divergence, for the same u. Measure it as a number.

Hint: (D(pi_eps) + D(pi_-eps)) / eps^2 cancels the eps^3 term. Work in float64: at eps = 1e-3, D is about
1e-6, and fp32 has hardly a digit left there. Use only `exact` of the divergence, because the
checker passes nothing else.
"""


def strength(divergence):
    """Return STRENGTH of a Divergence (not of its name), a float, from finite differences of its `exact`.

    You choose rho and u.
    """
    raise NotImplementedError("your turn")


def matched_beta(name, beta_kl):
    """Return the beta at which the divergence `name` pulls as hard as reverse_kl at beta_kl, a float."""
    raise NotImplementedError("your turn")
