"""The table of results/robustness.md: what was broken on purpose, how often, and what came of it.

Slow tests call `record`, a row for each fault; a row with the same fault is replaced, others stay.
    python -m pytest -m slow tests/test_hostile.py tests/test_options.py
"""
import os

PATH = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "results", "robustness.md")
HEAD = """# Robustness

Made by the slow tests: `python -m pytest -m slow`. "Refused" is one line that says what is wrong.

| fault | times tried | refused in one line | harmless | lost work | tracebacks |
|---|---|---|---|---|---|
"""


def record(fault, tried, refused="-", harmless="-", lost="none", tracebacks=0):
    """Writes the row of `fault`, in place of the row that it may have."""
    rows = {}
    if os.path.exists(PATH):
        with open(PATH, encoding="utf-8") as file:
            rows = {line.split(" | ")[0][2:]: line for line in file.read().splitlines()[6:]}
    rows[fault] = "| " + " | ".join(map(str, (fault, tried, refused, harmless, lost, tracebacks))) + " |"
    with open(PATH, "w", encoding="utf-8") as file:
        file.write(HEAD + "\n".join(rows.values()) + "\n")
