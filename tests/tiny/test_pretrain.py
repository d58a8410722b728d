"""python -m pytest tests/tiny/test_pretrain.py"""
import torch

import pretrain
from common import files
from tiny import shapes
from tiny.world import load_models


def test_same_seed_same_file_and_it_loads(tmp_path):
    """A few steps are enough to run every phase, the revival of unused codes included."""
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        pretrain.main([f"--out={path}", "--scenes=80", "--vq_steps=60", "--gpt_steps=3", "--judge_steps=3"])
    first, second = (files.load(str(path)) for path in paths)
    for part in ("gpt", "vqgan", "judge"):
        assert first[part]["state"].keys() == second[part]["state"].keys()
        assert all(torch.equal(v, second[part]["state"][k]) for k, v in first[part]["state"].items())
    policy, vqgan, _, options = load_models(str(paths[0]), torch.device("cpu"))
    assert options == {} and vqgan.decode(torch.zeros(1, 64, dtype=torch.long)).shape == (1, 3, 32, 32)
    assert policy.output.weight.any()    # the weights start at zero, so a step was taken


def test_revived_codes_are_vectors_that_were_far_from_all_codes():
    torch.manual_seed(0)
    vq = pretrain.VQGAN(pretrain.VQ)
    dead = torch.zeros(pretrain.VQ.codebook_size, dtype=torch.bool)
    dead[7:12] = True
    before = vq.quantize.embedding.weight.clone()
    images = shapes.render([s for _, s in shapes.random_scenes(8, pretrain.random.Random(0))])
    pretrain.revive(vq, images, dead)
    after = vq.quantize.embedding.weight
    assert torch.equal(before[~dead], after[~dead])
    with torch.no_grad():
        z = torch.nn.functional.normalize(vq.quant_conv(vq.encoder(images)), dim=1)
        z = z.permute(0, 2, 3, 1).reshape(-1, 8)
        near = (z @ torch.nn.functional.normalize(before, dim=1).T).amax(1)
    for code in after[dead]:
        which = (z - code).square().sum(1).argmin()
        assert torch.allclose(z[which], code, atol=1e-6) and (near < near[which]).sum() < 4 * 5 + 1


def test_near_misses_are_captions_of_the_same_form():
    rng, changed = pretrain.random.Random(0), []
    for caption in list(shapes.CAPTIONS)[::7]:
        other = pretrain.near_miss(caption, rng)
        assert other in shapes.CAPTIONS and len(other.split()) == len(caption.split())
        # A held-out caption would always be false, so the judge would learn to reject its pair.
        assert other == caption or not any((c, s) in shapes.UNSEEN for s, c in shapes.CAPTIONS[other].slots)
        changed.append(sum(a != b for a, b in zip(caption.split(), other.split())))
    assert max(changed) == 1 and changed.count(1) > .95 * len(changed)
