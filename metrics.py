"""Diversity and distance of sets of features."""
import torch
import torch.nn.functional as F


def pairwise(features):
    """Unit vectors [P,n,d] -> mean over the prompts of 1 - cosine between two different ones of a prompt."""
    n = features.shape[1]
    # the cosines of all pairs add up to the squared length of the sum; n of them are of a vector with itself
    total = features.sum(1).square().sum(1)                                                  # [P]
    return (1 - (total - n) / (n * (n - 1))).mean().item()


def vendi(features):
    """Unit vectors [n,d] -> the Vendi score, in 1..n. The d x d matrix has the same eigenvalues as the
    n x n one."""
    f = features.cpu().double()                    # mps knows no float64
    p = torch.linalg.eigvalsh((f.T @ f if len(f) > f.shape[1] else f @ f.T) / len(f)).clamp_min(1e-12)
    return (-(p * p.log()).sum()).exp().item()


def frechet(a, b):
    """Frechet distance of the Gaussians through two clouds of features [n,d], [m,d]; arXiv 1706.08500 eq. 6.
    (In features of Inception it is FID. It falls with n: compare only at equal numbers.)"""
    (m, s), (k, t) = ((x.mean(0), torch.atleast_2d(x.T.cov())) for x in (
        a.cpu().double(), b.cpu().double()))
    # tr sqrt(S T) is the sum of the roots of the eigenvalues of S T; sqrt(S) T sqrt(S) has the same ones
    values, vectors = torch.linalg.eigh(s)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ t @ root).clamp_min(0).sqrt().sum()
    return ((m - k).square().sum() + s.trace() + t.trace() - 2 * middle).item()


def precision_recall(real, drawn, k=3):
    """Features [n,d], [m,d] -> (share of the drawn that lie among the real, share of the real among the
    drawn); among: nearer to one of them than that is to its own k-th neighbour. arXiv 1904.06991 eq. 1."""
    def share(points, cloud):
        radius = torch.cdist(cloud, cloud).kthvalue(k + 1).values          # the nearest is the point itself
        return (torch.cdist(points, cloud) <= radius).any(1).double().mean().item()
    return share(drawn, real), share(real, drawn)


def lpips(layers, images, originals):
    """LPIPS with all weights 1, arXiv 1801.03924 eq. 1: a perceptual distance [b] of images to originals.

    layers: a function images -> list of activations [b,C,h,w]. Activations become unit vectors at every
    place. Their squared distance is averaged over places and summed over layers.
    """
    pairs = zip(layers(images), layers(originals))
    return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in pairs)
