"""python -m pytest tests/core/test_lesson.py

Prose goes stale unnoticed. So the files, commands, options, functions and line counts that a page names must
exist. An interval that a page quotes must be in the report, beside the same claim. Numbers of results must be
those of the csv files. Code that README prints must run and do what it says.
"""
import ast
import csv
import pathlib
import re
import statistics

import pytest
import torch

import grpo
import reward
from divergences import Categorical
from tiny.shapes import CATEGORIES

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "exercises/README.md",
         *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
# Options of pip, pytest, torchrun and venv, and files that a page only gives as an example.
OTHERS = {"index-url", "system-site-packages", "nproc_per_node", "help", "durations"}
EXAMPLES = {"eNN_name.py", "solutions/eNN_name.py", "exercises/test_eNN_name.py"}


def names(path):
    """Return everything that a Python file defines at the top, and methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= {t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
        found |= {node.name} if hasattr(node, "name") else set()
        found |= {f"{node.name}.{m.name}" for m in getattr(node, "body", [])
                  if isinstance(node, ast.ClassDef) and hasattr(m, "name")}
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py)::([\w.]+)`", text)
    assert len(places) >= 20 or page != "docs/lesson.md"
    for file, name in places:
        assert name in names(ROOT / file), f"{page} names {file}::{name}"
    for file in re.findall(r"\]\(([\w/.]+)", text):                  # links start at the folder of the page
        assert (ROOT / page).parent.joinpath(file).exists(), f"{page} links to {file}"
    for file in set(re.findall(r"(?<![\w/.($])[\w/]+\.py\b", re.sub(r"\]\([^)]*\)", "", text))) - EXAMPLES:
        assert (ROOT / file).exists() or (ROOT / page).parent.joinpath(file).exists(), f"{page} names {file}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_options_that_are_named_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:lab|full|tiny|common)\.[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), f"{page} runs {module}"
    sources = [f.read_text(encoding="utf-8") for folder in (".", "common", "tiny", "full", "lab")
               for f in (ROOT / folder).glob("*.py")]
    known = {name for source in sources for name in re.findall(r"^    (\w+): .*? = option\(", source, re.M)}
    assert len(known) > 80
    for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text):
        assert name in known | OTHERS, f"{page} names --{name}"


def main_rows():
    """Return the lines of the two main tables of docs/results.md, as results/main.csv has them."""
    with open(ROOT / "results" / "main.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    plain = lambda x, digits: f"{x:.{digits}f}".removeprefix("0") if digits else f"{x:.0f}"

    def cell(run, key, digits, scale=1, unit=""):
        values = [scale * float(row[key]) for row in rows if row["run"] == run]
        spread = f" ± {plain(statistics.stdev(values), digits)}" if len(values) > 1 else ""
        return plain(statistics.mean(values), digits) + unit + spread
    columns = [("reward", 3), ("heldout_reward", 3), ("open_entropy", 2), ("entropy_kept", 0, 100, " %"),
               ("vendi", 2)]
    names = {"base": "base", "js": "JS, beta .4", "none": "no divergence"}
    first = {run: [name, *(cell(run, *column) for column in columns),
                   "0" if run == "base" else cell(run, "kl_reverse", 1)] for run, name in names.items()}
    best = ["base, best of 8 by the judge", *(cell("base", f"best_of_n_{key}", 3)
                                              for key in ("reward", "heldout_reward")), "", "", "", ""]
    second = [[name, *(cell(run, f"heldout_reward/{category}", 2) for category in CATEGORIES)]
              for run, name in names.items()]
    return [("| " + " | ".join(row) + " |").replace("|  ", "| ")
            for row in [first["base"], best, first["js"], first["none"], *second]]


def test_the_main_results_are_those_of_the_csv():
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    missing = [row for row in main_rows() if row not in text]
    assert not missing, "docs/results.md lacks these lines:\n" + "\n".join(missing)


def test_the_numbers_of_readme_are_those_of_the_csv():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    base, best, js, none = ([cell.strip() for cell in row.split("|")[2:-1]] for row in main_rows()[:4])
    for sentence in (f"raises the held-out reward from {base[1]} to {js[1]} and keeps "
                     f"{js[3].split(' ±')[0]}",
                     f"the same ({none[1]}), and {none[3].split(' ±')[0]} is kept",
                     f"chosen by the judge, has a held-out reward of {best[1]}. Of 245 runs of 120 steps, "
                     f"one is better",
                     f"right in {round(100 * float(base[1]))} % of its images, both trained policies in "
                     f"{round(100 * float(js[1][:4]))} %"):
        assert sentence in text, sentence
    assert round(100 * float(none[1][:4])) == round(100 * float(js[1][:4]))
    with open(ROOT / "results" / "frontier.csv", encoding="utf-8") as file:
        reached = [float(row["heldout_reward"]) > float(best[1]) for row in csv.DictReader(file)]
    assert (len(reached), sum(reached)) == (245, 1)


def test_the_loss_as_printed_is_the_loss():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The idea")[1]
    printed = {"torch": torch}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], printed)
    g = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(6, 5, 7, generator=g, dtype=torch.float64) for _ in range(3))
    logits, tokens = (old + .3 * logits).requires_grad_(), torch.randint(7, (6, 5), generator=g)
    rewards = torch.rand(2, 3, generator=g, dtype=torch.float64)
    pi, logp_old = Categorical(logits), Categorical(old).log_prob(tokens)
    ours, _ = grpo.loss(pi, Categorical(ref), tokens, logp_old, grpo.advantages(rewards.flatten(), 3)[0], 30,
                        divergence="js", beta=.4)
    logps = [x.view(2, 3, 5) for x in (pi.log_prob(tokens), logp_old, Categorical(ref).log_prob(tokens))]
    theirs = printed["grpo_loss"](*logps, rewards, .4)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-9)
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, theirs)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_line_counts_in_the_file_map():
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"),
                      re.MULTILINE)
    lines = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in ROOT.glob("*.py")}
    assert {file: int(n) for file, n in rows} == lines, "put these numbers into the table \"The files\""


def test_folders_in_the_map():
    """README's map names every folder with Python files, and no other."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("| folder | what is in it |")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)/`", table))
    assert named >= {p.parent.name for p in ROOT.glob("*/*.py") if p.parent.name != "out"}
    assert all((ROOT / name).is_dir() for name in named)


def test_your_own_reward_works_as_printed(monkeypatch):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own reward")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    spec = re.search(r"--reward=(\S+)", section)[1]
    assert len(code.splitlines()) <= 10
    printed = {}
    exec(code, printed)
    monkeypatch.setattr(reward, "REWARDS", printed["REWARDS"])
    grey, red = torch.zeros(1, 3, 8, 8), torch.tensor([1., -1., -1.]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    known = {"judge": lambda images, prompts: torch.zeros(len(prompts))} | reward.REWARDS
    found = reward.weighted(spec, known)(torch.cat([grey, red]), ["a red circle"] * 2)
    assert found[0] == 0 and found[1] > .1


def test_quoted_intervals_are_those_of_the_report():
    report = (ROOT / "results/frontier.md").read_text(encoding="utf-8")
    quoted = 0
    for row in re.findall(r"^\| \(.*$", (ROOT / "docs/results.md").read_text(encoding="utf-8"), re.MULTILINE):
        claim = row.split()[1]
        lines = [line for line in report.splitlines() if line.startswith(f"| {claim} ")]
        for mean, interval in re.findall(r"([+-]\d\.\d+) (\[[^]]*\])", row):
            assert any(f"| {mean} [" in line and f"] {interval}, " in line for line in lines), claim + mean
            quoted += 1
    assert quoted >= 10
