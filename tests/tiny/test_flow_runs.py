"""Run: python -m pytest tests/tiny/test_flow_runs.py

Whole runs of a flow policy, on a small base with random weights.
"""
import json

import pytest
import torch

import evaluate
import pretrain
import sample
import train
from common import files
from tiny.world import FlowOptions, Latents, load_flow, load_models, open_flow


@pytest.fixture(scope="module")
def flags(mini_base, mini_flow_base):
    return [f"--init_from={mini_flow_base}", f"--tokenizer={mini_base}", "--device=cpu", "--max_steps=3",
            "--eval_interval=3", "--prompts_per_step=2", "--group_size=4", "--eval_prompts=1",
            "--eval_draws=64", "--micro_batch=3"]


def lines(folder):
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")} for text in file]


@pytest.fixture(scope="module")
def run(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    train.main(["configs/tiny_chunk.py", f"--out_dir={folder}", *flags])
    return folder


def test_the_loss_sees_the_sampler_and_the_run_moves(run, mini_flow_base):
    found = lines(run)
    assert len(found) == 3 and max(line["max_ratio_error"] for line in found) < 1e-3
    assert found[0]["outside_share"] > 0 and found[0]["kl_reverse"] == pytest.approx(0, abs=1e-4)
    assert found[2]["kl_reverse"] > 1e-6                   # three updates per rollout moved the policy
    policy, latents = load_flow(str(run), "cpu")
    base, _ = load_flow(mini_flow_base, "cpu")
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), base.parameters()))
    with open(run / "evaluations.jsonl", encoding="utf-8") as file:
        before, after = map(json.loads, file)
    assert {"sampler_reward", "sampler_heldout_reward", "kl_forward"} <= set(after)
    assert "token_entropy" not in after and before["kl_reverse"] == 0 < after["kl_reverse"]
    text = (run / "table.md").read_text(encoding="utf-8")
    assert "sampler_reward" in text


@pytest.fixture
def unmeasured(monkeypatch):
    """Evaluations take most of the time of such short runs, so these runs make none."""
    names = ("reward", "heldout_reward", "best_of_n_reward", "best_of_n_heldout_reward")
    found = evaluate.Evaluated(dict.fromkeys(names, 0.), None, torch.zeros(5 * 64, 3, 32, 32))
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **options: found)


def test_a_resumed_run_repeats_the_whole_one(run, flags, tmp_path, unmeasured):
    folder = tmp_path / "again"
    train.main(["configs/tiny_chunk.py", f"--out_dir={folder}", *flags, "--stop_after=1"])
    train.main([f"--out_dir={folder}", "--resume", "--stop_after=0"])
    assert lines(folder) == lines(run)


def test_micro_batches_of_steps_change_nothing(run, flags, tmp_path, unmeasured):
    folder = tmp_path / "parts"
    train.main(["configs/tiny_chunk.py", f"--out_dir={folder}", *flags, "--action_batch=1"])
    for one, other in zip(lines(folder), lines(run)):
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("options", [["--likelihood=elbo"], ["--adaptive_chunks=True", "--chunks=()"], [
    "--chunk_share=0.5", "--chunk_draw=change", "--divergence=js"], ["--logp_per_dim=False"]])
def test_other_options_train_too(options, flags, tmp_path, unmeasured):
    folder = tmp_path / "run"
    train.main(["configs/tiny_chunk.py", f"--out_dir={folder}", *flags, "--max_steps=1", *options])
    assert lines(folder)[0]["max_ratio_error"] < 1e-3


def test_samples_of_a_run_and_of_a_base(run, mini_base, tmp_path, capsys, monkeypatch):
    sample.main([f"--ckpt={run}", f"--out={tmp_path}/a.png", "--n=2", "--device=cpu"])
    assert "numbers, hash" in capsys.readouterr().out and (tmp_path / "a.png").exists()
    with pytest.raises(ValueError, match="a flow policy draws no codes"):
        sample.main([f"--ckpt={run}", f"--out={tmp_path}/b.png", "--temperature=0.5"])
    evaluate.main([str(run), "--draws=64", "--eval_prompts=1", f"--picture={tmp_path}/c.png"])


def test_latents_are_standardized_and_decode_to_the_image():
    _, vqgan, _, _ = load_models("assets/tiny_base.pt", "cpu")
    latents, images = Latents(), torch.rand(4, 3, 32, 32) * 2 - 1
    x = latents.encode(vqgan, images)
    assert x.shape == (4, 8, 8, 8) and torch.allclose(x.square().sum(1), torch.ones(4, 8, 8), atol=1e-5)
    same = vqgan.decode_vectors(x.flatten(2).transpose(1, 2), 8, 8)
    assert torch.allclose(latents.decode(vqgan, x), same)


def test_pretraining_is_fixed_by_its_seed(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    for path in paths:
        pretrain.main([f"--out={path}", "--policy=flow", "--scenes=80", "--flow_steps=3"])
    first, second = (files.load(path) for path in paths)
    for part in ("flow", "latents"):
        assert all(torch.equal(v, second[part]["state"][k]) for k, v in first[part]["state"].items())
    pipeline = open_flow(paths[0], None, torch.device("cpu"))
    assert pipeline.policy.final_layer.linear.weight.any() and pipeline.per == 512
    assert FlowOptions().tokenizer == "assets/tiny_base.pt"


def test_our_muon_takes_the_steps_of_the_library():
    torch.manual_seed(0)
    weights = [torch.randn(6, 4, requires_grad=True), torch.randn(4, 6, requires_grad=True)]
    others = [w.detach().clone().requires_grad_() for w in weights]
    ours, theirs = pretrain.Muon(weights, .1), torch.optim.Muon(others, .1, weight_decay=0)
    for _ in range(3):
        for w, other in zip(weights, others):
            w.grad = torch.randn_like(w)
            other.grad = w.grad.clone()
        ours.step()
        theirs.step()
    for w, other in zip(weights, others):
        assert torch.allclose(w, other, atol=.02)          # theirs computes in bf16
