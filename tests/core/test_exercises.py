"""python -m pytest tests/core/test_exercises.py

A checker must refuse an empty stub and accept the solution. These tests run all checkers on the stubs and on
the solutions, in one process each. A stub that somebody has begun to solve is skipped, except in CI. Some
checkers are also run on wrong solutions: a solution in which one piece of text is replaced.
"""
import inspect
import os
import pathlib
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(p.stem for p in (ROOT / "exercises").glob("e[0-9]*.py"))
BUG_HUNTS = {                                              # {name: tests that pass although the bug is there}
    "e04_find_the_bug": ["test_at_ratio_one_it_is_reinforce"],
    "e11_rounded_states": ["test_states_stay_in_bf16", "test_to_three_digits_the_ratio_is_one"]}
ROUNDED = "(mean + std * noise[:, k + 1]).to(store).float()"
NORMAL = "(-z ** 2 / 2 - math.log(std) - math.log(2 * math.pi) / 2).flatten(1)"
STORE = "states.append(x.to(store))"
UNROUNDED = "mean + std * noise[:, k + 1]"
AGAIN = ("s = states[k].float(); mean = c_x * s + c_v * velocity(s, times[k]); "
         "logp[k] = Gaussian(mean[:, None], std[None]).log_prob(x[:, None])[:, 0] / x.shape[1]")
WRONG = [                                                  # name, text of a solution, its new text, error
    ("e11_rounded_states", "x.to(store)", "x", "all states are stored in fp32"),
    ("e11_rounded_states", "noise[:, 0].to(store).float()", "noise[:, 0]", "the first state is not rounded"),
    ("e11_rounded_states", ROUNDED, UNROUNDED, "the next state is not rounded"),
    ("e11_rounded_states", STORE, f"{STORE}; x = {UNROUNDED}", "it continues with the unrounded state"),
    ("e11_rounded_states", STORE, f"{STORE}; x_next = {UNROUNDED}; {AGAIN}; x = x_next",
     "the same, with log-probabilities that are computed again from the stored states"),
    ("e11_rounded_states", "torch.stack(logp, 1)", "torch.stack(logp, 1).to(store)", "bf16 densities"),
    ("e11_rounded_states", UNROUNDED, "mean", "no noise"),
    ("e12_no_density", "1 + s ** 2 * dt / (2 * t)", "1", "noise without all of the drift"),
    ("e12_no_density", "1 + s ** 2 * dt / (2 * t)", "1 - s ** 2 * dt / (2 * t)", "a sign of the drift"),
    ("e12_no_density", "/ (2 * t)", "/ t", "a drift that is twice too strong"),
    ("e12_no_density", "s * math.sqrt(-dt)", "-s * dt", "std without the root"),
    ("e12_no_density", ".flatten(1).sum(1)", ".flatten(1).mean(1)", "the mean over the components"),
    ("e12_no_density", NORMAL, "(-z ** 2 / 2).flatten(1)", "a density that does not integrate to 1"),
    ("e12_no_density", "if std == 0:", "if False:", "no error without noise"),
    ("e12_no_density", "    if std == 0:", "    std = std or 1\n    if False:", "std = 1 without noise"),
    ("e13_clip_and_size", "math.sqrt(65536 / n)", "1", "the published clip for all sizes"),
    ("e13_clip_and_size", "math.sqrt(65536 / n)", "65536 / n", "a clip like 1/n"),
    ("e13_clip_and_size", "math.sqrt(65536 / n)", "math.sqrt(n / 65536)", "the rule upside down"),
    ("e13_clip_and_size", "-q ** 2 / 2", "0", "the mean of the log-ratio is left out"),
    ("e13_clip_and_size", "-q ** 2 / 2", "q ** 2 / 2", "the sign of the mean"),
    ("e13_clip_and_size", "-q ** 2 / 2", "-n * q ** 2 / 2", "the mean of the sum"),
    ("e13_clip_and_size", "q / math.sqrt(n)", "q / n", "the noise like 1/n"),
    ("e13_clip_and_size", "1 - L.cdf(math.log1p(eps))", "0", "only one side"),
    ("e14_likelihood_first", ".sum(1)", ".mean(1)", "the mean over the tokens"),
    ("e14_likelihood_first", "entropy + ", "", "the entropy of q is left out"),
    ("e14_likelihood_first", "(torch.logsumexp(-cost, 0) - math.log(len(cost))).item()",
     "(-cost.mean()).item()", "the mean of the cost in place of the mean of e^-cost"),
    ("e14_likelihood_first", "(torch.logsumexp(-cost, 0)", "((-cost).exp().sum().log()", "it underflows"),
    ("e14_likelihood_first", "math.log1p(-math.exp(log_p))", "math.log(1 - math.exp(log_p))",
     "1 - p becomes 1")]


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


def test_fourteen_exercises_each_with_checker_solution_and_a_line_in_the_index():
    assert len(NAMES) == 14
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
    if name in BUG_HUNTS:      # a bug does not show in every test, but all other tests must find it
        assert sorted(test for test, message in results.items() if message is None) == BUG_HUNTS[name]
    else:                      # each test must fail because of the stub, not because the checker is broken
        for test, message in results.items():
            assert message and "NotImplementedError: your turn" in message, (test, message)


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name, on_solutions):
    assert on_solutions[name] and not any(on_solutions[name].values()), on_solutions[name]
    assert len(on_solutions[name]) >= 2


def load(path, old="", new=""):
    """Return the module of a file, with the text `old` replaced by `new`."""
    text, module = path.read_text(encoding="utf-8"), types.ModuleType(path.stem)
    assert old in text, f"{path.name} has no {old!r}"
    exec(compile(text.replace(old, new) if old else text, str(path), "exec"), module.__dict__)
    return module


def complaint(name, old="", new=""):
    """Run a checker on its solution, with `old` replaced by `new` -> "test: message" of the first failure, or
    None. The tests of this checker must have no argument but `exercise`."""
    exercise = load(ROOT / "solutions" / f"{name}.py", old, new)
    for test, check in vars(load(ROOT / "exercises" / f"test_{name}.py")).items():
        if test.startswith("test_"):
            assert list(inspect.signature(check).parameters) == ["exercise"], test
            try:
                check(exercise)
            except (AssertionError, pytest.fail.Exception) as error:
                return f"{test}: {error}"


@pytest.mark.parametrize("name", sorted({name for name, *_ in WRONG}))
def test_wrong_solutions_fail(name):
    assert complaint(name) is None
    for _, old, new, error in (row for row in WRONG if row[0] == name):
        found = complaint(name, old, new)
        assert found, f"the checker of {name} accepts this error: {error}"
        print(f"{name}: {error} -> {found.splitlines()[0]}")
