"""python -m pytest tests/core/test_evaluation_by_hand.py

The measurements of an evaluation by brute force: on a policy that is a table (tests/helpers/by_hand.py), and
on scenes made by hand.
"""
import math
import random
from types import SimpleNamespace

import pytest
import torch

import evaluate
from by_hand import FIRST, Pipeline, World
from tiny import shapes
from tiny import world as tiny
from tiny.shapes import Obj, Scene

SAMPLING = dict(cfg_scale=2., temperature=.8)


def divergence_along(tokens, prompt, p, q):
    """Return KL(p || q) of one image, token after token, and the entropy of p. p, q: Tables."""
    kl, entropy, before = 0, 0, FIRST
    for token in tokens.tolist():
        logs = []
        for model in (p, q):
            cond, uncond = model.cond[prompt, before], model.uncond[before]
            logs.append(((uncond + 2 * (cond - uncond)) / .8).log_softmax(0).tolist())
        kl += sum(math.exp(a) * (a - b) for a, b in zip(*logs))
        entropy -= sum(math.exp(a) * a for a in logs[0])
        before = token
    return kl, entropy


def test_an_evaluation_by_brute_force():
    """Each KL is along the samples of its own first argument. The world measures a run against its base."""
    world, pipeline = World(), Pipeline()
    policy, reference = pipeline.policy, pipeline.reference
    base = evaluate.evaluate(world, pipeline, reference, prompts=2, draws=24, **SAMPLING)
    found = evaluate.evaluate(world, pipeline, policy, base, prompts=2, draws=24, **SAMPLING)
    results = found.results
    assert base.results["base"] is None and results["base"] is base.results

    def mean(samples, p, q):                         # the first 16 samples of each prompt
        values = [divergence_along(samples.actions[16 * i + j], i, p, q) for i in (0, 1) for j in range(16)]
        return [sum(column) / 32 for column in zip(*values)]
    forward, (reverse, entropy) = mean(base, reference, policy)[0], mean(found, policy, reference)
    assert results["kl_forward"] == pytest.approx(forward)
    assert results["kl_reverse"] == pytest.approx(reverse)
    assert results["token_entropy"] == pytest.approx(entropy / 16)
    assert mean(found, reference, policy)[0] != pytest.approx(forward, rel=.01)       # samples matter
    assert base.results["kl_forward"] == base.results["kl_reverse"] == 0

    prompts = ["dark"] * 24 + ["bright"] * 24
    reward, heldout = world.reward(found.images, prompts).tolist(), found.images[:, 0, 0, 0].tolist()
    best = [max(range(i, i + 8), key=lambda j: reward[j]) for i in range(0, 48, 8)]
    for name, values in {"reward": reward, "heldout_reward": heldout,
                         "best_of_n_reward": [reward[j] for j in best],
                         "best_of_n_heldout_reward": [heldout[j] for j in best]}.items():
        assert results[name] == pytest.approx(sum(values) / len(values))
    f = world.embed(found.images).view(2, 24, -1)
    pairs = [1 - f[i, a] @ f[i, b] for i in (0, 1) for a in range(24) for b in range(24) if a != b]
    assert results["pairwise"] == pytest.approx(torch.stack(pairs).mean().item())


BACKGROUNDS = list(shapes.BACKGROUNDS)
PLACES = (6, 6), (24, 8), (10, 24)


def drawn(prompt, background):
    """Return a Scene of the objects that a prompt names. Only its background is chosen."""
    slots = shapes.parse(prompt).slots
    return Scene(background, tuple(Obj(shape, color or "red", "small", *place)
                                   for (shape, color), place in zip(slots, PLACES)))


def test_entropy_kept_compares_a_run_with_its_base(monkeypatch):
    """Images of one prompt differ only in their background. In the base all four are equally frequent, so the
    entropy is log 4. In the run it is log 4 for the first prompt, and log 2 for three more. The last prompt
    has too few readable images."""
    monkeypatch.setattr(tiny, "COUNTED", 8)
    options = SimpleNamespace(reward="reader", heldout_reward="reader", categories=tiny.shapes.CATEGORIES)
    world = tiny.World(options, None, torch.device("cpu"))
    prompts, rewards = tiny.fixed_prompts(1), {"reward": torch.arange(50.).view(5, 10)}
    asked = []

    def sample(others, n):
        asked.extend(others)
        rng = random.Random(0)             # of each prompt three images are right, and the others are plain
        return shapes.render([shapes.sample_scene(shapes.parse(p), rng, True) if i < 3 else Scene("grey", ())
                              for p in others for i in range(n)])

    def measured(counts, base=None, plain=0):        # ten images of each prompt, of which eight count
        scenes = [drawn(p, BACKGROUNDS[i % n]) for p, n in zip(prompts, counts) for i in range(10)]
        scenes[50 - plain:] = [Scene("white", ())] * plain
        return world.measure(prompts, shapes.render(scenes), rewards, base, sample)
    base, log2 = measured([4] * 5), math.log(2)
    run = measured([4, 2, 2, 2, 2], base, plain=3)
    assert base["open_entropy_of"] == pytest.approx([2 * log2] * 5) and base["entropy_kept"] == 1
    assert run["open_entropy_of"] == [pytest.approx(n * log2) for n in (2, 1, 1, 1)] + [None]
    assert run["open_entropy"] == pytest.approx(5 / 4 * log2)
    assert run["entropy_kept"] == pytest.approx(5 / 8)          # on the four prompts where both have one
    assert (base["unreadable"], run["unreadable"]) == (0, 3 / 50)
    assert [run[f"reward/{c}"] for c in shapes.CATEGORIES] == [4.5, 14.5, 24.5, 34.5, 44.5]
    assert run["unseen"] == 3 / 8 and all(shapes.names_unseen(shapes.parse(p)) for p in asked)
