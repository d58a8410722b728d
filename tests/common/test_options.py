"""python -m pytest tests/common/test_options.py          (and -m slow: 20 times as many, and real processes)

Options of all scripts under random command lines and config files. Whatever is typed ends in one of three
ways: a config that the script's own `check` takes, the text of --help, or a UserError that is one line.
"""
import ast
import contextlib
import dataclasses
import io
import math
import os
import subprocess
import sys
import tempfile
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import ablation
from lab import bench
from common import config
import evaluate
from lab import frontier
from common import images as pictures
import pretrain
import robustness
import sample
import train
from full import weights
from common.config import UserError

MODULES = {m.__name__: m for m in (
    train, sample, evaluate, pretrain, frontier, ablation, pictures, bench, weights)}
RANDOM = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
POSITIONAL = {"evaluate": "runs", "pictures": "runs"}
NASTY = ["", " ", "=", "True", "true", "None", "nan", "inf", "-inf", "1e999", "-1e999", "-1", "0", "1",
         "1.0", ".5", "1_0", "2e308", "0x10", "0x" + "f" * 20000, "9" * 5000, str(2 ** 63), str(-2 ** 70),
         "1j", "[1]", "(1,)", "{}", "{[]: 1}", "{1: {}}", "'a'", "b'a'", "...", "1 if 1 else 2",
         "__import__('os')", "-" * 3000 + "1", "(" * 3000, "[" * 90 + "]" * 90, "lambda: 0", "\\", "'",
         "\n", "a\nb", "\udcff", "\ud800", "é", "日本", "\u202e", "a" * 5000, "../..", "/dev/null", "/", "~",
         "*", "judge:nan", "judge:inf", "judge:", "reader", "js", "cuda", "none", ","]


def values(kind):
    """Texts for an option of this type: half of them right or nearly so."""
    right = {int: st.integers(-3, 300).map(str), float: st.floats(-1, 3).map(str)}.get(
        kind, st.sampled_from([*map(str, get_args(kind)), "True", "False", "x", "x.png", "x.pt", "x.gif"]))
    return right | st.sampled_from(NASTY) | st.text(max_size=8)


def arguments(module):
    """Command lines: options that there are, with and without a value, misspelt ones, and bare words."""
    kinds = {f.name: f.type for f in dataclasses.fields(module.Config)}
    names = st.sampled_from(sorted(kinds))
    known = names.flatmap(lambda key: values(kinds[key]).map(lambda value: f"--{key}={value}"))
    typed = st.tuples(names | st.text(max_size=6), st.sampled_from("-x_"), st.sampled_from(NASTY))
    words = st.sampled_from(["configs/tiny_js.py", "config/tiny_none.py", "configs/llamagen_js.py", "configs",
                             "--help", "-h", "--", "-", "no.py", "train.py", "assets/tiny_base.pt"])
    return st.lists(known | known | known | names.map("--{}".format) | words | st.text(max_size=6)
                    | typed.map(lambda t: f"--{t[0]}{t[1]}={t[2]}"), max_size=5)


def outcome(name, argv):
    """'help', the text of a UserError, or the config; whatever else happens is an error of the test."""
    module = MODULES[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cfg, _ = config.load(module.Config, argv, POSITIONAL.get(name))
            module.check(cfg)
    except UserError as error:
        assert str(error) and ("\n" not in str(error) or any("\n" in arg for arg in argv)), str(error)
        assert len(str(error)) < 1000 + sum(map(len, argv))
        return str(error)
    except SystemExit as end:
        assert end.code == 0 and {"--help", "-h"} & set(argv)
        return "help"
    for field in dataclasses.fields(cfg):                          # what is taken is of the promised types
        value = getattr(cfg, field.name)
        assert value in get_args(field.type) or type(value) is field.type
        assert not isinstance(value, float) or math.isfinite(value)
    return cfg


def again(cfg):
    """What `show` prints of a config is a config file that gives it again, whatever was typed."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "shown.py"), "w", encoding="utf-8") as file:
            file.write(config.show(cfg))
        assert type(cfg)(**config.read_file(type(cfg), file.name)) == cfg


def fuzz_lines(name, n, counts):
    @settings(RANDOM, max_examples=n)
    @given(arguments(MODULES[name]))
    def one(argv):
        end = outcome(name, argv)
        kind = "refused" if isinstance(end, str) else "taken"
        kind = "help" if end == "help" else kind
        counts[kind] = counts.get(kind, 0) + 1
        if kind == "taken":
            again(end)
    one()


LINES = st.tuples(
    st.sampled_from(sorted(f.name for f in dataclasses.fields(train.Config))) | st.text(max_size=5),
    st.sampled_from([" = ", "=", " ", ": int = ", " += ", " == "]),
    st.sampled_from(NASTY) | st.text(max_size=6) | st.integers().map(str) | st.floats().map(str)
    | st.text(max_size=6).map(repr) | st.sampled_from(["'js'", "True", "'\\0'", "'\\ud800'"])
).map("".join) | st.sampled_from([
    "like = 'configs/tiny_js.py'", "like = 3", "like = '/'", "like = '\\0'", "import os", "# x", "'''doc'''",
    "    seed = 1", "seed = 1; beta = 2", "a = b = 1", "seed, beta = 1, 2", "def f(): pass", "",
    "seed = open('x')", "seed = " + "-" * 5000 + "1", "seed = " + "(" * 5000, "seed = {[]: 1}",
    "\0", "\x0c", "\ufeffseed = 1"])
GOOD = st.sampled_from(config.show(train.Config(beta=1, seed=3, resume=True)).splitlines())


def fuzz_files(n, counts):
    @settings(RANDOM, max_examples=n)
    @given(st.lists(LINES | GOOD | GOOD | GOOD, max_size=4).map(
        lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")) | st.binary(max_size=30))
    def one(data):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "some.py")
            with open(path, "wb") as file:
                file.write(data)
            end = outcome("train", [path])
        kind = "refused" if isinstance(end, str) else "taken"
        counts[kind] = counts.get(kind, 0) + 1
    one()


@pytest.mark.parametrize("name", MODULES)
def test_any_command_line_ends_well(name):
    counts = {}
    fuzz_lines(name, 60, counts)
    assert sum(counts.values()) >= 60 and counts["refused"] > 10 and counts.get("taken", 0) > 0, counts


def test_any_config_file_ends_well():
    counts = {}
    fuzz_files(150, counts)
    assert counts["refused"] > 50 and counts["taken"] > 10, counts


# ---- what is said --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODULES)
def test_a_wrong_value_names_the_option_the_value_and_what_is_allowed(name):
    """For every option of every script."""
    for field in dataclasses.fields(MODULES[name].Config):
        if field.type is tuple:
            assert f"{field.name} are bare words" in outcome(name, [f"--{field.name}=x"])
            continue
        wrong, said, allowed = {
            int: ("1.5", "1.5", "a whole number"), float: ("much", "'much'", "a number"),
            bool: ("yes", "'yes'", "True or False"), str: ("a\0b", "'a\\x00b'", "a text")}.get(
            field.type, ("nonsense", "'nonsense'", ", ".join(map(str, get_args(field.type)))))
        text = outcome(name, [f"--{field.name}={wrong}"])
        assert all(part in text for part in (f" {field.name} must be", allowed, f"not {said}")), text


@pytest.mark.parametrize("name, argument, parts", [
    ("train", "--seed=-1", ["seed", "at least 0", "-1"]),
    ("train", f"--seed={2 ** 63}", ["seed", "64 bits", str(2 ** 63)]),
    ("train", "--max_steps=0x" + "f" * 9999, ["max_steps", "64 bits", "digits"]),
    ("train", "--beta=1e999", ["beta", "finite", "inf"]),
    ("train", "--beta=" + "9" * 400, ["beta", "finite", "inf"]),
    ("train", "--beta={[]: 1}", ["beta", "a number", "'{[]: 1}'"]),
    ("train", "--reward=judge:nan", ["judge", "number", "nan"]),
    ("train", "--out_dir=", ["out_dir", "file or folder", "''"]),
    ("train", "--micro_batch=0", ["micro_batch", "1", "0"]),
    ("sample", "--n=0", ["n must be at least 1", "0"]),
    ("sample", "--top_p=0", ["top_p", "above 0", "0.0"]),
    ("sample", "--cfg_scale=.5", ["cfg_scale", "at least 1", "0.5"]),
    ("sample", "--out=x.xyz", ["out", ".png", "'x.xyz'"]),
    ("sample", "--temperature=-.1", ["temperature", "at least 0", "-0.1"]),
    ("sample", "--top_k=-2", ["top_k", "-1", "-2"]),
    ("pretrain", "--scenes=1", ["scenes", "at least 2", "1"]),
    ("pretrain", "--wrong_captions=1.5", ["wrong_captions", "1", "1.5"]),
    ("pretrain", "--vq_lr=-1", ["vq_lr", "at least 0", "-1"]),
    ("pretrain", "--out=x", ["out", ".pt", "'x'"]),
    ("frontier", "--seeds=0", ["seeds", "at least 1", "0"]),
    ("frontier", "--seeds=2000", ["seeds", "at most 1000", "2000"]),
    ("frontier", "--minutes=-1", ["minutes", "at least 0", "-1"]),
    ("bench", "--repeats=0", ["repeats", "at least 1", "0"]),
    ("weights", "--convert=x", ["--convert", "--to=FILE.pt"]),
    ("weights", "--to=", ["to", "''"])])
def test_what_is_out_of_range_names_the_option_the_value_and_what_is_allowed(name, argument, parts):
    text = outcome(name, [argument])
    assert isinstance(text, str) and all(part in text for part in parts), text


def test_runs_want_names_and_right_ends():
    assert "name at least one run" in outcome("evaluate", [])
    assert "name at least one run" in outcome("pictures", [])
    assert "draws must be a multiple of 8, not 9" == outcome("evaluate", ["x", "--draws=9"])
    assert "picture must be the name of a file that ends in .png" in outcome("evaluate", ["x", "--picture=y"])
    assert "that ends in .gif, not 'a.mp4'" in outcome("pictures", ["x", "--out=a.mp4"])
    assert "--prompts=FILE and --save=FOLDER" in outcome("sample", ["--save=y"])       # together or not
    assert "--prompts=FILE and --save=FOLDER" in outcome("sample", ["--prompts=y"])


# ---- every option is used ------------------------------------------------------------------------------
def read_of(path, names):
    """Attributes that a file reads of a variable called one of `names`: cfg.x, and getattr(cfg, "x")."""
    with open(config.locate(path), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            out |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in names else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner, key = node.args[:2]
            if isinstance(owner, ast.Name) and owner.id in names and isinstance(key, ast.Constant):
                out.add(key.value)
    return out


# Where a script's config goes besides its own file.
USERS = {"train": ["options", "evaluate", "runs", "grpo", "vapi", "tiny", "llamagen"], "sample": ["llamagen"],
         "frontier": ["sweep"], "ablation": ["sweep"]}


@pytest.mark.parametrize("name", MODULES)
def test_every_option_is_read_somewhere(name):
    fields = {f.name for f in dataclasses.fields(MODULES[name].Config)}
    files = [name, *USERS.get(name, [])]
    read = set().union(*(read_of(f"{file}.py", {"cfg", "options", "o"}) for file in files))
    assert fields <= read, f"never read: {fields - read}"


def test_an_option_that_nothing_reads_is_noticed(tmp_path):
    (tmp_path / "some.py").write_text("cfg.a\ncfg.b = 1\nother.c\ngetattr(cfg, 'd')\n'cfg.e'\n")
    assert read_of(str(tmp_path / "some.py"), {"cfg"}) == {"a", "d"}


# ---- real processes ------------------------------------------------------------------------------------
PROCESSES = [                                  # (words, a part of the one line)
    ("frontier.py --seeds=0", "seeds must be"),
    ("frontier.py --csv=results/ablation.csv --only=figures", "not a csv of this"),
    ("frontier.py --device=auto", "cuda, mps, cpu"),
    ("frontier.py --minutes=nan", "minutes must be a number"),
    ("train.py --out_dir=DIR --beta=1e999", "beta must be a number"),
    ("train.py configs", "no config file"), ("train.py --out_dir=DIR --init_from=FOLDER", "no file"),
    ("train.py --out_dir=FULL", "holds a run already"),
    ("train.py --out_dir=DIR --resume", "nothing to resume"),
    ("train.py --out_dir=BROKEN --resume", "damaged"),
    ("train.py --out_dir=DIR --world=llamagen --reward=hps --heldout_reward=clipscore --weights=DIR",
     "files are missing"),
    ("train.py --out_dir=DIR --init_from=assets/prompts.txt", "damaged"),
    ("train.py --seed=0x" + "f" * 9000, "seed"), ("sample.py --n=0", "n must be"),
    ("sample.py --ckpt=BROKEN", "damaged"), ("sample.py --prompt=;", "prompt is empty"),
    ("sample.py --out=x.xyz", ".png"),
    ("sample.py --gpt_ckpt=README.md --weights=DIR", "1 of 2 files are missing"),
    ("sample.py --prompt=\udcff", "no word"), ("evaluate.py", "name at least one run"),
    ("evaluate.py BROKEN", "damaged"), ("evaluate.py assets/tiny_base.pt", "is a base"),
    ("evaluate.py x --runs=y", "bare words"), ("pretrain.py --scenes=0", "scenes must be"),
    ("pretrain.py --vq_lr={[]:1}", "vq_lr must be"), ("pictures.py", "name at least one run"),
    ("pictures.py BROKEN DIR", "a film needs two"), ("pictures.py DIR --out=film", ".gif"),
    ("bench.py --repeats=0", "repeats must be"), ("bench.py --only=all_", "one of"),
    ("weights.py --convert=README.md --to=FOLDER/x.pt", "damaged"),
    ("weights.py --export=BROKEN/ckpt.pt --to=FOLDER/x.pt", "damaged"),
    ("weights.py --export=assets/tiny_base.pt --to=FOLDER/x.pt", "no checkpoint of a run")]


def run(words, part, tmp_path):
    """The process must end with exit code 2 and one line on stderr (a list of missing files has more)."""
    for name in ("FOLDER", "FULL", "BROKEN"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "FULL" / "x").write_text("x")
    (tmp_path / "BROKEN" / "ckpt.pt").write_bytes(b"PK\3\4 half of it")
    for name in ("FOLDER", "FULL", "BROKEN", "DIR"):
        words = words.replace(name, str(tmp_path / name))
    script, *words = words.split(" ")
    done = subprocess.run([sys.executable, config.locate(script), *words], capture_output=True, text=True,
                          cwd=config.locate("."), timeout=120, errors="surrogateescape",
                          env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [x for x in done.stderr.splitlines() if x.strip() and "|" not in x]     # bars have a |
    assert lines[0].startswith("error: ") and part in lines[0], done.stderr
    assert len(lines) == 1 or "missing" in lines[0], done.stderr


@pytest.mark.parametrize("words, part", PROCESSES[:2])
def test_processes_end_in_one_line_and_exit_code_2(words, part, tmp_path):
    run(words, part, tmp_path)


@pytest.mark.slow
def test_table_of_lines():
    """Rows of results/robustness.md: thousands of command lines and config files."""
    for name in MODULES:
        counts = {}
        fuzz_lines(name, 1200, counts)
        robustness.record(f"options: any command line of {name}.py", sum(counts.values()), counts["refused"],
                          counts.get("taken", 0) + counts.get("help", 0))
    counts = {}
    fuzz_files(3000, counts)
    robustness.record("options: any config file", sum(counts.values()), counts["refused"], counts["taken"])


@pytest.mark.slow
def test_table_of_processes(tmp_path):
    """A row of results/robustness.md: every process of the list."""
    for words, part in PROCESSES:
        run(words, part, tmp_path)
    robustness.record("options: a real process, exit code 2", len(PROCESSES), len(PROCESSES))
