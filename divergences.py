"""Three divergences to a reference policy, each in three estimators, with the gradients worked out.

    python divergences.py          draws the curves to out/divergences.png and checks every gradient below
    python divergences.py --demo   a policy of ten tokens under each divergence and estimator: out/demo.gif

[test_name] behind an equation is the test of tests/test_divergences.py that verifies it.

Notation. pi = the policy, rho = the frozen reference, a = the sampled token, s = grad log pi(a).
    w = rho(a) / pi(a),  x = log w = log rho(a) - log pi(a).  x > 0: the policy has moved below the reference
    (a "lost" token; x < 0: an "overdone" one).

An f-divergence is D = sum_v pi_v f(rho_v / pi_v) = E_pi[f(w)], f convex, f(1) = 0. Adding k (w - 1) to f does
not change D, because E_pi[w] = sum rho = 1; k is chosen so that f'(1) = 0. Then w = 1 is the minimum of f,
so f >= 0 at every token, and near pi = rho f is of second order in w - 1: an estimate of D has less noise.
(Section 1 does see it: it adds -k w to c, and k KL(rho || pi) to what is descended there. Sections 3 and 4
do not: to their g it adds a constant, which is no force.)
    reverse_kl   f = w - log w - 1             E_pi[-log w] = sum pi log(pi/rho) = KL(pi || rho)
    forward_kl   f = w log w - w + 1           E_pi[w log w] = sum rho log(rho/pi) = KL(rho || pi)
    js           f = 1/2 [-log((1+w)/2) + w log(2w/(1+w))]     with m = (pi + rho)/2:   pi/m = 2/(1+w),
                 rho/m = 2w/(1+w), so E_pi[f] = 1/2 KL(pi || m) + 1/2 KL(rho || m), between 0 and log 2
                 (pi/m and rho/m are at most 2)
[test_mean_of_sampled_is_the_divergence, test_exact_equals_torch_distributions,
test_js_is_bounded_and_finite_far_out]

--- 1. sampled: what the paper differentiates (arXiv 2606.21498; k3 of joschu.net/blog/kl-approx.html for
    reverse KL)
Put f at the sampled token into the loss; autograd flows through log pi(a), the sample stays fixed.
dw/dlog pi = -w, so
    grad f(w) = f'(w) (-w) s = c(w) s,       c(w) = -w f'(w):
    reverse_kl   f' = 1 - 1/w                   c = 1 - w
    forward_kl   f' = log w                     c = -w log w
    js           f' = 1/2 log(2w/(1+w))         c = -1/2 w log(2w/(1+w))        [*]
    [*] d/dw of -log((1+w)/2) + w log(2w/(1+w)): -1/(1+w) and w (1/w - 1/(1+w)) = 1/(1+w) cancel.
With the loss -A log pi + beta f, a token of advantage A acts as one of advantage A - beta c(w): "shaping".
A token that is drawn though the policy has nearly dropped it (w large) is pulled back in proportion to w by
reverse_kl and js, and even as w log w by forward_kl; one that the policy overdoes (w small) is pushed at a
constant 1 by reverse_kl, the others let go.
[test_weight_equals_autograd_of_sampled, test_weight_in_the_table_of_the_facts]

--- 2. What the sampled forms descend: not the divergence they are named after
In expectation over a ~ pi, with w pi = rho and grad x = -s:
    E_pi[c(w) s] = -E_rho[U'(x) s] = grad E_rho[U(x)],     U'(x) = -c/w = f'(w):
what the sampled form descends is E_rho[U]. Descent adds E_rho[U' s], as if a were drawn from the reference
with advantage U': the force on a token *of the reference*.
    reverse_kl   U' = 1 - e^-x             E_rho[U] = E_rho[x + e^-x - 1] = E_rho[x] = KL(rho || pi), the
                                           FORWARD KL, as E_rho[e^-x] = sum pi = 1
    forward_kl   U' = x                    E_rho[U] = 1/2 E_rho[x^2]: neither KL
    js           U' = 1/2 log(2/(1+e^-x))  has no name; U' saturates at 1/2 log 2 for lost tokens (x > 0),
                                           and grows like x/2 for overdone ones (x < 0)
[test_sampled_forms_descend_what_section_2_says, test_force_on_a_token_of_the_reference]
A score has mean zero, so a constant added to c is no force; in U it is a multiple of e^-x. So reverse_kl may
be told as U = x, U' = 1, c = -w: every token of the reference is pulled up alike, also where pi = rho, and
the softmax takes off the mean of c, -1, so that the loss's gradient in logit v is pi_v (-w_v + 1) = pi_v -
rho_v. So we read the paper's "uniform bias". And without its w - 1 it would be f = -log w (k1), c = 1: no
force at all.   [test_k1_as_a_loss_has_no_gradient_and_k2_is_exact_reverse_kl; k2 is x^2/2]
c is per drawn token, U' per unit of rho. In logit v the loss has the gradient
    pi_v (c_v - E_pi[c]) = -rho_v U'_v + pi_v E_rho[U'],   [test_the_gradient_in_a_logit]
and descent goes the other way: down with a token whose c is above the mean. A lost token is drawn rarely,
with a large c: the product is -rho U', however small pi is. An overdone one of small rho is hardly pushed by
js: rho U' is about rho x/2, where reverse_kl has rho - pi, about -pi.

--- 3. unbiased: the gradient of the divergence itself
The sample depends on pi as well, which section 1 leaves out. By the product rule, with grad pi_v = pi_v s_v,
    grad sum_v pi_v f(w_v) = sum_v pi_v [f(w_v) s_v + c(w_v) s_v] = E_pi[g(w) s],      g = f + c = f - w f',
and pi / stop_grad(pi), which is 1 but has the gradient s, in front of f(w) makes autograd say the same:
    reverse_kl   g = -log w       forward_kl   g = 1 - w        js   g = -1/2 log((1+w)/2)
[test_unbiased_averages_to_the_gradient_of_exact, test_g_in_closed_form]
(forward_kl's g is the c of sampled reverse_kl: while pi = pi_old the two are one method, sample by sample.
[test_unbiased_forward_kl_is_sampled_reverse_kl])
So far a ~ pi. In later inner epochs a ~ pi_old, and E_old[(pi/pi_old) f] = E_pi[f]: use pi / pi_old instead
(pass logp_old; no clip). `sampled` has no such weight: its mean gradient is E_old[c s], and section 2 holds
only while pi is near pi_old. `exact` needs none.
[test_unbiased_off_policy]

--- 4. exact: the sum over all V codes
The logits of both are there, so this costs no further forward pass, and the token adds no noise. For logits
z, dlog pi_a/dz_v = 1[a=v] - pi_v; put into E_pi[g s] this is
    dD/dz_v = pi_v (g_v - sum_u pi_u g_u).   [test_the_script_checks_itself]

"Exact" and "unbiased" speak of the divergence per token with its prefix held fixed. But pi draws prefixes,
too: the gradient of the sum along its own samples, E_pi[D_1 + .. + D_T], has one more term,
    E_pi[sum_t s_t (D_{t+1} + .. + D_T)],        s_t the score of token t given its prefix,
which is left out here, as in GRPO implementations. For reverse_kl that sum is the divergence of whole
sequences: their log w is the sum of the tokens', all under pi. For forward_kl the prefixes would have to be
drawn from rho, and js has log(1 + w_1 .. w_T), which is no sum.   [test_what_per_token_leaves_out]

--- Strength. Near pi = rho, D is about f''(1)/2 E_pi[(w-1)^2], and f''(1) = 1 for both KLs and 1/4 for js: so
js needs 4 beta to pull as hard as a KL at beta. Further out it is only a rule of thumb: in the sampled forms
U' is x for forward_kl, x - x^2/2 + .. for reverse_kl, and times 4 x - x^2/4 + .. for js, between them: 10 %
from x at |x| = .4 and 24 % at 1.   [test_strength_at_the_reference, test_strength_further_out]

Departure from the paper's code: none in section 1 (x is clamped to +-20 as there, which ends the gradient);
sections 3 and 4 are ours to compare with.
"""
import functools
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

LOG2 = torch.tensor(2.0, dtype=torch.float64).log().item()
STRENGTH = {"reverse_kl": 1, "forward_kl": 1, "js": 4}     # times beta, for one pull at pi = rho
CLAMP = 20.0                 # |log w| past which f no longer varies: no gradient in `sampled`


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


class Categorical:
    """provisional, see branch math"""

    def __init__(self, hidden, head=None, rows=None):
        self.hidden, self.head, self.rows = hidden, head, rows

    @functools.cached_property
    def logits(self):
        return self.head(self.hidden) if self.head else self.hidden

    @functools.cached_property
    def logp(self):
        return self.logits.log_softmax(-1)

    def at(self, start, stop):
        return Categorical(self.hidden[:, start:stop], self.head, self.rows)

    def _of(self, x):
        return x if self.rows is None else x[self.rows]

    def log_prob(self, tokens):
        rows = torch.arange(len(tokens), device=tokens.device) if self.rows is None else self.rows
        return self.logp[rows[:, None], torch.arange(tokens.shape[1], device=tokens.device), tokens]

    def entropy(self):
        return self._of(-(self.logp.exp() * self.logp).sum(-1))

    def divergence(self, name, other):
        return self._of(DIVERGENCES[name].exact(self.logp, other.logp))


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
