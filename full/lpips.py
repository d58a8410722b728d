"""LPIPS 0.1 on VGG16: a perceptual distance between two images (arXiv 1801.03924, equation 1)."""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import files

VGG_FILE, HEADS_FILE = "vgg16-397923af.pth", "lpips_v0.1_vgg.pth"
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))       # (width, convolutions), arXiv 1409.1556
SHIFT, SCALE = (-.030, -.088, -.188), (.458, .448, .450)         # ImageNet's mean and deviation, for [-1,1]


class LPIPS(nn.Module):
    """The distance of images [b,3,H,W], in about [-1,1], to other images -> [b].

    Features of both images are taken at five layers of VGG16. At every position they become unit vectors. The
    squared differences get one weight per channel, which was learned from people's judgments. The distance is
    their mean over positions, summed over channels and layers. The package `lpips` computes the same, which
    tests/full/test_lpips.py checks. But it needs torchvision, a build of which fits only one build of torch.
    """

    def __init__(self, vgg, heads):
        """vgg, heads: paths of torchvision's VGG16 and of the weights per channel. Raises UserError."""
        super().__init__()
        layers, width, self.ends = [], 3, []
        for n, count in BLOCKS:
            for _ in range(count):
                layers += [nn.Conv2d(width, n, 3, padding=1), nn.ReLU(inplace=True)]
                width = n
            self.ends.append(len(layers) - 1)              # the layers whose features are compared
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])        # numbered as in the file
        self.heads = nn.ModuleList(nn.Conv2d(n, 1, 1, bias=False) for n, _ in BLOCKS)
        # Tensors whose names `unused` matches are skipped. From the other names, `drop` is removed.
        for part, path, drop, unused in ((self.features, vgg, r"features\.(?=\d)", r"classifier\."),
                                         (self.heads, heads, r"lin(?=\d)|model\.1\.", "(?!)")):
            state = {re.sub(drop, "", str(k)): v for k, v in files.load(path).items()
                     if not re.match(unused, str(k))}
            files.load_weights(part, state, path, "not what LPIPS needs, see `python -m full.weights`")
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images, others):
        """Compare images [b,3,H,W] to others [b,3,H,W], or all of them to one [1,3,H,W] -> distances [b]."""
        x = torch.cat([images, others]).to(self.shift.dtype)                                 # [2b or b+1,...]
        x = (x - self.shift) / self.scale
        total, heads = 0, dict(zip(self.ends, self.heads))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in heads:
                a, b = F.normalize(x, dim=1).split([len(images), len(others)])                   # [..,C,h,w]
                total = total + heads[i]((a - b).square()).mean((1, 2, 3))
        return total.to(images.dtype)
