"""Exercise 3. The divergence in the reward.

Check yourself:   python -m pytest exercises/test_e03_in_reward.py

First read the docstrings of `Divergence.sampled` and `Divergence.unbiased` in divergences.py, and grpo.py.
GRPO adds beta * divergence to the *loss*. PPO for language models instead subtracts the divergence from the
*reward*, and leaves the rest to REINFORCE. Can both give the same gradient?
You look for an advantage A', a constant to autograd, such that the plain REINFORCE loss
    -A' log pi(a),           a sampled from pi,
has in expectation the gradient of
    -A log pi(a) + beta D,   where D is the exact divergence of this token with a fixed prefix.
`Divergence.unbiased` derives grad D as a mean over samples, E_pi[(f(w) - w f'(w)) s] with s = grad log pi(a).
This gives
    A' = A - beta (f(w) - w f'(w)).
Write this for all divergences of the table at once.

Hint: a Divergence holds f and c = -w f', both as functions of log w = log rho - log pi. Every token has its
own A'. A' is a number and not a function of the policy, so no gradient may flow through it.

Not part of the exercise: the penalties of *later* tokens, which PPO adds up to a return, and the
normalization by group.
"""


def shaped_advantage(adv, logp, logp_ref, beta, divergence):
    """Return A' [B,T], detached.

    adv [B]. logp and logp_ref [B,T] at the sampled tokens, logp with gradient. beta is a float, divergence a
    name of DIVERGENCES. (|log w| stays below CLAMP here, so you need not clamp.)
    """
    raise NotImplementedError("your turn")
