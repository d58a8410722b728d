"""Solution 13.

The noise of L has the standard deviation q / sqrt(n). log(1 +- eps) is about +-eps. So the noise is outside
with probability 2 Phi(-eps sqrt(n) / q), where Phi is the cdf of N(0, 1). This is the same at every n if eps
sqrt(n) is: eps = 1e-4 sqrt(65536 / n). "Nearly" is because log(1 +- eps) = +-eps - eps^2 / 2. At n = 512,
eps^2 / 2 is 6e-7.

The mean is different. In standard deviations of the noise it is -q sqrt(n) / 2, which grows with n. For
q = .02 it is -.2 at n = 512, and -2.6 at n = 65,536. With the rule the share outside is then
    n            512     8,192     65,536
    noise        20 %    20 %      20 %
    L            21 %    37 %      90 %
At n = 65,536 all of these 90 % are below 1 - eps. So the rule makes the shares of L nearly equal only while
q sqrt(n) is small. At full size the published eps = .0001 is a limit on the mean: half of all samples are
outside when q^2 / 2 = eps, at q = .014. GRPO-Guard (arXiv 2510.22319) adds q^2 / 2 to L for this reason.

Another question has another answer. If q sqrt(n) = h is fixed, so that the KL of the whole step is h^2 / 2 at
every n, the mean is -h^2 / (2n) and the noise is h / n. Both shrink like 1/n, so eps must also shrink like
1/n. Which question is right depends on what an update does. A network that errs by the same q in each
component has a KL that grows with n. So measure q, and the share outside, in your own run.
"""
import math
from statistics import NormalDist


def clip(n):
    return 1e-4 * math.sqrt(65536 / n)


def share_outside(q, n, eps, centred=False):
    L = NormalDist(0 if centred else -q ** 2 / 2, q / math.sqrt(n))
    return L.cdf(math.log1p(-eps)), 1 - L.cdf(math.log1p(eps))
