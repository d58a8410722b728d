"""Solution 3.

grad D = E_pi[(f - w f') s] and c = -w f', so grad D = E_pi[(f + c) s]. The loss -A log pi + beta D has the
mean gradient E_pi[-A s + beta (f + c) s] = E_pi[-(A - beta (f + c)) s]. This is REINFORCE with A' = A - beta
(f + c). For reverse_kl, f + c = -log w = log pi - log rho, which is PPO's familiar "reward minus beta times
log-ratio". The sampled form has c alone, without f, and this is not the gradient of D.
"""
from divergences import DIVERGENCES


def shaped_advantage(adv, logp, logp_ref, beta, divergence):
    d, x = DIVERGENCES[divergence], (logp_ref - logp).detach()                                   # [B,T]
    return adv[:, None] - beta * (d.f(x) + d.c(x))
