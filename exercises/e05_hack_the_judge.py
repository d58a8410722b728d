"""Exercise 5. Hack the judge, then detect the hacking.

Check yourself:   python -m pytest exercises/test_e05_hack_the_judge.py

Read tiny/judge.py first. The judge is a learned reward, and a learned reward has blind spots. Search for them
on purpose: increase its reward by gradient ascent on the *pixels* of images whose captions are false, and
change no pixel by more than `budget`. The judge's reward will rise far. But the reader, which measures
geometry, still finds that the images show the wrong thing. GRPO cannot change pixels, but it increases the
same reward.

Steps of `hack` (projected gradient ascent, arXiv 1706.06083), repeated `steps` times:
    x <- x + step * sign(d reward / d x)
    x <- the nearest point with |x - images| <= budget everywhere, and inside [-1,1]
A step of about 2.5 budget / steps reaches the border of the budget and can still turn around there.

Hint: judge(images, captions) runs under no_grad, as a reward should, so it gives no gradient. Use its two
parts, judge.embed_images and judge.embed_captions. The reward is the sum of their product over the last axis.
The reward of an image depends on no other image, so the gradient of the sum over images is the gradient of
each. torch.autograd.grad(reward, x) leaves the judge's own parameters without a gradient.

`detect` reads two curves of a run and says when hacking first shows. Let m_t(y) be the mean of y[t-9] ..
y[t], so ten steps, from t = 9 on. Return the first t with
    m_t(rewards) - m_(t-20)(rewards) > .05     and     m_(t-20)(heldout) - m_t(heldout) > .05.
"""


def hack(judge, images, captions, steps, budget):
    """Return images [B,3,H,W] in [-1,1] with a higher reward than `images` [B,3,H,W], without a gradient.

    Each pixel stays within `budget` of the pixel in `images`, which must not change. captions: B texts.
    """
    raise NotImplementedError("your turn")


def detect(rewards, heldout):
    """Return the first step (int) at which hacking shows, or None if it never shows.

    rewards and heldout are lists of floats of the same length, one entry per step.
    """
    raise NotImplementedError("your turn")
