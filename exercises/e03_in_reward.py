"""Exercise 3. The divergence in the reward.

Check yourself:   python -m pytest exercises/test_e03_in_reward.py

Read divergences.py, sections 1 and 3, and grpo.py first. GRPO adds beta * divergence to the *loss*. PPO as
used on language models takes it off the *reward* instead, and lets REINFORCE do the rest. Can both be the
same?
You look for a detached advantage A' such that the plain REINFORCE loss
    -A' log pi(a)          a sampled from pi, A' a constant to autograd
has in expectation the gradient of
    -A log pi(a) + beta D,    D the true divergence of this token (`exact` in divergences.py), prefix fixed.
Section 3 has grad D as a mean over samples: E_pi[(f(w) - w f'(w)) s] with s = grad log pi(a). So
    A' = A - beta (f(w) - w f'(w)).
Write that for every divergence of the table at once.

Hint: a Divergence holds f and c = -w f', both as functions of log w = log rho - log pi. A' is a number, not a
function of the policy: no gradient may flow through it. Every token has its own.

Not part of it: the penalties of *later* tokens, which PPO adds up to a return, and the group normalisation.
"""


def shaped_advantage(adv, logp, logp_ref, beta, divergence):
    """adv [B]; logp, logp_ref [B,T] at the sampled tokens, logp with gradient; beta a float; divergence a
    name of DIVERGENCES -> A' [B,T], detached. (|log w| stays below CLAMP here; you need not clamp.)"""
    raise NotImplementedError("your turn")
