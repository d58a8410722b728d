"""Solution 9.

With w = rho / pi_eps, log w = -eps (u - E_rho u) + O(eps^2). As f(w) = f''(1)/2 (w - 1)^2 + ..., its mean is
D = f''(1)/2 eps^2 Var_rho(u). Var_rho(u) is the same for all divergences, so it cancels in the ratio. What
remains is 1 / f''(1): 1 for both KLs and 4 for js, so js needs 4 times the beta.
"""
import torch

from divergences import DIVERGENCES


def strength(divergence, eps=1e-3):
    g = torch.Generator().manual_seed(0)
    logq, u = (torch.randn(100, generator=g, dtype=torch.float64) for _ in range(2))
    logq = logq.log_softmax(0)

    def curvature(d):
        return sum(d.exact((logq + e * u).log_softmax(0), logq) for e in (eps, -eps)) / eps ** 2
    return (curvature(DIVERGENCES["reverse_kl"]) / curvature(divergence)).item()


def matched_beta(name, beta_kl):
    return beta_kl * strength(DIVERGENCES[name])
