"""Setup of the checkers: the path to the project's files, one thread, and the fixture `exercise`."""
import importlib.util
import os
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exercise(request):
    """Return the module of test_eNN_name.py: exercises/eNN_name.py, or with SOLUTIONS=1 the solution."""
    name = request.path.stem.removeprefix("test_")
    folder = "solutions" if os.environ.get("SOLUTIONS") == "1" else "exercises"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
