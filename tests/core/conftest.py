"""For the tests of this folder that start whole runs."""
import pytest


@pytest.fixture
def small_evaluations(monkeypatch):
    """Allow evaluations of 8 images of each prompt. The exact reader is slow on images of random weights."""
    from tiny import world
    monkeypatch.setattr(world, "COUNTED", 8)
