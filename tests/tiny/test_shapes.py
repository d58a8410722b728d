"""python -m pytest tests/tiny/test_shapes.py"""
import random

import pytest
import torch

from common.config import UserError
from tiny import shapes
from tiny.shapes import Obj, Scene, matches, open_attributes, parse, read, render


def test_reader_is_exact_on_rendered_images():
    """At least 99 % of each attribute must be read correctly. In fact all are."""
    scenes = [s for _, s in shapes.random_scenes(600, random.Random(7), allow_unseen=True)]
    accuracy = shapes.reader_accuracy(scenes, render(scenes))
    assert set(accuracy) == {"readable", "background", "count", "shape", "color", "size", "place"}
    assert min(accuracy.values()) >= .99


def test_reader_finds_what_the_captions_say():
    drawn = shapes.random_scenes(300, random.Random(8), allow_unseen=True)
    seen = read(render([s for _, s in drawn]))
    assert all(matches(s, c) for s, (c, _) in zip(seen, drawn))
    wrong = sum(matches(s, d[0]) for s, d in zip(seen, drawn[1:] + drawn[:1]))
    assert wrong < 15    # the caption of another scene is nearly always false


def test_reader_survives_noise_and_refuses_nonsense():
    scenes = [s for _, s in shapes.random_scenes(100, random.Random(9))]
    noise = .06 * torch.randn(100, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert min(shapes.reader_accuracy(scenes, render(scenes) + noise).values()) > .95
    static = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert not any(s.readable for s in read(static))
    plain = read(torch.full((1, 3, 32, 32), .9))[0]
    assert not plain.readable and plain.objects == () and plain.background == "white"
    blob = render([Scene("black", ())])
    blob[:, :, 4:26, 4:26] = torch.tensor([-1., 1., -1.]).view(3, 1, 1)     # green, but larger than any shape
    assert not read(blob)[0].readable


@pytest.mark.parametrize("rows, readable", [(2, True), (6, False)])
def test_an_image_with_much_that_is_no_object_is_not_readable(rows, readable):
    """A dark purple on grey is far from the background, but no object covers so much of it. A tenth of the
    pixels may be so: three rows of 32."""
    image = render([Scene("grey", (Obj("circle", "red", "small", 8, 8),))])
    image[:, :, 32 - rows:] = torch.tensor([135., 60., 135.]).view(3, 1, 1) / 127.5 - 1
    (seen,) = read(image)
    assert [o.shape for o in seen.objects] == ["circle"] and seen.readable == readable


def test_each_category_means_what_it_says():
    red, blue = Obj("circle", "red", "small", 6, 10), Obj("square", "blue", "large", 24, 20)
    scene = Scene("white", (red, blue))
    true = ["a red circle and a blue square", "a blue square and a red circle", "a circle and a square",
            "a red circle left of a blue square", "a blue square right of a red circle",
            "a red circle above a blue square", "a blue square below a red circle"]
    false = ["a red circle", "two red circles", "a blue circle and a red square", "a circle and a triangle",
             "a red circle right of a blue square", "a red circle below a blue square"]
    assert all(matches(scene, parse(t)) for t in true) and not any(matches(scene, parse(t)) for t in false)
    assert matches(Scene("grey", (red, red._replace(x=20))), parse("two red circles"))
    assert not matches(scene._replace(readable=False), parse(true[0]))
    near = Scene("white", (red, blue._replace(x=9, y=24)))                       # only 3 pixels to the right
    assert not matches(near, parse("a red circle left of a blue square"))


def test_open_attributes_are_those_that_the_caption_leaves_open():
    scene = Scene("white", (Obj("circle", "red", "small", 6, 10), Obj("square", "blue", "large", 24, 20)))
    open_two = open_attributes(scene, parse("a circle and a square"))
    assert open_two == {"background": "white", "size 0": "small", "place 0": (0, 0), "color 0": "red",
                        "size 1": "large", "place 1": (2, 1), "color 1": "blue", "order": True}
    bound = open_attributes(scene, parse("a blue square left of a red circle"))   # false, but it still counts
    assert set(bound) == {"background", "size 0", "place 0", "size 1", "place 1"}
    assert bound["size 0"] == "large"
    assert open_attributes(Scene("white", ()), parse("a red circle")) is None
    assert open_attributes(scene._replace(readable=False), parse("a red circle")) is None


def test_held_out_pairs_stay_out_of_training():
    named = {c for k in shapes.CATEGORIES for c in shapes.captions(k)}
    unseen = {c for k in shapes.CATEGORIES for c in shapes.captions(k, unseen=True)}
    assert not named & unseen and named | unseen == set(shapes.CAPTIONS)
    assert not any(f"{c} {s}" in t for t in named for c, s in shapes.UNSEEN)
    objects = [o for _, scene in shapes.random_scenes(500, random.Random(0)) for o in scene.objects]
    assert not any((o.color, o.shape) in shapes.UNSEEN for o in objects)


def test_objects_never_overlap_and_scenes_are_deterministic():
    for _, scene in shapes.random_scenes(300, random.Random(3)):
        for i, a in enumerate(scene.objects):
            r = shapes.RADII[a.size]
            assert r + 1 <= min(a.x, a.y) and max(a.x, a.y) <= shapes.SIDE - r - 1
            for b in scene.objects[i + 1:]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= r + shapes.RADII[b.size] + shapes.GAP
    assert shapes.random_scenes(20, random.Random(3)) == shapes.random_scenes(20, random.Random(3))


def test_unknown_caption():
    with pytest.raises(UserError, match="not of the tiny world's grammar"):
        parse("a photo of a cat")
