"""Run: python -m pytest tests/common/test_floors.py

A file imports only from lower floors. Inside a folder it also imports from its neighbors, without a circle.
So a reader who reads from the lowest floor upwards meets nothing that is not defined yet. The test reads
syntax trees, so it also sees imports inside functions.
"""
import ast
import os
import pathlib
import re

import pytest

from common.config import locate

FLOORS = (                                             # lowest first; a name with / is a whole folder
    ("common/", "divergences.py", "metrics.py", "critical.py"),
    ("vqgan.py", "model.py", "flow.py", "grpo.py", "reward.py"),
    ("tiny/", "full/", "vapi.py", "rejection.py", "repa.py"),
    ("vrpo.py", "evaluate.py", "pretrain.py"),
    ("train.py", "sample.py", "lab/", "exercises/"))
FILES_AT_TOP, LINES, COLUMNS = 14, 350, 110


def floor(path):
    """Return the floor of a file, 1 to 5, or None for a file that has none."""
    return next((i for i, names in enumerate(FLOORS, 1) for name in names
                 if path == name or name.endswith("/") and path.startswith(name)), None)


def imports(path, text, paths):
    """Yield (line, path of the imported file) for every import of a file of `paths` in the file `path`."""
    def find(name):
        stem = name.replace(".", "/")
        return next((p for p in (f"{stem}.py", f"{stem}/__init__.py") if p in paths), None)
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = os.path.dirname(path).replace("/", ".") if node.level else ""
            module = ".".join(filter(None, (here, node.module)))
            inside = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            names = [name if find(name) else module for name in inside]        # `from full import clip`
        for name in dict.fromkeys(names):
            if (target := find(name)) and not target.endswith("__init__.py"):
                yield node.lineno, target


def circle(graph, path, way=()):
    """Return the files of a circle that is reached from `path`, or () if there is none."""
    if path in way:
        return (*way[way.index(path):], path)
    return next(filter(None, (circle(graph, other, (*way, path)) for other in graph.get(path, ()))), ())


def wrong(files):
    """files: {path: text} -> one line for each import or file that has to move."""
    out, graphs = [], {}
    for path, text in files.items():
        if not (here := floor(path)):
            out.append(f"{path} has no floor: give it one in FLOORS, or move it into a folder")
            continue
        for line, target in imports(path, text, files):
            there, folder = floor(target) or 9, os.path.dirname(path)
            if folder and folder == os.path.dirname(target):
                graphs.setdefault(folder, {}).setdefault(path, []).append(target)
            elif there >= here:
                out.append(f"{path}, line {line}, imports {target} of floor {there}: move what it needs to a "
                           f"file of floor {here - 1} or lower" if here > 1 else
                           f"{path}, line {line}, imports {target}: a file of floor 1 imports nothing of the "
                           f"project, so pass what it needs as an argument, or move the function up")
    for graph in graphs.values():
        if found := next(filter(None, (circle(graph, path) for path in graph)), ()):
            out.append(f"{' -> '.join(found)} is a circle: move what both need to a third file of the folder")
    return out


def product():
    """Return {path: text} of all Python files that are not tests, configs or solutions."""
    root = pathlib.Path(locate("README.md")).resolve().parent
    patterns = [f"{name}**/*.py" for names in FLOORS for name in names if name.endswith("/")]
    paths = sorted(p for pattern in ("*.py", *patterns) for p in root.glob(pattern))
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def test_imports_lead_down_and_never_in_a_circle():
    found = wrong(product())
    assert not found, "\n".join(["", *found])


def test_the_top_level_is_small_and_so_is_every_file():
    files = product()
    at_top, lines = [path for path in files if "/" not in path], {p: t.splitlines() for p, t in files.items()}
    assert len(at_top) <= FILES_AT_TOP, f"move one of these into a folder: {', '.join(at_top)}"
    long = [f"{path} has {len(found)} lines: move a part to a file of its own"
            for path, found in lines.items() if len(found) > LINES]
    wide = [f"{path}, line {n}, has {len(line)} columns: at most {COLUMNS}"
            for path, found in lines.items() for n, line in enumerate(found, 1) if len(line) > COLUMNS]
    assert not long + wide, "\n".join(["", *long, *wide])


LAZY = "def f():\n    if True:\n        {}\n"


@pytest.mark.parametrize("files, said", [
    ({"grpo.py": "import evaluate"}, "grpo.py, line 1, imports evaluate.py of floor 4: move .* floor 1"),
    ({"model.py": LAZY.format("from full.weights import find")}, "model.py, line 3, imports full/weights.py"),
    ({"full/clip.py": LAZY.format("from tiny import shapes")}, "full/clip.py, line 3, imports tiny/shapes"),
    ({"vapi.py": "import os, tiny.shapes"}, "vapi.py, line 1, imports tiny/shapes.py of floor 3"),
    ({"metrics.py": "from common import files"}, "metrics.py, line 1, imports common/files.py.*floor 1"),
    ({"common/run.py": "x = 1\nfrom reward import f"}, "common/run.py, line 2, imports reward.py"),
    ({"tiny/a.py": "from tiny import b", "tiny/b.py": LAZY.format("from . import c"),
      "tiny/c.py": "import tiny.a as x"}, "tiny/a.py -> tiny/b.py -> tiny/c.py -> tiny/a.py is a circle"),
    ({"common/a.py": "from common.a import b"}, "common/a.py -> common/a.py is a circle"),
    ({"graphs.py": ""}, "graphs.py has no floor"),
    ({"train.py": "import graphs", "graphs.py": ""}, "train.py, line 1, imports graphs.py"),
])
def test_what_breaks_the_rules_is_found(files, said):
    names = "evaluate.py full/weights.py tiny/shapes.py common/files.py reward.py full/__init__.py".split()
    found = wrong(dict.fromkeys(names, "") | files)
    assert any(re.match(said, line) for line in found), found


def test_what_keeps_the_rules_is_not_reported():
    assert not wrong({"common/files.py": "", "metrics.py": "import math\nimport torch", "common/run.py":
                      "from common import files\nfrom common.files import save", "grpo.py": "import metrics",
                      "train.py": LAZY.format("import common.run, grpo"), "lab/sweep.py": "import lab.stats",
                      "lab/stats.py": "from common import files"})
