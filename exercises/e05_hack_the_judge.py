"""Exercise 5. Hack the judge, then catch the hacker.

Check yourself:   python -m pytest exercises/test_e05_hack_the_judge.py

Read reward.py first. The judge is a learned opinion, and a learned opinion has blind spots. Look for them on
purpose: climb its score by gradient ascent on the *pixels* of pictures whose captions are false, changing no
pixel by more than `budget`. You will see the score go far up while the reader, which does geometry, is not
impressed: the pictures still show the wrong thing. GRPO cannot change pixels, but it climbs the same score.

Steps for `hack` (projected gradient ascent, arXiv 1706.06083; `steps` of them):
    x <- x + step * sign(d score / d x)
    x <- the nearest point with |x - images| <= budget everywhere, and inside [-1,1]
A step of about 2.5 budget / steps reaches the border and can still turn round there.

Hint: judge(images, captions) runs under no_grad, as a reward should, so no gradient comes out of it. Its two
halves, judge.embed_images and judge.embed_captions, are open; the score is the sum of their product over the
last axis. Pictures do not share a score, so the gradient of the sum over pictures is each one's own.
torch.autograd.grad(score, x) leaves the judge's own parameters without a gradient.

`detect` reads the two curves of a run and says when hacking first shows. With m_t(y) the mean of y[t-9] ..
y[t] (ten steps, from t = 9 on), it is the first t with
    m_t(rewards) - m_(t-20)(rewards) > .05     and     m_(t-20)(heldout) - m_t(heldout) > .05.
"""


def hack(judge, images, captions, steps, budget):
    """images [B,3,H,W] in [-1,1], B captions -> pictures [B,3,H,W] in [-1,1] that the judge likes better,
    each pixel within `budget` of the one in `images`, which stay as they are. No gradient is attached."""
    raise NotImplementedError("your turn")


def detect(rewards, heldout):
    """Two lists of floats of one length, one entry a step -> the first step (int) at which hacking shows, or
    None if it never does."""
    raise NotImplementedError("your turn")
