"""Three divergences to a reference policy and three estimators of each: nine loss terms and their gradients.

An action of a policy is a token, with a `Categorical` distribution, or a vector, with a `Gaussian` one. What
follows is about tokens. [test_name] after an equation names the test that verifies it, in
tests/core/test_divergences.py or test_gaussians.py.

Symbols
    pi, rho       the policy and the frozen reference: two distributions over the V codes of one token,
                  given the tokens before it
    a, v          the sampled token, a ~ pi, and any of the V codes
    grad          the gradient with respect to the policy's parameters
    s             grad log pi(a), the score function, with E_pi[s] = 0. At code v: s_v = grad log pi_v
    w, x          w = rho(a) / pi(a) and x = log w = log rho(a) - log pi(a)
    suppressed    a token with x > 0: the policy gives it less probability than the reference does
    boosted       a token with x < 0: the policy gives it more probability than the reference does
    D             a divergence, in nat per token (the unit of the natural logarithm)
    A, beta       the advantage of the token, and the weight of D in the loss
    U, force      U' = f'(w) as a function of x. We call it the force on a token: see Divergence.sampled

Definition. Let f be a convex function with f(1) = 0. The f-divergence of pi and rho is
    D = sum_v pi_v f(rho_v / pi_v) = E_pi[f(w)].
Since E_pi[w] = sum_v rho_v = 1, adding k (w - 1) to f leaves D unchanged for every constant k. We choose k so
that f'(1) = 0. Then w = 1 is the minimum of f, so f >= 0 at every token. Near pi = rho such an f is of second
order in w - 1, so an estimate of D from samples has less noise.

Three divergences. KL(p || q) = sum_v p_v log(p_v / q_v), so E_pi[-log w] = KL(pi || rho), and E_pi[w log w] =
KL(rho || pi). js is the Jensen-Shannon divergence (JS): the mean KL of pi and of rho to m = (pi + rho)/2. It
lies between 0 and log 2, because pi/m and rho/m are at most 2. The gradients contain two more functions of w:
    c = -w f'     for one sampled token: grad f(w) = c s, see Divergence.weight
    g = f + c     for the mean: grad D = E_pi[g s], see Divergence.unbiased
With Lpi = log(pi/m) = log(2 / (1 + w)) and Lrho = log(rho/m) = log(2w / (1 + w)), the table is
    name         D                                f(w)                 f'(w)      c(w)          g(w)
    reverse_kl   KL(pi || rho)                    w - log w - 1        1 - 1/w    1 - w         -log w
    forward_kl   KL(rho || pi)                    w log w - w + 1      log w      -w log w      1 - w
    js           (KL(pi || m) + KL(rho || m))/2   (Lpi + w Lrho) / 2   Lrho / 2   -w Lrho / 2   Lpi / 2
[test_mean_of_sampled_is_the_divergence, test_exact_equals_torch_distributions, test_g_in_closed_form,
test_js_is_bounded_and_finite_far_out]

Three estimators. All have the mean D. `unbiased` and `exact` also have the gradient of D in the mean, and
`sampled` has another gradient:
    sampled     f(w) at the sampled tokens, as in the paper (arXiv 2606.21498), its code, and most GRPO code
    unbiased    ours: the same value, with a gradient whose mean is the gradient of D
    exact       ours: the sum over all V codes, so that the choice of the token adds no noise

The main finding. The mean gradient of `sampled` is not the gradient of D. Gradient descent on the sampled
"reverse KL" of the paper and of GRPO lowers, on average, the forward KL. Divergence.sampled derives this.
"""
import math
from functools import cached_property
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

LOG2 = torch.tensor(2.0, dtype=torch.float64).log().item()
CLAMP = 20.0                 # x is clamped to +-CLAMP, as in the paper's code: beyond it, f has no gradient

# Strength. Near pi = rho, D is about f''(1)/2 E_pi[(w - 1)^2]. Both KLs have f''(1) = 1. JS has f''(1) = 1/4,
# so JS is as strong as a KL if its beta is 4 times larger. STRENGTH holds these factors. Training does not
# apply them: choose --beta yourself.                                         [test_strength_at_the_reference]
# Further out the factor 4 is only a rule of thumb. Divergence.sampled derives a force U' for each divergence.
# For forward_kl it is x, for reverse_kl x - x^2/2 + .., and for js x/4 - x^2/16 + .. . The table compares the
# other two forces with that of forward_kl, as abs(force - x) / abs(x):           [test_strength_further_out]
#                   x = -1     -.4      .4       1
#     4 times js      24 %    10 %    10 %    24 %
#     reverse_kl      72 %    23 %    18 %    37 %
STRENGTH = {"reverse_kl": 1, "forward_kl": 1, "js": 4}


class Divergence(NamedTuple):
    """One row of the table above. f and c are functions of x = log w, of any shape."""
    f: Callable                                # x -> f(w)
    c: Callable                                # x -> c(w) = -w f'(w)
    total: Callable                            # (log pi [..,V], log rho [..,V]) -> D [..], in nat

    def weight(self, log_w):
        """Return c(w) of log_w, any shape, and 0 where the clamp acts. The losses do not call it.

        The gradient of f(w) at a sampled token. The token stays fixed while pi changes:
            dw / dlog pi = -w
            grad f(w) = f'(w) (-w) s = c(w) s             [test_weight_equals_autograd_of_sampled]
        For js, f' is Lrho/2 because two terms cancel:
            dLpi/dw = -1/(1 + w)
            w dLrho/dw = w (1/w - 1/(1 + w)) = 1/(1 + w)
            d(Lpi + w Lrho)/dw = dLpi/dw + Lrho + w dLrho/dw = Lrho
        What c does. The loss -A log pi(a) + beta f(w) has the gradient -(A - beta c(w)) s. So the token acts
        like a token of advantage A - beta c(w).                         [test_limits_and_peaks_of_c]
            suppressed, w large    reverse_kl and js pull the token back in proportion to w. forward_kl pulls
                                   it back in proportion to w log w, which is more
            boosted, w small       reverse_kl pushes the token down with c near 1. The others have c near 0
        These effects are for one sampled token. How often a token is sampled also matters: see `sampled`.
        """
        return torch.where(log_w.abs() <= CLAMP, self.c(log_w), torch.zeros_like(log_w))

    def sampled(self, logp, logp_ref):
        """Return f(w) at the sampled tokens, as in the paper.

        logp = log pi(a) and logp_ref = log rho(a) have the same shape, which is also that of the result.

        What descent lowers. The mean gradient is E_pi[c(w) s]. With pi w = rho and grad x = -s,
            E_pi[c(w) s] = -E_pi[w f'(w) s]
                         = -E_rho[f'(w) s]
                         = grad E_rho[U(x)],              where U'(x) = f'(w).
        So descent lowers E_rho[U], which is not D:       [test_sampled_forms_descend_another_function]
            reverse_kl   U = x + e^-x - 1. As E_rho[e^-x] = sum_v pi_v = 1, E_rho[U] = E_rho[x] =
                         KL(rho || pi): the FORWARD KL
            forward_kl   U = x^2 / 2. E_rho[U] is half the mean square of x, which is neither KL
            js           U' = log(2 / (1 + e^-x)) / 2. E_rho[U] has no common name

        The force. Descent moves the parameters along E_rho[U' s]. This is the policy gradient for tokens
        sampled from rho, with advantage U'. We call U' the force. For js, the force on suppressed tokens
        stays below (log 2)/2. The force on boosted tokens is negative, and about x/2 for large -x. Since
        c = -w U' and pi w = rho, every code has pi c = -rho U', which the next paragraph uses.
        [test_force_on_a_token_of_the_reference]

        In a logit. The mean gradient with respect to logit v of pi is
            pi_v (c_v - E_pi[c]) = -(rho_v U'_v - pi_v E_rho[U']).       [test_the_gradient_in_a_logit]
        Descent moves logit v by rho_v U'_v - pi_v E_rho[U']. The second term makes the moves add up to 0. The
        first term:
            suppressed   The token is sampled rarely, but with a large -c. The product -pi c = rho U' does not
                         vanish when pi goes to 0.
            boosted      For js, rho U' is about rho x/2, which is tiny when rho is tiny. For reverse_kl,
                         rho U' = rho - pi is about -pi. It pushes the token down, however small rho is.

        The paper speaks of a "uniform bias" of reverse_kl. It may be using another form of c. As E_pi[s] = 0,
        adding a constant to c changes no mean gradient, so c = -w may replace 1 - w. Then U' = 1: all tokens
        sampled from rho have the same force. With E_pi[c] = -1, the gradient in logit v above becomes
        pi_v - rho_v. The two forms differ at single tokens. At pi = rho, c = 1 - w is 0 at every token, but
        the pulls of c = -w cancel only in the mean.

        k1, k2, k3 (joschu.net/blog/kl-approx.html) are estimates of KL(pi || rho) from samples: k1 = -x,
        k2 = x^2/2, and k3 = w - log w - 1, which is f of reverse_kl. As losses they differ:
            k1           c = 1, a constant, so the mean gradient is 0
            k2           c = -x, which is g of reverse_kl, so the mean gradient is that of KL(pi || rho)
            k3           the mean gradient is that of KL(rho || pi)
                         [test_k1_as_a_loss_has_no_gradient_and_k2_is_exact_reverse_kl]
        k1 and k3 differ by w - 1 only. In `sampled`, adding a multiple of w - 1 to f adds the same
        multiple of KL(rho || pi) to E_rho[U]. So here the choice f'(1) = 0 matters. In `unbiased` and
        `exact`, adding a multiple of w - 1 to f only adds a constant to g, which changes no mean gradient.
        """
        return self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def unbiased(self, logp, logp_ref, logp_old=None):
        """Return (pi / pi_old) f(w) at tokens sampled from pi_old. Its mean gradient is the gradient of D.

        logp_old = log pi_old(a), or None where pi_old = pi. All shapes are equal.
        pi also decides which token is sampled, and `sampled` omits this effect. By the product rule, with
        grad pi_v = pi_v s_v,
            grad D = sum_v grad(pi_v f(w_v))
                   = sum_v pi_v [f(w_v) s_v + c(w_v) s_v]
                   = E_pi[g(w) s],     g = f + c = f - w f'.
        `sampled` omits the term E_pi[f(w) s]. A factor pi / pi.detach() in front of f(w) restores the term:
        the factor is 1, and its gradient is s.           [test_unbiased_averages_to_the_gradient_of_exact]
        g of forward_kl is c of reverse_kl. So while pi = pi_old, unbiased forward_kl and sampled reverse_kl
        have the same gradient at every sampled token.    [test_unbiased_forward_kl_is_sampled_reverse_kl]
        In later inner epochs (further steps on one rollout) the tokens come from pi_old, the policy that
        sampled. Write E_old for the mean over pi_old. Since E_old[(pi / pi_old) f] = E_pi[f], the factor
        becomes pi / pi_old, without a clip. `sampled` has no such factor, and its mean gradient becomes
        E_old[c s]. So the derivation in `sampled` holds only while pi is near pi_old.
        [test_unbiased_off_policy]
        """
        ratio = (logp - (logp.detach() if logp_old is None else logp_old)).exp()
        return ratio * self.f((logp_ref - logp).clamp(-CLAMP, CLAMP))

    def exact(self, log_pi, log_rho):
        """Return D as a sum over all V codes: log_pi [..,V], log_rho [..,V] -> [..]. It needs no samples.

        `sampled` also needs all V logits, to normalize log pi(a). So the sum costs no further forward pass.
        For logits z, put dlog pi_a / dz_v = 1[a=v] - pi_v into E_pi[g s]:
            dD/dz_v = sum_a pi_a g_a (1[a=v] - pi_v)
                    = pi_v (g_v - E_pi[g])                [test_all_gradients_are_as_claimed]

        What `exact` and `unbiased` leave out. Their D is that of one token after fixed earlier tokens. But pi
        samples these, too. So the gradient of E_pi[D_1 + .. + D_T] has one more term:
            E_pi[sum_t s_t (D_{t+1} + .. + D_T)],     s_t = grad log pi(a_t | a_1 .. a_{t-1}).
        We omit this term, as GRPO implementations do.    [test_what_per_token_leaves_out]
        For reverse_kl, E_pi[D_1 + .. + D_T] is the divergence of whole sequences, because log w of a sequence
        is the sum of its tokens' x. For forward_kl this holds only if earlier tokens are sampled from rho.
        For js it never holds. The w of a sequence is the product w_1 ... w_T, and log(1 + w_1 ... w_T) is no
        sum.
        """
        return self.total(log_pi, log_rho)


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
    hidden holds the logits. hidden has r rows, and there are b samples. rows [b] is the index of
    each sample's row: in vapi.py several samples use one row. Without rows, sample i uses row i. The logits
    are large, so they are made when `logp` is first used, and kept. If that happens inside torch.no_grad,
    they have no gradient.
    """

    def __init__(self, hidden, head=None, rows=None):
        self.hidden, self.head, self.rows = hidden, head, rows

    @cached_property
    def logits(self):
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
        """Return the exact divergence `name` to `other`, which must have equal `rows`: [b,T], in nat."""
        return self._of_samples(DIVERGENCES[name].exact(self.logp, other.logp))

    def _of_samples(self, values):
        return values if self.rows is None else values[self.rows]                        # [r,T] -> [b,T]


# ---- actions that are vectors: the policies of flow.py -----------------------------------------------------
class GaussianJS(torch.autograd.Function):
    """JS of two normal distributions with one standard deviation: q = d^2 >= 0, of any shape -> JS, in nat.

    d is the distance of their means in standard deviations. Only the component along their difference
    matters. Along it, let z be the standard normal number of a sample a of pi. The log-ratio of the sample is
        x = log rho(a) - log pi(a) = -(q/2 + d z).
    pi and rho are mirror images, so both halves of JS are equal:
        JS = E_pi[log(pi/m)]
           = E_z[log 2 - log(1 + e^x)].                               [test_js_of_gaussians_by_monte_carlo]
    Near 0 it is q/8 - q^2/64, and it saturates at log 2.             [test_js_of_gaussians_near_and_far]
    The integral over z is a trapezoid on [-8,8] with 65 points, whose error is 6e-9.

    Autograd would fail at q = 0, where every run starts: d = sqrt(q) has no derivative there. By hand,
    let s = 1/(1 + e^-x), so ds/dx = s (1 - s). And dx/dq = -(1/2 + z/(2d)). Integration by parts gives
    E_z[z h(z)] = E_z[h'(z)], here for h = s with ds/dz = -d s (1 - s):
        dJS/dq = -E_z[s dx/dq]
               = E_z[s/2] + E_z[z s] / (2d)
               = E_z[s/2] - E_z[s (1 - s)] / 2
               = E_z[s^2] / 2.                                        [test_gradient_of_js_of_gaussians]
    At q = 0 this is 1/8.
    """
    @staticmethod
    def forward(ctx, q):
        ctx.save_for_backward(q)
        x, density = GaussianJS.log_ratio(q)
        return -(torch.log1p(torch.expm1(x) / 2) * density).sum(-1)   # log 2 - log(1 + e^x), exact near x = 0

    @staticmethod
    def backward(ctx, grad):
        x, density = GaussianJS.log_ratio(*ctx.saved_tensors)
        return grad * (x.sigmoid() ** 2 * density).sum(-1) / 2

    @staticmethod
    def log_ratio(q):
        """Return x [..,65] at the points z of the trapezoid, and the density of z times the spacing."""
        z = torch.linspace(-8, 8, 65, dtype=q.dtype, device=q.device)
        return -(q[..., None] / 2 + q.sqrt()[..., None] * z), (-z * z / 2).exp() / (2 * math.pi) ** .5 / 4


class Gaussian:
    """The distribution of vectors: one normal distribution with independent components for each action.

    mean [b,K,*n]: K actions of a sample, each of shape n, such as an image of latents. std [K]: the standard
    deviation of each action, the same for all components. All results are sums over the components of an
    action, so they are true densities and true divergences.
    """

    def __init__(self, mean, std):
        self.mean, self.std = mean, std.view(-1, *[1] * (mean.dim() - 2))                        # [K,1,..]

    def at(self, start, stop):
        return Gaussian(self.mean[:, start:stop], self.std[start:stop])

    def log_prob(self, actions):
        """Return the log-densities [b,K] of actions [b,K,*n], at the stored values (exercise 11)."""
        z = (actions - self.mean) / self.std
        return (-z * z / 2 - self.std.log() - math.log(2 * math.pi) / 2).flatten(2).sum(2)

    def entropy(self):
        """Return the differential entropy of each action, [b,K], in nat. It does not depend on the mean."""
        of_a_component = self.std.flatten().log() + math.log(2 * math.pi * math.e) / 2           # [K]
        return (self.mean[0, 0].numel() * of_a_component).expand(self.mean.shape[:2])

    def divergence(self, name, other):
        """Return the exact divergence `name` to a Gaussian with equal std, [b,K], in nat.

        log pi(a) - log rho(a) is linear in a, so both KLs are half the squared distance of the means:
            KL(pi || rho) = KL(rho || pi) = d^2 / 2.                  [test_kl_of_gaussians]
        So with `exact`, reverse_kl and forward_kl are the same loss.
        """
        q = ((self.mean - other.mean) / self.std).square().flatten(2).sum(2)                     # d^2, [b,K]
        return GaussianJS.apply(q) if name == "js" else q / 2
