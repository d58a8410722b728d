"""Two extras of the paper's released LlamaGen script, off by default: critical tokens and a dynamic weight.

Both come from GCPO (arXiv 2509.22485, github.com/zghhui/GCPO). The paper's script (arXiv 2606.21498) builds
on GCPO and leaves both on. Symbols: pi policy, rho reference, A advantage of a sequence, B sequences in
groups of G per prompt, T tokens, V codes, n latent dimensions.

critical_tokens   Some tokens of an image decide more than others. Each of three picks takes a tenth of them:
    first    the first tokens in raster order, because all later tokens are conditioned on them
    edge     the tokens where the policy's entropy changes most from place to place. Inside a wall or a sky
             the next token is about as certain as its neighbors, but at an outline it is not
    variety  the tokens where the images of a group differ most. Where all G images have about the same code,
             this token does not explain why their rewards differ, and its gradient is only noise
    The loss, with its divergence, is then averaged over the picked tokens only: sum(mask * loss) / sum(mask).
dynamic_weight    The policy term of token t, but not the divergence, is multiplied by the running mean
    of pi / rho over the tokens up to t. So parts of an image where the policy has become more certain than
    the reference get a larger advantage. Parts where it has become less certain get a smaller advantage.

Why both are off. No published run that we know separates their effect from that of the divergence, and the
divergence is our subject. GCPO's own ablation (Janus-Pro-1B, GenEval, sampled reverse KL) reports .84 for
plain GRPO, .83 with the picks, and .85 with picks and weight.

What the weight adds to the gradient. The script does not detach the weight, so autograd differentiates it as
well. Let the ratio to pi_old be 1, as in the first inner epoch. Let y = log pi - log rho, and let positions
count from 1. Without the weight w, the objective has the derivative A in log pi of token s. With w it has
    A (w_s + e^{y_s} sum_{t >= s} 1/t),     where the sum counts only if |y_s| <= clip.
At pi = rho this is A (1 + 1/s + 1/(s+1) + ... + 1/T): 7.1 A for the first of 256 tokens, 1.004 A for the last
token, and 2 A on average. With a mask, the sum runs over picked tokens t only. A token that is not picked has
no w_s, but keeps this sum.                                        [test_what_the_weight_adds_to_the_gradient]

Where the papers leave details open, this file follows GCPO's code:
    Size        A pick has int(share * T) tokens: 25 of 256, so 75 in all. The picks of a row never overlap.
    Groups      `edge` is picked per sequence, because each image has its own outlines. `variety` has one
                value per group, but excludes `first` and `edge` of the sequence. So its positions may differ.
    Middle      `edge` lies in the int(.8 T) positions from int(.1 T) on (25 to 228 of 256). The first row has
                few neighbors, and the end of an image influences nothing after it.
    Smoothing   The entropy is first averaged over a token, its left neighbor and the three neighbors above.
                These tokens are known when the token is sampled. At a border only existing neighbors count.
                The slope is half the difference of the neighbors on both sides. At a border it is the
                difference to the only neighbor.
    Entropy     It is the entropy of the distribution that sampled the tokens, [B,T], in nat.
    Ties        Values closer than 1e-5 are a tie, and the earliest position wins. Otherwise rounding would
                decide, and the order of a group would change the result. (GCPO leaves ties to topk.)
"""
import math

import torch
import torch.nn.functional as F


def _pick(values, taken, k):
    """Return a mask [B,T] of the k smallest values [B,T] of each row outside of the mask `taken` [B,T]."""
    values = (values.float() * 1e5).round().masked_fill(taken, math.inf)               # see "Ties" above
    return torch.zeros_like(taken).scatter(1, values.argsort(dim=1, stable=True)[:, :k], True)


def entropy_gradient(entropy, side):
    """Return the slope of the smoothed map of entropy [B,T] at each token, [B,T], >= 0. T = side * side."""
    padded = F.pad(torch.stack([entropy, torch.ones_like(entropy)]).unflatten(2, (side, side)), (1, 1, 1, 0))
    # The padded map has one more row above and one more column on each side. These are (row, column) offsets
    # in it: of the token itself, and of its neighbors at the left, upper left, top, and upper right.
    past = ((1, 1), (1, 0), (0, 0), (0, 1), (0, 2))
    total, count = sum(padded[..., i:i + side, j:j + side] for i, j in past)              # [B,side,side] each
    dy, dx = torch.gradient(total / count, dim=(1, 2))
    return torch.hypot(dy, dx).flatten(1)


def group_similarity(tokens, codebook, group_size):
    """Return the mean cosine of the codes that two different images of a group have at each position, [B,T].
    The rows of a group are equal. Arguments as in `critical_tokens`."""
    total = codebook.float()[tokens].unflatten(0, (-1, group_size)).sum(1)                        # [B/G,T,n]
    # |sum_i c_i|^2 = sum_i |c_i|^2 + sum_{i != j} c_i . c_j = G + G (G-1) * mean cosine
    mean = (total.square().sum(2) - group_size) / (group_size * (group_size - 1))                 # [B/G,T]
    return mean.repeat_interleave(group_size, 0)


def critical_tokens(entropy, tokens, codebook, group_size, side, share=0.1):
    """Return a bool mask [B,T] of the tokens that enter the loss: 3 * int(share * T) in each row.

    entropy [B,T], in nat, is that of the policy when it sampled tokens [B,T]. The G >= 2 sequences of a group
    are adjacent rows. codebook [V,n] holds unit vectors, T = side * side. share: size of one pick over T.
    Raises ValueError if the shapes do not fit, or if a pick would be empty or above T/3.
    """
    B, T = tokens.shape
    if entropy.shape != tokens.shape or T != side * side or group_size < 2 or B % group_size:
        raise ValueError(f"entropy {tuple(entropy.shape)} and tokens {tuple(tokens.shape)} must both be "
                         f"[B,T], with T = {side} * {side} and B a multiple of a group of {group_size} >= 2.")
    k = int(share * T)
    if not 1 <= k <= T // 3:
        raise ValueError(f"share must pick between 1 and a third of the {T} tokens, got {share}.")
    position = torch.arange(T, device=tokens.device).expand(B, T)
    first = position < k
    middle = (position >= int(.1 * T)) & (position < int(.1 * T) + int(.8 * T))
    edge = _pick(-entropy_gradient(entropy, side), first | ~middle, k)
    return first | edge | _pick(group_similarity(tokens, codebook, group_size), first | edge, k)


def dynamic_weight(logp, logp_ref, clip=0.5):
    """Return w_t = 1/t sum_{s <= t} exp(clip(log pi_s - log rho_s, +-clip)), [B,T] in [e^-clip, e^clip].

    logp, logp_ref [B,T]: log-probabilities of the sampled tokens under policy and reference. These must be
    whole sequences, because w_t depends on all tokens before t. The gradient flows through w, see above.
    """
    ratio = (logp - logp_ref).clamp(-clip, clip).exp()
    return ratio.cumsum(1) / torch.arange(1, ratio.shape[1] + 1, device=ratio.device)
