"""Pictures with their conditions from a disk, for vapi.py at full size: what `--data=` takes; and LPIPS, a
distance of two pictures.

    a folder             a folder in it for each class, pictures directly in that: ImageNet's layout
    .tsv .txt            a picture a line: path, a tab, caption
    .jsonl .json .csv    records of image_path (or image, path) and caption (or text, prompt), label, or both

Labels. In a folder of folders a class is the place of its folder among the sorted names (torchvision's rule,
by which LlamaGen was trained), and its caption is that name. So four of ImageNet's folders are classes 0 to
3, not what they were among the thousand: for a part of it, give a list with "label" instead. There, a record
without a caption gets the digits of its label. Of a list of texts the first is taken. Paths are relative to
the file that lists them.

Pictures are cut as in ADM (arXiv 2105.05233), and so as tokenizer and policy saw them: halved by a box filter
while the short side is at least twice what is wanted, then bicubic to it, then the middle. No flips. What is
not RGB becomes it: transparent parts white (ADM shows what is hidden there), 16 bits the upper 8. A turn that
only the EXIF header tells of is ignored, as there; of a film the first frame counts.

Departure 1: a class without pictures is an error, and nothing is searched below a class, so that the parent
of `train` and `val` is not taken for two classes.
"""
import os
import random
import re
import warnings

import numpy as np
import torch
from PIL import Image

from full import prompts
from common.config import UserError, locate

KINDS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")        # torchvision's
HELD_BACK = 64                          # pictures kept from training, or a tenth if there are fewer than 640
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")     # for EPS, Pillow would start Ghostscript
LONGEST = 50                            # times the short side: a strip of 1 x 60,000 would become gigabytes


# ---- lists -------------------------------------------------------------------------------------------------
def _entry(record):
    """A record of a list -> (caption, path, label or None). ValueError says what it lacks."""
    if isinstance(record, dict) and record.keys() == {"prompt"}:           # a bare text
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
        raise ValueError(f"'label' must be a number of a class, 0 or more, not {label!a:.60}")
    if number and not prompts.field(record, "prompt", "caption", "text"):
        return str(label), record[where].strip(), label
    first = {k: v[0] if isinstance(v, list) and v else v for k, v in record.items()}
    return prompts.caption_of(first), record[where].strip(), label


def _list(path):
    """File -> [(caption, path, label or None)]. UserError for the first of the pictures that is not there."""
    found = [entry for entry, _ in prompts.records(path, _entry, tables=(".csv",))]
    found = [(c, os.path.join(os.path.dirname(locate(path)), file), label) for c, file, label in found]
    missing = [file for _, file, _ in found if not os.path.isfile(file)]
    if missing:
        raise UserError(f"{path}: {len(missing)} of {len(found)} pictures are not there, the first is "
                        f"{missing[0]!a:.300}")
    return found


def _folder(path):
    """The same of a folder of folders, in order of the classes and of the names in each."""
    try:
        names = sorted(e.name for e in os.scandir(path) if e.is_dir())
        found = [[(name, e.path, label) for e in os.scandir(os.path.join(path, name))
                  if e.name.lower().endswith(KINDS) and e.is_file()] for label, name in enumerate(names)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror} ({error.filename!a:.300})") from None
    if not names:
        raise UserError(f"{path} holds no folders, and a class is one (pictures with captions want a list, "
                        f"see data.py)")
    for name, pictures in zip(names, found):
        try:
            prompts.caption_of({"name of a class": name, "caption": name})
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        if not pictures:
            raise UserError(f"{os.path.join(path, name)} holds no pictures ({' '.join(KINDS)}), and every "
                            f"folder in {path} is a class: fill it, or move it away")
    return [picture for pictures in found for picture in sorted(pictures)]


class Pictures:
    """All that is at `path`: `training` and `held_back`, [(caption, file, label or None)], and `label_of`
    {caption: label}. at_once: how many different ones a step wants; classes: does the policy read the labels,
    so that each caption must have one? Raises UserError."""

    def __init__(self, path, at_once=1, classes=False):
        if not path:
            raise UserError("vapi learns from pictures: give --data=FOLDER or --data=LIST (data.py says of "
                            "what kinds)")
        if not os.path.exists(locate(path)):
            raise UserError(f"no file or folder {path!a:.300}")
        found = _folder(locate(path)) if os.path.isdir(locate(path)) else _list(path)
        kept = min(HELD_BACK, -(-len(found) // 10))
        if len(found) - kept < at_once:
            raise UserError(f"{path} has {len(found)} pictures, of which {kept} are kept from training: too "
                            f"few for a step of {at_once} (prompts_per_step)")
        random.Random(1234).shuffle(found)                 # a stream of its own: the same ones for every run
        self.held_back, self.training = found[:kept], found[kept:]
        self.label_of = {caption: label for caption, _, label in found}
        for caption, file, label in found if classes else ():
            if label is None:
                raise UserError(f"{path}: {file!a:.300} has a caption and no label, and a c2i policy reads "
                                f"nothing else")
            if label != self.label_of[caption]:
                raise UserError(f"{path}: {caption!a:.60} is the caption of two labels: give each its own")


# ---- one picture -------------------------------------------------------------------------------------------
def to_rgb(image):
    """A Pillow image of any mode -> one of mode RGB. ValueError for floating point numbers."""
    if image.mode == "F":
        raise ValueError("floating point numbers, of which nobody knows what is white")
    if image.mode.startswith("I"):                         # 16 bits: convert() would cut off all above 255
        upper = np.asarray(image, np.int64).clip(0, 65535) >> 8
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_crop(image, side):
    """A Pillow image of mode RGB -> [3,side,side] in [-1,1]. ValueError for a strip."""
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are no picture but a strip")
    while min(image.size) >= 2 * side:
        image = image.resize([n // 2 for n in image.size], Image.BOX)
    scale = side / min(image.size)
    image = image.resize([round(n * scale) for n in image.size], Image.BICUBIC)
    left, top = ((n - side) // 2 for n in image.size)
    pixels = np.array(image.crop((left, top, left + side, top + side)))                          # [H,W,3]
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def load(file, side):
    """A file -> its picture [3,side,side] in [-1,1]. UserError names it if it is damaged or none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # of 90 million pixels; at 180 it is an error
            with Image.open(file, formats=FORMATS) as image:
                return centre_crop(to_rgb(image), side)
    except Exception as error:                             # each decoder of Pillow raises its own kinds
        raise UserError(f"{file!a:.300} cannot be read as a picture ({type(error).__name__}: "
                        f"{' '.join(str(error).split())[:120]}): mend it or take it out") from None
