"""python -m pytest tests/core/test_evaluate.py"""
import dataclasses
import glob
import io
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sample
import train
from common import config, files, images, tables
from common.config import UserError
from common.folder import checkpoint_of
from tiny import shapes
from tiny import world as tiny
from tiny.shapes import Obj, Scene


@pytest.fixture()
def opened(mini_base):
    return evaluate.open_world(evaluate.options({})(init_from=mini_base), torch.device("cpu"))


def test_entropy():
    assert tiny.entropy(["a"] * 8) == 0
    assert tiny.entropy([1, 2, 3, 4] * 16) == pytest.approx(math.log(4))


def test_open_entropy_is_always_of_64_readable_images():
    caption = shapes.parse("a red circle")
    scenes = [Scene(g, (Obj("circle", "red", s, x, 16),)) for g in ("white", "black")
              for s in ("small", "large") for x in (4, 28)] * 8
    # two backgrounds, two sizes, and two places, all equally often: three times log 2
    assert tiny.open_entropy(scenes, caption)[0] == pytest.approx(3 * math.log(2))
    bad = [Scene("grey", (), False)] * 30
    assert tiny.open_entropy(bad + scenes, caption) == (pytest.approx(3 * math.log(2)), 30)
    assert tiny.open_entropy(scenes[:63] + bad, caption) == (None, 30)


def test_kl_against_torch_distributions(opened):
    _, pipeline = opened
    policy, other = pipeline.policy, pipeline.reference
    torch.nn.init.normal_(other.output.weight, std=.3)
    prompts = ["a red circle", "two blue squares"]
    tokens, images = evaluate.sample(pipeline, policy, prompts, 3)
    assert tokens.shape == (6, 16) and images.shape == (6, 3, 32, 32)
    kl, entropy = evaluate.divergence_to(pipeline, policy, other, prompts, tokens)
    conditions = pipeline.encode([p for p in prompts for _ in range(3)])
    with torch.no_grad():
        p, q = (torch.distributions.Categorical(logits=m(tokens, conditions.cond, conditions.mask))
                for m in (policy, other))
    exact = torch.distributions.kl_divergence(p, q).sum(1).mean().item()
    assert kl == pytest.approx(exact, rel=1e-4)
    assert entropy == pytest.approx(p.entropy().mean().item(), rel=1e-4)


def test_evaluation_is_fixed_by_its_seed_and_best_of_n_is_better(opened):
    world, pipeline = opened
    torch.manual_seed(0)
    first, tokens, _ = evaluate.evaluate(world, pipeline, pipeline.reference, prompts=1, draws=64)
    torch.manual_seed(1)
    again, others, _ = evaluate.evaluate(world, pipeline, pipeline.reference, prompts=1, draws=64)
    assert torch.equal(tokens, others) and str(first) == str(again)
    assert first["best_of_n_reward"] > first["reward"] and first["kl_reverse"] == first["kl_forward"] == 0
    assert {f"reward/{c}" for c in shapes.CATEGORIES} | set(world.columns) <= set(first)


def test_compare_runs_and_sample_from_one(mini_base, tmp_path, capsys, small_evaluations):
    for seed in (0, 1):
        train.main([f"--out_dir={tmp_path / str(seed)}", f"--init_from={mini_base}", f"--seed={seed}",
                    "--max_steps=1", "--eval_prompts=1", "--eval_draws=8", "--prompts_per_step=1"])
    capsys.readouterr()
    evaluate.main([str(tmp_path / "0"), str(tmp_path / "1"), "--eval_prompts=1", "--draws=8",
                   f"--picture={tmp_path / 'compare.png'}"])
    printed = capsys.readouterr().out
    assert "best of 8" in printed and "2 seeds" in printed and "±" in printed
    assert (tmp_path / "compare.png").stat().st_size > 1000
    sample.main([f"--ckpt={tmp_path / '0'}", f"--out={tmp_path / 's.png'}",
                 "--prompt=a red circle; circle circle", "--n=2", "--top_k=5"])
    printed = capsys.readouterr().out
    assert "a red circle: " in printed and "not of the grammar" in printed and (tmp_path / "s.png").exists()


def test_images_in_the_folders_of_geneval(mini_base, tmp_path, capsys, small_evaluations):
    train.main([f"--out_dir={tmp_path / 'run'}", f"--init_from={mini_base}", "--max_steps=1",
                "--eval_prompts=1", "--eval_draws=8", "--prompts_per_step=1", "--learning_rate=0.1"])
    metadata = [{"tag": "counting", "include": [{"class": "circle", "count": 2}],
                 "prompt": "two red circles"}, {"tag": "single", "prompt": "a blue square"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, metadata)))

    def save(name, ckpt=tmp_path / "run"):
        sample.main([f"--ckpt={ckpt}", f"--prompts={tmp_path / 'm.jsonl'}", "--n=3",
                     f"--save={tmp_path / name}"])
        return [(tmp_path / name / "00001" / "samples" / f"{j:04d}.png").read_bytes() for j in range(3)]
    # The policy is that of the run, not its base, and the three samples differ.
    run, base = save("run_images"), save("base_images", mini_base)
    assert run != base and len(set(run)) == 3
    assert run == save("again")
    for i, record in enumerate(metadata):
        folder = tmp_path / "run_images" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == record
        assert sorted(os.listdir(folder / "samples")) == ["0000.png", "0001.png", "0002.png"]
    with pytest.raises(UserError, match="--prompts=FILE"):
        sample.main([f"--save={tmp_path / 'x'}"])


# ---- which runs share a row, and what is printed -----------------------------------------------------------
RESULTS = dict.fromkeys(tables.COLUMNS + ["best_of_n_reward", "best_of_n_heldout_reward", "open_entropy",
                                            "unseen", "entropy_kept", "unreadable"], .125)


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
    """Work in a folder of run folders, with an evaluation that knows its result at once. Return `make`, which
    makes a run folder, and `rows`, which runs evaluate.py -> {name: cells} of the table in compare.md."""
    monkeypatch.chdir(tmp_path)
    drawn = []

    class World:
        columns = ["unseen", "open_entropy", "entropy_kept", "unreadable"]
        fixed_prompts = staticmethod(lambda n: ["a red circle"])
        picture = staticmethod(lambda path, prompts, columns: drawn.append(path))
    policy = torch.nn.Linear(1, 1)
    pipeline = SimpleNamespace(policy=policy, reference=policy, made_from={})
    monkeypatch.setattr(evaluate, "open_world", lambda options, device: (World, pipeline))

    def measured(world, pipeline, policy, base=None, **settings):
        change = {"reward": policy.bias.item()} if base else {"open_entropy": math.nan}
        return evaluate.Evaluated(RESULTS | change, None, None)
    monkeypatch.setattr(evaluate, "evaluate", measured)

    def make(folder, result=0.0, step=120, **options):
        state = {"weight": torch.zeros(1, 1), "bias": torch.tensor([float(result)])}
        files.save({"config": dataclasses.asdict(evaluate.options({})(out_dir=folder, **options)),
                    "model": state, "step": step, "made_from": {}}, f"{folder}/ckpt.pt")

    def rows(*words):
        evaluate.main([*words, "--device=cpu", "--picture=new/compare.png"])
        assert drawn.pop() == "new/compare.png"
        with open("new/compare.md", encoding="utf-8") as file:
            cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in file]
        return {cell[0]: dict(zip(cells[0], cell)) for cell in cells[2:]}
    return SimpleNamespace(make=make, rows=rows)


def test_two_folders_of_one_run_are_refused(stubbed):
    stubbed.make("out/a", seed=3)
    stubbed.make("out/b", seed=3)
    stubbed.make("out/c", seed=4)
    os.symlink("a", "out/link")
    for first, second in (("out/a", "out/a"), ("out/a", "out/a/"), ("out/a", os.path.abspath("out/a")),
                          ("out/link", "out/a"), ("out/a", "out/a/ckpt.pt"), ("out/a", "out/b")):
        with pytest.raises(UserError, match=f"{first} and {second} both have seed 3 and the same options"):
            stubbed.rows(first, "out/c", second)
    assert "out/a, mean of 2 seeds" in stubbed.rows("out/a", "out/c")


def test_an_unfinished_run_has_its_own_row(stubbed):
    for seed, step in enumerate((120, 120, 60, 0)):
        stubbed.make(f"out/{seed}", result=seed, step=step, seed=seed)
    rows = stubbed.rows("out/0", "out/1", "out/2", "out/3")
    assert list(rows)[2:] == ["out/0, mean of 2 seeds", "out/2, step 60", "out/3, step 0"]
    assert rows["out/0, mean of 2 seeds"]["reward"] == "0.500 ± 0.707"
    assert rows["out/2, step 60"]["reward"] == "2.000"


def test_rows_show_temperature_and_guidance_that_differ(stubbed):
    stubbed.make("out/a", temperature=1.0)
    stubbed.make("out/b", temperature=1.4)
    stubbed.make("out/c", temperature=1.4, reward="reader", heldout_reward="judge")
    assert list(stubbed.rows("out/a")) == ["base", "best of 8 of the base", "out/a"]
    assert list(stubbed.rows("out/a", "--temperature=0.8", "--cfg_scale=2")) == [
        "base", "best of 8 of the base", "out/a, temperature 0.8, cfg_scale 2.0"]
    assert list(stubbed.rows("out/a", "out/b")) == [
        "base, temperature 1.0", "best of 8 of the base, temperature 1.0", "base, temperature 1.4",
        "best of 8 of the base, temperature 1.4", "out/a, temperature 1.0", "out/b, temperature 1.4"]
    assert {"base, reward judge, heldout_reward reader", "base, reward reader, heldout_reward judge", "out/b",
            "out/c"} <= set(stubbed.rows("out/b", "out/c"))


def test_the_terminal_gets_100_columns_and_the_file_gets_all(stubbed, capsys):
    for seed in range(3):
        stubbed.make("out/" + "long/" * 30 + str(seed), result=seed / 7, seed=seed)
    *_, last = stubbed.rows(*(f"out/{'long/' * 30}{seed}" for seed in range(3))).values()
    *table, where = capsys.readouterr().out.splitlines()
    assert max(map(len, table)) < 100 and len(table) == 5
    assert "entropy_kept" in table[0] and "open_entropy" not in table[0]
    assert table[-1].startswith("| out/long/long/l... mean of 3 seeds | 0.143 ± 0.143 |")
    assert where == "all columns: new/compare.md; images of each: new/compare.png"
    assert last["run"] == "out/" + "long/" * 30 + "0, mean of 3 seeds" and set(last) == {
        "run", "reward", "heldout_reward", "unseen", "open_entropy", "entropy_kept", "unreadable", "pairwise",
        "vendi", "token_entropy", "kl_reverse", "kl_forward"}
    assert evaluate.table([("a", RESULTS)], (), 100).splitlines()[0] == (
        "| run | reward | heldout_reward | vendi | kl_reverse |")


def test_what_a_short_run_cannot_measure_is_a_dash(stubbed):
    stubbed.make("out/a")
    base, best, _ = stubbed.rows("out/a").values()
    assert base["open_entropy"] == "-" == best["vendi"] and base["reward"] == "0.125"
    assert "| -" in evaluate.table([("two", [RESULTS, RESULTS | {"vendi": math.nan}])])


class Closed(io.StringIO):
    """A stdout whose reader has gone, such as `head -2`."""
    def write(self, text):
        raise BrokenPipeError


def test_the_files_are_there_when_nothing_can_be_printed(stubbed, monkeypatch):
    stubbed.make("out/a", result=.5)
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        stubbed.rows("out/a")
    assert "| out/a " in open("new/compare.md", encoding="utf-8").read()


def test_a_report_of_train_is_written_before_it_is_printed(tmp_path, monkeypatch, capsys):
    made = []
    world = SimpleNamespace(columns=["unseen"], images=None,
                            picture=lambda path, prompts, columns: made.append(os.path.basename(path)))
    monkeypatch.setattr(images, "curves", lambda lines, path, *args, **more: made.append("curves.png"))
    log = SimpleNamespace(lines=[])
    run = SimpleNamespace(before=evaluate.Evaluated(RESULTS, None, None), metrics=log, evaluations=log,
                          after=evaluate.Evaluated(RESULTS | {"reward": .75}, None, None),
                          file=lambda name: str(tmp_path / name))
    cfg = SimpleNamespace(out_dir="out/a", max_steps=1, algorithm="grpo", divergence="js")
    train.report(cfg, run, world, SimpleNamespace(generates_actions=True), [])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 100
    written = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| out/a " in written and "0.750" in written and "| unseen" in written
    os.remove(tmp_path / "table.md")
    made.clear()
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        train.report(cfg, run, world, SimpleNamespace(generates_actions=True), [])
    assert written == (tmp_path / "table.md").read_text(encoding="utf-8")
    assert made == ["before_after.png", "curves.png"]


def test_a_terminal_without_plus_minus_gets_a_table(stubbed, monkeypatch):
    for seed in (0, 1):
        stubbed.make(f"out/{seed}", seed=seed)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")            # as with PYTHONIOENCODING=ascii
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    config.run(lambda argv: stubbed.rows("out/0", "out/1"))
    terminal.flush()
    assert b"0.000 ? 0.000" in terminal.buffer.getvalue()


def test_errors_name_the_options_of_this_program(stubbed):
    stubbed.make("out/a")
    with pytest.raises(UserError, match="^--draws must be at least 64 in the tiny world, got 8"):
        stubbed.rows("out/a", "--draws=8")


def test_evaluate_and_sample_look_in_the_same_places(tmp_path, monkeypatch):
    """Outside of the project, a path that is not there is one in the project's folder."""
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(files, "load", lambda path, *args, **options: asked.append(path) or 1 / 0)
    for look in (evaluate.options_of, lambda path: sample.open_pipeline(sample.Config(ckpt=path), [], None)):
        with pytest.raises(ZeroDivisionError):
            look("assets/tiny_base.pt")
    assert asked == [os.path.join(os.path.dirname(evaluate.__file__), "assets/tiny_base.pt")] * 2
    os.makedirs("assets/tiny_base.pt")                                      # what is here comes first
    assert checkpoint_of("assets/tiny_base.pt") == os.path.join("assets/tiny_base.pt", "ckpt.pt")


def test_no_progress_bar_has_a_fixed_width():
    """A bar that is wider than the terminal wraps, and its last part, the reward, is never seen."""
    root = os.path.dirname(evaluate.__file__)
    wide = [path for path in glob.glob("**/*.py", root_dir=root, recursive=True)
            if not path.startswith("tests") and " ncols=" in open(os.path.join(root, path)).read()]
    assert not wide
