"""python -m pytest tests/test_lesson.py

Prose goes stale without a sound. What lesson.md and README.md name must be there: files, functions, line
counts.
"""
import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


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
