"""python -m pytest tests/full/test_llamagen_vapi.py          (and -m slow: one step at full size)

VA-pi in the full-size world: images from a folder or a list, captions or classes, on small files in the
released layouts (tests/helpers/full_size.py).
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import full_size
import sample
import train
import vapi
from common import config
from common.config import UserError, locate
from common.interfaces import Conditions, Rollout
from full import clip, data, weights
from model import GPT, GPTConfig
from test_llamagen import GPT_SMALL, lines
from vqgan import VQConfig

for package in ("transformers", "ftfy", "bs4"):
    pytest.importorskip(package)

# 4 x 4 tokens of 4 x 4 pixels. VGG16 has its full width, so the images must be small.
VQ_SMALL = VQConfig(codebook_size=128, ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=32)
C2I_SMALL = GPTConfig(dim=64, n_layer=2, n_head=2, vocab_size=128, block_size=16, cls_token_num=1,
                      model_type="c2i", num_classes=10)
QUICK = ["--max_steps=2", "--prompts_per_step=4", "--group_size=4", "--eval_prompts=2", "--eval_draws=8",
         "--micro_batch=8", "--device=cpu", "--learning_rate=0.01", "--n_head=2", "--block_size=16"]
C2I, T2I = ["configs/llamagen_c2i_vapi.py", "--gpt_ckpt=c2i_B_256.pt"], ["configs/llamagen_t2i_vapi.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make weights, 40 images of four classes, and a list of 30 images with captions."""
    path = tmp_path_factory.mktemp("weights")
    clip.HEADS[160] = 2
    full_size.make(str(path), GPT_SMALL, VQ_SMALL, "t2i_XL_stage1_256.pt", hps=full_size.small(160, 2))
    os.link(path / "vq_ds16_t2i.pt", path / "vq_ds16_c2i.pt")
    full_size.make_random(C2I_SMALL, str(path / "c2i_B_256.pt"))
    full_size.make_lpips(str(path))
    full_size.make_pictures(str(path / "pictures"), of_each=10)
    words = random.Random(0)
    with open(path / "list.tsv", "w") as file:
        for i in range(30):
            caption = f"a {words.choice(['red', 'blue', 'green'])} {words.choice(['cat', 'dog'])}"
            file.write(f"pictures/class {i % 4}/{i // 4}.png\t{caption} and photo {i}\n")
    yield path
    del clip.HEADS[160]


def go(folder, out, recipe, *more):
    train.main([*recipe, *QUICK, f"--weights={folder}", f"--out_dir={out}", *more])
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "c2i"
    return out, go(folder, out, C2I, f"--data={folder / 'pictures'}")


def test_classes_learn_from_a_folder_without_t5(run, folder, monkeypatch):
    out, metrics = run
    assert [line["step"] for line in metrics] == [0, 1]
    assert metrics[0]["kl_reverse"] == 0 < metrics[1]["kl_reverse"]
    assert metrics[0]["max_ratio_error"] < .02 and metrics[0]["prior"] > 0
    assert metrics[0]["reward"] < 0 and metrics[0]["reward_std"] > 0       # minus a distance
    evaluations = [json.loads(line) for line in open(out / "evaluations.jsonl")]
    assert all(e["reconstruction"] < 0 for e in evaluations) and len(evaluations) == 2
    assert evaluations[0]["reconstruction"] != evaluations[1]["reconstruction"]
    assert "reconstruction" in (out / "table.md").read_text()
    assert {"before_after.png", "curves.png", "ckpt.pt"} <= set(os.listdir(out))


def test_a_run_is_evaluated_again(run, tmp_path, capsys):
    """evaluate.py opens the same world and measures the same."""
    evaluate.main([str(run[0]), "--draws=8", "--eval_prompts=2", "--device=cpu",
                   f"--picture={tmp_path / 'c.png'}"])
    last = json.loads((run[0] / "evaluations.jsonl").read_text().splitlines()[-1])
    assert f"{last['reconstruction']:.3f}" in capsys.readouterr().out.splitlines()[-2]


def test_captions_learn_from_a_list(folder, tmp_path):
    """In fp32 the distribution that samples is the one that is trained, however a step is cut, with noise."""
    options = [f"--data={folder / 'list.tsv'}", "--dtype=float32", "--max_steps=1"]
    whole = go(folder, tmp_path / "a", T2I, *options, "--micro_batch=16", "--recompute=False")
    cut = go(folder, tmp_path / "b", T2I, *options, "--micro_batch=6")
    assert whole[0]["max_ratio_error"] < 1e-4 and whole[0]["kl_reverse"] == 0 and whole[0]["grad_norm"] > 0
    assert lines(whole)[0] == pytest.approx(lines(cut)[0], rel=2e-3, abs=2e-5)


def test_a_resumed_run_equals_a_whole_run(run, folder, tmp_path):
    go(folder, tmp_path / "halves", C2I, f"--data={folder / 'pictures'}", "--stop_after=1")
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    again = [json.loads(line) for line in open(tmp_path / "halves" / "metrics.jsonl")]
    assert lines(again) == lines(run[1])


@pytest.fixture(scope="module")
def opened(folder):
    """The options of a run in fp32, its world, and its pipeline."""
    options, _ = config.load(evaluate.options, [
        *C2I, *QUICK, f"--weights={folder}", f"--data={folder / 'pictures'}", "--dtype=float32"])
    return options, *evaluate.open_world(options, torch.device("cpu"))


def test_the_world_shows_real_images(opened):
    """Images have the side that the policy samples. Captions, labels and files belong together. Held-back
    images are never drawn."""
    _, world, pipeline = opened
    assert pipeline.pixels == 16                   # 4 x 4 tokens of 4 x 4 pixels
    captions, images = world.images.fixed_images()
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.float32
    assert torch.equal(images, world.images.fixed_images()[1])
    kept = {file for _, file, _ in world.images.listed.held_back}
    random.seed(0)
    drawn = [pair for _ in range(40) for pair in world.images.draw(4)]
    assert not kept & {file for _, file in drawn} and len({file for _, file in drawn}) == 36
    assert len(kept) == 4 and all(os.path.basename(os.path.dirname(file)) == c for c, file in drawn)
    conditions = pipeline.encode([c for c, _ in drawn])
    assert conditions.cond.tolist() == [int(c[-1]) for c, _ in drawn] and conditions.mask.shape == (160, 1)
    assert set(world.fixed_prompts(2)) <= set(captions)
    a, b = torch.rand(2, 11, 3, 16, 16)
    distance, lpips = world.images.perceptual, world.images.measure
    assert torch.allclose(distance(a, b), lpips(a, b), atol=1e-5)                    # 11 is 8 + 3
    assert torch.allclose(distance(a, b[:1]), lpips(a, b[:1].expand_as(a)), atol=1e-5)


class OneStep:
    """As much of a common.run.Run as a loop needs for one step."""
    device, generator = torch.device("cpu"), torch.Generator()

    def steps(self):
        yield 0

    def rows(self, n):
        return torch.arange(n)

    def phase(self, name):
        pass

    def optimizer_step(self, step):
        pass

    def log(self, step, line, stats):
        self.line = line


def test_targets_and_labels_are_those_of_the_images_that_a_step_names(opened, monkeypatch):
    options, world, pipeline = opened
    seen, drawn, real = [], [], vapi.loss_of

    def loss_of(cfg, policy, reference, context, conditions, targets, *rest):
        seen.append((conditions.cond, targets))
        return real(cfg, policy, reference, context, conditions, targets, *rest)
    monkeypatch.setattr(vapi, "loss_of", loss_of)
    draw = world.images.draw
    monkeypatch.setattr(world.images, "draw", lambda n: (drawn.extend(draw(n)), drawn)[1])
    run = OneStep()
    vapi.vapi_loop(options, run, world, pipeline)
    pipeline.policy.zero_grad()
    captions, paths = zip(*drawn)
    assert len(drawn) == 4 and run.line["reward"] < 0
    assert len(seen) == 2                          # 16 samples, 8 in a micro-batch
    for labels, targets in seen:
        assert torch.equal(targets, pipeline.encode_images(world.images.load(paths)))
        assert labels.tolist() == [int(caption[-1]) for caption in captions]


@pytest.mark.parametrize("recipe, options, message", [
    (C2I, [], "give --data=FOLDER"),
    (C2I, ["--data=DATA/list.tsv"], "has a caption and no label"),
    (C2I, ["--data=DATA/pictures", "--algorithm=grpo"], "no option 'context_noise'"),
    (["configs/llamagen_js.py", "--gpt_ckpt=c2i_B_256.pt"], ["--group_size=8"], "reads classes"),
    (C2I, ["--data=DATA/pictures", "--prompts_per_step=37"], "too few for a step of 37"),
    (C2I, ["--data=DATA/pictures", "--eval_prompts=5"], "eval_prompts must be at most 3"),
    (C2I, ["--data=DATA/eleven.jsonl"], "has a class 10, and c2i_B_256.pt knows classes from 0 to 9"),
    (C2I, ["--data=DATA/pictures", "--gpt_ckpt=mine_256.pt"], "must begin with c2i_"),
    (C2I, ["--data=DATA/pictures", "--weights=DATA/pictures"], "vgg16-397923af.pth"),
    (T2I, ["--data=DATA/nowhere"], "no file or folder"),
])
def test_errors_name_the_cause_and_leave_nothing(folder, tmp_path, recipe, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(weights, "_download", lambda name, path: 1 / 0)
    (folder / "eleven.jsonl").write_text("\n".join(json.dumps(
        {"path": f"pictures/class 0/{i % 10}.png", "label": i}) for i in range(11)))
    if not (folder / "mine_256.pt").exists():
        os.link(folder / "c2i_B_256.pt", folder / "mine_256.pt")
    with pytest.raises(UserError, match=message) as error:
        go(folder, tmp_path / "run", recipe, *[o.replace("DATA", str(folder)) for o in options])
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(error.value) or "files are missing" in str(error.value)


def test_a_damaged_image_ends_a_run_that_can_be_resumed(folder, run, tmp_path):
    """The error names the image, and the last checkpoint remains. With the image repaired, the resumed run
    equals a run without damage."""
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    for _, file, _ in data.Pictures(str(tmp_path / "pictures")).training:
        os.truncate(file, 200)
    with pytest.raises(UserError, match=r"\d.png' cannot be read as an image"):
        go(folder, tmp_path / "run", C2I, f"--data={tmp_path / 'pictures'}")
    shutil.copytree(folder / "pictures", tmp_path / "pictures", dirs_exist_ok=True)
    train.main([f"--out_dir={tmp_path / 'run'}", "--resume"])
    assert lines([json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]) == lines(run[1])


# ---- images for FID ----------------------------------------------------------------------------------------
def test_npz_is_what_adms_evaluator_reads(folder, run, tmp_path, monkeypatch):
    options = ["--gpt_ckpt=c2i_B_256.pt", "--vq_ckpt=vq_ds16_c2i.pt", "--n_head=2", "--block_size=16",
               "--n=5", f"--weights={folder}", "--device=cpu"]
    monkeypatch.setattr(evaluate, "TOKENS_AT_ONCE", 2 * 16)                         # three pieces
    found = []
    for name, more in (("a", []), ("b", []), ("c", ["--seed=1"])):
        sample.main([*options, f"--npz={tmp_path / name}.npz", *more])
        with np.load(tmp_path / f"{name}.npz") as file:
            assert file.files == ["arr_0"]
            found.append(file["arr_0"])
    assert found[0].shape == (5, 256, 256, 3) and found[0].dtype == np.uint8 and found[0].std() > 1
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert len({image.tobytes() for image in found[0]}) == 5
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz", "c.npz"]     # no half-written files
    with pytest.raises(UserError, match="exists already"):
        sample.main([*options, f"--npz={tmp_path}/a.npz"])
    with pytest.raises(UserError, match="reads prompts"):
        sample.main([*options[2:], "--gpt_ckpt=t2i_XL_stage1_256.pt", f"--npz={tmp_path}/d.npz"])
    sample.main([f"--ckpt={run[0]}", f"--npz={tmp_path}/d.npz", "--n=1", *options[5:]])
    monkeypatch.setattr(sample, "to_bytes", lambda pixels: 1 / 0)          # whatever fails on the way
    with pytest.raises(ZeroDivisionError):
        sample.main([*options, f"--npz={tmp_path}/e.npz"])
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz", "c.npz", "d.npz"]


def test_bytes_are_rounded_and_larger_images_are_resized_without_antialias():
    x = torch.zeros(1, 3, 256, 256)
    x[..., :6] = torch.tensor([-2., -1, -1 + .6 / 127.5, 0, 1 - .4 / 127.5, 3])
    assert sample.to_bytes(x)[0, 5, :6, 1].tolist() == [0, 0, 1, 128, 255, 255]
    x = torch.zeros(1, 3, 512, 512)
    x[..., 200] = 1
    # Sample 100 lies between pixels 200 and 201. In Keys' cubic with a = -.75 these two have the weight
    # 19/32, and their neighbors -3/32. With antialias, 8 pixels would have weights.
    row = sample.to_bytes(x)[0, 100, 98:103, 0].tolist()
    assert row == [int(127.5 * w + 128) for w in (0, -3 / 32, 19 / 32, 0, 0)]


# ---- memory ------------------------------------------------------------------------------------------------
class Living(TorchDispatchMode):
    """The most bytes at once of storages of at least `least`."""

    def __init__(self, least):
        super().__init__()
        self.least, self.now, self.peak, self.seen = least, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if size >= self.least and key not in self.seen:
                    self.seen.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.gone, key, size)
        return out

    def gone(self, key, size):
        self.now -= size
        self.seen.discard(key)


@pytest.mark.parametrize("dropout", [False, True])
def test_there_are_logits_of_images_not_of_samples(dropout):
    """4 images x 4 samples: what exists at once is 7 times the logits of 4 rows, not of 16 rows."""
    torch.manual_seed(0)
    c = GPTConfig(dim=32, n_layer=1, n_head=2, vocab_size=2048, block_size=64, cls_token_num=1,
                  model_type="c2i")
    policy, reference = GPT(c).eval(), GPT(c).eval().requires_grad_(False)
    cfg = SimpleNamespace(temperature=1.0, divergence="js", estimator="sampled", clip_eps=.2,
                          prior_weight=.1)
    tokens, z = torch.randint(2048, (16, 64)), torch.randint(2048, (4, 64))
    context = Rollout(z, None, torch.arange(4))
    with Living(4 * 64 * 2048 * 2) as living:
        loss, _ = vapi.loss_of(
            cfg, policy, reference, context, Conditions(torch.arange(4), torch.ones(4, 1)), z,
            torch.arange(4).repeat_interleave(4), tokens, torch.full((16, 64), -7.6), torch.randn(16),
            16 * 64, .4, [0, 1, 2, 3] if dropout else None)
        loss.backward()
    assert living.peak == 7 * 4 * 64 * 2048 * 4


# ---- full size ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_one_step_at_full_size(tmp_path):
    """GPT-B, VQ-16 and VGG16 at 256 pixels: 4 images x 4 samples from a generated folder, on the CPU. CLIP is
    small. The test prints times and peak memory."""
    where = str(tmp_path / "weights")
    os.makedirs(where)
    for name in ("c2i_B_256.pt", "vq_ds16_c2i.pt"):
        full_size.make_random(weights.RELEASED[name][0], f"{where}/{name}", std=.05 - .03 * ("B" in name))
    torch.manual_seed(0)
    full_size.make_rewards(where)
    full_size.make_lpips(where)
    full_size.make_pictures(str(tmp_path / "pictures"), of_each=10, size=(500, 375))
    code = ("import resource, train; from common import config; config.run(train.main); "
            "print('peak GB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)")
    done = subprocess.run(
        [sys.executable, "-c", code, "configs/llamagen_c2i_vapi.py", "--gpt_ckpt=c2i_B_256.pt",
         "--max_steps=1", "--prompts_per_step=4", "--group_size=4", "--micro_batch=8", "--eval_prompts=1",
         "--eval_draws=8", "--device=cpu", f"--data={tmp_path / 'pictures'}", f"--weights={where}",
         f"--out_dir={tmp_path / 'run'}"],
        cwd=os.path.dirname(locate("train.py")) or ".", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    line = json.loads(open(tmp_path / "run" / "metrics.jsonl").readline())
    print(done.stdout[-600:], line)
    assert line["kl_reverse"] == 0 and line["max_ratio_error"] < 1e-3 and line["reward"] < 0
    assert re.search(r"peak GB [\d.]+", done.stdout) and torch.isfinite(torch.tensor(line["grad_norm"]))
