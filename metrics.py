"""Measures of diversity, and distances between sets of images, computed from feature vectors."""
import torch
import torch.nn.functional as F


def pairwise(features):
    """Return the mean of 1 - cosine over all pairs of different images of one prompt, a float in [0,2].

    features: unit vectors [P,n,d] of n >= 2 images of each of P prompts.
    """
    n = features.shape[1]
    # The squared length of the sum is the sum of all n^2 cosines. n of them compare a vector with itself.
    total = features.sum(1).square().sum(1)                                                  # [P]
    return (1 - (total - n) / (n * (n - 1))).mean().item()


def vendi(features):
    """Return the Vendi score (arXiv 2210.02410 eq. 2), the effective number of different images, in 1..n.

    features: unit vectors [n,d]. The matrix F F^T / n holds the cosines of all pairs, divided by n. The score
    is exp(entropy of its eigenvalues). F^T F / n has the same nonzero eigenvalues: we use the smaller matrix.
    """
    f = features.cpu().double()                    # on the CPU, because Apple GPUs (MPS) have no float64
    p = torch.linalg.eigvalsh((f.T @ f if len(f) > f.shape[1] else f @ f.T) / len(f)).clamp_min(1e-12)
    return (-(p * p.log()).sum()).exp().item()


def frechet(a, b):
    """Return the Frechet distance between Gaussians fitted to features a [n,d] and b [m,d], a float >= 0.

    This is arXiv 1706.08500 eq. 6, which is called FID when the features come from Inception. The value falls
    as n grows, so compare only values of equal n.
    """
    a, b = a.cpu().double(), b.cpu().double()
    s, t = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())                          # [d,d]
    # The trace of sqrt(s t) is the sum of the square roots of the eigenvalues of s t. The symmetric matrix
    # sqrt(s) t sqrt(s) has the same eigenvalues.
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * middle).item()


def precision_recall(real, sampled, k=3):
    """Return (precision, recall) of arXiv 1904.06991 eq. 1, two floats in [0,1].

    real [n,d] and sampled [m,d] are features. A point lies within a set if it is as near to some member of
    the set as that member is to its own k-th neighbor in the set. precision is the share of sampled points
    within the real set. recall is the share of real points within the sampled set.
    """
    def within(points, members):
        radius = torch.cdist(members, members).kthvalue(k + 1).values      # the nearest is the member itself
        return (torch.cdist(points, members) <= radius).any(1).double().mean().item()
    return within(sampled, real), within(real, sampled)


def lpips(layers, images, originals):
    """Return LPIPS with all weights 1 (arXiv 1801.03924 eq. 1): a perceptual distance [b] to the originals.

    layers is a function images -> list of activations [b,C,h,w]. Activations become unit vectors at every
    place. Their squared distance is averaged over places and summed over layers.
    """
    pairs = zip(layers(images), layers(originals))
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs)
