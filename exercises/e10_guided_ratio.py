"""Exercise 10. Guidance, done wrong.

Check yourself:   python -m pytest exercises/test_e10_guided_ratio.py        (-s shows the two numbers)

First read ImageTransformer.logits and ImageTransformer.generate in model.py. With classifier-free guidance at
scale s, the distribution of the sampler is
    softmax(uncond + s (cond - uncond)).
This distribution is pi_old, because the samples come from it. The policy gradient is only right if pi, in the
ratio r = pi / pi_old, is computed in the same way. Then r = 1 on the first pass over a batch, whatever s is.
The released code of arXiv 2606.21498 does otherwise for Janus: it samples at a scale of 5, and computes pi
from the conditional logits alone. Then r is far from 1 before anything is learned. With our base at scale 3,
one token in ten starts outside of the clip range 1 +- .2, some tokens with r > 50. A check costs one line,
and train.py logs it as max_ratio_error.

Hint: calling gpt computes logits by teacher forcing, and takes a cfg_scale of its own. gather picks the
log-probability of the sampled token.
"""


def ratio_error(gpt, tokens, logp, cond, mask, cfg_scale):
    """Return the largest |pi/pi_old - 1| over all tokens, a float, with pi computed in the right way.

    tokens [B,T] and logp [B,T] come from gpt.generate(cond, mask, cfg_scale=cfg_scale, return_logp=True).
    """
    raise NotImplementedError("your turn")


def conditional_only_error(gpt, tokens, logp, cond, mask, cfg_scale):
    """Return the same number, but with pi computed without guidance."""
    raise NotImplementedError("your turn")
