"""Real images with captions or labels from a disk, for vapi.py at full size. The option --data names one of:

    a folder             one folder per class, with its images directly inside: ImageNet's layout
    .tsv .txt            one image per line: path, a tab, caption
    .jsonl .json .csv    records of image_path (or image, path), and caption (or text, prompt), label, or both

Labels. The label of a class folder is its position among the sorted names, and its caption is its name. This
is torchvision's rule, by which LlamaGen was trained. So four of ImageNet's folders get the labels 0 to 3
instead of their own among the thousand. For a part of ImageNet, give a list with labels. In a list, the
caption defaults to the digits of the label. If a caption is itself a list of texts, the first text counts.
Paths are relative to the file that lists them.

Pixels. Images are cropped as in ADM (arXiv 2105.05233), because tokenizer and policy saw such images. A box
filter halves the image while its short side is at least twice the wanted side. A bicubic resize and a crop of
the middle follow. There are no flips. All modes become RGB. Transparent parts become white (ADM shows the
colors that they hide). Values of 16 bits lose the lower 8. A rotation in the EXIF header is ignored, as in
ADM. Of an animation, the first frame counts.

Departure 1: a class without images is an error, and folders inside a class are not searched. So the parent
folder of `train` and `val` is not mistaken for two classes.
"""
import os
import random
import re
import warnings

import numpy as np
import torch
from PIL import Image

from common import files
from common.config import UserError, locate
from full import prompts

KINDS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")        # torchvision's
HELD_BACK = 64                          # images kept from training, or a tenth if there are fewer than 640
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")     # for EPS, Pillow would start Ghostscript
LONGEST = 50                            # times the short side: 1 x 60,000 pixels would grow to gigabytes


# ---- lists -------------------------------------------------------------------------------------------------
def _entry(record):
    """Return (caption, path, label or None) of a record. The message of a ValueError says what it lacks."""
    if isinstance(record, dict) and record.keys() == {"prompt"}:           # a line of text
        path, tab, caption = str(record["prompt"]).partition("\t")
        if not tab:
            raise ValueError("no tab between path and caption, and no field image_path, image or path")
        return prompts.caption_of({"caption": caption}), path.strip(), None
    where, number = prompts.field(record, "image_path", "image", "path"), prompts.field(record, "label")
    if where is None or not isinstance(record[where], str) or not record[where].strip():
        raise ValueError("no path in a field image_path, image or path")
    label = record[number] if number else None
    label = int(label) if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label.strip()) else label
    if number and (type(label) is not int or label < 0):
        raise ValueError(f"'label' must be the number of a class, at least 0, got {label!a:.60}")
    if number and not prompts.field(record, "prompt", "caption", "text"):
        return str(label), record[where].strip(), label
    first = {k: v[0] if isinstance(v, list) and v else v for k, v in record.items()}
    return prompts.caption_of(first), record[where].strip(), label


def _list(path):
    """Return [(caption, path, label or None)] of a list. Raises UserError if an image does not exist."""
    folder = os.path.dirname(locate(path))
    found = [(caption, os.path.join(folder, file), label) for (caption, file, label), _ in
             prompts.records(path, _entry, tables=(".csv",))]
    if missing := [file for _, file, _ in found if not os.path.isfile(file)]:
        raise UserError(f"{path}: {len(missing)} of {len(found)} images do not exist, the first is "
                        f"{missing[0]!a:.300}")
    return found


def _folder(path):
    """Return [(caption, path, label)] of a folder of class folders, sorted by class and file name."""
    with files.explain(f"cannot read {path}"):
        names = sorted(e.name for e in os.scandir(path) if e.is_dir())
        found = [[(name, e.path, label) for e in os.scandir(os.path.join(path, name))
                  if e.name.lower().endswith(KINDS) and e.is_file()] for label, name in enumerate(names)]
    if not names:
        raise UserError(f"{path} has no class folders; for images with captions, give a list (full/data.py)")
    for name, images in zip(names, found):
        with files.explain(f"{path} has a class folder whose name is no caption"):
            prompts.caption_of({"name of a class": name, "caption": name})
        if not images:
            raise UserError(f"{os.path.join(path, name)} has no images ({' '.join(KINDS)}), but every folder "
                            f"in {path} is a class: fill it, or move it away")
    return [image for images in found for image in sorted(images)]


class Pictures:
    """The images at `path`. `training` and `held_back` are lists of (caption, file, label or None), and
    `label_of` is {caption: label}. at_once: how many different images a step needs. classes: whether the
    policy reads labels. Then each caption must have exactly one. Raises UserError."""

    def __init__(self, path, at_once=1, classes=False):
        if not path:
            raise UserError("vapi learns from images: give --data=FOLDER or --data=LIST (see full/data.py)")
        if not os.path.exists(locate(path)):
            raise UserError(f"no file or folder {path!a:.300}: check --data")
        found = _folder(locate(path)) if os.path.isdir(locate(path)) else _list(path)
        kept = min(HELD_BACK, -(-len(found) // 10))
        if len(found) - kept < at_once:
            raise UserError(f"{path} has {len(found)} images, of which {kept} are held back: too few for a "
                            f"step of {at_once}; add images or lower --prompts_per_step")
        random.Random(1234).shuffle(found)                 # its own stream: the same split in every run
        self.held_back, self.training = found[:kept], found[kept:]
        self.label_of = {caption: label for caption, _, label in found}
        for caption, file, label in found if classes else ():
            if label is None:
                raise UserError(f"{path}: {file!a:.300} has a caption and no label, which a c2i policy needs")
            if label != self.label_of[caption]:
                raise UserError(f"{path}: {caption!a:.60} is the caption of two labels: give each its own")


# ---- one image ---------------------------------------------------------------------------------------------
def to_rgb(image):
    """Convert a Pillow image of any mode to mode RGB. Raises ValueError for floating point numbers."""
    if image.mode == "F":
        raise ValueError("floating point numbers, whose white is unknown")
    if image.mode.startswith("I"):                         # 16 bits: convert() would clip all above 255
        upper = np.asarray(image, np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image, side):
    """Resize and crop a Pillow image of mode RGB -> [3,side,side] in [-1,1]. ValueError if it is too long."""
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: one side is over {LONGEST} x the other")
    while min(image.size) >= 2 * side:
        image = image.resize([n // 2 for n in image.size], Image.BOX)
    scale = side / min(image.size)
    image = image.resize([round(n * scale) for n in image.size], Image.BICUBIC)
    left, top = ((n - side) // 2 for n in image.size)
    pixels = np.array(image.crop((left, top, left + side, top + side)))                          # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def load(file, side):
    """Return the image in a file, [3,side,side] in [-1,1]. Raises UserError if it is damaged or no image."""
    with (files.explain(f"{file!a:.300} cannot be read as an image", ": replace or remove it"),
          warnings.catch_warnings()):
        warnings.simplefilter("ignore")                    # of 90 million pixels; 180 million are an error
        with Image.open(file, formats=FORMATS) as image:
            return center_crop(to_rgb(image), side)
