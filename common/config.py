"""Options of every script: a dataclass of defaults, a config file, then `--key=value`; the last word wins.

    python train.py configs/tiny_js.py --beta=0.2 --resume        (a bool may stand bare)
    python train.py --help

The defaults are the fields of a dataclass in the script itself, one line each with a comment, and `--help`
prints those lines. A config file holds `key = value` lines and nothing else; it is parsed, not run. With a
line `like = "configs/other.py"` it says only in what it differs from another one. Unknown keys are refused in
files as on the command line (nanoGPT checks the latter only, so a typo in a file costs a run), types are
checked, and an int is fine where a float is wanted.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
from typing import Literal, get_args, get_origin


class UserError(ValueError):
    """Something the user can mend. `run` prints its one line and exits with code 2, without a traceback."""


class Fault(RuntimeError):
    """Something that went wrong on the way, with a message for people. `run` prints it, with exit code 1."""


def _expected(kind):
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number (of 64 bits)", float: "a number (finite)", bool: "True or False",
            tuple: "a tuple", str: "a text (one that can name a file)"}[kind]


def _is_text(value):
    """Is it one that can be the name of a file? Half a surrogate pair and a zero byte cannot."""
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _check(cls, key, value, where):
    """The value in the type of the field, or UserError naming the option, the value and what is allowed."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if key not in fields:
        near = difflib.get_close_matches(key, fields, 1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists them all"
        raise UserError(f"{where}: there is no option {key!r}; {hint}")
    kind = fields[key]
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2 ** 1000 else math.inf
    right = (value in get_args(kind) if get_origin(kind) is Literal else type(value) is kind
             and (kind is not float or math.isfinite(value)) and (kind is not int or abs(value) < 2 ** 63)
             and (kind is not str or _is_text(value)))
    if not right:
        try:
            said = " ".join(repr(value).split())[:200]
        except ValueError:
            said = "a number of so many digits"    # Python refuses to write thousands of them
        raise UserError(f"{where}: {key} must be {_expected(kind)}, not {said}")
    return value


def restore(cls, stored, where):
    """The config that a checkpoint keeps as {key: value}, each value checked. Raises UserError."""
    if not isinstance(stored, dict):
        raise UserError(f"{where} keeps no options: it is another kind of file, or of another version")
    return cls(**{key: _check(cls, str(key), value, where) for key, value in stored.items()})


def find(path):
    """The config file meant by `path`: config/NAME.py finds configs/NAME.py too, as people write both."""
    for candidate in (locate(path), locate(re.sub(r"^config/", "configs/", path))):
        if os.path.isfile(candidate):
            return candidate
    names = sorted(n for n in os.listdir(locate("configs")) if n.endswith(".py"))
    raise UserError(f"no config file {path!r}; there are: " + ", ".join("configs/" + n for n in names))


def read_file(cls, path, depth=0):
    """{key: checked value} of a config file: a Python file of only `key = literal` lines and comments.
    depth: how many files led here by `like`."""
    try:
        with open(path, encoding="utf-8") as file:
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
            raise UserError(f"{where}: only `key = value` lines with plain values can stand here") from None
        if key == "like":
            if out or not isinstance(value, str) or depth > 4:
                raise UserError(f"{where}: `like` must be the first line, name one file, and not lead in a "
                                f"circle")
            out |= read_file(cls, find(value), depth + 1)
        else:
            out[key] = _check(cls, key, value, where)
    return out


def _parse(cls, key, text):
    """The text after `--key=` as a value: numbers and booleans are read as Python's, texts as they stand."""
    if {f.name: f.type for f in dataclasses.fields(cls)}.get(key) is str:
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text                                                        # _check says what is wrong with it


def load(cls, argv, positional=None):
    """Command line -> (config: an instance of `cls`, {key: value} of what the command line itself set).

    argv: without the script's name; a bare word is a config file, or, if `positional` names a field, a
    value of that field (a tuple of all of them). Exits after --help. Raises UserError.
    """
    from_files, from_cli, words = {}, {}, []
    for arg in argv:
        if arg in ("--help", "-h"):
            print(help_text(cls))
            raise SystemExit(0)
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if key == positional:
                raise UserError(f"{key} are bare words, without --{key}=")
            if not equals and {f.name: f.type for f in dataclasses.fields(cls)}.get(key) not in (bool, None):
                raise UserError(f"--{key} wants a value: --{key}=...")
            from_cli[key] = _check(cls, key, _parse(cls, key, text) if equals else True, "command line")
        elif positional:
            words.append(arg)
        else:
            from_files.update(read_file(cls, find(arg)))
    if words:
        from_cli[positional] = tuple(words)
    return cls(**{**from_files, **from_cli}), from_cli


def at_least(cfg, **lowest):
    """UserError unless each option that is named here has at least the value given here."""
    for key, low in lowest.items():
        if getattr(cfg, key) < low:
            raise UserError(f"{key} must be at least {low}, not {getattr(cfg, key)}")


def named(cfg, **endings):
    """UserError unless each option that is named here is the name of a file with that ending; "" for any."""
    for key, ending in endings.items():
        value, kind = getattr(cfg, key), f"file that ends in {ending}" if ending else "file or folder"
        if not value or not value.lower().endswith(ending):
            raise UserError(f"{key} must be the name of a {kind}, not {value!r}")


def help_text(cls):
    """The script's docstring, then each option with its default and its comment, taken from the source."""
    script = sys.modules["__main__"]               # options.py holds those of train.py
    module = script if getattr(script, "Config", None) is cls else sys.modules[cls.__module__]
    lines = [(module.__doc__ or "").strip(), "", "Options (--key=value):"]
    for line in inspect.getsource(cls).splitlines()[1:]:
        option = re.match(r"\s+(\w+): ([^=]+?) = (.+?)\s+# (.*)", line)
        if option:
            name, _, default, comment = option.groups()
            lines.append(f"  --{name + '=' + default:30s} {comment}")
        elif heading := re.match(r"\s+# -+ (.*)", line):
            lines.append(f" {heading[1]}")
        elif more := re.match(r"\s+# (.*)", line):
            lines.append(" " * 35 + more[1].strip())
    return "\n".join(lines)


def show(config):
    """The resolved config, as a config file that would give it again."""
    return "\n".join(f"{f.name} = {getattr(config, f.name)!r}" for f in dataclasses.fields(config))


def locate(path):
    """A path as given from here, else from the folder of this project (so that scripts run from anywhere)."""
    beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def run(main):
    """Runs a script's main(); errors meant for people become one line: exit 2 on bad input, 1 at run time."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (Fault, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(1) from None
