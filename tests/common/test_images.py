"""python -m pytest tests/common/test_images.py"""
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from common import images


def test_to_pil_maps_the_range_and_clips():
    image = torch.tensor([-2., -1., 0., 1., 2.]).expand(3, 1, 5)
    assert [p[0] for p in images.to_pil(image).get_flattened_data()] == [0, 0, 128, 255, 255]


def test_grid_frames_show_rewards(tmp_path):
    """Two prompts, two groups of two 4x4 images. The frame is green where the reward is above 1/2."""
    group = torch.zeros(2, 3, 4, 4)
    rewards = [torch.tensor([1., 0.]), torch.tensor([.5, .6])]
    images.grid([("one", [group, group], rewards), ("two", [group, group], None)], tmp_path / "g.png",
                headings=("base", "run"))
    side = 4 * images.SCALE + images.PAD
    with Image.open(tmp_path / "g.png") as file:
        assert file.size == (2 * (2 * side + 3 * images.PAD), images.LINE + 2 * (side + images.LINE))
        left = [i * (2 * side + 3 * images.PAD) + j * side + images.PAD - 1 for i in (0, 1) for j in (0, 1)]
        top = 2 * images.LINE + side // 2                              # beside the middle of the first images
        green, red, white = (30, 160, 60), (210, 50, 50), (255, 255, 255)
        assert [file.convert("RGB").getpixel((x, top)) for x in left] == [green, red, red, green]
        below = top + side + images.LINE
        assert {file.convert("RGB").getpixel((x, below)) for x in left} == {white}


def lines(n):
    keys = ("reward", "heldout_reward", "diversity", "kl_reverse", "entropy", "zero_spread", "grad_norm",
            "t_sample", "t_reward", "t_update")
    return [{"step": i} | dict.fromkeys(keys, .1 * i) for i in range(n)]


def test_curves_show_the_evaluations_of_what_is_trained(tmp_path):
    evaluations = [{"step": 0, "distance": .1, "heldout_reward": .2}]
    images.curves(lines(40), tmp_path / "c.png", evaluations, trained="distance")
    assert (tmp_path / "c.png").stat().st_size > 10_000
    with pytest.raises(KeyError, match="reward"):
        images.curves(lines(40), tmp_path / "c.png", evaluations)


def test_pyplot_needs_no_screen():
    plt = images.pyplot()
    assert plt is sys.modules["matplotlib.pyplot"] and plt.get_backend().lower() == "agg"


def test_a_backend_that_does_not_exist_does_no_harm():
    root = os.path.dirname(os.path.dirname(images.__file__))
    subprocess.run([sys.executable, "-c", "from common import images; images.pyplot()"], check=True, cwd=root,
                   env=os.environ | {"MPLBACKEND": "foo"})
