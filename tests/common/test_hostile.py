"""Run: python -m pytest tests/common/test_hostile.py    (-m slow: many more files, and the rows of the table)

Broken and hostile files, given to every function that loads a file. `refused` states what must happen. A case
is one fault for one loader. A fault is a function that changes the good file at `path`.
"""
import collections
import dataclasses
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import types
import zipfile

import pytest
import torch

import evaluate
import robustness
from common import config, files
from common.config import UserError
from common.folder import open_run
from full import clip, t5
from full_size import make_random
from lab import frontier
from model import GPT
from test_clip import tiny_clip, to_open_clip
from test_weights import TEXT, TOKENIZER, convert, status
from tiny.world import load_models
from vqgan import VQGAN

pytestmark = pytest.mark.filterwarnings("ignore")          # torch's, on its way to refuse a file
CPU = torch.device("cpu")


def converted(path):
    """Convert the file at `path` and load the result. An error of either step may name the file at `path`."""
    new = convert(path, path + ".pt")
    return GPT.from_pretrained(new, n_head=2, block_size=256)


LOADERS = {                                    # name: function that returns {name: tensor} for a comparison
    "load": lambda path: files.load(path)["gpt"]["state"],                # it accepts any dict of tensors
    "base": lambda path: load_models(path, CPU)[0].state_dict(),
    "run": lambda path: load_models(path, CPU)[0].state_dict(),
    "options": lambda path: evaluate.options_of(path)[1]["model"],
    "resume": lambda path: open_run(evaluate.options, [
        f"--out_dir={os.path.dirname(path)}", "--resume"])[1]["model"],
    "gpt": lambda path: GPT.from_pretrained(path, n_head=2, block_size=256).state_dict(),
    "safetensors": lambda path: converted(path).state_dict(),
    "vq": lambda path: VQGAN.from_pretrained(path).state_dict(),
    "clip": lambda path: clip.load_clip(path).state_dict(),
    "head": lambda path: dict(zip("wb", clip.load_head(path, 24))),
    "t5 cache": lambda path: {text: row.clone() for text, row in t5.Captions(         # it maps its file
        path + "_t5", os.path.dirname(path), dtype=torch.float32).rows.items()}}
ZIPS = [name for name in LOADERS if name != "safetensors"]
WHOLE = [name for name in ZIPS if name not in ("load", "options", "resume")]  # these check every tensor


@pytest.fixture(autouse=True)
def heads(monkeypatch):
    """Tell the number of heads of the small CLIP of these tests."""
    monkeypatch.setitem(clip.HEADS, 32, 2)


@pytest.fixture(scope="session")
def good(mini_base, tmp_path_factory):
    """Return {name of a loader: path of a good file for it}."""
    pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.torch")
    root = tmp_path_factory.mktemp("good")
    out = {name: str(root / f"{name.replace(' ', '_')}.pt") for name in LOADERS}
    out["safetensors"] = str(root / "gpt.safetensors")
    base = files.load(mini_base)
    for name in ("load", "base"):
        files.save(base, out[name])
    options = dataclasses.asdict(evaluate.options({})(init_from=out["base"]))
    for name in ("run", "options", "resume"):
        files.save({"model": base["gpt"]["state"], "config": options, "step": 1, "rng": {},
                    "optimizer": {"state": {}}}, out[name])
    make_random(TEXT, out["gpt"])
    make_random(TOKENIZER, out["vq"])
    safetensors.save_file(torch.load(out["gpt"], weights_only=True)["model"], out["safetensors"])
    torch.save({"state_dict": to_open_clip(tiny_clip())}, out["clip"])
    sizes, head = [24, 10, 6, 5, 3, 1], {}
    for i, a, b in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    torch.save(head, out["head"])
    os.mkdir(out["t5 cache"] + "_t5")
    with open(out["t5 cache"] + "_t5/config.json", "w") as file:
        json.dump({"d_model": 8}, file)
    cache = t5.Captions(out["t5 cache"] + "_t5", str(root), dtype=torch.float32).path
    files.save({"captions": ["a cat", "dog"], "lengths": [2, 3], "features": torch.randn(5, 8)}, cache)
    out["t5 cache"] = cache
    return out


def spoil(good, name, folder, fault):
    """Copy the good file of a loader to `folder`, apply the fault, and return the path."""
    path = os.path.join(folder, "ckpt.pt" if name == "resume" else os.path.basename(good[name]))
    shutil.copy(good[name], path)
    fault(path)
    return path


class Hung(BaseException):
    """It is not an Exception, so that no loader can catch it."""


def hung(*_):
    raise Hung


def load(name, good, path):
    """Return what the loader returns for the file at `path`. It must end within 10 s and 64 MB of memory."""
    argument = path
    if name == "t5 cache":                             # its arguments are folders
        argument = os.path.join(os.path.dirname(path), "c.pt")
        if not os.path.exists(argument + "_t5"):
            shutil.copytree(os.path.join(os.path.dirname(good[name]), "t5_cache.pt_t5"), argument + "_t5")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")                                            # reset the peak
    before = status("VmRSS")
    # A loader that takes more than 2 GB must not exhaust the memory of the machine.
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2 ** 31, hard))
    signal.signal(signal.SIGALRM, hung)
    signal.alarm(10)
    try:
        return LOADERS[name](argument)
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert status("VmHWM") - before < 64 * 2 ** 20


def refused(name, good, folder, fault):
    """Check that the loader names the file in one line of a UserError, and runs no code of the file."""
    os.environ["EVIL"] = str(folder / "ran")                       # hostile code would create this file
    path = spoil(good, name, str(folder), fault)
    try:
        load(name, good, path)
    except UserError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 1000 and os.path.basename(path) in text, (name, text)
        assert not os.path.exists(folder / "ran")
        return text
    pytest.fail(f"{name} loaded it")


def test_the_good_files_load_and_stay_within_their_limits(good, tmp_path):
    for name in LOADERS:
        (tmp_path / name).mkdir()
        assert load(name, good, spoil(good, name, str(tmp_path / name), lambda path: None))


# ---- faults: {name: function that changes the file at `path`} ------------------------------------------
def edit(change):
    """Return a fault that applies `change` to the dict in the file and writes the file again."""
    def fault(path):
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file, save_file
            state = {"model": load_file(path)}
            change(state)
            return save_file(state["model"], path)
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return fault


def tensors(state):
    """Return the inner dict {name: tensor} of a file, and the name of one matrix in it."""
    for key in ("gpt", "model", "state", "state_dict"):
        if isinstance(state.get(key), dict):
            return tensors(state[key])
    return state, next(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() == 2)


def put(value):
    """Return a fault that replaces a matrix by value(matrix)."""
    def change(state):
        where, key = tensors(state)
        where[key] = value(where[key])
    return edit(change)


def write(data):
    def fault(path):
        with open(path, "wb") as file:
            file.write(data)
    return fault


def cut(share):
    return lambda path: os.truncate(path, max(0, int(share * os.path.getsize(path)) - (share == 1)))


def folder(path):
    os.remove(path)
    os.mkdir(path)


def zip_of(**parts):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name, content in parts.items():
            file.writestr(name, content)
    return data.getvalue()


SHARES = [0, 1e-3, .01, .05, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .99, .999, 1]
OTHERS = {
    "folder": folder, "text": write(b"weights are here"), "page": write(b"<!DOCTYPE html>"),
    "a pointer of git-lfs": write(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "gzip": write(b"\x1f\x8b\x08" + bytes(99)), "zeros": write(bytes(4096)),
    "image": write(b"\x89PNG\r\n\x1a\n"),
    "zip magic alone": write(b"PK\3\4" + bytes(200)), "an empty zip": write(zip_of()),
    "a zip of a text": write(zip_of(readme="hello")),
    "wrong magic": lambda path: write(b"QK" + open(path, "rb").read()[2:])(path),
    "a list": lambda path: torch.save([1, 2], path), "a tensor": lambda path: torch.save(torch.ones(3), path),
    "a number": lambda path: torch.save(7, path)}
ANOTHER = {"an empty dict": lambda path: torch.save({}, path), "other weights": lambda path: torch.save(
    {"net": {"w": torch.ones(2, 3)}, "lr": 1e-3}, path), "an empty dict, with no version": write(
        zip_of(**{"archive/data.pkl": b"\x80\x02}.", "archive/version": "3\n"}))}


class Calls:
    """An object whose pickle calls function(*args) when it is loaded without weights_only."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def code(make):
    """Return {format: fault}: pickles that create the file $EVIL when loaded without weights_only."""
    return {"in a zip": lambda path: torch.save({"model": {"x": make()}}, path),
            "as a key": lambda path: torch.save({make(): torch.ones(2)}, path),
            "in torch's old format": lambda path: torch.save(
                {"model": make()}, path, _use_new_zipfile_serialization=False),
            "in a namespace": lambda path: torch.save({"args": types.SimpleNamespace(lr=make())}, path),
            "bare": lambda path: write(pickle.dumps(make(), protocol=2))(path)}


CODE = {f"{what} {where}": fault for what, make in {
    "a command": lambda: Calls(os.system, f"touch '{os.environ['EVIL']}'"),
    "open": lambda: Calls(open, os.environ["EVIL"], "w"),
    "eval": lambda: Calls(eval, f"open({os.environ['EVIL']!r}, 'w')"),
    "a process": lambda: Calls(subprocess.call, ["touch", os.environ["EVIL"]])}.items()
    for where, fault in code(make).items()}


class Lie:
    """A tensor of four numbers that claims another size and stride."""

    def __init__(self, size, stride):
        self.claim = size, stride

    def __reduce__(self):
        storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float,
                                             _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, *self.claim, False, collections.OrderedDict())


def laughs(path):
    """Nest 30 lists, each of which holds the next one ten times, so 10^30 paths lead to one NaN."""
    state = {"bad": torch.tensor(float("nan"))}
    for _ in range(30):
        state = {"gpt": [state] * 10, "model": state}
    torch.save(state, path)


def circle(path):
    state = torch.load(path, weights_only=True)
    state["more"] = [state]
    state["bad"] = torch.tensor(float("nan"))                      # or it would be harmless
    torch.save(state, path)


HUGE = {
    "10^12 numbers": put(lambda old: Lie((10 ** 6, 10 ** 6), (10 ** 6, 1))),
    "2^64 numbers": put(lambda old: Lie((2 ** 62, 4), (4, 1))),
    "-1 numbers": put(lambda old: Lie((-1, 4), (4, 1))),
    "10^12 numbers in the old format": lambda path: torch.save(
        {"model": {"x": Lie((10 ** 12,), (1,))}}, path, _use_new_zipfile_serialization=False),
    "a tensor to be made": put(lambda old: Calls(torch.FloatTensor, 25 * 10 ** 8)),
    "a list in itself": circle, "a list of lists of lists": laughs}
NUMBERS = {
    f"{value} in {dtype}": put(lambda old, value=value, dtype=dtype: old.to(dtype).index_fill(
        1, torch.tensor([old.shape[1] - 1]), float(value)))
    for value in ("nan", "inf", "-inf") for dtype in (torch.float32, torch.float16, torch.bfloat16)}
NUMBERS["nan in a name of two lines"] = edit(
    lambda state: tensors(state)[0].update({"two\nlines": torch.tensor([float("nan")])}))
TYPES = {
    **{str(dtype): put(lambda old, dtype=dtype: old.to(dtype)) for dtype in (
        torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)},
    "a list": put(lambda old: old.tolist()), "a text": put(lambda old: "0.5"), "None": put(lambda old: None),
    "sparse": put(lambda old: old.to_sparse()), "no memory": put(lambda old: old.to("meta"))}


def missing(state):
    where, key = tensors(state)
    del where[key]


def shape(change):
    return put(lambda old: change(old).contiguous())


KEYS = {
    "missing": edit(missing), "more columns": shape(lambda old: torch.cat([old, old], 1)),
    "a column less": shape(lambda old: old[:, 1:]), "flat": shape(lambda old: old.flatten()),
    "one dimension more": shape(lambda old: old[None]), "empty": shape(lambda old: old[:0])}
EXTRA = {"extra": edit(lambda state: tensors(state)[0].update(extra=torch.ones(2))),
         "a name of two lines": edit(lambda state: tensors(state)[0].update({"two\nlines": torch.ones(2)})),
         "none at all": edit(lambda state: tensors(state)[0].clear())}


def header(change, tail=b""):
    """Return a fault that replaces the header {name: {dtype, shape, data_offsets}} of a safetensors file by
    change(header), which is bytes or data for JSON. tail: bytes to add behind the data."""
    def fault(path):
        data = open(path, "rb").read()
        n, = struct.unpack("<Q", data[:8])
        text = change(json.loads(data[8:8 + n]))
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        write(struct.pack("<Q", len(text)) + text + data[8 + n:] + tail)(path)
    return fault


def entry(**values):
    """Return a fault that changes the entry of the first tensor."""
    def change(table):
        table[next(k for k in table if k != "__metadata__")].update(values)
        return table
    return header(change)


def claim(n):
    """Return a fault that makes the header claim a length of n bytes."""
    return lambda path: write(struct.pack("<Q", n) + open(path, "rb").read()[8:])(path)


LIES = {
    "longer than the file": claim(10 ** 9), "of 2^63 bytes": claim(2 ** 63), "of no bytes": claim(0),
    "no JSON": header(lambda table: b"{" + bytes(20)), "a list": header(lambda table: [1]),
    "nested too deep": header(lambda table: b"[" * 10 ** 5),
    "10^12 numbers": entry(shape=[10 ** 6, 10 ** 6]), "2^64 numbers": entry(shape=[2 ** 62, 4]),
    "-1 numbers": entry(shape=[-1, 3]), "no such type": entry(dtype="F7"), "another type": entry(dtype="F64"),
    "data beyond the end": entry(data_offsets=[0, 10 ** 12]), "data backwards": entry(data_offsets=[16, 0]),
    "data of another": entry(data_offsets=[4, 8]), "data that nothing names": header(lambda t: t, bytes(64)),
    "no entry": header(lambda table: {}), "ints": entry(dtype="I32"), "bits": entry(dtype="U32")}
CONFIGS = {                                     # of the policy in a base
    "a width of 10^6": dict(dim=2 ** 20),
    "10^12 codes": dict(vocab_size=10 ** 12), "10^12 tokens": dict(block_size=10 ** 12),
    "-16 tokens": dict(block_size=-16), "-2 heads": dict(n_head=-2), "no heads": dict(n_head=0),
    "half a head": dict(n_head=.5), "a text": dict(dim="32"), "None": dict(dim=None),
    "no such option": dict(depth=3), "a multiple of 0": dict(multiple_of=0),
    "a kind": dict(model_type="t3i"), "a prefix of 10^12": dict(cls_token_num=10 ** 12),
    "eps = inf": dict(norm_eps=float("inf"))}
OPTIONS = {                                     # of a run
    "none": None, "a list": [1], "a text": "beta", "another world": dict(world="antigravity"),
    "a world of dots": dict(world="os.path"), "no such option": dict(alpha=1),
    "a text for a number": dict(beta="1"), "a tensor": dict(seed=torch.zeros(3, 3)),
    "out of range": dict(temperature=-1.0), "NaN": dict(beta=float("nan")),
    "an old tensor": dict(top_k=0, score_cfg=torch.zeros(3, 3)),
    "an old bomb of digits": dict(top_k=0, score_cfg=10 ** 5000),
    "a bomb of digits": dict(max_steps=10 ** 5000), "a name with a zero byte": dict(init_from="a\0b")}


def with_config(values):
    def change(state):
        state["gpt"]["config"] |= values
    return edit(change)


def with_options(values):
    def change(state):
        state["config"] = {**state["config"], **values} if isinstance(values, dict) else values
    return edit(change)


FAULTS = {                                     # rows of the table: {name: ({case: fault}, loaders)}
    "truncated": ({f"at {share}": cut(share) for share in SHARES}, list(LOADERS)),
    "missing": ({"missing": os.remove}, [n for n in LOADERS if n != "t5 cache"]),      # which is then created
    "another kind of file, wrong magic": (OTHERS, list(LOADERS)),
    "a file of something else": (ANOTHER, [n for n in ZIPS if n != "load"]),
    "a pickle that runs code": (CODE, ZIPS),
    "sizes that are not there, lists in themselves": (HUGE, ZIPS),
    "NaN, infinity": (NUMBERS, list(LOADERS)),
    "wrong type": (TYPES, [name for name in WHOLE]),
    "wrong type in safetensors": (dict(list(TYPES.items())[:4]), ["safetensors"]),
    "missing, misshapen": (KEYS, WHOLE + ["safetensors"]),
    "extra, none": (EXTRA, [n for n in WHOLE + ["safetensors"] if n not in ("head", "t5 cache")]),
    "a safetensors header that lies": (LIES, ["safetensors"]),
    "a config that asks for what is not there": ({k: with_config(v) for k, v in CONFIGS.items()}, ["base"]),
    "options that are none": ({k: with_options(v) for k, v in OPTIONS.items()}, ["options", "resume"])}


@pytest.mark.parametrize("fault, case", [(fault, case) for fault in FAULTS for case in FAULTS[fault][0]])
def test_it_is_refused_in_one_line(fault, case, good, tmp_path):
    cases, names = FAULTS[fault]
    for name in names:
        (tmp_path / name).mkdir()
        refused(name, good, tmp_path / name, cases[case])


def test_the_traps_are_real(good, tmp_path, monkeypatch):
    """Each pickle of CODE does run its code when it is loaded without weights_only."""
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    for case, fault in CODE.items():
        path = spoil(good, "gpt", str(tmp_path), fault)
        assert not os.path.exists(tmp_path / "ran"), case
        pickle.load(open(path, "rb")) if case.endswith("bare") else torch.load(path, weights_only=False)
        os.remove(tmp_path / "ran")


# ---- flipped bits --------------------------------------------------------------------------------------
def flip(place):
    def fault(path):
        data = bytearray(open(path, "rb").read())
        data[place // 8] ^= 1 << place % 8
        write(data)(path)
    return fault


def flips(name, good, folder, places):
    """Return [refused, harmless] for files with a flipped bit. A file that loads must give equal tensors."""
    expected, counts = load(name, good, spoil(good, name, str(folder), lambda path: None)), [0, 0]
    for place in places:
        path = spoil(good, name, str(folder), flip(place))
        try:
            got = load(name, good, path)
        except UserError as error:
            assert "\n" not in str(error) and os.path.basename(path) in str(error)
            counts[0] += 1
            continue
        assert list(got) == list(expected) and all(torch.equal(got[k], expected[k]) for k in got), place
        counts[1] += 1
    return counts


def places(path, n, seed=0):
    """Return n random bits of a file, and n / 4 bits of its last 100 bytes, where a zip has its table."""
    size = 8 * os.path.getsize(path)
    rng = random.Random(seed)
    return [rng.randrange(size) for _ in range(n)] + [rng.randrange(size - 800, size) for _ in range(n // 4)]


@pytest.mark.parametrize("name", ZIPS)
def test_a_flipped_bit_is_found_or_harmless(name, good, tmp_path):
    found, harmless = flips(name, good, tmp_path, places(good[name], 8))
    assert found + harmless == 10 and found >= 5       # harmless: padding between parts, dates, attributes


def inside(path):
    """Return a bit of the largest tensor in a zip, in the second byte from its end."""
    with zipfile.ZipFile(path) as file:
        part = max((p for p in file.infolist() if "/data/" in p.filename), key=lambda p: p.file_size)
        return 8 * (open(path, "rb").read().index(file.read(part)) + part.file_size - 2)


@pytest.mark.parametrize("name", ZIPS)
def test_a_flipped_weight_is_found_before_loading(name, good, tmp_path, monkeypatch):
    """torch.load itself would not notice it."""
    fault = flip(inside(good[name]))
    monkeypatch.setattr(torch, "load", lambda *args, **options: pytest.fail("loaded before it was verified"))
    assert "damaged" in refused(name, good, tmp_path, fault)


@pytest.mark.parametrize("tower, values", [
    ("vision_config", dict(num_hidden_layers=3)), ("text_config", dict(hidden_size=2 ** 14)),
    ("text_config", dict(vocab_size=10 ** 9)), ("vision_config", dict(intermediate_size=10 ** 9)),
    ("vision_config", dict(patch_size=0)), ("text_config", dict(num_attention_heads="x"))])
def test_a_folder_whose_config_asks_for_more_than_it_has(tower, values, good, tmp_path):
    """transformers would fill in random numbers for whatever the files lack."""
    tiny_clip().save_pretrained(tmp_path / "clip")
    assert load("clip", good, str(tmp_path / "clip"))
    config_file = tmp_path / "clip" / "config.json"
    options = json.loads(config_file.read_text())
    options[tower] |= values
    config_file.write_text(json.dumps(options))
    with pytest.raises(UserError) as error:
        load("clip", good, str(tmp_path / "clip"))
    assert str(tmp_path / "clip") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change", [lambda w: w.fill_(float("nan")), lambda w: w.int(), lambda w: w[:1]])
def test_a_folder_with_bad_weights(change, good, tmp_path):
    from safetensors.torch import load_file, save_file
    tiny_clip().save_pretrained(tmp_path / "clip")
    state = load_file(tmp_path / "clip" / "model.safetensors")
    key = "visual_projection.weight"
    save_file(state | {key: change(state[key]).contiguous()}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(UserError) as error:
        load("clip", good, str(tmp_path / "clip"))
    assert str(tmp_path / "clip") in str(error.value) and "\n" not in str(error.value)


def test_runs_that_begin_with_one_another(good, tmp_path):
    a, b = str(tmp_path / "a.pt"), str(tmp_path / "b.pt")
    for path, begin in ((a, b), (b, a)):
        files.save({"model": {}, "config": {"init_from": begin}}, path)
    with pytest.raises(UserError, match="is it a circle"):
        load("run", good, a)


def test_half_a_line_of_frontier_csv(tmp_path):
    """Runs are appended for hours. A line that a kill cut short must be reported and not counted."""
    good, path = open(config.locate("results/frontier.csv"), newline="").read(), tmp_path / "frontier.csv"
    lines = good.splitlines(keepends=True)[:3]
    path.write_text("".join(lines), newline="")
    assert len(frontier.load(str(path))) == 2
    for text in ([lines[0], lines[1], lines[2][:n]] for n in range(1, len(lines[2]) - 12)):
        path.write_text("".join(text), newline="")
        with pytest.raises(UserError, match="run 2 is not whole"):
            frontier.load(str(path))
    path.write_text("".join([*lines[:2], lines[2].strip(), lines[1]]), newline="")
    with pytest.raises(UserError, match="run 2 is not whole"):
        frontier.load(str(path))
    for data in (b"", b"\xff\xfe", b"\0", b"a,b\n1,2\n"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a csv of this version"):
            frontier.load(str(path))


@pytest.mark.slow
def test_table(good, tmp_path):
    """Write the rows of results/robustness.md: every fault for each of its loaders, and thousands of bits."""
    os.environ["EVIL"] = str(tmp_path / "ran")
    for fault, (cases, names) in FAULTS.items():
        for case in cases:
            for name in names:
                (tmp_path / case.replace("/", "") / name).mkdir(parents=True)
                refused(name, good, tmp_path / case.replace("/", "") / name, cases[case])
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        n = len(cases) * len(names)
        robustness.record(f"weights: {fault}", f"{len(cases)} x {len(names)} loaders", n)
    sums = [0, 0]
    for name in ZIPS:
        (tmp_path / name).mkdir()
        sums = [a + b for a, b in zip(sums, flips(name, good, tmp_path / name, places(good[name], 400)))]
    robustness.record("weights: a bit flipped", f"500 x {len(ZIPS)} loaders", *sums)
