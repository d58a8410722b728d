"""Exercise 12. A probability without a density.

Check yourself:   python -m pytest exercises/test_e12_no_density.py

First read the opening of flow.py, but not step_table. A public tutorial of Flow-GRPO samples without noise,
    x' = x + v dt,        dt = t' - t < 0,
and takes -|v|^2 dt / 2 as the log-probability of this step. It runs, and its loss has a gradient. Yet this
number is not a log-probability:
    The step is deterministic, so std = 0. All the probability is at one point, and a point has no density.
    Another policy, whose mean differs by a little, never reaches the point that was sampled. So
    pi / pi_old would be 0, however small the difference is.
    -|v|^2 dt / 2 does not depend on what was sampled. Its gradient makes v shorter or longer, for any x'.
A policy gradient needs noise, so Flow-GRPO samples a stochastic differential equation (SDE). Noise alone
would widen the distribution of x. So the SDE also has a drift that takes this back. Write one step of it,
from time t to time end < t, with noise level s:
    x' = c_x x + c_v v + std z,        z ~ N(0, 1).
In the limit of small steps, the density of x at every t must stay what it is without noise. Then write the
log-density of x'. It is a true one: its exponential integrates to 1 over x'.

Hint: point 6 of flow.py, sorted by x and v. The components of x' are independent.
"""


def step(t, end, s):
    """Return c_x, c_v and std, floats, of the step from time t to time end, 0 <= end < t <= 1.

    s >= 0 is a float. At s = 0 this is the deterministic step.
    """
    raise NotImplementedError("your turn")


def log_density(after, x, v, t, end, s):
    """Return the log-density [B] of the states after [B,*n], given x and v [B,*n], in nat.

    Raises ValueError if s is 0. The message says that there is no density.
    """
    raise NotImplementedError("your turn")
