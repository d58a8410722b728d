"""Two extras of the paper's released LlamaGen script, off by default: which tokens enter the loss, and how
much the advantage of each counts. Pure tensor functions of what a step knows already.

They come from GCPO (arXiv 2509.22485, github.com/zghhui/GCPO), and the released script of arXiv 2606.21498,
which builds on it, leaves them on.

critical_tokens   Not every token of a picture decides as much. Three picks, each a tenth of the T positions:
    first    the first ones in raster order: everything after them is conditioned on them;
    edge     those where the entropy of the policy changes most from place to place. Inside a wall or a sky
             the next token is about as sure as its neighbours; at an outline it is not;
    variety  those where the pictures of a group differ most. Where all G have about the same code, the
             reward cannot prefer one to another, and the token learns noise.
    The loss, divergence included, is then averaged over the picked tokens only: sum(mask * loss) / sum(mask).
dynamic_weight    The policy term of token t (not the divergence) is multiplied by the running mean of
    pi / rho over the tokens up to t, rho being the reference: parts of a picture in which the policy has
    grown surer than it was get more of the advantage, parts where it has grown less sure get less.

Why they are off: no run that we can see separates them from the divergences, which are what this repository
is about. GCPO's own ablation (Janus-Pro-1B, GenEval, k3 as divergence) has .84 for plain GRPO, .83 with the
picks, .85 with both.

What the weight adds to the gradient. The script does not detach it, so autograd goes through it too. Say that
the ratio to pi_old is 1 (first epoch), x = log pi - log rho, A the advantage of the sequence, and positions
count from 1. The force on log pi of token s, which is A without the weight, is then
    A (w_s + e^{x_s} sum_{t >= s} 1/t)     with the sum where |x_s| <= clip, else 0.
At pi = rho this is A (1 + 1/s + 1/(s+1) + ... + 1/T): 7.1 A for the first of 256 tokens, 1.004 A for the
last, 2 A on average. With a mask the loss has picked tokens t only: a token that is not picked loses its w_s,
but still feels the sum over picked ones after it.   [test_what_the_weight_adds_to_the_gradient]

What the papers leave open, settled as in GCPO's code where that says:
 1. A pick has int(share * T) tokens: 25 of 256, so 75 in all; the picks of a sequence never overlap.
 2. `edge` is picked for each sequence: each picture has its outlines elsewhere. `variety` has one score for
    the whole group, but as it leaves out the sequence's own `first` and `edge`, its positions may differ too.
 3. `edge` lies in the positions from int(.1 T), int(.8 T) of them (25 to 228 of 256): the first row has few
    neighbours, and the end of a picture decides nothing that comes after it.
 4. The entropy is first averaged over a token, its left neighbour and the three above: what is known when the
    token is drawn. At a border only those that exist count. The gradient is half the difference of the two
    sides; at a border, the difference to the one neighbour.
 5. The entropy is that of the sampler's distribution, from the rollout or from a forward pass: nat, [B,T].
 6. Scores closer than 1e-5 are a tie, and of ties the earlier position wins: otherwise rounding would choose,
    and the order of a group would change the result. (GCPO leaves ties to topk.)
"""
import math

import torch
import torch.nn.functional as F

from common.config import UserError


def _pick(score, taken, k):
    """The k positions of the smallest score [B,T] in each row, outside `taken` [B,T] -> mask [B,T]."""
    score = (score.float() * 1e5).round().masked_fill(taken, math.inf)                            # point 6
    return torch.zeros_like(taken).scatter(1, score.argsort(dim=1, stable=True)[:, :k], True)


def entropy_gradient(entropy, side):
    """entropy [B,T], T = side * side -> how steeply its smoothed map changes at each token, [B,T], >= 0."""
    padded = F.pad(torch.stack([entropy, torch.ones_like(entropy)]).unflatten(2, (side, side)), (1, 1, 1, 0))
    # row and column of self, left, up-left, up, up-right in the padded map: a row above, a column each side
    past = ((1, 1), (1, 0), (0, 0), (0, 1), (0, 2))
    total, count = sum(padded[..., i:i + side, j:j + side] for i, j in past)              # [B,side,side] each
    dy, dx = torch.gradient(total / count, dim=(1, 2))                                            # point 4
    return torch.hypot(dy, dx).flatten(1)


def group_similarity(tokens, codebook, group_size):
    """tokens [B,T], groups of G in a row; codebook [V,8] of unit rows -> [B,T] in [-1,1]: the mean cosine of
    the codes that two different pictures of the group have at a position, the same for all G of them."""
    total = codebook.float()[tokens].unflatten(0, (-1, group_size)).sum(1)                        # [B/G,T,8]
    # |sum_i c_i|^2 = sum_i |c_i|^2 + sum_{i != j} c_i . c_j = G + G (G-1) * mean cosine
    mean = (total.square().sum(2) - group_size) / (group_size * (group_size - 1))                 # [B/G,T]
    return mean.repeat_interleave(group_size, 0)


def critical_tokens(entropy, tokens, codebook, group_size, side, share=0.1):
    """The tokens that enter the loss -> mask [B,T], bool, True at 3 * int(share * T) positions of each row.

    entropy [B,T], nat, of the policy where it drew the tokens [B,T]; groups of G >= 2 sequences in a row;
    codebook [V,8], unit vectors (vqgan.quantize.codes()); T = side * side; share: of one pick. Raises
    UserError for a share that picks nothing or more than all, ValueError for shapes that do not fit.
    """
    B, T = tokens.shape
    if entropy.shape != tokens.shape or T != side * side or group_size < 2 or B % group_size:
        raise ValueError(f"entropy {tuple(entropy.shape)} and tokens {tuple(tokens.shape)} must both be "
                         f"[B,T] with T = {side} * {side} and B a multiple of a group of {group_size} >= 2")
    k = int(share * T)
    if not 1 <= k <= T // 3:
        raise UserError(f"the share of critical tokens must pick between 1 and a third of the {T} tokens, "
                        f"not {share}")
    position = torch.arange(T, device=tokens.device).expand(B, T)
    first = position < k
    middle = (position >= int(.1 * T)) & (position < int(.1 * T) + int(.8 * T))                   # point 3
    edge = _pick(-entropy_gradient(entropy, side), first | ~middle, k)
    return first | edge | _pick(group_similarity(tokens, codebook, group_size), first | edge, k)


def dynamic_weight(logp, logp_ref, clip=0.5):
    """logp, logp_ref [B,T] of the sampled tokens under policy and reference -> [B,T] in [e^-clip, e^clip].

    The gradient flows through it, see above. Position t needs all before it: give it whole sequences.
    """
    # w_t = 1/t sum_{s <= t} exp(clip(log pi_s - log rho_s, +-clip))
    ratio = (logp - logp_ref).clamp(-clip, clip).exp()
    return ratio.cumsum(1) / torch.arange(1, ratio.shape[1] + 1, device=ratio.device)
