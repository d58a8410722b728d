"""Run: python -m pytest tests/common/test_config.py"""
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

import evaluate
import pretrain
import sample
from common import config, device
from common.config import UserError, option

OPTIONS = {"train.py": evaluate.options({}), "a full-size run": evaluate.options({"world": "llamagen"}),
           "vapi.py": evaluate.options({"algorithm": "vapi"}), "sample.py": sample.Config,
           "evaluate.py": evaluate.Config, "pretrain.py": pretrain.Config}


def load(argv):
    """Return the config of a run of train.py, which `load` has validated."""
    return config.load(evaluate.options, argv)[0]


def write(tmp_path, text):
    path = tmp_path / "some.py"
    path.write_text(text)
    return str(path)


def test_file_then_command_line_and_the_last_word_wins(tmp_path):
    path = write(tmp_path, '"""what it is"""\nbeta = 1\nseed = 3\nout_dir = "out/x"  # a comment\n')
    cfg, given = config.load(evaluate.options, [path, "--seed=4", "--resume"])
    assert (cfg.beta, cfg.seed, cfg.out_dir, cfg.resume) == (1.0, 4, "out/x", True)
    assert isinstance(cfg.beta, float)
    assert given == {"beta": 1.0, "out_dir": "out/x", "seed": 4, "resume": True}


@pytest.mark.parametrize("argv, parts", [
    (["--learning_rte=1e-3"], ["learning_rte", "'learning_rate'"]),
    (["--qqqq=1"], ["qqqq", "--help"]),
    (["--max_steps=ten"], ["max_steps", "'ten'", "whole number"]),
    (["--max_steps=1.5"], ["max_steps", "1.5", "whole number"]),
    (["--beta=True"], ["beta", "True", "number"]),
    (["--resume=1"], ["resume", "1", "True or False"]),
    (["--divergence=kl"], ["divergence", "'kl'", "js, forward_kl, reverse_kl, none"]),
    (["--beta"], ["--beta needs a value"]),
    (["configs/tiny_jss.py"], ["configs/tiny_jss.py", "configs/tiny_js.py"]),
])
def test_command_line_errors_name_option_value_and_what_is_allowed(argv, parts):
    with pytest.raises(UserError) as error:
        load(argv)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("text, parts", [
    ("learning_rte = 1e-3", ["line 1", "learning_rte", "'learning_rate'"]),
    ("seed = 1\nbeta = '.1'", ["line 2", "beta", "a finite number"]),
    ("import os", ["line 1", "key = value"]),
    ("seed = __import__('os').getpid()", ["line 1", "plain values"]),
    ("seed = 1 +", ["not a config file"]),
    ("a.b = 1", ["line 1"]), ("seed, beta = 1, 2", ["line 1"]), ("seed += 1", ["line 1"]),
    ("\0", ["not a config file"]),
])
def test_config_files_are_checked_and_never_run(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        load([write(tmp_path, text)])
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("argv, part", [
    (["--top_k=100"], "no option 'top_k'"), (["--top_p=.9"], "no option 'top_p'"),
    (["--beta=-1"], "beta must be at least 0, got -1"), (["--group_size=1"], "group_size must be at least 2"),
    (["--temperature=0"], "temperature"), (["--beta=1e999"], "beta"),
    (["--warmup=2"], "--warmup must be at most 1, got 2"),
    (["--reward=judje"], "no reward 'judje'"), (["--reward=judge:x"], "must be a number"),
    (["--heldout_reward=judge"], "must not be trained on"), (["--eval_draws=68"], "a multiple of 8, got 68"),
    (["--eval_draws=56"], "at least 64 in the tiny world, got 56"),
])
def test_train_refuses_what_makes_no_sense(argv, part):
    with pytest.raises(UserError, match=part):
        load(argv)


def test_config_name_is_found_in_both_spellings_and_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("config/tiny_js.py") == config.find("configs/tiny_js.py")


@pytest.mark.parametrize("name", sorted(n for n in os.listdir(config.locate("configs")) if n.endswith(".py")))
def test_every_config_loads(name):
    cfg, default = load([f"configs/{name}"]), load([])
    assert cfg.out_dir == "out/" + name.removesuffix(".py")
    if name == "tiny_js.py":
        assert cfg == default                           # `python train.py` alone is the tiny JS run
    if name.startswith("tiny") and name.endswith("_kl.py"):
        assert cfg.beta == default.beta / 4             # the same strength (divergences.py)


@pytest.mark.parametrize("name", OPTIONS)
def test_help_lists_every_option_with_its_text(name):
    text = config.help_text(OPTIONS[name])
    for field in dataclasses.fields(OPTIONS[name]):
        (line,) = [x for x in text.splitlines() if x.startswith(f"  --{field.name}=")]
        assert len(line.split(None, 1)[1].split("  ")[-1]) > 5, line


def test_help_prints_general_options_and_with_a_config_file_also_its_parts(capsys):
    def shown(*argv):
        with pytest.raises(SystemExit):
            load([*argv, "--help"])
        return {line.split("=")[0].strip() for line in capsys.readouterr().out.splitlines()
                if line.startswith("  --")}
    general, full, vapi = shown(), shown("configs/llamagen_js.py"), shown("configs/tiny_vapi.py")
    assert {"--beta", "--out_dir", "--logit_chunk"} <= general and "--world" in general & full & vapi
    assert {"--gpt_ckpt", "--t5", "--score_cfg"} <= full - general - vapi
    assert {"--context_noise", "--wrong_captions"} <= vapi - general - full
    assert "--cfg_scale" in general - vapi                      # VA-pi has no guidance


def test_a_part_is_checked_beside_its_options_and_an_older_name_is_translated(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Part:
        chunk: int = option(1, "a number", low=1, high=9)

        def check(cfg):
            if cfg.chunk == 5:
                raise UserError("--chunk must not be 5")
    cls = config.compose(Part, evaluate.Kind)
    assert [p.__name__ for p in config.parts_of(cls)] == ["Part", "Kind"]
    for value, said in ((0, "--chunk must be at least 1, got 0"), (10, "--chunk must be at most 9, got 10"),
                        (5, "must not be 5")):
        with pytest.raises(UserError, match=said):
            config.validate(cls(chunk=value))
    assert load(["--chunk=3"]) == load([write(tmp_path, "chunk = 3")]) == load(["--logit_chunk=3"])


def test_shown_config_is_a_config_file_that_gives_it_again(tmp_path):
    cfg = load(["--beta=.3", "--divergence=none", "--out_dir=out/a b"])
    assert load([write(tmp_path, config.show(cfg))]) == cfg
    assert config.changed(cfg) == "out_dir = 'out/a b'\ndivergence = 'none'\nbeta = 0.3"
    assert config.changed(load([])) == ""


@pytest.mark.parametrize("words, part", [
    (["train.py", "--learning_rte=1"], "did you mean 'learning_rate'"),
    (["sample.py", "--prompt=a mauve circle", "--out=unused.png"], "no word 'mauve'"),
    (["sample.py", "--ckpt=no/such/run"], "no file no/such/run"),
    (["evaluate.py"], "name at least one run"),
    (["train.py", "--init_from=README.md", "--out_dir=DIR"], "damaged"),
])
def test_processes_end_in_one_line_and_exit_code_2(words, part, tmp_path):
    words = [w.replace("DIR", str(tmp_path / "run")) for w in words]
    done = subprocess.run([sys.executable, config.locate(words[0]), *words[1:]],
                          capture_output=True, text=True, cwd=config.locate("."))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.strip()]
    assert line.startswith("error: ") and part in line


def test_a_config_says_only_in_what_it_differs(tmp_path):
    js, kl, matched, released = (load([f"configs/llamagen_{n}.py"])
                                 for n in ("js", "reverse_kl", "js_matched", "js_as_released"))
    assert (kl.divergence, kl.beta, kl.reward) == ("reverse_kl", .04, "hps") and matched.beta == 4 * js.beta
    assert dataclasses.replace(kl, divergence="js", out_dir=js.out_dir) == js
    assert released.critical_tokens and released.dynamic_weight and not js.critical_tokens
    circle = tmp_path / "circle.py"
    circle.write_text(f"like = {str(circle)!r}\n")
    late = tmp_path / "late.py"
    late.write_text("beta = 1\nlike = 'configs/tiny_js.py'\n")
    for path in (circle, late):
        with pytest.raises(UserError, match="`like` must be the first line"):
            config.read_file(str(path))


def test_no_more_threads_than_cores_that_may_be_used(tmp_path, monkeypatch):
    for text, cores in (("max 100000", math.inf), ("200000 100000", 2), ("150000 100000", 2), ("", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert device.quota(tmp_path / "cpu.max") == cores
    assert device.quota(tmp_path / "none") == math.inf
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for cores, threads in ((math.inf, 3), (8, 3), (2, 2)):
            monkeypatch.setattr(device, "quota", lambda: cores)
            device.start("cpu")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
