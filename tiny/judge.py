"""The two rewards of the tiny world: `Judge`, a learned opinion that can be hacked, and `reader`, which is exact."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from tiny import shapes
from tiny import text


class Judge(nn.Module):
    """Two encoders into one space, arXiv 2103.00020, trained with the sigmoid loss of SigLIP,
    arXiv 2303.15343 eq. 1."""

    def __init__(self, width=64, caption_dim=text.DIM):
        super().__init__()
        self.image = nn.Sequential(                                        # [B,3,32,32] -> [B,width]
            nn.Conv2d(3, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 4, 2, 1), nn.GELU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(64 * 16, 128), nn.GELU(), nn.Linear(128, width))
        self.word = nn.Sequential(nn.Linear(caption_dim, 128), nn.GELU(), nn.Linear(128, 128))
        self.caption = nn.Sequential(nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, width))
        self.scale, self.bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-4.))

    def embed_images(self, images):
        """images [B,3,32,32] in [-1,1] -> unit vectors [B,width]; evaluate.py's diversity uses them too."""
        return F.normalize(self.image(images.clamp(-1, 1)), dim=1)

    def activations(self, images):
        """What the three convolutions see: list of [B,C,h,w]."""
        x, found = images.clamp(-1, 1), []
        for layer in self.image[:6]:
            x = layer(x)
            found += [x] if isinstance(layer, nn.GELU) else []
        return found

    def embed_captions(self, captions):
        """B captions -> unit vectors [B,width]. Words are summed, so order reaches us by their features."""
        features, mask = text.encode(captions, self.scale.device, times=1)
        words = self.word(features.to(self.scale.dtype)) * mask[..., None]
        return F.normalize(self.caption(words.sum(1)), dim=1)

    def loss(self, images, captions, truth):
        """truth [B,N] in {0,1}: is caption n true of image b? -> mean over pairs of
        -log sigmoid(+-(s cos + bias))."""
        logits = self.scale.exp() * self.embed_images(images) @ self.embed_captions(captions).T + self.bias
        return F.binary_cross_entropy_with_logits(logits, truth)

    @torch.no_grad()
    def forward(self, images, captions):
        """The reward: cosine in [-1,1] of each image [B,3,32,32] with its own caption -> [B]."""
        return (self.embed_images(images) * self.embed_captions(captions)).sum(1)


def reader(images, captions):
    """1.0 where the exact reader finds just what the caption says, else 0.0 -> [B]. Grammar captions only."""
    right = [shapes.matches(s, shapes.parse(c)) for s, c in zip(shapes.read(images), captions)]
    return torch.tensor(right, dtype=torch.float, device=images.device)
