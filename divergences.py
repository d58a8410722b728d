"""Three divergences to a reference policy, three ways to put each into a loss, and the gradients of all nine.

[test_name] after an equation names the test of tests/core/test_divergences.py that verifies the equation.

Symbols
    pi, rho       the policy and the frozen reference: two distributions over the V codes of one token,
                  given the tokens before it
    a, v          the sampled token, a ~ pi, and any of the V codes
    s             grad log pi(a), the score function, with E_pi[s] = 0. At code v: s_v = grad log pi_v
    w, x          w = rho(a) / pi(a) and x = log w = log rho(a) - log pi(a)
    suppressed    a token with x > 0: the policy gives it less probability than the reference does
    boosted       a token with x < 0: the policy gives it more
    D             a divergence, in nat per token; A is the advantage, beta the weight of D in the loss

Definition. Let f be a convex function with f(1) = 0. The f-divergence of pi and rho is
    D = sum_v pi_v f(rho_v / pi_v) = E_pi[f(w)].
Since E_pi[w] = sum_v rho_v = 1, adding k (w - 1) to f leaves D unchanged for every constant k. We choose k so
that f'(1) = 0. Then w = 1 is the minimum of f, so f >= 0 at every token. Near pi = rho such an f is of second
order in w - 1, so an estimate of D from samples has less noise.

The three divergences of this file:
    name         D                                f(w)               f'(w)      c(w)         g(w)
    reverse_kl   KL(pi || rho)                    w - log w - 1      1 - 1/w    1 - w        -log w
    forward_kl   KL(rho || pi)                    w log w - w + 1    log w      -w log w     1 - w
    js           (KL(pi || m) + KL(rho || m))/2   (P + w R) / 2      R / 2      -w R / 2     P / 2
KL(p || q) = sum_v p_v log(p_v / q_v). So E_pi[-log w] = KL(pi || rho), and E_pi[w log w] = KL(rho || pi).
For js, m = (pi + rho)/2, P = log(pi/m) = log(2 / (1 + w)), and R = log(rho/m) = log(2w / (1 + w)). JS lies
between 0 and log 2, because pi/m and rho/m are at most 2.
    c = -w f'     is the coefficient of s in the gradient of f(w) at a sampled token: see Divergence.weight
    g = f + c     is the coefficient of s in the gradient of D: see Divergence.unbiased
[test_mean_of_sampled_is_the_divergence, test_exact_equals_torch_distributions, test_g_in_closed_form,
test_js_is_bounded_and_finite_far_out]

The three estimators. All have the mean value D. Only their gradients differ.
    sampled     f(w) at the sampled tokens, as in the paper (arXiv 2606.21498), its code, and most GRPO code
    unbiased    ours: the same value, with a gradient whose mean is the gradient of D
    exact       ours: the sum over all V codes, so that the choice of the token adds no noise

The main finding. The mean gradient of `sampled` is not the gradient of D. The sampled "reverse KL" that GRPO
and the paper use descends the forward KL. Divergence.sampled derives what each sampled form descends.
"""
from functools import cached_property
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

LOG2 = torch.tensor(2.0, dtype=torch.float64).log().item()
CLAMP = 20.0                 # x is clamped to +-CLAMP, as in the paper's code: beyond it, f has no gradient

# Strength. STRENGTH is the factor for beta with which a divergence pulls as hard as a KL near pi = rho. There
# D is about f''(1)/2 E_pi[(w - 1)^2]. Both KLs have f''(1) = 1. JS has f''(1) = 1/4, so JS needs 4 beta.
#     [test_strength_at_the_reference]
# Further out the factor 4 is only a rule of thumb. In the sampled forms the force f'(w) on a token of the
# reference is x for forward_kl and x - x^2/2 + .. for reverse_kl. Four times js has the force x - x^2/4 + ..,
# which lies between the KLs. The force of 4 times js differs from x by 10 % at |x| = .4 and by 24 % at 1. The
# force of reverse_kl differs from x by 18 % at x = .4, 23 % at -.4, 37 % at 1, and 72 % at -1.
#     [test_strength_further_out]
STRENGTH = {"reverse_kl": 1, "forward_kl": 1, "js": 4}


class Divergence(NamedTuple):
    """One row of the table above. f and c are functions of x = log w, of any shape."""
    f: Callable                                # x -> f(w)
    c: Callable                                # x -> c(w) = -w f'(w)
    total: Callable                            # (log pi [..,V], log rho [..,V]) -> D [..], in nat

    def weight(self, log_w):
        """Return c(w) of log_w, any shape: the coefficient of s in the gradient of `sampled`.

        The gradient of f at a sampled token, which stays fixed while pi changes:
            dw / dlog pi = -w
            grad f(w) = f'(w) (-w) s = c(w) s             [test_weight_equals_autograd_of_sampled]
        For js, f' is R/2 because two terms cancel:
            dP/dw = -1/(1 + w)
            w dR/dw = w (1/w - 1/(1 + w)) = 1/(1 + w)
            d(P + w R)/dw = dP/dw + R + w dR/dw = R
        What c does. The loss -A log pi(a) + beta f(w) has the gradient -(A - beta c(w)) s. So the token acts
        like a token of advantage A - beta c(w). We call this effect shaping.
            suppressed, w large    reverse_kl and js pull the token back in proportion to w, forward_kl even
                                   in proportion to w log w
            boosted, w small       reverse_kl pushes the token down with c near 1. For forward_kl and js, c
                                   goes to 0              [test_weight_in_the_table_of_the_facts]
        These effects are per sampled token. `sampled` adds how often a token is sampled.
        Where the clamp acts, the weight is 0.
        """
        return torch.where(log_w.abs() <= CLAMP, self.c(log_w), torch.zeros_like(log_w))

    def sampled(self, logp, logp_ref):
        """Return f(w) at the sampled tokens, as in the paper.

        logp = log pi(a) and logp_ref = log rho(a) have the same shape, which is also that of the result.

        What it descends. The mean gradient is E_pi[c(w) s]. With pi w = rho and grad x = -s,
            E_pi[c(w) s] = -E_pi[w f'(w) s]
                         = -E_rho[f'(w) s]
                         = grad E_rho[U(x)],              where U'(x) = f'(w).
        So descent lowers E_rho[U], which is not D:       [test_sampled_forms_descend_another_function]
            reverse_kl   U = x + e^-x - 1. As E_rho[e^-x] = sum_v pi_v = 1, E_rho[U] = E_rho[x] =
                         KL(rho || pi): the FORWARD KL
            forward_kl   U = x^2 / 2. E_rho[U] is half the mean square of x, which is neither KL
            js           U' = log(2 / (1 + e^-x)) / 2. E_rho[U] has no common name
        Descent adds E_rho[U' s], as if tokens of the reference were sampled with advantage U'. So U' is the
        force on a token of the reference. For js, U' stays below (log 2)/2 at suppressed tokens, and grows
        like x/2 at boosted tokens.                       [test_force_on_a_token_of_the_reference]

        c and U' describe one gradient in two units. c counts per sampled token, U' per unit of reference
        probability, and pi c = -rho U'. In logit v the mean gradient is
            pi_v (c_v - E_pi[c]) = -rho_v U'_v + pi_v E_rho[U'].         [test_the_gradient_in_a_logit]
        Descent goes the other way: it lowers the logit of a token whose c is above the mean.
            suppressed   The token is sampled rarely, but with a large c. The product pi c stays -rho U',
                         however small pi is.
            boosted      Take a token of small rho. For js, U' grows, but rho U' is about rho x/2, so the
                         token is hardly pushed. For reverse_kl, rho U' is rho - pi, about -pi.

        Constants. As E_pi[s] = 0, adding a constant to c changes no mean gradient. In U it adds a multiple
        of e^-x. So reverse_kl also has the form U = x, U' = 1, c = -w. In this form every token of the
        reference is pulled up alike, also where pi = rho. The softmax subtracts the mean of c, so the
        gradient in logit v is pi_v - rho_v. The paper writes of a "uniform bias". We read the term this way.

        k1, k2, k3 (joschu.net/blog/kl-approx.html) are estimates of KL(pi || rho) from samples: k1 = -x,
        k2 = x^2/2, and k3 = w - log w - 1, which is f of reverse_kl. As losses they differ:
            k1           c = 1, a constant, so it is no force at all
            k2           c = -x, which is g of reverse_kl, so the mean gradient is that of KL(pi || rho)
            k3           descends KL(rho || pi)
                         [test_k1_as_a_loss_has_no_gradient_and_k2_is_exact_reverse_kl]
        So the choice f'(1) = 0 matters here: a term k (w - 1) in f adds k KL(rho || pi) to what is descended.
        In `unbiased` and `exact` that term only adds a constant to g, which is no force.
        """
        return self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def unbiased(self, logp, logp_ref, logp_old=None):
        """Return (pi / pi_old) f(w) at tokens sampled from pi_old. Its mean gradient is the gradient of D.

        logp_old = log pi_old(a), or None where pi_old = pi. All shapes are equal.
        Which token is sampled depends on pi as well, and `sampled` omits this. By the product rule, with
        grad pi_v = pi_v s_v,
            grad D = sum_v grad(pi_v f(w_v))
                   = sum_v pi_v [f(w_v) s_v + c(w_v) s_v]
                   = E_pi[g(w) s],     g = f + c = f - w f'.
        `sampled` omits the term E_pi[f(w) s]. A factor pi / stop_grad(pi) in front of f(w) restores it: the
        factor is 1, and its gradient is s.               [test_unbiased_averages_to_the_gradient_of_exact]
        g of forward_kl is c of reverse_kl. So while pi = pi_old, unbiased forward_kl and sampled reverse_kl
        are one method, sample by sample.                 [test_unbiased_forward_kl_is_sampled_reverse_kl]
        In later inner epochs a ~ pi_old, and E_old[(pi / pi_old) f] = E_pi[f]. So the factor is then
        pi / pi_old, without a clip.                      [test_unbiased_off_policy]
        `sampled` has no such factor. Its mean gradient is then E_old[c s], so what `sampled` derives holds
        only while pi is near pi_old.
        """
        ratio = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
        return ratio * self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def exact(self, logp, logp_ref):
        """Return D as a sum over all V codes: log pi [..,V], log rho [..,V] -> [..]. It needs no samples.

        The logits of policy and reference are there anyway, so the sum costs no further forward pass. For
        logits z, put dlog pi_a / dz_v = 1[a=v] - pi_v into E_pi[g s]:
            dD/dz_v = sum_a pi_a g_a (1[a=v] - pi_v)
                    = pi_v (g_v - E_pi[g])                [test_all_gradients_are_as_claimed]

        What "exact" and "unbiased" leave out. Both speak of the divergence per token with a fixed prefix. But
        pi samples the prefix, too. So the gradient of E_pi[D_1 + .. + D_T] has one more term:
            E_pi[sum_t s_t (D_{t+1} + .. + D_T)],     s_t = grad log pi(a_t | a_1 .. a_{t-1}).
        We omit this term, as GRPO implementations do.    [test_what_per_token_leaves_out]
        For reverse_kl, E_pi[D_1 + .. + D_T] is the divergence of whole sequences, because log w of a sequence
        is the sum of its tokens' x. For forward_kl the prefixes would have to be samples of rho. For js,
        log(1 + w_1 .. w_T) is not a sum over tokens.
        """
        return self.total(logp, logp_ref)


def _js_total(logp, logq):
    log_m = torch.logaddexp(logp, logq) - LOG2
    return (logp.exp() * (logp - log_m) + logq.exp() * (logq - log_m)).sum(-1) / 2


DIVERGENCES = {
    "reverse_kl": Divergence(
        f=lambda x: x.exp() - x - 1,
        c=lambda x: 1 - x.exp(),
        total=lambda logp, logq: (logp.exp() * (logp - logq)).sum(-1)),
    "forward_kl": Divergence(
        f=lambda x: x.exp() * x - x.exp() + 1,
        c=lambda x: -x.exp() * x,
        total=lambda logp, logq: (logq.exp() * (logq - logp)).sum(-1)),
    "js": Divergence(           # softplus(x) = log(1 + w) and softplus(-x) = log((1 + w)/w) do not overflow
        f=lambda x: (LOG2 - F.softplus(x) + x.exp() * (LOG2 - F.softplus(-x))) / 2,
        c=lambda x: -x.exp() * (LOG2 - F.softplus(-x)) / 2,
        total=_js_total),
}


class Categorical:
    """The policy's distribution over the code of every token.

    hidden [r,T,width] holds the last hidden states, and head maps them to logits [r,T,V]. Without a head,
    hidden holds the logits. rows [b] is the row of each sample, where several samples share one. Without
    rows, row i is sample i.
    The logits are large, so they are made when `logp` is first used, and kept. That first use also decides
    whether gradients flow.
    """

    def __init__(self, hidden, head=None, rows=None):
        self.hidden, self.head, self.rows = hidden, head, rows

    @cached_property
    def logits(self):
        """Logits [r,T,V]."""
        return self.hidden if self.head is None else self.head(self.hidden)

    @cached_property
    def logp(self):
        """Log-probabilities [r,T,V]."""
        return self.logits.log_softmax(-1)

    def at(self, start, stop):
        """Return the distributions at positions start .. stop - 1. Their logits are not computed yet."""
        return Categorical(self.hidden[:, start:stop], self.head, self.rows)

    def log_prob(self, tokens):
        """Return the log-probabilities [b,T] of tokens [b,T]."""
        b, T = tokens.shape
        rows = torch.arange(b, device=tokens.device) if self.rows is None else self.rows
        return self.logp[rows[:, None], torch.arange(T, device=tokens.device), tokens]

    def entropy(self):
        """Return the entropy of each token, [b,T], in nat."""
        return self._of_samples(-(self.logp.exp() * self.logp).sum(-1))

    def divergence(self, name, other):
        """Return the exact divergence to `other`, a Categorical with the same rows: [b,T], in nat.

        name is a key of DIVERGENCES.
        """
        return self._of_samples(DIVERGENCES[name].exact(self.logp, other.logp))

    def _of_samples(self, values):
        return values if self.rows is None else values[self.rows]                        # [r,T] -> [b,T]


def check_gradients(vocab=50, seed=0):
    """Return {claim: largest error} for the gradients derived above, in float64.

    pi and rho are random distributions over `vocab` codes."""
    g = torch.Generator().manual_seed(seed)
    z, logq = (torch.randn(vocab, generator=g, dtype=torch.float64) * 1.5 for _ in range(2))
    z, logq = z.requires_grad_(), logq.log_softmax(0)
    logp = z.log_softmax(0)
    pi, x = logp.detach().exp(), (logq - logp).detach()

    def grad(y):
        return torch.autograd.grad(y, z, retain_graph=True)[0]

    def js_potential(x):        # U of js: the integral of U' from 0 to x, by Simpson's rule
        nodes, weights = torch.linspace(0, 1, 2001, dtype=torch.float64), torch.full((2001,), 2 / 6000.)
        weights[1::2], weights[0], weights[-1] = 4 / 6000., 1 / 6000., 1 / 6000.
        return x * ((LOG2 - F.softplus(-x[..., None] * nodes)) / 2 @ weights.double())
    potential = {"reverse_kl": lambda x: x, "forward_kl": lambda x: x * x / 2, "js": js_potential}
    out = {}
    for name, d in DIVERGENCES.items():
        y = torch.linspace(-15, 15, 301, dtype=torch.float64, requires_grad=True)        # y = log pi, rho = 1
        auto = torch.autograd.grad(d.sampled(y, torch.zeros_like(y)).sum(), y)[0]
        out[f"{name}: weight = autograd of sampled"] = \
            (((auto - d.weight(-y)).abs() / (1 + auto.abs())).max())
        out[f"{name}: E_pi[sampled] descends E_rho[U]"] = \
            (grad((pi * d.sampled(logp, logq)).sum())
             - grad((logq.exp() * potential[name](logq - logp)).sum())).abs().max()
        out[f"{name}: E_pi[unbiased] = exact"] = \
            (grad((pi * d.unbiased(logp, logq)).sum()) - grad(d.exact(logp, logq))).abs().max()
        force = (d.f(x) + d.c(x)).detach()                                                 # g
        out[f"{name}: dD/dz = pi (g - E_pi[g])"] = \
            (grad(d.exact(logp, logq)) - pi * (force - (pi * force).sum())).abs().max()
    return {claim: difference.item() for claim, difference in out.items()}
