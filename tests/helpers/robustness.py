"""Write the table results/robustness.md. A row tells what was broken on purpose, how often, and the outcome.

Slow tests call `record` once for each fault. It replaces the row of the same fault and keeps the other rows.
    python -m pytest -m slow tests/common/test_hostile.py tests/common/test_options.py
"""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PATH = os.path.join(ROOT, "results", "robustness.md")
HEAD = """# Robustness

Made by the slow tests: `python -m pytest -m slow`. "Refused" is one line that says what is wrong.

| fault | times tried | refused in one line | harmless | lost work | tracebacks |
|---|---|---|---|---|---|
"""


def record(fault, tried, refused="-", harmless="-", lost="none", tracebacks=0):
    """Write the row of `fault`, in place of an earlier row of the same fault."""
    rows = {}
    if os.path.exists(PATH):
        with open(PATH, encoding="utf-8") as file:
            rows = {line.split(" | ")[0][2:]: line for line in file.read().splitlines()[6:]}
    rows[fault] = "| " + " | ".join(map(str, (fault, tried, refused, harmless, lost, tracebacks))) + " |"
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(HEAD + "\n".join(rows.values()) + "\n")
