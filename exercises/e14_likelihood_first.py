"""Exercise 14. Measure the likelihood before you blame the reward.

Check yourself:   python -m pytest exercises/test_e14_likelihood_first.py        (-s shows the numbers)

The base of the tiny world has never seen a red cross, a green circle or a blue triangle. After a GRPO run, at
most one of 96 images of such a prompt is right. Is the reward wrong, or beta, or the number of steps? GRPO
reinforces what is sampled. So first measure how often the base would sample a right image at all.

1. Compute the cost of one right image a of a prompt c, its negative log-likelihood in nat:
       cost = -log pi(a | c) = -sum_t log pi(a_t | c, a_<t).
2. A prompt has many right images, with other places, sizes and backgrounds. Let q be a uniform distribution
   over their token sequences, with entropy H. So log q(a) = -H for each. The chance of a right image is
       p = sum over right a of pi(a | c) = E_q[ pi(a | c) / q(a) ] = e^H E_q[ e^-cost ].
   Replace E_q by the mean over m images drawn from q. Compute log p: the numbers e^-cost may underflow.
   This mean is dominated by its cheapest images, which are rare. So it is unbiased but usually too low.
3. How many samples does it take until at least one is right with probability s? None of n samples is right
   with probability (1 - p)^n.

What is H? For a prompt of one shape and one color that the base has seen, pi is about q. There the mean cost
is about H, because the cross-entropy of q and pi is H where pi = q.

Hint: torch.logsumexp. math.log1p(-p) is log(1 - p), without the rounding error of 1 - p for a tiny p.
"""


def costs(gpt, tokens, cond, mask):
    """Return -log pi of images [B], in nat. tokens [B,T]. gpt(tokens, cond, mask) gives logits [B,T,V]."""
    raise NotImplementedError("your turn")


def log_chance(cost, entropy):
    """Return log p, a float, from the costs [m] of m images drawn from q, and the entropy H of q in nat."""
    raise NotImplementedError("your turn")


def samples_needed(log_p, s=.95):
    """Return the n at which a right image is among n samples with probability s, a float. log_p: below 0."""
    raise NotImplementedError("your turn")
