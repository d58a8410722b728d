"""python -m pytest tests/lab/test_figures.py"""
import pytest
import torch
from PIL import Image

from common.config import UserError
from common.images import LINE
from divergences import DIVERGENCES, STRENGTH
from lab import figures

NAMES = list(DIVERGENCES)


def test_curves_and_checks_of_the_gradients(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures.main([])
    assert (tmp_path / "out" / "divergences.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("largest error") == 4 * len(NAMES)


@pytest.mark.parametrize("beta", [.25, 1.])
@pytest.mark.parametrize("estimator", ["sampled", "unbiased", "exact"])
@pytest.mark.parametrize("name", NAMES)
def test_fixed_points(name, estimator, beta):
    """The gradient is zero there by autograd as well, and the two closed forms hold."""
    strong = beta * STRENGTH[name]
    pi = figures.fixed_point(name, estimator, strong)
    z, logq = pi.log().requires_grad_(), figures.RHO.log()
    logp, d = z.log_softmax(0), DIVERGENCES[name]
    penalty = d.exact(logp, logq) if estimator != "sampled" else (pi * d.sampled(logp, logq)).sum()
    (gradient,) = torch.autograd.grad((logp.exp() * figures.REWARD).sum() - strong * penalty, z)
    assert gradient.abs().max() < 1e-8 and pi.sum().item() == pytest.approx(1)
    if name == "reverse_kl" and estimator != "sampled":
        boltzmann = (logq + figures.REWARD / beta).softmax(0)
        assert torch.allclose(pi, boltzmann, atol=1e-9)
    if name == "reverse_kl" and estimator == "sampled":                 # pi (l - r) / rho is beta for all
        others = figures.REWARD == 0
        level = (beta * figures.RHO / pi)[others]
        assert torch.allclose(level, level[0].expand_as(level), rtol=1e-7)
        assert torch.allclose(pi[4], beta * figures.RHO[4] / (level[0] - 1), rtol=1e-7)


@pytest.mark.parametrize("name, estimator", figures.FORMS)
def test_update_estimates_the_gradient_of_the_objective(name, estimator):
    """The mean over many samples, far from the reference, is the gradient that fixed_point sets to zero."""
    z, beta, n = figures.RHO.flip(0).log(), .5, 400_000
    pi, g = z.softmax(0), torch.Generator().manual_seed(0)
    value = figures.REWARD - beta * figures.shaping(name, estimator, z.log_softmax(0), figures.RHO.log())
    right = pi * (value - (pi * value).sum())
    noise = 5 * ((pi * value ** 2).sum() / n) ** .5                                 # five standard errors
    assert noise < .1 * right.abs().max()
    assert (figures.update(z, name, estimator, beta, n, g) - right).abs().max() < noise


def test_demo_is_an_animation(tmp_path):
    figures.demo(tmp_path / "demo.gif", steps=30, frames=3)
    with Image.open(tmp_path / "demo.gif") as image:
        assert image.n_frames == 4


def test_a_film_shows_the_steps_that_all_runs_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run, width, steps in (("a", 30, (0, 10, 20)), ("b", 50, (0, 20, 40))):
        (tmp_path / run).mkdir()
        for step in steps:
            Image.new("RGB", (width, 40), (step * 5, 0, 0)).save(tmp_path / run / f"samples_{step:05d}.png")
    figures.main(["a", "b"])
    with Image.open(tmp_path / "out" / "film.gif") as film:
        assert film.n_frames == 2 and film.size == (80, 40 + LINE)
        film.seek(1)                                                          # step 20, of both
        assert {film.convert("RGB").getpixel((x, 40))[0] for x in (15, 60)} == {100}
    cut = tmp_path / "b" / "samples_00020.png"
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UserError, match="samples_00020.png cannot be read as an image"):
        figures.main(["a", "b"])
    with pytest.raises(UserError, match="two sampled steps"):
        figures.main([str(tmp_path)])


def test_a_demo_takes_no_runs():
    with pytest.raises(UserError, match="--demo takes no runs, got run"):
        figures.main(["--demo", "run"])
