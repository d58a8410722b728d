"""Options of every script: defaults, then a config file, then `--key=value`. The last word wins.

    python train.py configs/tiny_js.py --beta=0.2 --resume        (a bool may stand without a value)
    python train.py --help                                        the options that every run has
    python train.py configs/tiny_js.py --help                     and those that this config needs

Options are fields of dataclasses, made by `option`. Each dataclass stands beside the code that reads it and
is a *part*. `compose` joins the parts that a run needs, so an option that means nothing to a run is unknown
to it.

A config file holds `key = value` lines and nothing else. It is parsed, not run. With a first line
`like = "configs/other.py"` it states only how it differs from the other file. Unknown keys are refused in
files as on the command line, and types are checked. (nanoGPT checks only the command line, so a typo in a
file is ignored there.)
"""
import ast
import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import time
from typing import Literal, get_args, get_origin

RENAMED = {"chunk": "logit_chunk"}          # options that had another name in older configs and checkpoints


class UserError(ValueError):
    """Invalid input, which the user can fix. `run` prints one line and exits with code 2."""


class Fault(RuntimeError):
    """A failure at run time, with a message for people. `run` prints one line and exits with code 1."""


# ---- what an option is -------------------------------------------------------------------------------------
def option(default, text, low=None, high=None, ending=None):
    """Make a dataclass field. text: for --help. low, high: the range. ending: of the name of a file."""
    return dataclasses.field(default=default, metadata=dict(help=text, low=low, high=high, ending=ending))


@functools.cache                            # the same parts make the same class, so that configs compare
def compose(*parts):
    """Make one dataclass with the options of all parts, in their order."""
    return dataclasses.dataclass(frozen=True)(type("Config", parts[::-1], {}))


def parts_of(cls):
    """Return the dataclasses that hold the options of `cls`: what `compose` got, or `cls` itself."""
    return [part for part in cls.__mro__[::-1] if part.__dict__.get("__annotations__")]


def fields(cls):
    return {field.name: field for field in dataclasses.fields(cls)}


KINDS = {int: "a whole number (of at most 64 bits)", float: "a finite number", bool: "True or False",
         tuple: "a tuple", str: "a text of printable characters"}


def _shown(value):
    try:
        return " ".join(repr(value).split())[:200]
    except ValueError:                            # Python refuses to print integers of thousands of digits
        return "a number with too many digits"


def _checked(cls, key, value, where):
    """Return the value in the type of the option. UserError names the option, the value, what is allowed."""
    known = fields(cls)
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them all"
        raise UserError(f"{where}: there is no option {key!r} for this run; {hint}")
    kind = known[key].type
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 10 ** 300 else math.inf
    allowed = (value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind
               and (kind is not float or math.isfinite(value)) and (kind is not int or abs(value) < 2 ** 63)
               and (kind is not str or value.isprintable()))
    if not allowed:
        allowed = KINDS.get(kind) or "one of " + ", ".join(map(str, get_args(kind)))
        raise UserError(f"{where}: {key} must be {allowed}, got {_shown(value)}")
    return value


def validate(cfg):
    """Raise UserError for a value out of the range of its option, or for what a part's `check` refuses."""
    for name, field in fields(type(cfg)).items():
        value, limits = getattr(cfg, name), field.metadata
        if limits.get("low") is not None and value < limits["low"]:
            raise UserError(f"--{name} must be at least {limits['low']}, got {value}")
        if limits.get("high") is not None and value > limits["high"]:
            raise UserError(f"--{name} must be at most {limits['high']}, got {value}")
        ending = limits.get("ending")
        if ending is not None and (not value or not value.lower().endswith(ending)):
            kind = f"file that ends in {ending}" if ending else "file or folder"
            raise UserError(f"--{name} must be the name of a {kind}, got {value!r}")
    for part in parts_of(type(cfg)):
        if "check" in part.__dict__:
            part.check(cfg)


# ---- config files and the command line ---------------------------------------------------------------------
def locate(path):
    """Return a path, of a file here or else in the folder of this project: scripts run from anywhere."""
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def find(path):
    """Return the path of a config file. config/NAME.py also finds configs/NAME.py: people write both."""
    for candidate in (locate(path), locate(re.sub(r"^config/", "configs/", path))):
        if os.path.isfile(candidate):
            return candidate
    names = [n.removesuffix(".py") for n in sorted(os.listdir(locate("configs"))) if n.endswith(".py")]
    near = difflib.get_close_matches(os.path.basename(path).removesuffix(".py"), names, 1)
    raise UserError(f"no config file {path!r:.99}; " + (
        f"did you mean configs/{near[0]}.py?" if near else f"in configs/ there are: {', '.join(names)}"))


def read_file(path, depth=0):
    """Read a config file -> {key: (value, place)}. depth: how many files led to this one by `like`."""
    try:
        with open(path, encoding="utf-8-sig") as file:          # -sig: Windows may put a mark at the start
            tree = ast.parse(file.read())
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise UserError(f"{path}: not a config file of `key = value` lines ({error})") from None
    out = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):              # a docstring
            continue
        where = f"{path}, line {node.lineno}"
        try:
            (target,) = node.targets
            key, value = target.id, ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError, MemoryError, RecursionError):
            raise UserError(f"{where}: only `key = value` lines with plain values are allowed here") from None
        if key == "like":
            if out or not isinstance(value, str) or depth > 4:
                raise UserError(f"{where}: `like` must be the first line, must name one file, and must not "
                                f"lead in a circle")
            out |= read_file(find(value), depth + 1)
        else:
            out[RENAMED.get(key, key)] = value, where
    return out


def _parse(kind, text):
    """Read the text after `--key=`: a number or a bool as Python reads it, a text as it stands."""
    if kind is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text                                        # _checked says what is wrong with it


def load(choose, argv, positional=None):
    """Read the command line -> (config, {key: value} of what it and its config file set). Raises UserError.

    choose: a dataclass of options, or a function {key: value} -> such a dataclass, which looks at the options
    that decide which parts a run needs. argv: the words behind the script's name. A word without dashes is a
    config file, or, if `positional` names an option, a value of that option, which is a tuple. Exits after
    --help.
    """
    given, from_cli, words, wants_help = {}, {}, [], False
    for arg in argv:
        if arg in ("--help", "-h"):
            wants_help = True
        elif arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            from_cli[RENAMED.get(key, key)] = text if equals else None
        elif arg.startswith("-"):
            raise UserError(f"options start with two dashes: -{arg:.99}")
        elif positional:
            words.append(arg)
        else:
            given |= read_file(find(arg))
    known = {key: value for key, (value, _) in given.items()} | from_cli
    cls = choose if isinstance(choose, type) else choose(known)
    if wants_help:
        print(help_text(cls))
        raise SystemExit(0)
    values = {key: _checked(cls, key, value, where) for key, (value, where) in given.items()}
    chosen = {}
    for key, text in from_cli.items():
        kind = fields(cls)[key].type if key in fields(cls) else None
        if key == positional:
            raise UserError(f"{key} are words without dashes, not --{key}=")
        if text is None and kind not in (bool, None):
            raise UserError(f"--{key} needs a value: --{key}=...")
        chosen[key] = _checked(cls, key, True if text is None else _parse(kind, text), "command line")
    if words:
        chosen[positional] = tuple(words)
    cfg = cls(**values | chosen)
    validate(cfg)
    return cfg, values | chosen


def restore(choose, stored, where):
    """Return the config that a checkpoint keeps as {key: value}, each value checked. Raises UserError.

    Checkpoints from before options had parts hold the options of all worlds. Others hold an option that is a
    constant now. What this run does not need is dropped, unless its value would change the run.
    """
    if not isinstance(stored, dict):
        raise UserError(f"{where} keeps no options: it is another kind of file, or of another version")
    stored = {RENAMED.get(str(key), str(key)): value for key, value in stored.items()}
    cls = choose if isinstance(choose, type) else choose(stored)
    gone = [k for k in stored if k not in fields(cls) and ("top_k" in stored or hasattr(cls, k))]
    for key in gone:
        if hasattr(cls, key) and _shown(stored[key]) != _shown(getattr(cls, key)):
            raise UserError(f"{where}: this version has no option {key!r} for such a run, "
                            f"and it was {_shown(stored[key])}")
    known = {k: v for k, v in stored.items() if k not in gone}
    cfg = cls(**{key: _checked(cls, key, value, where) for key, value in known.items()})
    try:
        validate(cfg)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return cfg


# ---- what is printed ---------------------------------------------------------------------------------------
def help_text(cls):
    """Return the script's docstring, then every option with its default and help text, part by part."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip(), "", "Options (--key=value):"]
    for part in parts_of(cls):
        if part.__doc__.startswith("----"):                # a heading; otherwise Python made the docstring
            lines.append(f" {part.__doc__.splitlines()[0]}")
        for name in part.__annotations__:
            field = fields(cls)[name]
            lines.append(f"  --{name + '=' + repr(field.default):30s} {field.metadata.get('help', '')}")
    return "\n".join(lines)


def show(cfg):
    """Return the whole config, as a config file that gives it again."""
    return "\n".join(f"{name} = {getattr(cfg, name)!r}" for name in fields(type(cfg)))


def changed(cfg):
    """Return the options that differ from their defaults, as lines of a config file."""
    return "\n".join(line for line, field in zip(show(cfg).split("\n"), dataclasses.fields(cfg))
                     if getattr(cfg, field.name) != field.default)


def _short(text, most=300):
    """Cut a long line in the middle. The list of missing files has a line for each, and stays as it is."""
    return text if len(text) <= most or "\n" in text else f"{text[:most - 100]} ... {text[-95:]}"


def run(main):
    """Run a script's main(argv). Errors become one line: exit code 2 for invalid input, 1 at run time."""
    for stream in (sys.stdout, sys.stderr):       # a terminal that has no ± must not end a finished run
        stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (UserError, Fault, OSError) as error:
        if os.environ.get("RANK", "0") != "0":    # torchrun: rank 0 says it, and its end is the end of all
            time.sleep(2)
        print(f"error: {_short(str(error))}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise                                 # a bug: its traceback helps
        print("error: out of memory. Hold less at once. train.py: lower --micro_batch, set --sample_batch "
              "and --logit_chunk, or add --recompute. evaluate.py: lower --draws. sample.py: lower --n.",
              file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(1) from None
