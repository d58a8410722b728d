"""python -m pytest tests/core/test_train.py

The loop on a base with random weights. These tests check that it is the loop that it claims to be. Whether it
*learns* is tested in test_learns.py.
"""
import json
import os
import random
import subprocess
import sys

import pytest
import torch

import evaluate
import train
from common import config, files, run
from common.config import UserError
from common.interfaces import Conditions
from divergences import DIVERGENCES

pytestmark = pytest.mark.usefixtures("small_evaluations")
QUICK = ["--eval_interval=3", "--eval_prompts=1", "--eval_draws=8", "--prompts_per_step=4", "--group_size=4",
         "--micro_batch=16", "--heldout_reward=reader", "--device=cpu"]
ONE_STEP = ["--max_steps=2", "--stop_after=1"]           # stops before the last evaluation and the report
KEYS = {"step", "reward", "heldout_reward", "reward_std", "zero_spread", "kl_reverse", "entropy",
        "max_ratio_error", "clip_share", "clamp_share", "grad_norm",
        "t_sample", "t_reward", "t_advantage", "t_update", "t_log"}


def lines(folder, name="metrics.jsonl"):
    """Return the lines of a log without their times, which differ between runs."""
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(folder / name)]


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])
    return files.load(str(folder / "ckpt.pt"))


def same(a, b):
    """Whether two nested checkpoints are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_six_steps_are_three_and_three_bit_for_bit(mini_base, tmp_path):
    """With both optimizers: matrices inside the blocks have Muon, the rest has AdamW."""
    whole = go(tmp_path / "whole", mini_base, "--max_steps=6", "--muon_lr=0.01")
    half = go(tmp_path / "halves", mini_base, "--max_steps=6", "--muon_lr=0.01", "--stop_after=3")
    assert half["step"] == 3 and not (tmp_path / "halves" / "table.md").exists()
    with open(tmp_path / "halves" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')                           # what a kill while writing leaves behind
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    rest = files.load(str(tmp_path / "halves" / "ckpt.pt"))
    for key in ("model", "optimizer", "muon", "rng", "step"):
        assert same(whole[key], rest[key]), key
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(tmp_path / "whole", name) == lines(tmp_path / "halves", name)
    for name in ("samples_00000.png", "samples_00006.png", "before_after.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_log_has_its_keys_and_the_sampler_is_the_trained_policy(mini_base, tmp_path):
    go(tmp_path / "run", mini_base, "--max_steps=3", "--temperature=0.8", "--cfg_scale=2.0",
       "--inner_epochs=2", "--learning_rate=0.01")
    log = lines(tmp_path / "run")
    raw = json.loads(open(tmp_path / "run" / "metrics.jsonl").readline())
    assert KEYS <= set(raw) and [line["step"] for line in log] == [0, 1, 2]
    assert all(line["max_ratio_error"] < 1e-4 for line in log)       # also with guidance and temperature
    assert log[0]["kl_reverse"] == pytest.approx(0, abs=1e-6) and log[2]["kl_reverse"] > 0
    assert [e["step"] for e in lines(tmp_path / "run", "evaluations.jsonl")] == [0, 3]
    assert {"before_after.png", "curves.png", "table.md", "samples_00000.png"} <= set(
        os.listdir(tmp_path / "run"))


@pytest.mark.parametrize("divergence, estimator", [
    ("js", "sampled"), ("reverse_kl", "unbiased"), ("forward_kl", "exact")])
def test_micro_batches_do_not_change_the_step(divergence, estimator, mini_base, tmp_path):
    runs = [go(tmp_path / f"m{m}", mini_base, *ONE_STEP, f"--micro_batch={m}", *memory,
               f"--divergence={divergence}", f"--estimator={estimator}")
            for m, *memory in [(16,), (4, "--logit_chunk=5", "--recompute")]]
    one, four = (lines(tmp_path / f"m{m}")[0] for m in (16, 4))
    for key in ("grad_norm", "kl_reverse", "entropy", "clip_share"):
        assert one[key] == pytest.approx(four[key], rel=1e-5, abs=1e-7)
    # Compare Adam's first moment, which is .1 of the gradient. Adam's step is no good measure, because it is
    # about as large for a gradient near zero.
    for i, state in runs[0]["optimizer"]["state"].items():
        other = runs[1]["optimizer"]["state"][i]["exp_avg"]
        assert (state["exp_avg"] - other).norm() <= 1e-5 * state["exp_avg"].norm() + 1e-9, i


def test_tokens_share_ratios_too(mini_base, tmp_path):
    """Ratios leave the clip in whole chunks: rows of 4 tokens, or the whole image of 16."""
    for size in (4, 16):
        go(tmp_path / f"{size}", mini_base, *ONE_STEP, f"--chunk_size={size}", "--beta=0", "--inner_epochs=2",
           "--clip_eps=0.01", "--learning_rate=2e-5")
        chunks = lines(tmp_path / f"{size}")[0]["outside_share"] * 16 * 16 / size
        assert 0 < chunks < 16 * 16 / size and chunks == round(chunks)
    with pytest.raises(UserError, match="--chunk_size must divide the 16 tokens"):
        go(tmp_path / "odd", mini_base, "--chunk_size=5")


def test_a_used_folder_is_refused_and_left_as_it_is(mini_base, tmp_path):
    go(tmp_path / "run", mini_base, *ONE_STEP)
    before = {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}
    with pytest.raises(UserError, match="--resume.*--out_dir"):
        go(tmp_path / "run", mini_base, *ONE_STEP)
    with pytest.raises(UserError, match="beta"):                        # it would be another run
        train.main([f"--out_dir={tmp_path / 'run'}", "--resume", "--beta=0.7"])
    assert before == {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}
    with pytest.raises(UserError, match="nothing to resume"):
        train.main([f"--out_dir={tmp_path / 'none'}", "--resume"])


def test_schedules():
    cfg = config.compose(run.Length, run.Optimizer)(max_steps=100, warmup=.1, min_lr_ratio=.1,
                                                    learning_rate=1.0)
    rates = [run.learning_rate(cfg, s, cfg.learning_rate) for s in range(101)]
    assert rates[0] == pytest.approx(.1) and rates[9] == rates[10] == 1 and rates[100] == pytest.approx(.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert run.schedule("constant", .4, 0, .5) == .4
    assert run.schedule("linear", .4, 0, .25) == pytest.approx(.3)
    assert run.schedule("cosine", .4, 0, .5) == pytest.approx(.2)
    assert run.schedule("cosine", .4, .1, 1) == pytest.approx(.1)


def test_importing_train_does_not_wait_for_matplotlib():
    """Its import takes longer than all others together, and the first step does not need it."""
    code = "import sys, train; " \
           "raise SystemExit(bool({'matplotlib', 'torch._dynamo', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(train.__file__)).returncode == 0


# ---- the loop without its plumbing -------------------------------------------------------------------------
class Recorder:
    """Takes the place of a Run for one step. It keeps the gradients and changes no weights."""

    def __init__(self, policy):
        self.policy, self.device = policy.eval(), torch.device("cpu")
        self.generator, self.gradients = torch.Generator().manual_seed(5), {}

    def rows(self, total):
        return torch.arange(total)

    def steps(self):
        yield 0

    def phase(self, name):
        pass

    def optimizer_step(self, step):
        self.gradients = {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}
        self.policy.zero_grad(set_to_none=True)

    def log(self, step, line, stats):
        self.line = line | {name: value.item() for name, value in stats.items()}


def in_float64(world, pipeline):
    """Convert a tiny world and its models to float64, so that two ways to compute a step agree to 1e-10."""
    for model in (pipeline.policy, pipeline.reference, pipeline.vqgan, world.judge):
        model.double()
    encode = pipeline.encode

    def in_double(prompts):
        conditions = encode(prompts)
        return Conditions(conditions.cond.double(), conditions.mask)
    pipeline.encode = in_double
    if world.images:
        load = world.images.load
        world.images.load = lambda items: load(items).double()
    return world, pipeline


def moved(pipeline):
    """Move the policy away from its reference."""
    weight = pipeline.policy.output.weight
    with torch.no_grad():
        weight.add_(.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("divergence, estimator", [("none", "sampled")] + [
    (d, e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")])
def test_a_step_is_the_loss_by_hand(divergence, estimator, mini_base):
    """Repeat a step of the loop from its samples, by the formulas of grpo.py and divergences.py."""
    cfg = evaluate.options({})(
        init_from=mini_base, prompts_per_step=2, group_size=4, micro_batch=3, logit_chunk=5, cfg_scale=2.,
        temperature=.9, divergence=divergence, estimator=estimator, beta=.3)
    world, pipeline = in_float64(*evaluate.open_world(cfg, torch.device("cpu")))
    moved(pipeline)
    policy, recorder, kept = pipeline.policy, Recorder(pipeline.policy), []
    rollout = policy.rollout
    policy.rollout = lambda *args, **options: kept.append(rollout(*args, **options)) or kept[0]
    random.seed(0)
    train.grpo_loop(cfg, recorder, world, pipeline)

    random.seed(0)
    prompts = [p for p in world.draw(2) for _ in range(4)]
    conditions, tokens = pipeline.encode(prompts), kept[0].actions
    pi, rho = (model(tokens, conditions.cond, conditions.mask, cfg_scale=2., temperature=.9).softmax(-1)
               for model in (policy, pipeline.reference))                                        # [8,16,V]
    p, q = (x.gather(-1, tokens[..., None])[..., 0] for x in (pi, rho))                          # [8,16]
    w = q / p
    m, mean = (pi + rho) / 2, (1 + w) / 2                       # mean: m / pi at the sampled token
    f, total = {"reverse_kl": (w - w.log() - 1, (pi * (pi / rho).log()).sum(-1)),
                "forward_kl": (w * w.log() - w + 1, (rho * (rho / pi).log()).sum(-1)),
                "js": ((w * (w / mean).log() - mean.log()) / 2,
                       (pi * (pi / m).log() + rho * (rho / m).log()).sum(-1) / 2),
                "none": (0 * w, 0)}[divergence]
    penalty = {"sampled": f, "unbiased": p / p.detach() * f, "exact": total}[estimator]
    rewards = world.reward(pipeline.decode(tokens), prompts).view(2, 4)
    adv = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).view(8, 1)
    (.3 * penalty - p / p.detach() * adv).mean().backward()
    for name, parameter in policy.named_parameters():
        assert torch.allclose(recorder.gradients[name], parameter.grad, rtol=1e-8, atol=1e-12), name
    assert recorder.line["reward"] == pytest.approx(rewards.mean().item())
    assert recorder.line["kl_reverse"] == pytest.approx((pi * (pi / rho).log()).sum(-1).mean().item())
    assert recorder.line["max_ratio_error"] < 1e-10
