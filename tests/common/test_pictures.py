"""python -m pytest tests/common/test_pictures.py"""
import pytest
from PIL import Image

from common import images as pictures
from common.config import UserError
from lab import figures


def test_a_film_shows_the_steps_that_all_runs_have(tmp_path):
    for run, width, steps in (("a", 30, (0, 10, 20)), ("b", 50, (0, 20, 40))):
        (tmp_path / run).mkdir()
        for step in steps:
            Image.new("RGB", (width, 40), (step * 5, 0, 0)).save(tmp_path / run / f"samples_{step:05d}.png")
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    figures.main([*runs, f"--out={tmp_path / 'film.gif'}"])
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 2 and film.size == (80, 40 + pictures.LINE)
        film.seek(1)                                                          # step 20, of both
        assert {film.convert("RGB").getpixel((x, 40))[0] for x in (15, 60)} == {100}
    with pytest.raises(UserError, match="two sampled steps"):
        figures.main([str(tmp_path)])
    with pytest.raises(UserError, match="at least one run"):
        figures.main([])
