"""python -m pytest -m slow tests/core/test_mutants.py

Do the tests notice errors? tests/helpers/mutants.py puts errors into a copy of the project. 25 minutes.
"""
import os
import subprocess
import sys

import pytest

from common.config import locate

SCRIPT = locate("tests/helpers/mutants.py")
THREE = """
import mutants
mutants.MUTANTS = {name: ("metrics.py", old, new, "tests/core/test_metrics.py") for name, old, new in (
    ("harmless", "Measures of diversity", "Measures"), ("harmful", "- 2 * middle", "- middle"),
    ("no import", "import torch.nn.functional as F", "import torch.x"))}
"""


@pytest.mark.slow
def test_the_script_tells_survivors_from_killed_mutants():
    def run(code):
        return subprocess.run([sys.executable, "-c", THREE + code], cwd=os.path.dirname(SCRIPT), text=True,
                              capture_output=True)
    done = run("print(mutants.main([]))")
    verdicts = "{'harmless': 'survived', 'harmful': 'killed', 'no import': 'did not run'}"
    assert done.stdout.splitlines()[-1] == verdicts, done.stdout + done.stderr
    moved = run('mutants.MUTANTS["gone"] = ("metrics.py", "a", "b", ""); mutants.main(["harmful"])')
    assert moved.returncode == 1 and moved.stderr.startswith("gone: metrics.py has 'a' ")


@pytest.mark.slow
def test_95_percent_of_the_mutants_are_killed():
    """It writes results/mutants.md, and prints one line for each mutant: `-s` shows them."""
    assert subprocess.run([sys.executable, SCRIPT]).returncode == 0
