"""Exercise 11. Find the bug: the ratio is .99996.

Check yourself:   python -m pytest exercises/test_e11_rounded_states.py

First read the opening of flow.py, and class Gaussian in divergences.py. The function below is a rollout of
Flow-GRPO. It runs, and its images are good. The states are stored in bf16, because this halves their memory.
The loss reads the stored states and computes the log-probabilities again. Before the first update the policy
is still the one that sampled. So the ratio pi / pi_old must be 1. It is not:
    the mean ratio is .99996, and 9 of 10 ratios are below 1.
A public framework had this bug. It looks like harmless rounding. But the published clip range of Flow-GRPO is
1 +- .0001. So .99996 uses up more than a third of the lower side before anything is learned.

Find the bug and fix it. The states must stay in bf16, and the log-probabilities must stay in fp32.

Hint: at which x was the log-probability computed? Which x does the loss read? Ask the same about the x that
the mean is computed from. Start with the first state.
"""
import torch

from divergences import Gaussian


def rollout(velocity, times, table, noise, store=torch.bfloat16):
    """Sample K steps -> (states [B,K+1,n] of dtype `store`, log-probabilities [B,K] in fp32).

    velocity(x [B,n], t) -> [B,n], in fp32. times [K+1], table = c_x, c_v, std, [K] each. noise [B,K+1,n], in
    fp32: noise[:, 0] is the first state, and noise[:, k + 1] is z of step k. The log-probability of a step is
    the mean over its n components.
    """
    # your turn: fix the lines that are wrong (remove this comment when you have fixed them)
    x = noise[:, 0]
    states, logp = [x.to(store)], []
    for k, (c_x, c_v, std) in enumerate(zip(*table)):
        mean = c_x * x + c_v * velocity(x, times[k])
        x = mean + std * noise[:, k + 1]
        step = Gaussian(mean[:, None], std[None])
        logp.append(step.log_prob(x[:, None])[:, 0] / x.shape[1])
        states.append(x.to(store))
    return torch.stack(states, 1), torch.stack(logp, 1)
