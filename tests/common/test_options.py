"""Run: python -m pytest tests/common/test_options.py      (-m slow: 20 times as many, and real processes)

Options of all scripts under random command lines and config files. Whatever is typed ends in one of three
ways: a config whose values are valid, the text of --help, or a UserError of one line.
"""
import ast
import contextlib
import dataclasses
import glob
import io
import itertools
import math
import os
import subprocess
import sys
import tempfile
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import pretrain
import robustness
import sample
from common import config
from common.config import UserError
from full import weights
from lab import ablation, bench, figures, frontier

SCRIPTS = {"train.py": evaluate.options, "sample.py": sample.Config, "evaluate.py": evaluate.Config,
           "pretrain.py": pretrain.Config, "lab.frontier": frontier.Config, "lab.ablation": ablation.Config,
           "lab.bench": bench.Config, "lab.figures": figures.Config, "full.weights": weights.Config}
KINDS = [(f"--world={world}", f"--algorithm={algorithm}")                # of runs, with different options
         for world, algorithm in [
             *itertools.product(("tiny", "llamagen", "janus"), ("grpo", "vapi", "rejection")),
             ("tiny_flow", "grpo"), ("sd3", "grpo")]]


def kinds(name):
    """Return [(words, the dataclass of options)]: with these words, a script has these options."""
    choose = SCRIPTS[name]
    return [((), choose)] if isinstance(choose, type) else [
        (words, choose(dict(word[2:].split("=") for word in words))) for words in KINDS]


def fields(name):
    """Return {name of an option: field} of all options that a script may have."""
    return {field.name: field for _, cls in kinds(name) for field in dataclasses.fields(cls)}


RANDOM = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
POSITIONAL = {"evaluate.py": "runs", "lab.figures": "runs"}
NASTY = ["", " ", "=", "True", "true", "None", "nan", "inf", "-inf", "1e999", "-1e999", "-1", "0", "1",
         "1.0", ".5", "1_0", "2e308", "0x10", "0x" + "f" * 20000, "9" * 5000, str(2 ** 63), str(-2 ** 70),
         "1j", "[1]", "(1,)", "{}", "{[]: 1}", "{1: {}}", "'a'", "b'a'", "...", "1 if 1 else 2",
         "__import__('os')", "-" * 3000 + "1", "(" * 3000, "[" * 90 + "]" * 90, "lambda: 0", "\\", "'",
         "\n", "a\nb", "\udcff", "\ud800", "é", "日本", "\u202e", "a" * 5000, "../..", "/dev/null", "/", "~",
         "*", "judge:nan", "judge:inf", "judge:", "reader", "js", "cuda", "none", ","]


def values(kind):
    """Return texts for an option of this type. About half of them are valid, or nearly valid."""
    right = {int: st.integers(-3, 300).map(str), float: st.floats(-1, 3).map(str)}.get(
        kind, st.sampled_from([*map(str, get_args(kind)), "True", "False", "x", "x.png", "x.pt", "x.gif"]))
    return right | st.sampled_from(NASTY) | st.text(max_size=8)


def arguments(name):
    """Return command lines: options with and without a value, misspelt options, and words without dashes."""
    types = {key: field.type for key, field in fields(name).items()}
    names = st.sampled_from(sorted(types))
    known = names.flatmap(lambda key: values(types[key]).map(lambda value: f"--{key}={value}"))
    typed = st.tuples(names | st.text(max_size=6), st.sampled_from("-x_"), st.sampled_from(NASTY))
    words = st.sampled_from(["configs/tiny_js.py", "config/tiny_none.py", "configs/llamagen_js.py", "configs",
                             "--help", "-h", "--", "-", "no.py", "train.py", "assets/tiny_base.pt"])
    return st.lists(known | known | known | names.map("--{}".format) | words | st.text(max_size=6)
                    | typed.map(lambda t: f"--{t[0]}{t[1]}={t[2]}"), max_size=5)


def outcome(name, argv):
    """Return the config, "help", or the text of a UserError. Anything else that happens fails the test."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cfg, _ = config.load(SCRIPTS[name], argv, POSITIONAL.get(name))
    except UserError as error:
        assert str(error) and ("\n" not in str(error) or any("\n" in arg for arg in argv)), str(error)
        assert len(str(error)) < 1000 + sum(map(len, argv))
        return str(error)
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & set(argv)
        return "help"
    for field in dataclasses.fields(cfg):                          # every value has the type of its option
        value = getattr(cfg, field.name)
        assert value in get_args(field.type) or type(value) is field.type
        assert not isinstance(value, float) or math.isfinite(value)
    return cfg


def again(name, cfg):
    """Check that what `show` prints is a config file that gives the same config, whatever was typed."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "shown.py"), "w", encoding="utf-8") as file:
            file.write(config.show(cfg))
        if name in POSITIONAL:                                 # words without dashes are no config files
            assert type(cfg)(**{key: value for key, (value, _) in config.read_file(file.name).items()}) == cfg
        else:
            assert config.load(SCRIPTS[name], [file.name])[0] == cfg


def fuzz_lines(name, n, counts):
    @settings(RANDOM, max_examples=n)
    @given(arguments(name))
    def one(argv):
        end = outcome(name, argv)
        kind = "refused" if isinstance(end, str) else "taken"
        kind = "help" if end == "help" else kind
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "taken":
            again(name, end)
    one()


LINES = st.tuples(
    st.sampled_from(sorted(fields("train.py"))) | st.text(max_size=5),
    st.sampled_from([" = ", "=", " ", ": int = ", " += ", " == "]),
    st.sampled_from(NASTY) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)
    | st.text(max_size=6).map(repr) | st.sampled_from(["'js'", "True", "'\\0'", "'\\ud800'"])
).map("".join) | st.sampled_from([
    "like = 'configs/tiny_js.py'", "like = 3", "like = '/'", "like = '\\0'", "import os", "# x", "'''doc'''",
    "    seed = 1", "seed = 1; beta = 2", "a = b = 1", "seed, beta = 1, 2", "def f(): pass", "",
    "seed = open('x')", "seed = " + "-" * 5000 + "1", "seed = " + "(" * 5000, "seed = {[]: 1}",
    "\0", "\x0c", "\ufeffseed = 1"])
GOOD = st.sampled_from(config.show(evaluate.options({})(beta=1.0, seed=3, resume=True)).splitlines())


def fuzz_files(n, counts):
    @settings(RANDOM, max_examples=n)
    @given(st.lists(LINES | GOOD | GOOD | GOOD, max_size=4).map(
        lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
    def one(data):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "some.py")
            with open(path, "wb") as file:
                file.write(data)
            end = outcome("train.py", [path])
        kind = "refused" if isinstance(end, str) else "taken"
        counts[kind] = counts.get(kind, 0) + 1
    one()


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_command_line_ends_well(name):
    counts = {}
    fuzz_lines(name, 60, counts)
    assert sum(counts.values()) >= 60 and counts["refused"] > 10 and counts.get("taken", 0) > 0, counts


def test_any_config_file_ends_well():
    counts = {}
    fuzz_files(150, counts)
    assert counts["refused"] > 50 and counts["taken"] > 10, counts


# ---- error messages -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_value_names_the_option_the_value_and_what_is_allowed(name):
    """For every option of every script, in every kind of run."""
    for words, cls in kinds(name):
        for field in dataclasses.fields(cls):
            if field.type is tuple:
                said = "are words without dashes" if field.name == POSITIONAL.get(name) else "must be a tuple"
                assert f"{field.name} {said}" in outcome(name, [*words, f"--{field.name}=x"])
                continue
            wrong, said, allowed = {
                int: ("1.5", "1.5", "a whole number"), float: ("much", "'much'", "a finite number"),
                bool: ("yes", "'yes'", "True or False"), str: ("a\0b", "'a\\x00b'", "a text")}.get(
                field.type, ("nonsense", "'nonsense'", ", ".join(map(str, get_args(field.type)))))
            text = outcome(name, [*words, f"--{field.name}={wrong}"])
            assert all(part in text for part in (f" {field.name} must be", allowed, f"got {said}")), text


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_unknown_option_names_the_nearest_one(name):
    for words, cls in kinds(name):
        for field in dataclasses.fields(cls):
            text = outcome(name, [*words, f"--{field.name}x=1"])
            assert f"no option '{field.name}x'" in text and f"did you mean '{field.name}'?" in text


def test_a_run_knows_only_the_options_that_it_needs():
    counts = {" ".join(words): len(dataclasses.fields(cls)) for words, cls in kinds("train.py")}
    print("\n".join(f"{n} options: {words}" for words, n in counts.items()))
    assert counts["--world=tiny --algorithm=grpo"] <= 40
    for words, key in itertools.product(KINDS, ("gpt_ckpt", "init_from", "score_cfg", "context_noise", "data",
                                                "wrong_captions")):
        tiny, vapi, tokens = "tiny" in words[0], "vapi" in words[1], words[0][8:] in ("llamagen", "janus")
        needed = {"gpt_ckpt": not tiny, "init_from": tiny, "score_cfg": tokens and "grpo" in words[1],
                  "context_noise": vapi, "data": vapi and not tiny, "wrong_captions": vapi and tiny}[key]
        said = str(outcome("train.py", [*words, f"--{key}=7"]))
        assert (f"no option {key!r} for this run" in said) != needed


@pytest.mark.parametrize("name, argument, parts", [
    ("train.py", "--seed=-1", ["--seed must be at least 0, got -1"]),
    ("train.py", f"--seed={2 ** 63}", ["seed", "at most 64 bits", str(2 ** 63)]),
    ("train.py", "--max_steps=0x" + "f" * 9999, ["max_steps", "64 bits", "digits"]),
    ("train.py", "--beta=1e999", ["beta", "finite", "inf"]),
    ("train.py", "--beta=" + "9" * 400, ["beta", "finite", "inf"]),
    ("train.py", "--beta={[]: 1}", ["beta", "a finite number", "'{[]: 1}'"]),
    ("train.py", "--reward=judge:nan", ["judge", "number", "nan"]),
    ("train.py", "--out_dir=", ["out_dir", "file or folder", "''"]),
    ("train.py", "--micro_batch=0", ["micro_batch", "1", "0"]),
    ("sample.py", "--n=0", ["n must be at least 1", "0"]),
    ("sample.py", "--top_p=0", ["top_p", "above 0", "0.0"]),
    ("sample.py", "--cfg_scale=.5", ["cfg_scale", "at least 1", "0.5"]),
    ("sample.py", "--out=x.xyz", ["out", ".png", "'x.xyz'"]),
    ("sample.py", "--temperature=-.1", ["temperature", "at least 0", "-0.1"]),
    ("sample.py", "--top_k=-2", ["top_k", "-1", "-2"]),
    ("pretrain.py", "--scenes=1", ["scenes", "at least 2", "1"]),
    ("pretrain.py", "--wrong_captions=1.5", ["wrong_captions", "1", "1.5"]),
    ("pretrain.py", "--vq_lr=-1", ["vq_lr", "at least 0", "-1"]),
    ("pretrain.py", "--out=x", ["out", ".pt", "'x'"]),
    ("lab.frontier", "--seeds=0", ["seeds", "at least 1", "0"]),
    ("lab.frontier", "--seeds=2000", ["seeds", "at most 1000", "2000"]),
    ("lab.frontier", "--minutes=-1", ["minutes", "at least 0", "-1"]),
    ("lab.bench", "--repeats=0", ["repeats", "at least 1", "0"]),
    ("full.weights", "--convert=x", ["--convert", "--to=FILE.pt"]),
    ("full.weights", "--to=", ["to", "''"])])
def test_what_is_out_of_range_names_the_option_the_value_and_what_is_allowed(name, argument, parts):
    text = outcome(name, [argument])
    assert isinstance(text, str) and all(part in text for part in parts), text


def test_scripts_need_names_of_runs_and_the_right_endings():
    assert "name at least one run" in outcome("evaluate.py", [])
    assert "--draws must be a multiple of 8, got 9" == outcome("evaluate.py", ["x", "--draws=9"])
    assert ("--picture must be the name of a file that ends in .png, got 'y'"
            == outcome("evaluate.py", ["x", "--picture=y"]))
    assert "--prompts=FILE and --save=FOLDER" in outcome("sample.py", ["--save=y"])       # together or not
    assert "--prompts=FILE and --save=FOLDER" in outcome("sample.py", ["--prompts=y"])


# ---- every option is read ------------------------------------------------------------------------------
def read_of(path):
    """Return the options that a file reads: cfg.x, o.x, options.x, self.cfg.x and getattr(cfg, "x"). Reads in
    a function `check` do not count, because an option that is only checked has no effect."""
    def is_config(node):
        return (getattr(node, "id", None) in ("cfg", "o", "options", "own")
                or getattr(node, "attr", None) == "cfg")

    def visit(node):
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            return set()
        out = set().union(*map(visit, ast.iter_child_nodes(node)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_config(node.value):
            out.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            out |= {getattr(node.args[1], "value", "")} if is_config(node.args[0]) else set()
        return out
    with open(config.locate(path), encoding="utf-8") as file:
        return visit(ast.parse(file.read()))


def users(name):
    """Return the files that read the options of a script."""
    full = glob.glob("full/*.py", root_dir=config.locate("."))
    if name == "train.py":
        return ["train.py", "evaluate.py", "vapi.py", "rejection.py", "flow.py", "tiny/world.py",
                "common/run.py", "common/folder.py", *full]
    if name.endswith(".py"):
        return [name] + full * (name == "sample.py")
    return [name.replace(".", "/") + ".py"] + ["lab/sweep.py"] * name.startswith("lab.")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_read_somewhere(name):
    read = set().union(*map(read_of, users(name)))
    assert set(fields(name)) <= read, f"never read: {set(fields(name)) - read}"


def test_an_option_that_nothing_reads_is_noticed(tmp_path):
    (tmp_path / "some.py").write_text("cfg.a\ncfg.b = 1\nother.c\ngetattr(cfg, 'd')\n'cfg.e'\nself.cfg.f\n"
                                      "def check(cfg):\n    return cfg.g\n")
    assert read_of(str(tmp_path / "some.py")) == {"a", "d", "f"}


# ---- real processes ------------------------------------------------------------------------------------
PROCESSES = [                                  # (words, a part of the one line)
    ("lab.frontier --seeds=0", "seeds must be"),
    ("lab.frontier --csv=results/ablation.csv --only=figures", "not a csv of this"),
    ("lab.frontier --device=auto", "cuda, mps, cpu"),
    ("lab.frontier --minutes=nan", "minutes must be a finite number"),
    ("train.py --out_dir=DIR --beta=1e999", "beta must be a finite number"),
    ("train.py configs", "no config file"), ("train.py --out_dir=DIR --init_from=FOLDER", "no file"),
    ("train.py --out_dir=FULL", "but no ckpt.pt to resume"),
    ("train.py --out_dir=DIR --resume", "nothing to resume"),
    ("train.py --out_dir=BROKEN --resume", "damaged"),
    ("train.py --out_dir=DIR --world=llamagen --reward=hps --heldout_reward=clipscore --weights=DIR",
     "files are missing"),
    ("train.py --out_dir=DIR --init_from=assets/prompts.txt", "damaged"),
    ("train.py --seed=0x" + "f" * 9000, "seed"), ("sample.py --n=0", "n must be"),
    ("sample.py --ckpt=BROKEN", "damaged"), ("sample.py --prompt=;", "prompt is empty"),
    ("sample.py --out=x.xyz", ".png"),
    ("sample.py --gpt_ckpt=README.md --weights=DIR", "1 of 2 files are missing"),
    ("sample.py --prompt=\udcff", "printable characters"), ("evaluate.py", "name at least one run"),
    ("train.py -beta=0.1", "two dashes"), ("train.py tiny_js", "did you mean configs/tiny_js.py?"),
    ("train.py --out_dir=DIR --shard", "only one process"), ("sample.py --world=janus", "would be ignored"),
    ("pretrain.py --out=assets/tiny_base.pt", "add --overwrite"),
    ("evaluate.py BROKEN", "damaged"), ("evaluate.py assets/tiny_base.pt", "is a base"),
    ("evaluate.py x --runs=y", "words without dashes"), ("pretrain.py --scenes=0", "scenes must be"),
    ("pretrain.py --vq_lr={[]:1}", "vq_lr must be"), ("lab.figures BROKEN DIR", "a film needs two"),
    ("lab.figures DIR --demo", "--demo takes no runs"),
    ("lab.bench --repeats=0", "repeats must be"), ("lab.bench --only=all_", "one of"),
    ("full.weights --convert=README.md --to=FOLDER/x.pt", "damaged"),
    ("full.weights --export=BROKEN/ckpt.pt --to=FOLDER/x.pt", "damaged"),
    ("full.weights --export=assets/tiny_base.pt --to=FOLDER/x.pt", "no checkpoint of a run")]


def run(words, part, tmp_path):
    """Check that the process ends with exit code 2 and one line on stderr, or a list of missing files."""
    for name in ("FOLDER", "FULL", "BROKEN"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "FULL" / "x").write_text("x")
    (tmp_path / "BROKEN" / "ckpt.pt").write_bytes(b"PK\3\4 half of it")
    for name in ("FOLDER", "FULL", "BROKEN", "DIR"):
        words = words.replace(name, str(tmp_path / name))
    script, *words = words.split(" ")
    script = [script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run([sys.executable, *script, *words], capture_output=True, text=True,
                          cwd=config.locate("."), timeout=120, errors="surrogateescape",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.strip() and "|" not in x]     # progress bars have a |
    assert lines[0].startswith("error: ") and part in lines[0], done.stderr
    assert len(lines) == 1 or "missing" in lines[0], done.stderr


@pytest.mark.parametrize("words, part", PROCESSES[:2])
def test_processes_end_in_one_line_and_exit_code_2(words, part, tmp_path):
    run(words, part, tmp_path)


@pytest.mark.slow
def test_table_of_lines():
    """Write rows of results/robustness.md: thousands of command lines and config files."""
    for name in SCRIPTS:
        counts = {}
        fuzz_lines(name, 1200, counts)
        robustness.record(f"options: any command line of {name}", sum(counts.values()), counts["refused"],
                          counts.get("taken", 0) + counts.get("help", 0))
    counts = {}
    fuzz_files(3000, counts)
    robustness.record("options: any config file", sum(counts.values()), counts["refused"], counts["taken"])


@pytest.mark.slow
def test_table_of_processes(tmp_path):
    """Write a row of results/robustness.md: every process of the list."""
    for words, part in PROCESSES:
        run(words, part, tmp_path)
    robustness.record("options: a real process, exit code 2", len(PROCESSES), len(PROCESSES))
