"""LPIPS, a perceptual distance of two images."""
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import files
from common.config import UserError

VGG_FILE, HEADS_FILE = "vgg16-397923af.pth", "lpips_v0.1_vgg.pth"
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))           # width, convolutions; arXiv 1409.1556
SHIFT, SCALE = (-.030, -.088, -.188), (.458, .448, .450)   # ImageNet's mean and deviation, moved to [-1,1]


class LPIPS(nn.Module):
    """LPIPS 0.1 on VGG16, arXiv 1801.03924 eq. 1. Calling it: two of [b,3,H,W] in about [-1,1] -> [b]; the
    second may be one picture [1,3,H,W], to which all are compared.

    What five layers see of the two, as unit vectors at every place; the squares of their difference, weighted
    by what people found different, one weight a channel; the mean over places; the sum over layers.

    The package `lpips` computes the same (tests/test_data.py holds ours against it). But it wants
    torchvision, a build of which fits one build of torch only; with the wrong one transformers breaks too.
    """

    def __init__(self, vgg, heads):
        """The files of VGG16 (torchvision's) and of the heads. UserError if they are not."""
        super().__init__()
        layers, width, self.ends = [], 3, []
        for n, count in BLOCKS:
            for _ in range(count):
                layers += [nn.Conv2d(width, n, 3, padding=1), nn.ReLU(inplace=True)]
                width = n
            self.ends.append(len(layers) - 1)              # what is seen there is compared
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])        # numbered as in the file
        self.heads = nn.ModuleList(nn.Conv2d(n, 1, 1, bias=False) for n, _ in BLOCKS)
        self._take(self.features, vgg, r"features\.(?=\d)", r"classifier\.")
        self._take(self.heads, heads, r"lin(?=\d)|model\.1\.")
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)

    def _take(self, part, path, drop, unused="^$"):
        """Puts the tensors of a file into `part`, all of them, by their names without what matches `drop`."""
        state = {k: v for k, v in files.load(path).items() if not re.match(unused, str(k))}
        try:
            if wrong := [k for k, v in state.items() if not v.is_floating_point()]:
                raise RuntimeError(f"{wrong[0]} holds no floating point numbers")
            part.load_state_dict({re.sub(drop, "", k): v for k, v in state.items()})
        except (AttributeError, TypeError, RuntimeError) as error:
            raise UserError(f"{path} is not what LPIPS needs, see `python weights.py`: "
                            f"{' '.join(str(error).split())[:200]}") from None

    @torch.no_grad()
    def forward(self, images, others):
        x = torch.cat([images, others]).to(self.shift.dtype)                                 # [2b or b+1,...]
        x = (x - self.shift) / self.scale
        total, heads = 0, dict(zip(self.ends, self.heads))
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in heads:
                a, b = F.normalize(x, dim=1).split([len(images), len(others)])                   # [..,C,h,w]
                total = total + heads[i]((a - b).square()).mean((1, 2, 3))
        return total.to(images.dtype)
