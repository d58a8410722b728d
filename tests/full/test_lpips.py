"""python -m pytest tests/full/test_lpips.py

LPIPS is compared with its formula and with the package `lpips`.
"""
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from full import lpips
import full_size
from common.config import UserError


def refused(message, function, *args):
    with pytest.raises(UserError, match=message) as error:
        function(*args)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips")
    full_size.make_lpips(str(path))
    return [str(path / name) for name in (lpips.VGG_FILE, lpips.HEADS_FILE)]


def test_lpips_is_its_formula(files):
    """The oracle computes the formula in doubles from the file, with a list of convolutions."""
    vgg, heads = (torch.load(f, weights_only=True) for f in files)
    a, b = torch.rand(2, 3, 3, 40, 40) * 2.4 - 1.2
    mean, std = torch.tensor([.485, .456, .406]).double(), torch.tensor([.229, .224, .225]).double()

    def seen(x):
        x = ((x.double() + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        out = []
        for i in (0, 2, "pool", 5, 7, "pool", 10, 12, 14, "pool", 17, 19, 21, "pool", 24, 26, 28):
            if i == "pool":
                out.append(x)
                x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5)) if x.shape[2] % 2 == 0 \
                    else F.max_pool2d(x, 2)
            else:
                weight, bias = (vgg[f"features.{i}.{k}"].double() for k in ("weight", "bias"))
                x = F.conv2d(x, weight, bias, padding=1)
                x = x * (x > 0)
        return [y / y.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for y in out + [x]]
    expected = 0
    for k, (y, z) in enumerate(zip(seen(a), seen(b))):
        expected = expected + torch.einsum("c,bchw->b", heads[f"lin{k}.model.1.weight"].flatten().double(),
                                           (y - z) ** 2) / (y.shape[2] * y.shape[3])
    ours = lpips.LPIPS(*files)
    found = ours(a, b)
    assert found.shape == (3,) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found.double(), expected, rtol=1e-4)
    assert torch.equal(ours(a, a), torch.zeros(3)) and torch.allclose(ours(b, a), found)
    for k, head in enumerate(ours.heads):          # the weights of the file
        assert torch.equal(head.weight, heads[f"lin{k}.model.1.weight"])


PACKAGE = """
import sys
import types
import torch, torch.nn as nn
{stand_ins}
import lpips
vgg, images, out = sys.argv[1:]
model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
state = torch.load(vgg, weights_only=True)
theirs = {{f"net.slice{{s}}.{{i}}.{{k}}": state[f"features.{{i}}.{{k}}"]
          for s, (start, end) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1)
          for i in range(start, end) for k in ("weight", "bias") if f"features.{{i}}.{{k}}" in state}}
missing, strange = model.load_state_dict(theirs, strict=False)
assert not strange and not [k for k in missing if k.startswith("net")]
torch.save(model(*torch.load(images)).flatten().detach(), out)
"""
STAND_INS = """
def vgg16(pretrained=False):
    layers, width = [], 3
    for n, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(width, n, 3, padding=1), nn.ReLU(inplace=True)]
            width = n
        layers += [nn.MaxPool2d(2, 2)]
    return types.SimpleNamespace(features=nn.Sequential(*layers))
for name in ("torchvision", "torchvision.models", "scipy", "scipy.ndimage"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].models = sys.modules["torchvision.models"]
sys.modules["torchvision.models"].vgg16 = vgg16
sys.modules["scipy.ndimage"].zoom = None
"""


def test_lpips_is_that_of_the_package(files, tmp_path):
    """The package runs its own forward pass with its own heads. Only the layers of torchvision are replaced,
    by ours. LPIPS reads the package's file of heads, which an old torch saved on a GPU. Byte by byte, it is
    the file that full/weights.py fetches."""
    package = importlib.util.find_spec("lpips")
    if not package:
        pytest.skip("no package lpips: pip install --no-deps lpips==0.1.4")
    heads = os.path.join(os.path.dirname(package.origin), "weights", "v0.1", "vgg.pth")
    paths = [str(tmp_path / name) for name in ("images.pt", "out.pt")]
    a, b = torch.rand(2, 3, 3, 48, 48) * 2 - 1
    torch.save((a, b), paths[0])
    done = subprocess.run([sys.executable, "-c", PACKAGE.format(stand_ins=STAND_INS), files[0], *paths],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-900:]
    theirs, ours = torch.load(paths[1], weights_only=True), lpips.LPIPS(files[0], heads)
    assert torch.allclose(ours(a, b), theirs, rtol=1e-5) and theirs.min() > 0
    sums = [head.weight.sum().item() for head in ours.heads]
    assert sums == pytest.approx([6.926, 8.858, 17.515, 51.521, 47.035], abs=2e-3)     # the published ones


@pytest.mark.parametrize("which, change, message", [
    (0, lambda s: s.pop("features.28.weight"), "Missing key.*28.weight"),
    (0, lambda s: s.update({"features.30.weight": torch.zeros(1)}), "Unexpected key"),
    (0, lambda s: s.update({"features.0.weight": torch.zeros(64, 3, 5, 5)}), "size mismatch"),
    (0, lambda s: s.update({"features.0.bias": torch.ones(64).int()}), "int32, not a tensor of floating"),
    (0, lambda s: s.update({"features.0.bias": torch.full((64,), torch.nan)}), "NaN"),
    (1, lambda s: s.pop("lin4.model.1.weight"), "not what LPIPS.*Missing key"),
    (1, lambda s: s.update({3: 4}), "'3' is int, not a tensor"),
])
def test_files_that_are_not_lpips_are_refused(files, tmp_path, which, change, message):
    state, paths = torch.load(files[which], weights_only=True), list(files)
    change(state)
    paths[which] = str(tmp_path / "changed.pth")
    torch.save(state, paths[which])
    refused(message, lpips.LPIPS, *paths)
    refused("no file", lpips.LPIPS, *[p + "x" for p in files])


def test_vgg16_has_the_parameters_of_the_table():
    from full import weights
    layers, width = 0, 3
    for n, count in lpips.BLOCKS:
        for _ in range(count):
            layers, width = layers + 9 * width * n + n, n
    matrices = sum((a + 1) * b for a, b in ((512 * 49, 4096), (4096, 4096), (4096, 1000)))
    assert layers + matrices == weights.VGG16
    assert weights.RELEASED[lpips.HEADS_FILE][0] == 4 * sum(n for n, _ in lpips.BLOCKS)
    assert weights.RELEASED[lpips.VGG_FILE][0] == 4 * weights.VGG16 == 553_430_176
