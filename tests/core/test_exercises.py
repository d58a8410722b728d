"""python -m pytest tests/core/test_exercises.py

A checker must refuse an empty stub and accept the solution. These tests run all checkers on the stubs and on
the solutions, in one process each. A stub that somebody has begun to solve is skipped, except in CI.
"""
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(p.stem for p in (ROOT / "exercises").glob("e[0-9]*.py"))
BUG_HUNT = "e04_find_the_bug"


def outcomes(folder, solutions):
    """Return {exercise: {test: None if passed, else the message}} of all checkers, on stubs or solutions."""
    env = {k: v for k, v in os.environ.items() if k not in ("SOLUTIONS", "PYTEST_ADDOPTS")}
    env |= {"OMP_NUM_THREADS": "1"} | ({"SOLUTIONS": "1"} if solutions else {})
    report = folder / "report.xml"
    run = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "exercises",
                          f"--junitxml={report}"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert report.exists(), run.stdout + run.stderr
    found = {name: {} for name in NAMES}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [child.get("message") for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.get("classname").rpartition(".test_")[2]][case.get("name")] = bad[0] if bad else None
    return found


@pytest.fixture(scope="module")
def on_stubs(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("stubs"), solutions=False)


@pytest.fixture(scope="module")
def on_solutions(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("solutions"), solutions=True)


def test_ten_exercises_each_with_checker_solution_and_a_line_in_the_index():
    assert len(NAMES) == 10
    assert NAMES == sorted(p.stem.removeprefix("test_") for p in (ROOT / "exercises").glob("test_*.py"))
    assert NAMES == sorted(p.stem for p in (ROOT / "solutions").glob("*.py"))
    index = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    assert NAMES == sorted(re.findall(r"\]\((e\d+_\w+)\.py\)", index))
    for name in NAMES:                          # each file names the command that checks the exercise
        for path in (f"{name}.py", f"test_{name}.py"):
            text = (ROOT / "exercises" / path).read_text(encoding="utf-8")
            assert f"python -m pytest exercises/test_{name}.py" in text.split('"""')[1], path


@pytest.mark.parametrize("name", NAMES)
def test_stub_fails_its_checker(name, on_stubs):
    text = (ROOT / "exercises" / f"{name}.py").read_text(encoding="utf-8")
    if text.count("your turn") < len(re.findall(r"^def ", text, re.MULTILINE)) and not os.environ.get("CI"):
        pytest.skip("somebody has begun to solve this exercise")
    results = on_stubs[name]
    assert results
    if name == BUG_HUNT:       # at ratio 1 the bug does not show, but all other tests must find it
        assert [test for test, message in results.items() if message is None] == [
            "test_at_ratio_one_it_is_reinforce"]
    else:                      # each test must fail because of the stub, not because the checker is broken
        for test, message in results.items():
            assert message and "NotImplementedError: your turn" in message, (test, message)


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name, on_solutions):
    assert on_solutions[name] and not any(on_solutions[name].values()), on_solutions[name]
    assert len(on_solutions[name]) >= 2
