"""Three divergences to a reference policy, each in three estimators, with the gradients worked out.

    python divergences.py        draws the curves to out/divergences.png and checks every gradient below

Notation. pi = the policy, rho = the frozen reference, a = the sampled token, s = grad log pi(a).
    w = rho(a) / pi(a),  x = log w = log rho(a) - log pi(a).  x > 0: the policy has moved below the reference.

An f-divergence is D = sum_v pi_v f(rho_v / pi_v) = E_pi[f(w)], f convex, f(1) = 0 (and f'(1) = 0 here: adding
c (w - 1) to f changes nothing, because E_pi[w] = 1; it only lowers the variance of estimates).
    reverse_kl   f = w - log w - 1             E_pi[-log w] = sum pi log(pi/rho) = KL(pi || rho)
    forward_kl   f = w log w - w + 1           E_pi[w log w] = sum rho log(rho/pi) = KL(rho || pi)
    js           f = 1/2 [-log((1+w)/2) + w log(2w/(1+w))]     with m = (pi + rho)/2:   pi/m = 2/(1+w),
                 rho/m = 2w/(1+w), so E_pi[f] = 1/2 KL(pi || m) + 1/2 KL(rho || m), between 0 and log 2

--- 1. sampled: what the paper differentiates (arXiv 2606.21498; k3 of joschu.net/blog/kl-approx.html for
    reverse KL)
Put f at the sampled token into the loss; autograd flows through log pi(a), the sample stays fixed.
dw/dlog pi = -w, so
    grad f(w) = f'(w) (-w) s = c(w) s,       c(w) = -w f'(w):
    reverse_kl   f' = 1 - 1/w                   c = 1 - w
    forward_kl   f' = log w                     c = -w log w
    js           f' = 1/2 log(2w/(1+w))         c = -1/2 w log(2w/(1+w))        [*]
    [*] d/dw of -log(1+w)/2 + w log(2w/(1+w)): the terms -1/(1+w) and w (1/w - 1/(1+w)) = 1/(1+w) cancel.
So a token of advantage A acts as one of advantage A - beta c(w). That is the shape the method is named
after. As the policy drops a token of the reference (w large) reverse_kl and js pull it back in proportion
to w, forward_kl even as w log w; as the policy overdoes one (w small) reverse_kl pushes at a constant 1,
the others let go.

--- 2. What the sampled forms descend: not the divergence they are named after
A score has mean zero, so constants in c drop out. In expectation over a ~ pi, with w pi = rho:
    E_pi[c(w) s] = -E_rho[U'(x) s] = grad E_rho[U(x)], where U'(x) is the force on a token *of the reference*:
    reverse_kl   c = 1 - w           U' = 1                    E_rho[x] = KL(rho || pi): the FORWARD KL
    forward_kl   c = -w x            U' = x                    1/2 E_rho[x^2]: neither KL
    js           c = -1/2 w log(..)  U' = 1/2 log(2/(1+e^-x))  saturates at 1/2 log 2 for lost tokens (x > 0),
                                                               grows like x/2 for overdone ones (x < 0)
A uniform force (1 even where pi = rho) is the "uniform bias" of reverse_kl in the paper; js has none
at pi = rho.

--- 3. unbiased: the gradient of the divergence itself
The sample depends on pi as well, which section 1 leaves out. By the product rule
    grad sum_v pi_v f(w_v) = sum_v pi_v [f(w_v) s_v + c(w_v) s_v] = E_pi[(f(w) - w f'(w)) s],
and pi / stop_grad(pi), which is 1 but has the gradient s, in front of f(w) makes autograd say the same:
    reverse_kl   f - w f' = -log w       forward_kl   1 - w        js   -1/2 log((1+w)/2)
After the first of several inner epochs the sample is from pi_old: use pi / pi_old instead (pass logp_old).

--- 4. exact: the sum over all V codes
The logits are there, so this costs no forward pass, and the token adds no noise. With g = f - w f':
    dD/dz_v = pi_v (g_v - sum_u pi_u g_u)       for logits z.

"Exact" and "unbiased" speak of the divergence per token with its prefix held fixed: how a token changes the
prefixes of later ones (the return-to-go of a sequence-level KL) is left out, as GRPO implementations do.

--- Strength. f''(1) = 1 for both KLs and 1/4 for js: at pi = rho, js needs 4 beta to pull as hard as a KL
at beta.

Departure from the paper's code: none in section 1 (x is clamped to +-20 as there, which ends the gradient);
sections 3 and 4 are ours to compare with.
"""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

LOG2 = torch.tensor(2.0, dtype=torch.float64).log().item()
CLAMP = 20.0                                   # |log w| past which a token's term has no gradient


class Divergence(NamedTuple):
    """All shapes are free and equal, e.g. [B,T]; `exact` reduces the last axis, [..,V] -> [..]."""
    f: Callable                                # log w -> f(w)
    c: Callable                                # log w -> -w f'(w)
    exact: Callable                            # (logp_all [..,V], logp_ref_all [..,V]) -> D [..], in nat

    def sampled(self, logp, logp_ref):
        """The paper's form: f(w) at the sampled tokens; its gradient is weight(log w) * grad logp."""
        return self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def unbiased(self, logp, logp_ref, logp_old=None):
        """f(w) times pi / pi_old (pi_old = pi without gradient if None): its gradient has the mean of
        `exact`'s."""
        ratio = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
        return ratio * self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def weight(self, log_w):
        """Closed form of the coefficient of grad log pi(a) in `sampled`; 0 where the clamp acts."""
        return torch.where(log_w.abs() <= CLAMP, self.c(log_w), torch.zeros_like(log_w))


def _js_exact(logp, logq):
    log_m = torch.logaddexp(logp, logq) - LOG2
    return (logp.exp() * (logp - log_m) + logq.exp() * (logq - log_m)).sum(-1) / 2


DIVERGENCES = {
    "reverse_kl": Divergence(
        f=lambda x: x.exp() - x - 1,
        c=lambda x: 1 - x.exp(),
        exact=lambda logp, logq: (logp.exp() * (logp - logq)).sum(-1)),
    "forward_kl": Divergence(
        f=lambda x: x.exp() * x - x.exp() + 1,
        c=lambda x: -x.exp() * x,
        exact=lambda logp, logq: (logq.exp() * (logq - logp)).sum(-1)),
    "js": Divergence(                  # softplus(x) = log(1 + w), softplus(-x) = log((1 + w)/w): no overflow
        f=lambda x: (LOG2 - F.softplus(x) + x.exp() * (LOG2 - F.softplus(-x))) / 2,
        c=lambda x: -x.exp() * (LOG2 - F.softplus(-x)) / 2,
        exact=_js_exact),
}


def check_gradients(vocab=50, seed=0):
    """{claim: largest difference} of the docstring's claims, in float64, for random pi and rho over `vocab`
    codes."""
    g = torch.Generator().manual_seed(seed)
    z, logq = (torch.randn(vocab, generator=g, dtype=torch.float64) * 1.5 for _ in range(2))
    z, logq = z.requires_grad_(), logq.log_softmax(0)
    logp = z.log_softmax(0)
    pi, x = logp.detach().exp(), (logq - logp).detach()

    def grad(y):
        return torch.autograd.grad(y, z, retain_graph=True)[0]

    # E_rho[U(x)] of section 2. For js, U is the integral of 1/2 log(2/(1+e^-t)) from 0: by quadrature, so
    # that it owes nothing to the closed forms above.
    def integral(x):
        nodes, weights = torch.linspace(0, 1, 2001, dtype=torch.float64), torch.full((2001,), 2 / 6000.)
        weights[1::2], weights[0], weights[-1] = 4 / 6000., 1 / 6000., 1 / 6000.             # Simpson's rule
        return x * ((LOG2 - F.softplus(-x[..., None] * nodes)) / 2 @ weights.double())
    descends = {"reverse_kl": lambda x: x, "forward_kl": lambda x: x * x / 2, "js": integral}
    out = {}
    for name, d in DIVERGENCES.items():
        y = torch.linspace(-15, 15, 301, dtype=torch.float64, requires_grad=True)        # y = log pi, rho = 1
        auto = torch.autograd.grad(d.sampled(y, torch.zeros_like(y)).sum(), y)[0]
        out[f"{name}: weight = autograd of sampled"] = \
            (((auto - d.weight(-y)).abs() / (1 + auto.abs())).max())
        out[f"{name}: E_pi[sampled] descends E_rho[U]"] = \
            (grad((pi * d.sampled(logp, logq)).sum())
             - grad((logq.exp() * descends[name](logq - logp)).sum())).abs().max()
        out[f"{name}: E_pi[unbiased] = exact"] = \
            (grad((pi * d.unbiased(logp, logq)).sum()) - grad(d.exact(logp, logq))).abs().max()
        force = (d.f(x) + d.c(x)).detach()                                                   # g = f - w f'
        out[f"{name}: dD/dz = pi (g - E_pi[g])"] = \
            (grad(d.exact(logp, logq)) - pi * (force - (pi * force).sum())).abs().max()
    return {claim: difference.item() for claim, difference in out.items()}


def plot(path):
    """Two panels: the effective shift of the advantage, c(w), and the force U'(x) on a reference token."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    x = torch.linspace(-6, 2.5, 400, dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, d in DIVERGENCES.items():
        strength = 4 if name == "js" else 1                                # matched curvature at pi = rho
        label = name + (" x 4" if name == "js" else "")
        axes[0].plot(x, strength * d.weight(x), label=label)
        force = -(d.weight(x) - float(name == "reverse_kl")) / x.exp()       # the constant of c has mean zero
        axes[1].plot(x, strength * force, label=label)
    axes[0].set(title="added to the advantage: $-\\beta c(w)$, here $c(w)$", ylabel="c(w)", ylim=(-8, 2))
    axes[1].set(title="force on a token of the reference, $U'(x)$", ylabel="U'(x)", ylim=(-6.5, 3))
    for axis in axes:
        axis.set_xlabel("x = log(reference / policy);  right: the policy has lost the token")
        axis.axhline(0, color="grey", lw=.6)
        axis.axvline(0, color="grey", lw=.6)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    import os
    os.makedirs("out", exist_ok=True)
    plot("out/divergences.png")
    for claim, difference in check_gradients().items():
        print(f"{claim:45s} largest difference {difference:.1e}")
    print("curves: out/divergences.png")
