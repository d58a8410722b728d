"""Exercise 10. Guidance, done wrong.

Check yourself:   python -m pytest exercises/test_e10_guided_ratio.py        (-s shows the two numbers)

Read GPT.logits and GPT.generate in model.py first. With classifier-free guidance at scale s the sampler draws
from
    softmax(uncond + s (cond - uncond)),
and that is pi_old: the distribution that the samples are from. A policy gradient is only one if pi, in the
ratio r = pi / pi_old, is made in the same way. Then r = 1 on the first pass over a batch, whatever s is.
Score pi by the conditional logits alone (as the released code of arXiv 2606.21498 does for Janus, which
samples at a scale of 5), and r is far from 1 before anything is learnt. With our base at scale 3, one token
in ten then starts outside of the clip range 1 +- .2, some with r > 50. To check it costs one line, and
train.py logs it as max_ratio_error.

Hint: calling gpt scores tokens by teacher forcing and takes a cfg_scale of its own. gather picks the
log-probability of the token that was drawn.
"""


def ratio_error(gpt, tokens, logp, cond, mask, cfg_scale):
    """tokens [B,T] and their logp [B,T] as gpt.generate(cond, mask, cfg_scale=cfg_scale, return_logp=True)
    gave them -> the largest |pi/pi_old - 1| over all tokens, a float, with pi as it ought to be scored."""
    raise NotImplementedError("your turn")


def conditional_only_error(gpt, tokens, logp, cond, mask, cfg_scale):
    """The same, with pi scored without guidance."""
    raise NotImplementedError("your turn")
