"""Solution 5.

Under an L-infinity budget the best step of a given size is along the *sign* of the gradient: each pixel pays
for itself, so each takes its whole allowance. Projection onto the budget and onto [-1,1] is two clamps.
On the checker's 16 pictures with false captions, budget .1 (13 of 255 grey levels), 20 steps: the judge goes
from -.31 to +.12 (true captions have about +.36), the reader stays at 0, and noise of the same size moves the
judge by .01.
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
