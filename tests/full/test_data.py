"""python -m pytest tests/full/test_data.py

Images are read from folders and lists, good and hostile ones. A second implementation checks the crop.
"""
import itertools
import os
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from full import data
import full_size
from common.config import UserError

W, H = 90, 70


@pytest.fixture
def folder(tmp_path):
    full_size.make_pictures(str(tmp_path / "pictures"), classes=3, of_each=4)
    return tmp_path / "pictures"


def everything(path, **options):
    found = data.Pictures(str(path), **options)
    return sorted(found.training + found.held_back), found


def refused(message, function, *args, **options):
    with pytest.raises(UserError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- lists -------------------------------------------------------------------------------------------------
def test_a_folder_of_folders_numbers_its_classes_in_order(folder):
    os.rename(folder / "class 2", folder / "Zebra")                        # upper case sorts first
    os.rename(folder / "class 0", folder / "日本 é")
    (folder / "class 1" / "notes.txt").write_text("no image")
    (folder / "list.csv").write_text("no class")
    os.rename(folder / "class 1" / "0.png", folder / "class 1" / "UPPER.PNG")
    found, pictures = everything(folder)
    assert pictures.label_of == {"Zebra": 0, "class 1": 1, "日本 é": 2}
    expected = [(name, str(folder / name / file), label) for name, label in pictures.label_of.items()
                for file in os.listdir(folder / name) if file != "notes.txt"]
    assert found == sorted(expected)
    assert len(found) == 12
    names = [f"n{n:08d}" for n in random.Random(0).sample(range(10 ** 6), 40)]             # in random order
    for name in names:
        (folder / "many" / name).mkdir(parents=True)
        os.link(folder / "Zebra" / "0.png", folder / "many" / name / "0.png")
    assert everything(folder / "many")[1].label_of == {name: i for i, name in enumerate(sorted(names))}


LISTS = {
    "a.tsv": "pictures/class 0/0.png\ta cat, asleep\n# a remark\n\npictures/class 1/1.png \t two dogs \n",
    "a.txt": "\ufeffpictures/class 0/0.png\ta cat, asleep\r\npictures/class 1/1.png\ttwo dogs\r\n",
    "a.jsonl": '{"image_path": "pictures/class 0/0.png", "text": ["a cat, asleep", "another"]}\n'
               '{"Path": "ABSOLUTE/pictures/class 1/1.png", "caption": "two dogs", "width": 3}\n',
    "a.json": '[{"image": "pictures/class 0/0.png", "prompt": "a cat, asleep"},\n'
              ' {"image": "pictures/class 1/1.png", "prompt": "two dogs"}]',
    "a.csv": 'image,caption\npictures/class 0/0.png,"a cat, asleep"\npictures/class 1/1.png,two dogs\n'}


@pytest.mark.parametrize("name", LISTS)
def test_lists_with_captions(folder, name):
    (folder.parent / name).write_text(LISTS[name].replace("ABSOLUTE", str(folder.parent)), newline="")
    found, pictures = everything(folder.parent / name)
    assert found == [("a cat, asleep", str(folder / "class 0" / "0.png"), None),
                     ("two dogs", str(folder / "class 1" / "1.png"), None)]
    refused("has a caption and no label", everything, folder.parent / name, classes=True)


@pytest.mark.parametrize("name, text", [
    ("a.jsonl", '{"path": "0.png", "label": 207, "caption": "a dog"}\n{"path": "1.png", "label": 5}\n'),
    ("a.csv", "path,label,caption\n0.png,207,a dog\n1.png,5,5\n")])
def test_lists_with_labels(folder, name, text):
    (folder / "class 0" / name).write_text(text)
    found, pictures = everything(folder / "class 0" / name, classes=True)
    assert [(c, label) for c, _, label in found] == [("5", 5), ("a dog", 207)]
    assert pictures.label_of == {"5": 5, "a dog": 207}


@pytest.mark.parametrize("n, kept", [(2, 1), (10, 1), (11, 2), (639, 64), (640, 64), (2000, 64)])
def test_held_back_are_64_or_a_tenth_and_always_the_same(tmp_path, n, kept):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.tsv").write_text("\n".join(f"a.png\tcaption {i}" for i in range(n)))
    random.seed(3)
    before = random.getstate()
    first, second = (data.Pictures(str(tmp_path / "a.tsv"), n - kept) for _ in range(2))
    assert random.getstate() == before             # the stream of the run is untouched
    assert len(first.held_back) == kept and first.held_back == second.held_back
    assert len({c for c, _, _ in first.training + first.held_back}) == n
    refused(f"{n} images, of which {kept} are held", data.Pictures, str(tmp_path / "a.tsv"), n - kept + 1)


@pytest.mark.parametrize("name, content, message", [
    ("a.tsv", b"", "has no entries"), ("a.jsonl", b"", "has no entries"), ("a.csv", b"", "has no entries"),
    ("a.tsv", b"0.png a cat\n", "line 1: no tab between path and caption"),
    ("a.tsv", b"0.png\ta cat\n1.png\t\n", "line 2: no tab"), ("a.tsv", b"\ta cat\n", "line 1: no tab"),
    ("a.tsv", b"0.png\ta\nno\0where.png\ta cat\n", r"1 of 2 images do not exist, .*no\\x00where"),
    ("a.tsv", b"0.png\ta\nx.jpg\ta cat\ny.png\tb", "2 of 3 images do not exist, .*x.jpg"),
    ("a.tsv", b"0.png\ta\ngone.png\ta cat\n", r"1 of 2 .*gone\.png"),
    ("a.tsv", b"0.png\ta d\xf6g\n", "line 1: 'caption' must be a text in UTF-8"),
    ("a.tsv", b"\xf6.png\ta dog\n", r"1 of 1 .*udcf6\.png"),
    ("a.jsonl", b'{"path": "0.png"}', "line 1: no field prompt, caption or text"),
    ("a.jsonl", b'{"caption": "a cat"}', "line 1: no path in a field image_path"),
    ("a.jsonl", b'{"image": 3, "caption": "a cat"}', "line 1: no path"),
    ("a.jsonl", b'{"image": "0.png", "caption": ["", "x"]}', "line 1: 'caption' must be"),
    ("a.jsonl", b'{"image": "0.png", "caption": []}', "line 1: 'caption' must be"),
    ("a.jsonl", b'{"image": "0.png", "label": -1}', "line 1: 'label' must be the number of a class"),
    ("a.jsonl", b'{"image": "0.png", "label": true}', "line 1: 'label' must be"),
    ("a.jsonl", b'{"image": "0.png", "label": "cat"}', "line 1: 'label' must be"),
    ("a.jsonl", b'["0.png", "a cat"]', "line 1: it is neither a text nor a record"),
    ("a.json", b'[{"path": "0.png", "label": 1}, {"path": "1.png", "text": "a"}]', "1.png' has a caption"),
    ("a.json", b'[{"path": "0.png", "label": 1, "text": "a"}, {"path": "1.png", "label": 2, "text": "a"}]',
     "'a' is the caption of two labels"),
    ("a.csv", b"image\n0.png\n", "line 2: no field prompt"), ("a.md", b"x", "unknown kind of file '.md'"),
    ("a.tsv", b"0.png\ta cat\n", "too few for a step of 1"),
])
def test_lists_that_are_refused(folder, name, content, message):
    (folder / "class 0" / "x.jpg").mkdir()
    (folder / "class 0" / name).write_bytes(content)
    refused(message, data.Pictures, str(folder / "class 0" / name), classes=b'"label"' in content)


def test_folders_that_are_refused(folder, tmp_path):
    refused("no file or folder .*nowhere", data.Pictures, str(tmp_path / "nowhere"))
    refused("give --data=FOLDER", data.Pictures, "")
    refused("has no class folders", data.Pictures, str(folder / "class 0"))
    refused("pictures has no images", data.Pictures, str(tmp_path))        # like the parent of train and val
    (folder / "class 1" / "x.jpg").mkdir()         # a folder with the name of an image is none
    assert len(everything(folder)[0]) == 12
    (folder / "empty").mkdir()
    refused("empty has no images", data.Pictures, str(folder))
    os.rmdir(folder / "empty")
    os.symlink(folder, folder / "loop")            # a class that has only folders
    refused("loop has no images", data.Pictures, str(folder))
    os.remove(folder / "loop")
    os.symlink("itself.png", folder / "class 0" / "itself.png")
    refused("symbolic links", data.Pictures, str(folder))
    os.remove(folder / "class 0" / "itself.png")
    os.symlink("nothing.png", folder / "class 0" / "broken.png")
    assert len(everything(folder)[0]) == 12        # a broken link is no image
    os.rename(folder / "class 1", os.path.join(os.fsencode(folder), b"\xff"))
    refused("'name of a class'|UTF-8", data.Pictures, str(folder))


# ---- one image ---------------------------------------------------------------------------------------------
def as_published(image, side):
    """Compute ADM's center crop in another way: by products with matrices of weights, in doubles."""
    def box(t):
        return (t >= -.5) & (t < .5)               # of two equally near pixels, Pillow takes the right one

    def cubic(t):                                  # Keys, a = -1/2
        t = np.abs(t)
        return np.where(t < 1, 1.5 * t ** 3 - 2.5 * t ** 2 + 1,
                        np.where(t < 2, -.5 * t ** 3 + 2.5 * t ** 2 - 4 * t + 2, 0))

    def resized(x, h, w, kind):
        for axis, m in ((1, w), (0, h)):
            n = x.shape[axis]
            # [m,n]: distance of each old pixel from each new pixel, in units of the wider of the two
            apart = ((np.arange(m)[:, None] + .5) * n / m - np.arange(n) - .5) / max(n / m, 1)
            weights = kind(apart.round(9)).astype(float)
            x = np.moveaxis(np.tensordot(weights / weights.sum(1, keepdims=True), x, (1, axis)), 0, axis)
            x = np.floor(x + .5 + 1e-9).clip(0, 255)
        return x
    x = np.asarray(image, float)
    while min(x.shape[:2]) >= 2 * side:
        x = resized(x, x.shape[0] // 2, x.shape[1] // 2, box)
    h, w = (round(n * side / min(x.shape[:2])) for n in x.shape[:2])
    x = resized(x, h, w, cubic)
    top, left = (h - side) // 2, (w - side) // 2
    return x[top:top + side, left:left + side].transpose(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("width, height, side", [
    (64, 64, 32), (200, 130, 32), (130, 202, 32), (35, 60, 32), (20, 24, 32), (63, 64, 32), (32, 32, 32)])
def test_the_crop_is_the_published_one(width, height, side):
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([x * 255 / width, y * 255 / height, 127 + 100 * np.sin(x / 3) * np.cos(y / 5)], 2)
    image = Image.fromarray(pixels.astype(np.uint8))
    found, expected = data.center_crop(image, side), as_published(image, side)
    assert found.shape == (3, side, side) and found.dtype == torch.float32 and found.abs().max() <= 1
    apart = np.abs(found.numpy() - expected) * 127.5
    # Pillow's weights have 22 bits, so sometimes a half is rounded the other way.
    assert apart.max() < 1.01 and apart.mean() < .01, (apart.max(), apart.mean())
    # The middle of a ramp stays in the middle, and the ramp still rises to the right or downward.
    assert found[0].mean().abs() < .06 and found[1].mean().abs() < .06
    assert (found[0].diff(dim=1) >= 0).all() and (found[1].diff(dim=0) >= 0).all()


RED = (200, 30, 60)
MODES = {  # mode: (image, expected RGB)
    "L": (Image.new("L", (W, H), 90), (90,) * 3), "1": (Image.new("1", (W, H), 1), (255,) * 3),
    "P": (Image.new("RGB", (W, H), RED).quantize(8), RED),
    "RGBA": (Image.new("RGBA", (W, H), (*RED, 255)), RED),
    "LA": (Image.new("LA", (W, H), (90, 0)), (255,) * 3),
    "clear": (Image.new("RGBA", (W, H), (*RED, 0)), (255,) * 3),
    "half": (Image.new("RGBA", (W, H), (0, 0, 0, 128)), (127,) * 3),
    "CMYK": (Image.new("CMYK", (W, H), (0, 255, 255, 0)), (255, 0, 0)),
    "16": (Image.fromarray(np.full((H, W), 128 * 257, np.uint16)), (128,) * 3),
    "16 white": (Image.fromarray(np.full((H, W), 65535, np.uint16)), (255,) * 3)}


@pytest.mark.parametrize("mode", MODES)
def test_all_kinds_of_pixels_become_rgb(tmp_path, mode):
    image, expected = MODES[mode]
    path = str(tmp_path / "a") + (".tif" if mode == "CMYK" else ".png")
    image.save(path)
    found = data.load(path, 16)
    assert found.shape == (3, 16, 16) and torch.allclose(
        (found + 1) * 127.5, torch.tensor(expected).float()[:, None, None].expand_as(found), atol=1.01)


def test_exif_does_not_rotate_an_image(tmp_path):
    image, exif = Image.new("RGB", (40, 40), "black"), Image.Exif()
    image.paste("white", (0, 0, 40, 20))
    exif[0x0112] = 3                               # upside down
    image.save(tmp_path / "a.jpg", exif=exif)
    found = data.load(str(tmp_path / "a.jpg"), 16)
    assert found[:, :6].min() > .9 and found[:, -6:].max() < -.9


def test_damaged_images_are_named_in_one_line(folder, tmp_path):
    good = {}
    for kind in ("jpg", "png", "webp", "tif", "bmp", "ppm"):
        path = tmp_path / f"a.{kind}"
        Image.open(folder / "class 0" / "0.png").save(path)
        good[kind] = path.read_bytes()
        assert data.load(str(path), 32).shape == (3, 32, 32)
    rng, kinds = random.Random(0), itertools.cycle(good)
    loaded = [0, 0, 0]
    for i, kind in zip(range(150), kinds):         # random bytes, cut files, changed bytes
        raw = bytearray(good[kind])
        if i % 3 == 0:
            raw = bytearray(rng.randbytes(400)) if i % 2 else raw[:12] + rng.randbytes(400)
        elif i % 3 == 1:
            raw = raw[:rng.randrange(len(raw) * 9 // 10)]
        else:
            for _ in range(5):
                raw[rng.randrange(min(len(raw), 200))] = rng.randrange(256)
        path = tmp_path / f"bad {i}.{kind}"
        path.write_bytes(bytes(raw))
        try:
            assert data.load(str(path), 32).isfinite().all()
            loaded[i % 3] += 1
        except UserError as error:
            assert f"bad {i}" in str(error) and "\n" not in str(error)
    assert loaded[:2] == [0, 0] and loaded[2] < 50         # a changed pixel cannot be noticed
    for cut in (good["jpg"][:-200], good["png"][:-200]):
        (tmp_path / "cut.jpg").write_bytes(cut)
        refused("cut.jpg' cannot be read as an image", data.load, str(tmp_path / "cut.jpg"), 32)


def test_bombs_strips_and_floats_are_refused(tmp_path):
    Image.new("1", (15000, 15000)).save(tmp_path / "bomb.png")
    refused("bomb.png.*DecompressionBomb", data.load, str(tmp_path / "bomb.png"), 32)
    Image.new("L", (1, 60000)).save(tmp_path / "strip.png")
    refused("60000 pixels: one side is over 50 x the other", data.load, str(tmp_path / "strip.png"), 256)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    refused("floating point", data.load, str(tmp_path / "float.tif"), 32)
    refused("cannot be read as an image", data.load, str(tmp_path), 32)    # a folder


def test_a_large_image_causes_no_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side, end in ((12, "read"), (15, "refused")):      # 144 pixels, and 225: over twice the limit
        Image.new("RGB", (side, side)).save(tmp_path / "a.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if end == "read":
                assert data.load(str(tmp_path / "a.png"), 8).shape == (3, 8, 8)
            else:
                refused("DecompressionBombError", data.load, str(tmp_path / "a.png"), 8)


def test_the_content_of_a_file_counts_and_not_its_name(tmp_path):
    """PostScript in a .png would make Pillow start Ghostscript. A photo of two images (MPO) is a photo."""
    Image.new("RGB", (40, 40), RED).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").format == "EPS"
    refused("UnidentifiedImageError", data.load, str(tmp_path / "a.png"), 16)
    images = [Image.new("RGB", (40, 40), color) for color in (RED, "black")]
    for kind in ("mpo", "gif", "webp"):
        path = str(tmp_path / f"b.{kind}")
        images[0].save(path, save_all=True, append_images=images[1:])
        assert data.load(path, 16)[0].mean() == pytest.approx(200 / 127.5 - 1, abs=.05)     # the first frame
