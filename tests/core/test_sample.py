"""python -m pytest tests/core/test_sample.py"""
import json
import os

import pytest
import torch

import sample
from common import images
from common.config import UserError

PROMPTS = ["two red circles", "a blue square", "A  Red circle"]


@pytest.fixture(scope="module")
def opened(mini_base):
    """Load the models once, because most tests of this file do not look at how they are loaded."""
    return sample.open_pipeline(sample.Config(ckpt=mini_base), [], torch.device("cpu"))


@pytest.fixture
def save(opened, tmp_path, monkeypatch):
    """Return a function (folder, more options) -> {file in the folder: its bytes}."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "open_pipeline", lambda cfg, prompts, where: opened)
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"prompt": p, "tag": "x"}) for p in PROMPTS))

    def save(folder, *options):
        sample.main(["--prompts=m.jsonl", f"--save={folder}", "--n=2", "--device=cpu", *options])
        return {str(path.relative_to(folder)): path.read_bytes()
                for path in (tmp_path / folder).relative_to(tmp_path).rglob("*.*") if path.is_file()}
    return save


def stop_at(image, monkeypatch):
    """Stop sample.py by Ctrl-C when it is about to write that image."""
    count, real = iter(range(image)), images.to_pil

    def to_pil(pixels):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return real(pixels)
    monkeypatch.setattr(images, "to_pil", to_pil)


def test_save_continues_with_the_images_of_one_go(save, monkeypatch):
    whole = save("whole")
    assert len(whole) == 3 * 3 + 1 and len({v for k, v in whole.items() if k.endswith(".png")}) == 6
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(3, patch)
        save("parts")
    first = os.stat("parts/00000/samples/0000.png").st_mtime_ns
    assert sorted(os.listdir("parts")) == ["00000", "00001.tmp", "options.json"]
    assert save("parts") == whole
    assert os.stat("parts/00000/samples/0000.png").st_mtime_ns == first        # it was not made again


def test_save_refuses_a_folder_of_other_images(save, opened):
    whole = save("a")
    with pytest.raises(UserError, match="a were made with temperature = 1.0, not with 0.5: choose another"):
        save("a", "--temperature=0.5")
    with pytest.raises(UserError, match="seed = 0, not with 1"):
        save("a", "--seed=1")
    assert save("a", "--cfg_scale=1.0", "--top_k=0") == whole              # the usual values, in other words
    made_from = dict(opened[0].made_from)
    opened[0].made_from["ckpt"] = "m.jsonl"                                # a run that was trained further
    with pytest.raises(UserError, match="made with weights = "):
        save("a")
    opened[0].made_from.update(made_from)
    assert save("a") == whole
    with open("m.jsonl", "a") as file:
        file.write('\n{"prompt": "a red circle"}')
    with pytest.raises(UserError, match="made with prompts = "):
        save("a")
    os.remove("a/options.json")
    with pytest.raises(UserError, match="a is not empty"):
        save("a")


def test_all_prompts_are_checked_before_the_first_image(save):
    with open("m.jsonl", "a") as file:
        file.write('\n{"prompt": "a mauve circle"}')
    with pytest.raises(UserError, match="no word 'mauve'"):
        save("a")
    assert not os.path.exists("a")


def test_spaces_upper_case_and_a_last_semicolon_do_not_matter(opened, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "open_pipeline", lambda cfg, prompts, where: opened)
    hashes = []
    for prompt in ("a red circle;two blue squares", " A RED  Circle ; two blue squares ; "):
        sample.main([f"--prompt={prompt}", "--n=1", "--device=cpu", f"--out={tmp_path / 's.png'}"])
        printed = capsys.readouterr().out
        assert "a red circle: 0% right\ntwo blue squares: 0% right\n" in printed
        hashes.append(printed.split("hash ")[1].split()[0])
    assert hashes[0] == hashes[1]
    with pytest.raises(UserError, match="the prompt is empty"):
        sample.main(["--prompt=;", f"--out={tmp_path / 's.png'}"])
