"""Solution 5.

Under an L-infinity budget, the best step of a given size follows the *sign* of the gradient, because each
pixel has a budget of its own and can use all of it. The projection onto the budget and onto [-1,1] is two
clamps. The checker uses 16 images with false captions, budget .1 (13 of 255 gray levels), and 20 steps. The
judge's reward rises from -.31 to +.12, where true captions have about +.36. The reader stays at 0. Noise of
the same size changes the judge's reward by .01.
"""
import torch


def hack(judge, images, captions, steps, budget):
    with torch.no_grad():
        target = judge.embed_captions(captions)                                                  # [B,width]
    x = images.clone()
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad((judge.embed_images(x) * target).sum(), x)
        x = x.detach() + 2.5 * budget / steps * gradient.sign()
        x = torch.clamp(x, images - budget, images + budget).clamp(-1, 1)
    return x.detach()


def detect(rewards, heldout):
    def rise(y, t):                                        # m_t - m_(t-20)
        return (sum(y[t - 9:t + 1]) - sum(y[t - 29:t - 19])) / 10
    for t in range(29, len(rewards)):
        if rise(rewards, t) > .05 and rise(heldout, t) < -.05:
            return t
    return None
