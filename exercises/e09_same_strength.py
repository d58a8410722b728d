"""Exercise 9. The same strength, measured.

Check yourself:   python -m pytest exercises/test_e09_same_strength.py

Read the paragraph "Strength" of divergences.py first, and configs/: why is beta .4 for js and .1 for the KLs?
To compare divergences at one beta is to compare strong with weak ones; near pi = rho, where training
starts, they differ by a factor only. Take it from measurement, without any formula for f: move pi away from
rho by a little,
    log pi_eps = log_softmax(log rho + eps u),        u a random direction of the logits,
and see how D grows. D(pi_0) = 0 is a minimum, so
    D(pi_eps) = k eps^2 / 2 + O(eps^3),        k = f''(1) Var_rho(u)
and the strength of a divergence is its k over that of reverse_kl, for the same u. A number is enough.

Hint: (D(pi_eps) + D(pi_-eps)) / eps^2 cancels the eps^3 term. Work in float64: at eps = 1e-3, D is about
1e-6, and fp32 has hardly a digit left there. Only `exact` of the divergence is needed, and only that will be
there.
"""



def strength(divergence):
    """A Divergence (not its name) -> its curvature at pi = rho over that of reverse_kl, a float. Measured by
    finite differences of divergence.exact alone; rho and u are yours to draw."""
    raise NotImplementedError("your turn")


def matched_beta(name, beta_kl):
    """A name of DIVERGENCES, and a beta for reverse_kl -> the beta at which that divergence pulls as hard."""
    raise NotImplementedError("your turn")
