"""The tiny world: a caption grammar, a renderer, and an exact reader that takes pictures back to facts.

A scene is a plain background with one to three shapes on it; a caption names some of its attributes and
leaves the rest open. Because the reader recovers every attribute from pixels by geometry (nothing in it is
learned), we can *measure* the two things that post-training trades against each other:
  - performance: does the picture show what the caption says?            -> `matches`
  - diversity:   how widely do the attributes vary that it does not say? -> `open_attributes`
The five categories are a miniature GenEval (arXiv 2310.11513):
  single    a red circle                           counting  three red circles
  two       a circle and a square (colours open)   position  a red circle left of a blue square
  binding   a red circle and a blue square

Look at some scenes, and measure the reader:   python shapes.py
Images are [B,3,32,32] in [-1,1]; x and y are pixels from the top left corner; sizes are in pixels.
"""
import itertools
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.config import UserError

SIDE = 32                                                       # pixels a side, H = W
COLOURS = dict(red=(225, 40, 40), green=(40, 165, 60), blue=(45, 80, 225), yellow=(245, 215, 40))
BACKGROUNDS = dict(white=(240, 240, 240), grey=(135, 135, 135), black=(25, 25, 25), brown=(110, 72, 45))
SHAPES = ("circle", "square", "triangle", "cross")
RADII = dict(small=5, large=7)                                  # half the width of a shape
NUMBERS = dict(two=2, three=3)
GAP, MARGIN, LATTICE = 2, 1, 8                                  # pixels between shapes, to border, of places
RELATION_MARGIN = 4                                             # "left of" means at least this many pixels
# Policy and judge meet these pairs in no caption and no picture, in pretraining or GRPO: they test
# generalisation.
HELD_OUT = {("red", "cross"), ("green", "circle"), ("blue", "triangle")}
CATEGORIES = ("single", "two", "counting", "position", "binding")


class Obj(NamedTuple):
    shape: str
    colour: str
    size: str
    x: float
    y: float


class Scene(NamedTuple):
    background: str
    objects: tuple                # of Obj, in reading order: left to right, then top to bottom
    readable: bool = True         # False where the reader met something that is no shape of this world


class Caption(NamedTuple):
    text: str
    category: str
    slots: tuple                  # of (shape, colour or None where the caption leaves it open)
    relation: str = ""


# ---- the grammar -------------------------------------------------------------------------------------------
RELATIONS = {"left of": lambda a, b: b.x - a.x, "right of": lambda a, b: a.x - b.x,
             "above": lambda a, b: b.y - a.y, "below": lambda a, b: a.y - b.y}


def _grammar():
    """Yields every caption of the world.
    It is small enough to list, so parsing one is a dictionary look-up."""
    pairs = list(itertools.product(COLOURS, SHAPES))
    for c, s in pairs:
        yield Caption(f"a {c} {s}", "single", ((s, c),))
        for word, n in NUMBERS.items():
            yield Caption(f"{word} {c} {s}{'es' if s == 'cross' else 's'}", "counting", ((s, c),) * n)
    for s, t in itertools.permutations(SHAPES, 2):
        yield Caption(f"a {s} and a {t}", "two", ((s, None), (t, None)))
    for (c, s), (d, t) in itertools.product(pairs, pairs):
        if c != d and s != t:                                   # both differ: swapping colours is an error
            yield Caption(f"a {c} {s} and a {d} {t}", "binding", ((s, c), (t, d)))
            for relation in RELATIONS:
                yield Caption(f"a {c} {s} {relation} a {d} {t}", "position", ((s, c), (t, d)), relation)


CAPTIONS = {caption.text: caption for caption in _grammar()}


def parse(text):
    """Caption of a text. Raises UserError where the text is not of this world's grammar."""
    if text not in CAPTIONS:
        raise UserError(f"caption {text!r} is not of the tiny world; "
                        "try 'a red circle left of a blue square'")
    return CAPTIONS[text]


def held_out(caption):
    """True where a Caption names a pair of HELD_OUT."""
    return any((colour, shape) in HELD_OUT for shape, colour in caption.slots)


def captions(category, heldout=False):
    """All caption texts of a category, either without held-out pairs or with at least one."""
    return [c.text for c in CAPTIONS.values() if c.category == category and held_out(c) == heldout]


# ---- the renderer ------------------------------------------------------------------------------------------
def sample_scene(caption, rng, allow_heldout=False):
    """A random Scene of which the caption is true: what it leaves open is drawn uniformly.
    rng: random.Random."""
    while True:
        background, objects = rng.choice(list(BACKGROUNDS)), []
        for shape, colour in caption.slots:
            free = [c for c in COLOURS if allow_heldout or (c, shape) not in HELD_OUT]
            size = rng.choice(list(RADII))
            places = range(RADII[size] + MARGIN, SIDE - RADII[size] - MARGIN + 1, LATTICE)
            for _ in range(20):                                 # look for a free place, else start over
                x, y = rng.choice(places), rng.choice(places)
                new = Obj(shape, colour or rng.choice(free), size, x, y)
                if all(max(abs(o.x - x), abs(o.y - y)) >= RADII[o.size] + RADII[size] + GAP for o in objects):
                    objects.append(new)
                    break
            else:
                break
        if len(objects) == len(caption.slots):
            if not caption.relation or RELATIONS[caption.relation](*objects) >= RELATION_MARGIN:
                return Scene(background, tuple(sorted(objects, key=lambda o: (o.x, o.y))))


def _draw(draw, shape, x, y, r, fill):
    """One shape with centre (x, y) and half width r, in the coordinates of a Pillow drawing."""
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x - r, y + r - 1), (x + r - 1, y + r - 1)), fill=fill)
    else:                                                       # a cross with arms of 3/8 of its width
        a = 3 * r // 8
        draw.rectangle((x - r, y - a, x + r - 1, y + a - 1), fill=fill)
        draw.rectangle((x - a, y - r, x + a - 1, y + r - 1), fill=fill)


def render(scenes, over=4):
    """Scenes to images[B,3,32,32] in [-1,1]; drawn `over` times too large, then box-filtered, so edges are
    soft."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.float32)
    for image, scene in zip(images, scenes):
        canvas = Image.new("RGB", (SIDE * over, SIDE * over), BACKGROUNDS[scene.background])
        draw = ImageDraw.Draw(canvas)
        for o in scene.objects:
            _draw(draw, o.shape, o.x * over, o.y * over, RADII[o.size] * over, COLOURS[o.colour])
        image[:] = np.asarray(canvas.reduce(over))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


# ---- the reader --------------------------------------------------------------------------------------------
WINDOW, SLACK = 16, 2                    # pixels a side of a template; pixels that it may be shifted each way
ERROR_LIMIT = .35                        # mismatch, as a share of the template's area, past which we give up
TEMPLATES = list(itertools.product(SHAPES, RADII))


def _templates():
    """Coverage of each (shape, size) in a window, in [0,1]: [8,1,WINDOW,WINDOW], drawn by the renderer's
    own hand."""
    out = []
    for shape, size in TEMPLATES:
        canvas = Image.new("L", (WINDOW * 4, WINDOW * 4))
        _draw(ImageDraw.Draw(canvas), shape, WINDOW * 2, WINDOW * 2, RADII[size] * 4, 255)
        out.append(torch.from_numpy(np.asarray(canvas.reduce(4), np.float32) / 255))
    return torch.stack(out)[:, None]


_TEMPLATES = _templates()
_COLOURS, _BACKGROUNDS = (torch.tensor(list(p.values())) / 1. for p in (COLOURS, BACKGROUNDS))


@torch.no_grad()
def read(images):
    """images[B,3,32,32] in [-1,1] to a list of B Scenes, by geometry alone.

    1. Background: the commonest one, where each pixel votes for the nearest entry of the whole palette.
    2. Coverage: a pixel is p = background + a (colour - background); solve for a in [0,1], keep the best
       colour.
    3. Objects: connected regions with a > 1/2.
    4. Shape and size: the template with the least squared error.
    A scene is not readable if a region fits no template, if there are no regions or more than 3, or if more
    than a tenth of the pixels outside of them is far from the background.
    """
    p = (images.float().cpu().clamp(-1, 1) + 1) * 127.5                                          # [B,3,H,W]
    B = len(p)
    nearest = torch.cdist(p.flatten(2).transpose(1, 2),
                          torch.cat([_BACKGROUNDS, _COLOURS])).argmin(2)                         # [B,H*W]
    background = torch.stack([(nearest == i).sum(1) for i in range(len(BACKGROUNDS))], 1).argmax(1)     # [B]
    ground = _BACKGROUNDS[background]                                                            # [B,3]
    d = (_COLOURS - ground[:, None])                                                             # [B,4,3]
    # a = <p - g, d> / <d, d>;  residual^2 = |p - g - a d|^2
    offset = p - ground[:, :, None, None]
    a = (torch.einsum("bchw,bkc->bkhw", offset, d) / (d * d).sum(2)[..., None, None]).clamp(0, 1)
    residual = (offset[:, None] - a[:, :, None] * d[..., None, None]).square().sum(2)            # [B,4,H,W]
    coverage = a.gather(1, residual.min(1, keepdim=True).indices)                                # [B,1,H,W]
    mask = (coverage > .5).float()
    # Every pixel takes the largest label around it until nothing changes: one label a connected region.
    labels = mask * torch.arange(1., SIDE * SIDE + 1).view(1, 1, SIDE, SIDE)
    while not torch.equal(labels, new := F.max_pool2d(labels, 3, 1, 1) * mask):
        labels = new

    # Labels are 1 .. H*W, 0 outside; with the picture's number before them, all are found at once.
    size = SIDE * SIDE + 1
    ids, pixels = (labels.flatten(1).long() + size * torch.arange(B)[:, None]).unique(return_counts=True)
    ids = ids[(pixels >= 6) & (ids % size > 0)]                                              # less is dirt
    stray = (offset.square().sum(1) > 60 ** 2) & (F.max_pool2d(mask, 3, 1, 1)[:, 0] == 0)       # neither nor
    readable = (stray.float().mean((1, 2)) < .1).tolist()
    scenes = [[] for _ in range(B)]
    if len(ids):
        which = ids // size                                                                      # [N]
        region = (labels[which] == (ids % size).view(-1, 1, 1, 1)).float()                       # [N,1,H,W]
        colour = (residual[which] * region).sum((2, 3)).argmin(1)                                # [N]
        ys, xs = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE).view(1, -1)
        inside = region[:, 0] > 0
        box = [(torch.where(inside, v, 99).amin((1, 2)) + torch.where(inside, v, -1).amax((1, 2)) + 1) // 2
               for v in (ys, xs)]                                                           # centre, [N] each
        # The soft coverage of this region and its rim only, cut out around the centre: [N,1,20,20].
        half = WINDOW // 2 + SLACK
        padded = F.pad(coverage[which] * F.max_pool2d(region, 3, 1, 1), (half,) * 4)
        crops = torch.stack([q[:, y:y + 2 * half, x:x + 2 * half]
                             for q, y, x in zip(padded, *map(torch.Tensor.tolist, box))])
        # sum (crop - t)^2 = sum crop^2 - 2 <crop, t> + sum t^2, for every template and shift
        area = _TEMPLATES.square().sum((1, 2, 3)).view(1, -1, 1, 1)
        error = (crops.square().sum((2, 3), keepdim=True) - 2 * F.conv2d(crops, _TEMPLATES) + area) / area
        error, best = error.flatten(1).min(1)
        kind, shift = best // (2 * SLACK + 1) ** 2, best % (2 * SLACK + 1) ** 2
        y, x = box[0] + shift // (2 * SLACK + 1) - SLACK, box[1] + shift % (2 * SLACK + 1) - SLACK
        for b, k, c, x, y, e in zip(*(v.tolist() for v in (which, kind, colour, x, y, error))):
            scenes[b].append(Obj(TEMPLATES[k][0], list(COLOURS)[c], TEMPLATES[k][1], x, y))
            readable[b] &= e <= ERROR_LIMIT
    return [Scene(list(BACKGROUNDS)[g], tuple(sorted(objects, key=lambda o: (o.x, o.y))),
                  ok and 0 < len(objects) < 4)
            for g, objects, ok in zip(background.tolist(), scenes, readable)]


# ---- performance and diversity of a scene ------------------------------------------------------------------
def assign(scene, caption):
    """The scene's object for each slot of the caption (as good a match as is there), or None if there are
    too few."""
    left, chosen = list(scene.objects), []
    if len(left) < len(caption.slots):
        return None
    for shape, colour in caption.slots:
        chosen.append(max(left, key=lambda o: (o.shape == shape) + (o.colour == colour)))
        left.remove(chosen[-1])
    return chosen


def matches(scene, caption):
    """True where the scene shows exactly what the caption says: these objects, no others, in this
    relation."""
    if not scene.readable or len(scene.objects) != len(caption.slots):
        return False
    chosen = assign(scene, caption)
    if not all(o.shape == s and c in (None, o.colour) for o, (s, c) in zip(chosen, caption.slots)):
        return False
    return not caption.relation or RELATIONS[caption.relation](*chosen) >= RELATION_MARGIN


def open_attributes(scene, caption):
    """{name: value} of what the caption leaves open; None if the picture is unreadable or has too few
    objects.

    Places are cells of a 3 x 3 grid. Right or wrong pictures count alike: diversity is measured apart from
    performance.
    """
    chosen = assign(scene, caption) if scene.readable else None
    if chosen is None:
        return None
    out = {"background": scene.background}
    for i, (o, (_, colour)) in enumerate(zip(chosen, caption.slots)):
        out[f"size {i}"] = o.size
        out[f"place {i}"] = (int(o.x * 3 // SIDE), int(o.y * 3 // SIDE))
        if colour is None:
            out[f"colour {i}"] = o.colour
    if len(chosen) == 2 and not caption.relation:
        out["order"] = chosen[0].x < chosen[1].x
    return out


def reader_accuracy(scenes, images):
    """Share read right of: background, count, and (where the count is right) shape, colour, size, place;
    readable."""
    right, total = {}, {}
    for truth, seen in zip(scenes, read(images)):
        facts = [("readable", seen.readable), ("background", seen.background == truth.background),
                 ("count", len(seen.objects) == len(truth.objects))]
        if facts[-1][1]:
            # Sorting by place can swap two objects that stand nearly in line, so pair each with its nearest.
            for o in truth.objects:
                near = min(seen.objects, key=lambda s: abs(s.x - o.x) + abs(s.y - o.y))
                facts += [(name, getattr(near, name) == getattr(o, name))
                          for name in ("shape", "colour", "size")]
                facts += [("place", max(abs(near.x - o.x), abs(near.y - o.y)) <= 1)]
        for name, ok in facts:
            right[name], total[name] = right.get(name, 0) + ok, total.get(name, 0) + 1
    return {name: right[name] / total[name] for name in total}


def random_scenes(n, rng, allow_heldout=False):
    """n (Caption, Scene) pairs: a category at random, then a caption of it, then a scene of which it is
    true."""
    pools = {k: [CAPTIONS[t] for t in captions(k) + (captions(k, True) if allow_heldout else [])]
             for k in CATEGORIES}
    drawn = [rng.choice(pools[rng.choice(CATEGORIES)]) for _ in range(n)]
    return [(c, sample_scene(c, rng, allow_heldout)) for c in drawn]


if __name__ == "__main__":
    scenes = [s for _, s in random_scenes(2000, random.Random(0), allow_heldout=True)]
    for name, share in reader_accuracy(scenes, render(scenes)).items():
        print(f"{name:10s} {share:7.2%} read right of 2,000 rendered scenes")
