"""Run: python -m pytest tests/common/test_files.py"""
import json
import os
import pickle
import random

import pytest
import torch

from common import files
from common.config import UserError
from tiny.world import load_models


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """A save that fails half way, such as on a full disk, leaves the earlier file as it was."""
    path = str(tmp_path / "ckpt.pt")
    files.save({"step": 1, "x": torch.arange(3)}, path)
    before = open(path, "rb").read()

    def half(state, file):
        file.write(b"PK half a file")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError):
        files.save({"step": 2}, path)
    assert open(path, "rb").read() == before and files.load(path)["step"] == 1


def test_keep_leaves_the_newest_earlier_checkpoints(tmp_path):
    for step in (5, 10, 15, 20):
        files.save({"step": step}, str(tmp_path / "ckpt.pt"), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_000015.pt", "ckpt_000020.pt"]
    assert files.load(str(tmp_path / "ckpt_000015.pt"))["step"] == 15


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.path.join(os.environ["EVIL_DIR"], "ran"),)


@pytest.mark.parametrize("make", ["torch", "pickle", "text", "empty", "truncated", "missing", "folder"])
def test_bad_files_are_refused_in_one_line_and_run_no_code(make, tmp_path, monkeypatch):
    monkeypatch.setenv("EVIL_DIR", str(tmp_path))
    path = str(tmp_path / "x.pt")
    if make == "torch":
        torch.save({"model": Evil()}, path)
    elif make == "pickle":
        pickle.dump(Evil(), open(path, "wb"))
    elif make == "folder":
        os.mkdir(path)
    elif make == "truncated":
        torch.save({"x": torch.zeros(1000)}, path)
        os.truncate(path, os.path.getsize(path) // 2)
    elif make != "missing":
        open(path, "w").write("not a checkpoint" if make == "text" else "")
    with pytest.raises(UserError) as error:
        files.load(path)
    assert "\n" not in str(error.value) and path in str(error.value) and not os.path.exists(tmp_path / "ran")


def test_random_streams_continue(tmp_path):
    """The state goes through a file, because weights_only must be able to load it."""
    g = torch.Generator().manual_seed(1)
    random.seed(1), torch.manual_seed(1)

    def draw():
        return (random.random(), random.gauss(0, 1), torch.rand(3).tolist(),
                torch.rand(3, generator=g).tolist())
    draw()
    files.save(files.rng_state(g), str(tmp_path / "rng.pt"))
    expected = draw()
    random.seed(9), torch.manual_seed(9), g.manual_seed(9)
    files.set_rng_state(files.load(str(tmp_path / "rng.pt")), g)
    assert draw() == expected
    # The state of a GPU's stream has 16 bytes.
    other = files.rng_state(g) | {"generator": torch.zeros(16, dtype=torch.uint8)}
    with pytest.raises(UserError, match="cannot resume on cpu.*another kind of device.*--device"):
        files.set_rng_state(other, g)


def test_log_drops_torn_and_repeated_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = files.Log(str(path), 0)
    for step in range(5):
        log.write({"step": step, "reward": step / 3})
    path.write_text(path.read_text() + '{"step": 5, "rew')                 # killed in the middle of a line
    again = files.Log(str(path), 3)                                   # the checkpoint is of step 3
    again.write({"step": 3, "reward": 7})
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines == again.lines


@pytest.mark.parametrize("garbage", [b"[1,2]", b'{"a": 1}', b'{"step": "x"}', b"\xff", b"null", b"12 x"])
def test_log_drops_only_the_damaged_line_and_keeps_a_copy(garbage, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": %d}' % step for step in range(3)]
    path.write_bytes(b"\n".join([garbage, *good[:2], garbage, good[2], b""]))
    damaged = path.read_bytes()
    assert [line["step"] for line in files.Log(str(path), 9).lines] == [0, 1, 2]
    assert path.read_bytes() == b"\n".join([*good, b""])
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "dropped damaged lines 1, 4; " in capsys.readouterr().out
    files.Log(str(path), 9)                                           # now it is good, so there is no warning
    assert capsys.readouterr().out == ""


def test_fingerprints_tell_files_apart(tmp_path):
    path, seen = tmp_path / "weights.pt", set()

    def note(content):
        path.write_bytes(content)
        seen.add(files.fingerprint(str(path)))
    # A small file is read whole, so one byte shows anywhere. Of a large one, the first and the last byte do.
    for content in (b"", b"abc", b"xbc", b"axc", b"abx", bytes(9 << 20), b"x" + bytes((9 << 20) - 1),
                    bytes((9 << 20) - 1) + b"x", bytes(9 << 20) + b"x", *([b"abc"] * 3)):
        note(content)
    assert len(seen) == 9
    folder = files.fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("not a weight")
    assert files.fingerprint(str(tmp_path)) == folder
    path.write_bytes(b"")
    assert files.fingerprint(str(tmp_path)) != folder


def test_a_base_and_a_run_load_alike(mini_base, tmp_path):
    policy, vqgan, judge, options = load_models(mini_base, torch.device("cpu"))
    assert options == {} and not any(m.training for m in (policy, vqgan, judge))
    state = {k: v + 1 for k, v in policy.state_dict().items()}
    files.save({"model": state, "config": {"init_from": mini_base}}, str(tmp_path / "ckpt.pt"))
    moved, _, _, options = load_models(str(tmp_path), torch.device("cpu"))
    assert options["init_from"] == mini_base
    assert all(torch.equal(v, state[k]) for k, v in moved.state_dict().items())
    files.save({"model": {}, "config": {"init_from": mini_base}}, str(tmp_path / "ckpt.pt"))
    with pytest.raises(UserError, match="no base or run"):
        load_models(str(tmp_path), torch.device("cpu"))
