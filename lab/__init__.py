"""Experiments and tools of the authors. Run them from the root, as in `python -m lab.frontier`."""
