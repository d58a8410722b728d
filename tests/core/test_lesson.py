"""python -m pytest tests/core/test_lesson.py

Prose goes stale without a sound. What lesson.md and README.md name must be there: files, functions, line
counts. An interval that README quotes must be the one in the report, beside the same claim, and a speed one
of results/bench.md.
"""
import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def names(path):
    """Everything that a Python file defines at the top, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
        found |= {node.name} if hasattr(node, "name") else set()
        found |= {f"{node.name}.{m.name}" for m in getattr(node, "body", [])
                  if isinstance(node, ast.ClassDef) and hasattr(m, "name")}
    return found


@pytest.mark.parametrize("page", ["lesson.md", "README.md"])
def test_files_and_functions_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)
    assert len(places) >= 20 or page != "lesson.md"
    for file, name in places:
        assert name in names(ROOT / file), f"{page} names {file}::{name}"
    for file in re.findall(r"`([\w/]+\.(?:py|md|sh))`", text) + re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / file).exists(), f"{page} names {file}"


def test_line_counts_in_the_file_map():
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"),
                      re.MULTILINE)
    assert {file for file, _ in rows} == {p.name for p in ROOT.glob("*.py")}
    for file, lines in rows:
        assert int(lines) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


def test_quoted_intervals_are_those_of_the_report():
    report = (ROOT / "results/frontier.md").read_text(encoding="utf-8")
    quoted = 0
    for row in re.findall(r"^\| \(.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        claim = row.split()[1]
        lines = [line for line in report.splitlines() if line.startswith(f"| {claim} ")]
        for mean, interval in re.findall(r"([+-]\d\.\d+) (\[[^]]*\])", row):
            assert any(f"| {mean} [" in line and f"] {interval}, " in line for line in lines), claim + mean
            quoted += 1
    assert quoted >= 10


def test_quoted_speeds_are_those_of_the_bench():
    """Every number of README's table is one of results/bench.md, and a ratio is that of its row."""
    known = set(re.findall(r"[\d.,]+", (ROOT / "results/bench.md").read_text(encoding="utf-8")))
    table = re.search(r"\| \| usual \| ours \| ratio \|\n.*\n((?:\|.*\n)+)",
                      (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    for row in table.splitlines():
        usual, ours, ratio = (cell.strip() for cell in row.split("|")[2:5])
        assert {usual, ours} <= known, row
        a, b = (float(number.replace(",", "")) for number in (usual, ours))
        assert float(ratio) == pytest.approx(max(a, b) / min(a, b), rel=.01), row
