"""Exercise 14. Measure the likelihood before you blame the reward.

Check yourself:   python -m pytest exercises/test_e14_likelihood_first.py        (-s shows the numbers)

The base of the tiny world has never seen a red cross, a green circle or a blue triangle. After every GRPO run
it still never draws one (`unseen` in README.md). Is the reward wrong, or beta, or the number of steps? GRPO
reinforces what is sampled. So first measure how often a right image would be sampled at all.

1. Compute the negative log-likelihood of one right image a of a prompt c, in nat:
       nat = -log pi(a | c) = -sum_t log pi(a_t | c, a_<t).
2. A prompt has many right images, with other places, sizes and backgrounds. Let q be the uniform
   distribution over them, with entropy H. So log q(a) = -H for each of them. The chance of a right image is
       P = sum over right a of pi(a | c) = E_q[ pi(a | c) / q(a) ] = e^H E_q[ e^-nat ].
   Replace E_q by the mean over m images drawn from q. Compute log P: the numbers e^-nat may underflow.
3. One sample is right with probability P. How many samples does it take until at least one is right with
   probability c? None of n samples is right with probability (1 - P)^n.

What is H? The base knows the pairs that it has seen. For a seen prompt of the same kind the mean of nat is
about H, because the cross-entropy to q equals H where pi = q. It is a little larger, because the base makes
errors. So the estimate of P for seen pairs can come out above 1.

Hint: torch.logsumexp. math.log1p(-p) is log(1 - p), without the rounding error of 1 - p for a tiny p.
"""


def nat_per_image(gpt, tokens, cond, mask):
    """Return -log pi of images [B], in nat. tokens [B,T]. gpt(tokens, cond, mask) gives logits [B,T,V]."""
    raise NotImplementedError("your turn")


def log_chance(nats, entropy):
    """Return log P, a float, from the nat [m] of m images drawn from q, and the entropy H of q in nat."""
    raise NotImplementedError("your turn")


def samples_needed(log_p, confidence=.95):
    """Return how many samples hold a right image with this probability, as a float. log_p: log P, below 0."""
    raise NotImplementedError("your turn")
