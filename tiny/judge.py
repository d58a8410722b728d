"""The two rewards of the tiny world: a judge that is learned and can be hacked, and a reader that is exact.

  judge    The cosine between the vectors that a small model like CLIP gives to an image and to its prompt.
           pretrain.py trains it. It is a learned reward, as HPS and CLIPScore are, which rate photographs.
           Such a reward is good on images like those of its training. On other images it has errors, and a
           policy that maximizes the reward can exploit them. This is reward hacking.
  reader   1 if the image shows exactly what the prompt says, otherwise 0. It is a verifiable reward. It reads
           the image by geometry (shapes.py), and nothing in it is learned.

By default a run trains on the judge, and the reader is the held-out reward. If the judge's reward rises while
the reader's falls, the policy hacks the judge. In exercises/e05_hack_the_judge.py you do so on purpose.

The judge has two encoders into one space of unit vectors of D = 64 numbers, as CLIP has (arXiv 2103.00020).
It is trained with the sigmoid loss of SigLIP (arXiv 2303.15343 eq. 1).
  B images [B,3,32,32] -> 3 convolutions of stride 2 -> 2 linear layers -> [B,D]
  N texts -> features of words (text.py) -> 2 linear layers -> sum over words -> 2 linear layers -> [N,D]
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from tiny import shapes, text


class Judge(nn.Module):
    def __init__(self, width=64, caption_dim=text.DIM):
        super().__init__()
        self.image = nn.Sequential(                                        # [B,3,32,32] -> [B,D]
            nn.Conv2d(3, 32, 4, 2, 1), nn.GELU(), nn.Conv2d(32, 64, 4, 2, 1), nn.GELU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.GELU(), nn.Flatten(),
            nn.Linear(64 * 16, 128), nn.GELU(), nn.Linear(128, width))
        self.word = nn.Sequential(nn.Linear(caption_dim, 128), nn.GELU(), nn.Linear(128, 128))
        self.caption = nn.Sequential(nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, width))
        self.scale = nn.Parameter(torch.tensor(2.3))                       # the log of the factor in `loss`
        self.bias = nn.Parameter(torch.tensor(-4.))

    def embed_images(self, images):
        """Map images [B,3,32,32] in [-1,1] to unit vectors [B,D], on which evaluation measures diversity."""
        return F.normalize(self.image(images.clamp(-1, 1)), dim=1)

    def activations(self, images):
        """Return the outputs of the three convolutions, a list of [B,C,h,w]. vapi.py compares them."""
        x, outputs = images.clamp(-1, 1), []
        for layer in self.image[:6]:
            x = layer(x)
            outputs += [x] if isinstance(layer, nn.GELU) else []
        return outputs

    def embed_captions(self, texts):
        """Map N texts to unit vectors [N,D]. The sum over words ignores their order. Order enters only
        because the feature of each word contains its position."""
        features, mask = text.encode(texts, self.scale.device, times=1)
        words = self.word(features.to(self.scale.dtype)) * mask[..., None]
        return F.normalize(self.caption(words.sum(1)), dim=1)

    def loss(self, images, captions, truth):
        """Return the loss (a scalar) on all pairs of B images and N captions.

        truth [B,N]: 1 where a caption is true of an image, else 0. The loss is the mean over all pairs of
        -log sigmoid(z (exp(scale) cosine + bias)), where z is 1 for a true pair and -1 for a false pair.
        SigLIP divides the sum over pairs by B, not by B N.
        """
        logits = self.scale.exp() * self.embed_images(images) @ self.embed_captions(captions).T + self.bias
        return F.binary_cross_entropy_with_logits(logits, truth)

    @torch.no_grad()
    def forward(self, images, prompts):
        """Return the reward of each image [B,3,32,32] for its own prompt: their cosine in [-1,1], [B]."""
        return (self.embed_images(images) * self.embed_captions(prompts)).sum(1)


def reader(images, prompts):
    """Return the exact reward [B]: 1.0 where an image [B,3,32,32] shows just what its prompt says, else 0.0.

    Raises UserError for a prompt that is not of the world's grammar (shapes.CAPTIONS), and ValueError unless
    there are as many prompts as images.
    """
    if len(images) != len(prompts):
        raise ValueError(f"the reader needs a prompt for each image, got images {tuple(images.shape)} and "
                         f"{len(prompts)} prompts")
    right = [shapes.matches(s, shapes.parse(p)) for s, p in zip(shapes.read(images), prompts)]
    return torch.tensor(right, dtype=torch.float, device=images.device)
