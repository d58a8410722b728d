"""python -m pytest tests/full/test_llamagen.py

Runs of the full-size world, on small files in the released layouts (tests/helpers/full_size.py). A slow test
takes one step at full size.
"""
import json
import os
import re
import subprocess
import sys

import pytest
import torch

import evaluate
import full_size
import sample
import train
from common import files
from common.config import UserError, locate
from full import clip, llamagen, weights
from model import GPT, GPTConfig
from vqgan import VQConfig

for package in ("transformers", "ftfy", "bs4"):
    pytest.importorskip(package)

GPT_SMALL = GPTConfig(dim=64, n_layer=2, n_head=2, vocab_size=128, block_size=16, cls_token_num=120,
                      caption_dim=32)
VQ_SMALL = VQConfig(codebook_size=128, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=32)
PROMPTS = ["a red cat", "A photo of the Dog!", "a blue dog on the cat", "small green photo",
            "a cat and a dog", "the red photo", "a dog", "a blue photo of a red cat"]
QUICK = ["configs/llamagen_js.py", "--max_steps=2", "--prompts_per_step=2", "--group_size=4",
         "--sample_batch=4", "--eval_prompts=2", "--eval_draws=8", "--micro_batch=4",
         "--device=cpu", "--learning_rate=0.01", "--n_head=2", "--block_size=16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make weights and prompts, and tell full/clip.py the number of heads of our small HPS."""
    path = tmp_path_factory.mktemp("weights")
    clip.HEADS[160] = 2
    full_size.make(str(path), GPT_SMALL, VQ_SMALL, "t2i_XL_stage1_256.pt", hps=full_size.small(160, 2))
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    yield path
    del clip.HEADS[160]


def go(folder, out, *more):
    train.main([*QUICK, f"--weights={folder}", f"--prompts={folder / 'prompts.txt'}", f"--out_dir={out}",
                *more])
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def lines(metrics):
    return [{k: v for k, v in line.items() if not k.startswith("t_")} for line in metrics]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "js"
    return out, go(folder, out)


def test_a_run_from_released_files_to_images(run):
    out, metrics = run
    assert [line["step"] for line in metrics] == [0, 1]
    # The reference stores in bf16 what autocast rounds at every use. So it is the policy exactly, until the
    # policy moves.
    assert metrics[0]["kl_reverse"] == 0 < metrics[1]["kl_reverse"]
    assert 0 < metrics[0]["max_ratio_error"] < .02                         # bf16; fp32 is tested below
    assert metrics[0]["reward_std"] > 0 and metrics[0]["heldout_reward"] != metrics[0]["reward"]
    assert {"before_after.png", "curves.png", "table.md", "ckpt.pt"} <= set(os.listdir(out))


def test_best_of_n_samples_its_pool_once(folder, tmp_path):
    """A pool on disk and two updates, in bf16."""
    out, small = tmp_path / "best", QUICK[1:]
    train.main(["configs/llamagen_best_of_n.py", *small, "--pool=2", "--groups=3", f"--weights={folder}",
                f"--prompts={folder / 'prompts.txt'}", f"--out_dir={out}"])
    pool = [files.load(str(path)) for path in sorted((out / "pool").iterdir())]
    assert [(len(p["prompts"]), tuple(p["tokens"].shape)) for p in pool] == 2 * [(2, (2, 4, 16))]
    metrics = [json.loads(line) for line in open(out / "metrics.jsonl")]
    best = [p["rewards"].amax(1) for p in pool]
    assert torch.cat(best).min() <= metrics[0]["imitated_reward"] <= torch.cat(best).max()
    assert metrics[0]["grad_norm"] > 0 and (out / "table.md").exists()


def test_memory_options_and_extras_do_what_they_say(folder, run, tmp_path):
    """In fp32 the way a step is cut changes nothing. The extras change the loss, not the images of step 0."""
    plain = go(folder, tmp_path / "plain", "--dtype=float32", "--recompute=False", "--logit_chunk=0",
               "--micro_batch=8", "--sample_batch=0")
    cut = go(folder, tmp_path / "cut", "--dtype=float32", "--logit_chunk=5", "--micro_batch=3")
    for a, b in zip(lines(plain), lines(cut)):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)
    assert plain[0]["max_ratio_error"] < 1e-4
    extras = go(folder, tmp_path / "extras", "--dtype=float32", "--logit_chunk=0", "--critical_tokens",
                "--dynamic_weight")
    assert extras[0]["reward"] == pytest.approx(plain[0]["reward"], abs=1e-6)
    assert abs(extras[0]["grad_norm"] / plain[0]["grad_norm"] - 1) > .05
    with pytest.raises(UserError, match="dynamic_weight needs all tokens"):
        go(folder, tmp_path / "no", "--dynamic_weight", "--logit_chunk=4")


def test_guidance_is_the_same_in_rollout_and_loss(folder, tmp_path):
    guided = go(folder, tmp_path / "a", "--dtype=float32", "--cfg_scale=5.0")
    stopped = go(folder, tmp_path / "b", "--dtype=float32", "--cfg_scale=5.0", "--uncond_grad=False")
    for metrics in (guided, stopped):
        assert all(line["max_ratio_error"] < 1e-4 for line in metrics)
    assert guided[0]["reward"] == stopped[0]["reward"] and guided[0]["grad_norm"] != stopped[0]["grad_norm"]


def test_a_resumed_run_needs_no_t5(folder, run, tmp_path, monkeypatch):
    """The features come from the disk. The resumed half equals the second half of a whole run."""
    go(folder, tmp_path / "halves", "--stop_after=1")
    monkeypatch.setattr(llamagen.t5.Captions, "_load", lambda self: 1 / 0)
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    again = [json.loads(line) for line in open(tmp_path / "halves" / "metrics.jsonl")]
    assert lines(again) == lines(run[1])


def test_an_exported_run_loads_as_a_released_file_and_samples_the_same(folder, run, tmp_path, capsys):
    out, _ = run
    weights.main([f"--export={out / 'ckpt.pt'}", f"--to={folder / 'mine_256.pt'}"])
    state = torch.load(out / "ckpt.pt", weights_only=True)["model"]
    mine = GPT.from_pretrained(str(folder / "mine_256.pt"), n_head=2, block_size=16).state_dict()
    assert state.keys() == mine.keys() and all(torch.equal(state[k], mine[k]) for k in state)
    hashes = []
    for source in ([f"--ckpt={out}"], ["--gpt_ckpt=mine_256.pt", "--n_head=2", "--block_size=16"],
                   ["--gpt_ckpt=t2i_XL_stage1_256.pt", "--n_head=2", "--block_size=16"]):
        capsys.readouterr()
        sample.main([*source, f"--weights={folder}", "--prompt=a red cat; a dog", "--n=2", "--device=cpu",
                     f"--out={tmp_path / 's.png'}"])
        printed = capsys.readouterr().out
        assert re.search(r"64 tokens, \d+ different codes, hash [0-9a-f]{16}\n", printed)
        hashes.append(re.search("hash (.*)", printed)[1])
    assert hashes[0] == hashes[1] != hashes[2]


def test_class_conditional_files_sample_too(folder, tmp_path, capsys):
    """The tensors tell that a file is class-conditional. Its name need not."""
    c2i = GPTConfig(dim=64, n_layer=2, n_head=2, vocab_size=128, block_size=16, cls_token_num=1,
                    model_type="c2i", num_classes=10)
    options = ["--vq_ckpt=vq_ds16_t2i.pt", "--n_head=2", "--block_size=16", "--n=2", f"--weights={folder}",
               f"--out={tmp_path / 'c.png'}", "--device=cpu"]
    hashes = []
    for name in ("exported.pt", "c2i_B_256.pt"):
        full_size.make_random(c2i, str(folder / name))
        sample.main([*options, f"--gpt_ckpt={name}", "--prompt=0; 9"])
        assert (tmp_path / "c.png").stat().st_size > 1000
        hashes.append(re.search("hash (.*)", capsys.readouterr().out)[1])
    assert hashes[0] == hashes[1]
    for wrong in ("10", "cat", "1;;2", "-1"):
        with pytest.raises(UserError, match="class numbers from 0 to 9"):
            sample.main([*options, "--gpt_ckpt=c2i_B_256.pt", f"--prompt={wrong}"])


def test_runs_are_compared_and_sampled_for_geneval(folder, run, tmp_path, capsys):
    out, _ = run
    evaluate.main([str(out), "--draws=8", "--eval_prompts=2", f"--picture={tmp_path / 'c.png'}",
                   "--device=cpu", "--cfg_scale=3.0"])
    assert "best of 8 of the base" in capsys.readouterr().out and (tmp_path / "c.png").exists()
    (tmp_path / "m.jsonl").write_text('{"tag": "single", "prompt": "a red cat"}\n')
    sample.main([f"--ckpt={out}", f"--prompts={tmp_path / 'm.jsonl'}", f"--save={tmp_path / 'g'}", "--n=2",
                 f"--weights={folder}", "--device=cpu"])
    assert sorted(os.listdir(tmp_path / "g" / "00000" / "samples")) == ["0000.png", "0001.png"]


def test_one_error_names_all_missing_files_before_anything_is_made(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        go(tmp_path / "nowhere", tmp_path / "run", f"--prompts={folder / 'prompts.txt'}")
    text = str(error.value)
    for name in ("t2i_XL_stage1_256.pt", "vq_ds16_t2i.pt", "flan-t5-xl", "HPS_v2.1_compressed.pt",
                 "clip-vit-large-patch14"):
        assert name in text
    assert "MIT" in text and "huggingface.co/peizesun/llamagen_t2i" in text
    assert not (tmp_path / "run").exists()


def test_strange_prompts_reach_the_rewards_unchanged(folder, tmp_path, monkeypatch):
    """T5 and CLIP cut what is too long for them. Nothing else is lost, and the run does not stop."""
    strange = ["a red cat " * 1000, "ein Käfer, 猫 и собака", "🐈‍⬛ <b>bold</b> http://x.y",
               "a  dog\twith\u00a0gaps"]
    (tmp_path / "strange.txt").write_text("\n".join(strange), encoding="utf-8")
    seen, real = set(), clip.Reward.__call__
    monkeypatch.setattr(clip.Reward, "__call__", lambda self, images, prompts: (
        seen.update(prompts), real(self, images, prompts))[1])
    metrics = go(folder, tmp_path / "run", f"--prompts={tmp_path / 'strange.txt'}", "--max_steps=3",
                 "--eval_prompts=1")
    assert seen <= {c.strip() for c in strange} and len(seen) >= 3
    assert all(line["grad_norm"] > 0 and "skipped" not in line for line in metrics)


@pytest.mark.parametrize("options, message", [
    (["--reward=judge"], "this world has no reward 'judge'"),
    (["--heldout_reward=hps"], "must not be trained on"),
    (["--eval_prompts=8"], "none would be left"),
    (["--n_head=0"], "n_head="),
    (["--gpt_ckpt=nothing.pt"], "nothing.pt"),
    (["--gpt_ckpt=vq_ds16_t2i.pt"], "does not look like a file for GPTConfig"),
    (["--sample_batch=3"], "do not divide into batches of --sample_batch=3"),
    (["--prompts=no.txt"], "no file"),
    (["--shard", "--lora_rank=4"], "use one of them"),
])
def test_errors_name_the_cause_and_leave_nothing(folder, tmp_path, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        go(folder, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


# ---- full size --------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_one_step_at_full_size(tmp_path):
    """LlamaGen-XL and VQ-16 at 256 pixels, with a small T5 and small CLIPs of the same layouts.

    The test prints the time of each phase and the peak memory. FULL_SIZE=folder keeps the weights there.
    FULL_SIZE_REWARDS=1 makes the CLIPs at full size, too. FULL_SIZE_DEVICE=cpu takes 1 step of 2 x 2 images,
    FULL_SIZE_DEVICE=cuda 3 steps of 4 x 8 images, as many as a GPU has in the paper.
    """
    folder = os.environ.get("FULL_SIZE") or str(tmp_path / "weights")
    device, real = os.environ.get("FULL_SIZE_DEVICE", "cpu"), bool(os.environ.get("FULL_SIZE_REWARDS"))
    size = dict(max_steps=1, prompts_per_step=2, group_size=2, micro_batch=2)
    if device == "cuda":
        size = dict(max_steps=3, prompts_per_step=4, group_size=8, micro_batch=16)
    if not os.path.exists(folder):
        subprocess.run([sys.executable, full_size.__file__, folder] + ["--rewards"] * real, check=True)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    code = ("import resource, train; from common import config; config.run(train.main); "
            "print('peak GB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6); "
            "import torch; print('of the GPU', torch.cuda.max_memory_allocated() / 1e9)")
    done = subprocess.run(
        [sys.executable, "-c", code, "configs/llamagen_js.py", *(f"--{k}={v}" for k, v in size.items()),
         "--sample_batch=0", "--eval_prompts=1", "--eval_draws=8", f"--device={device}",
         f"--weights={folder}", f"--prompts={prompts}", f"--out_dir={tmp_path / 'run'}"],
        cwd=os.path.dirname(locate("train.py")) or ".", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(text) for text in open(tmp_path / "run" / "metrics.jsonl")]
    print(done.stdout[-600:])
    for line in lines:
        times = {k: v for k, v in line.items() if k.startswith("t_") and k != "t_log"}
        print(line, "\nshares:", {k: f"{v / sum(times.values()):.0%}" for k, v in times.items()})
        assert torch.isfinite(torch.tensor(line["grad_norm"])) and line["max_ratio_error"] < .1
    assert len(lines) == size["max_steps"] and lines[0]["kl_reverse"] == 0
