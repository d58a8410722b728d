"""The tiny world: a grammar of captions, a renderer, and a reader that recovers a scene from its image.

A scene is a plain background with one to three shapes on it. A caption names some attributes of a scene and
leaves the other attributes open. The reader finds every attribute by geometry, so nothing in it is learned.
Therefore we can measure exactly the two quantities that post-training trades against each other:
  performance: does the image show what the text says?                       -> `matches`
  diversity:   how much do the attributes vary that the text leaves open?    -> `open_attributes`
The five categories of captions are a miniature of GenEval, a benchmark of text-to-image models (arXiv
2310.11513):
  single    a red circle                           counting  three red circles
  two       a circle and a square (open colors)    position  a red circle left of a blue square
  binding   a red circle and a blue square

Images are [B,3,H,W] in [-1,1] with H = W = 32. Sizes and places are in pixels. Places x and y start at the
top left corner, and y points down. Symbols of the reader:
  B images   N connected regions of object pixels in all images   K = 4 colors of objects
  p, g, c    RGB values in 0..255: p of a pixel, g of the background, c of an object. d = c - g
  a          coverage: the fraction of a pixel that an object covers, so that p = g + a d
"""
import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.config import UserError

SIDE = 32                                            # H = W
COLORS = dict(red=(225, 40, 40), green=(40, 165, 60), blue=(45, 80, 225), yellow=(245, 215, 40))
BACKGROUNDS = dict(white=(240, 240, 240), grey=(135, 135, 135), black=(25, 25, 25), brown=(110, 72, 45))
SHAPES = ("circle", "square", "triangle", "cross")
RADII = dict(small=5, large=7)                       # half the width of a shape
NUMBERS = dict(two=2, three=3)
GAP = 2                                              # least gap between two shapes
MARGIN = 1                                           # least gap between a shape and the border
GRID = 8                                             # centers of shapes stand on a grid with this spacing
RELATION_MARGIN = 4                                  # "left of" means left by at least this many pixels
# Unseen pairs: no caption and no image in the training of policy and judge contains these pairs of color and
# shape. So they test generalization.
UNSEEN = {("red", "cross"), ("green", "circle"), ("blue", "triangle")}
CATEGORIES = ("single", "two", "counting", "position", "binding")


class Obj(NamedTuple):
    shape: str
    color: str
    size: str
    x: float                      # of the center
    y: float


class Scene(NamedTuple):
    background: str
    objects: tuple                # of Obj, from left to right; at equal x from top to bottom
    readable: bool = True         # False: the image shows something that is not of this world


class Caption(NamedTuple):
    text: str
    category: str
    slots: tuple                  # of (shape, color); color is None where the caption leaves it open
    relation: str = ""            # key of RELATIONS, or "" where the caption names none


# ---- the grammar -------------------------------------------------------------------------------------------
# By how many pixels object a is left of (right of, above, below) object b.
RELATIONS = {"left of": lambda a, b: b.x - a.x, "right of": lambda a, b: a.x - b.x,
             "above": lambda a, b: b.y - a.y, "below": lambda a, b: a.y - b.y}


def _grammar():
    """Yield every Caption of the world. The list is short, so parsing a text is a look-up in a dictionary."""
    pairs = list(itertools.product(COLORS, SHAPES))
    for c, s in pairs:
        yield Caption(f"a {c} {s}", "single", ((s, c),))
        for word, n in NUMBERS.items():
            yield Caption(f"{word} {c} {s}{'es' if s == 'cross' else 's'}", "counting", ((s, c),) * n)
    for s, t in itertools.permutations(SHAPES, 2):
        yield Caption(f"a {s} and a {t}", "two", ((s, None), (t, None)))
    for (c, s), (d, t) in itertools.product(pairs, pairs):
        if c != d and s != t:                 # otherwise swapping the two colors would change nothing
            yield Caption(f"a {c} {s} and a {d} {t}", "binding", ((s, c), (t, d)))
            for relation in RELATIONS:
                yield Caption(f"a {c} {s} {relation} a {d} {t}", "position", ((s, c), (t, d)), relation)


CAPTIONS = {caption.text: caption for caption in _grammar()}


def parse(text):
    """Return the Caption of a text. Raise UserError if the grammar does not contain the text."""
    if text not in CAPTIONS:
        raise UserError(f"{text!r} is not of the tiny world's grammar; try 'a red circle and a blue square'")
    return CAPTIONS[text]


def names_unseen(caption):
    """Return whether a Caption names a pair of UNSEEN."""
    return any((color, shape) in UNSEEN for shape, color in caption.slots)


def captions(category, unseen=False):
    """Return all texts of a category: those without unseen pairs, or those with at least one."""
    return [c.text for c in CAPTIONS.values() if c.category == category and names_unseen(c) == unseen]


# ---- the renderer ------------------------------------------------------------------------------------------
def _place(shape, color, objects, rng, allow_unseen):
    """Return a random Obj that keeps its distance from `objects`, or None after 20 attempts."""
    colors = [c for c in COLORS if allow_unseen or (c, shape) not in UNSEEN]
    size = rng.choice(list(RADII))
    places = range(RADII[size] + MARGIN, SIDE - RADII[size] - MARGIN + 1, GRID)
    for _ in range(20):
        x, y = rng.choice(places), rng.choice(places)
        new = Obj(shape, color or rng.choice(colors), size, x, y)
        if all(max(abs(o.x - x), abs(o.y - y)) >= RADII[o.size] + RADII[size] + GAP for o in objects):
            return new
    return None


def sample_scene(caption, rng, allow_unseen=False):
    """Sample a Scene that a Caption describes; open attributes are uniform. rng: random.Random."""
    while True:
        background, objects = rng.choice(list(BACKGROUNDS)), []
        for shape, color in caption.slots:
            if (new := _place(shape, color, objects, rng, allow_unseen)) is None:
                break                                           # no room: start again
            objects.append(new)
        else:
            if not caption.relation or RELATIONS[caption.relation](*objects) >= RELATION_MARGIN:
                return Scene(background, tuple(sorted(objects, key=lambda o: (o.x, o.y))))


def _draw(canvas, shape, x, y, r, fill):
    """Draw one shape with center (x, y) and half width r on a Pillow canvas (ImageDraw)."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif shape == "square":
        canvas.rectangle((x - r, y - r, x + r - 1, y + r - 1), fill=fill)
    elif shape == "triangle":
        canvas.polygon(((x, y - r), (x - r, y + r - 1), (x + r - 1, y + r - 1)), fill=fill)
    else:                                               # a cross; an arm is 3/8 as thick as the cross is wide
        arm = 3 * r // 8
        canvas.rectangle((x - r, y - arm, x + r - 1, y + arm - 1), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm - 1, y + r - 1), fill=fill)


def render(scenes, over=4):
    """Render B Scenes -> images [B,3,32,32] in [-1,1].
    Each scene is drawn `over` times too large, then reduced by averaging. So edges are soft."""
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.float32)
    for image, scene in zip(images, scenes):
        large = Image.new("RGB", (SIDE * over, SIDE * over), BACKGROUNDS[scene.background])
        canvas = ImageDraw.Draw(large)
        for o in scene.objects:
            _draw(canvas, o.shape, o.x * over, o.y * over, RADII[o.size] * over, COLORS[o.color])
        image[:] = np.asarray(large.reduce(over))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 127.5 - 1


# ---- the reader --------------------------------------------------------------------------------------------
WINDOW = 16                                     # side of a template
SLACK = 2                                       # largest shift of a template in each direction
ERROR_LIMIT = .35            # largest squared error / sum of squares of the template, of a readable region
TEMPLATES = list(itertools.product(SHAPES, RADII))


def _template(shape, size):
    """Return the coverage [WINDOW,WINDOW] that a shape in the middle of a window gives to each pixel."""
    large = Image.new("L", (WINDOW * 4, WINDOW * 4))
    _draw(ImageDraw.Draw(large), shape, WINDOW * 2, WINDOW * 2, RADII[size] * 4, 255)
    return torch.from_numpy(np.asarray(large.reduce(4), np.float32) / 255)


_TEMPLATES = torch.stack([_template(*t) for t in TEMPLATES])[:, None]                  # [8,1,WINDOW,WINDOW]
_COLORS, _BACKGROUNDS = (torch.tensor(list(p.values())) / 1. for p in (COLORS, BACKGROUNDS))   # [4,3]


def _find_coverage(offset, g):
    """offset [B,3,H,W] is p - g, g [B,3] -> coverage [B,1,H,W] in [0,1], squared residual [B,K,H,W].
    For each color the least-squares solution of p - g = a d is a = <p - g, d> / <d, d>.
    The residual of a color is |p - g - a d|^2. The coverage is the value a of the color with the least
    residual."""
    d = _COLORS - g[:, None]                                                                      # [B,K,3]
    a = (torch.einsum("bchw,bkc->bkhw", offset, d) / (d * d).sum(2)[..., None, None]).clamp(0, 1)
    residual = (offset[:, None] - a[:, :, None] * d[..., None, None]).square().sum(2)
    return a.gather(1, residual.min(1, keepdim=True).indices), residual


def _find_regions(mask):
    """mask [B,1,H,W] -> its N connected regions: the index of their image [N], and their masks [N,1,H,W]."""
    # Every pixel starts with its own label, from 1 to H*W. Then it takes the largest label around it until
    # nothing changes. Afterwards all pixels of a connected region have the same label.
    labels = mask * torch.arange(1., SIDE * SIDE + 1).view(1, 1, SIDE, SIDE)
    while not torch.equal(labels, new := F.max_pool2d(labels, 3, 1, 1) * mask):
        labels = new
    # Adding a multiple of the image's index makes labels unique. So one call of unique finds all regions.
    stride = SIDE * SIDE + 1
    ids = labels[:, 0].long() + stride * torch.arange(len(mask)).view(-1, 1, 1)
    ids, pixels = ids.unique(return_counts=True)
    ids = ids[(pixels >= 6) & (ids % stride > 0)]                  # no tiny regions; label 0 is outside
    image, label = ids // stride, ids % stride
    return image, (labels[image] == label.view(-1, 1, 1, 1)).float()


def _fit_templates(coverage, regions):
    """regions [N,1,H,W], coverage [N,1,H,W] of their images -> template, y, x, relative error, [N] each.
    The result is the template and the place with the least squared error, near the center of the region."""
    inside = regions[:, 0] > 0
    rows, columns = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE).view(1, -1)
    y, x = [(torch.where(inside, i, 99).amin((1, 2)) + torch.where(inside, i, -1).amax((1, 2)) + 1) // 2
            for i in (rows, columns)]                                             # center of the bounding box
    # Keep the region and a rim of one pixel, for its soft edge. Cut 20 x 20 pixels around the center.
    half, shifts = WINDOW // 2 + SLACK, 2 * SLACK + 1
    padded = F.pad(coverage * F.max_pool2d(regions, 3, 1, 1), (half,) * 4)
    crops = torch.stack([image[:, top:top + 2 * half, left:left + 2 * half]
                         for image, top, left in zip(padded, y.tolist(), x.tolist())])
    # sum (crop - t)^2 = sum crop^2 - 2 <crop, t> + sum t^2, for every template t and every shift
    area = _TEMPLATES.square().sum((1, 2, 3)).view(1, -1, 1, 1)
    error = (crops.square().sum((2, 3), keepdim=True) - 2 * F.conv2d(crops, _TEMPLATES) + area) / area
    error, best = error.flatten(1).min(1)
    template, shift = best // shifts ** 2, best % shifts ** 2
    return template, y + shift // shifts - SLACK, x + shift % shifts - SLACK, error


@torch.no_grad()
def read(images):
    """Read images [B,3,32,32] in [-1,1] -> a list of B Scenes, by geometry alone.

    A Scene is not readable if a region fits no template, if there are no regions or more than three, or if a
    tenth of the pixels is far from the background but outside of all regions.
    """
    pixels = (images.float().cpu().clamp(-1, 1) + 1) * 127.5                                      # [B,3,H,W]
    # Every pixel votes for the nearest color. The background with the most votes wins.
    nearest = torch.cdist(pixels.flatten(2).transpose(1, 2), torch.cat([_BACKGROUNDS, _COLORS])).argmin(2)
    background = torch.stack([(nearest == i).sum(1) for i in range(len(BACKGROUNDS))], 1).argmax(1)      # [B]
    g = _BACKGROUNDS[background]                                                                  # [B,3]
    offset = pixels - g[:, :, None, None]
    coverage, residual = _find_coverage(offset, g)
    mask = (coverage > .5).float()                                 # pixels of objects, [B,1,H,W]
    stray = (offset.square().sum(1) > 60 ** 2) & (F.max_pool2d(mask, 3, 1, 1)[:, 0] == 0)
    readable = (stray.float().mean((1, 2)) < .1).tolist()
    objects = [[] for _ in images]
    image, regions = _find_regions(mask)
    if len(image):
        color = (residual[image] * regions).sum((2, 3)).argmin(1)
        fits = _fit_templates(coverage[image], regions)
        for b, c, template, y, x, error in zip(*(v.tolist() for v in (image, color, *fits))):
            shape, size = TEMPLATES[template]
            objects[b].append(Obj(shape, list(COLORS)[c], size, x, y))
            readable[b] &= error <= ERROR_LIMIT
    return [Scene(list(BACKGROUNDS)[i], tuple(sorted(found, key=lambda o: (o.x, o.y))),
                  ok and 0 < len(found) < 4) for i, found, ok in zip(background.tolist(), objects, readable)]


# ---- performance and diversity of a scene ------------------------------------------------------------------
def assign(scene, caption):
    """Return a list with the best object for each slot of a Caption. None if there are too few objects."""
    remaining, chosen = list(scene.objects), []
    if len(remaining) < len(caption.slots):
        return None
    for shape, color in caption.slots:
        chosen.append(max(remaining, key=lambda o: (o.shape == shape) + (o.color == color)))
        remaining.remove(chosen[-1])
    return chosen


def matches(scene, caption):
    """Return whether a Scene shows exactly the objects of a Caption, in its relation, and no other object."""
    if not scene.readable or len(scene.objects) != len(caption.slots):
        return False
    chosen = assign(scene, caption)
    return (all(o.shape == s and c in (None, o.color) for o, (s, c) in zip(chosen, caption.slots))
            and (not caption.relation or RELATIONS[caption.relation](*chosen) >= RELATION_MARGIN))


def open_attributes(scene, caption):
    """Return {attribute: value} of what a Caption leaves open; None if unreadable or if objects are missing.
    A Scene that contradicts the Caption counts too, because diversity is measured apart from performance."""
    chosen = assign(scene, caption) if scene.readable else None
    if chosen is None:
        return None
    values = {"background": scene.background}
    for i, (o, (_, color)) in enumerate(zip(chosen, caption.slots)):
        values[f"size {i}"] = o.size
        values[f"place {i}"] = (int(o.x * 3 // SIDE), int(o.y * 3 // SIDE))      # cell of a 3 x 3 grid
        if color is None:
            values[f"color {i}"] = o.color
    if len(chosen) == 2 and not caption.relation:
        values["order"] = chosen[0].x < chosen[1].x
    return values


def reader_accuracy(scenes, images):
    """n true Scenes, their images [n,3,32,32] -> {attribute: fraction in [0,1] that is read correctly}.
    Attributes of objects count only where the number of objects is correct. A place may be 1 pixel off."""
    results = {}
    for truth, seen in zip(scenes, read(images)):
        facts = [("readable", seen.readable), ("background", seen.background == truth.background),
                 ("count", len(seen.objects) == len(truth.objects))]
        # An error of one pixel can change the order of two objects, so compare with the nearest object.
        for o in truth.objects if facts[-1][1] else ():
            near = min(seen.objects, key=lambda s: abs(s.x - o.x) + abs(s.y - o.y))
            facts += [(name, getattr(near, name) == getattr(o, name)) for name in ("shape", "color", "size")]
            facts += [("place", max(abs(near.x - o.x), abs(near.y - o.y)) <= 1)]
        for name, correct in facts:
            results.setdefault(name, []).append(correct)
    return {name: sum(correct) / len(correct) for name, correct in results.items()}


def random_scenes(n, rng, allow_unseen=False):
    """Sample n pairs (Caption, Scene): a random category, a random caption of it, a scene that it describes.
    rng: random.Random. allow_unseen: whether pairs of UNSEEN may occur."""
    pools = {k: [CAPTIONS[t] for t in captions(k) + (captions(k, True) if allow_unseen else [])]
             for k in CATEGORIES}
    drawn = [rng.choice(pools[rng.choice(CATEGORIES)]) for _ in range(n)]
    return [(c, sample_scene(c, rng, allow_unseen)) for c in drawn]
