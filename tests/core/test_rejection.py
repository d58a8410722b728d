"""Run: python -m pytest tests/core/test_rejection.py

Imitation of the policy's own images: the derivation by enumeration, and the loop on a base with random
weights."""
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import evaluate
import rejection
import train
from common import config, files, run
from common.config import Fault, UserError
from rejection import dpo_loss, imitated, imitation_loss

QUICK = ["--algorithm=rejection", "--eval_interval=4", "--eval_prompts=1", "--eval_draws=8",
         "--prompts_per_step=4", "--group_size=4", "--max_steps=4", "--groups=6", "--device=cpu"]


def numbers(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the derivation ----------------------------------------------------------------------------------------
def test_the_optimum_is_tilted():
    """J of the docstring is largest at rho exp(r / tau) / Z, and falls short of it by tau KL elsewhere."""
    r, tau, log_rho = numbers(6, seed=1), .4, numbers(6, seed=2).log_softmax(0)

    def objective(log_pi):
        return (log_pi.exp() * (r - tau * (log_pi - log_rho))).sum()
    best = (log_rho + r / tau).log_softmax(0)
    for seed in range(5):
        logits = numbers(6, seed=10 + seed)
        log_pi = logits.log_softmax(0)
        assert (objective(best) - objective(log_pi)).item() == pytest.approx(
            tau * (log_pi.exp() * (log_pi - best)).sum().item())
    logits = best.clone().requires_grad_()
    assert torch.autograd.grad(objective(logits.log_softmax(0)), logits)[0].abs().max() < 1e-12


def test_two_limits():
    """The weights of a group add up to 1. tau = 0 is one-hot, tau = infinity is plain maximum likelihood."""
    rewards, logp = numbers(5, 8), numbers(5, 8, 3, seed=1)
    index, weights = imitated(rewards, .3)
    assert torch.allclose(weights.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.equal(index, torch.arange(8).expand(5, 8))
    by_hand = (rewards[0] / .3).exp() / (rewards[0] / .3).exp().sum()
    assert torch.allclose(weights[0], by_hand) and torch.allclose(imitated(rewards + 7, .3)[1], weights)

    index, one = imitated(rewards, 0)
    assert torch.equal(index[:, 0], rewards.argmax(1)) and torch.equal(one, torch.ones(5, 1))
    nearly = imitated(rewards, 1e-6)[1]
    assert torch.allclose(nearly, F.one_hot(rewards.argmax(1), 8).double(), atol=1e-6)
    assert torch.allclose(imitation_loss(logp, nearly),
                          imitation_loss(logp.gather(1, index[..., None].expand(-1, -1, 3)), one), atol=1e-5)
    plain = imitation_loss(logp, imitated(rewards, 1e9)[1])
    assert torch.allclose(plain, -logp.mean((1, 2)), atol=1e-8)


def test_equal_rewards_teach_nothing():
    for tau in (0, .05):
        _, weights = imitated(torch.tensor([[.3] * 4, [.3, .1, .2, .3]]), tau)
        assert weights.sum(1).tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("tau", [0, .3])
def test_what_the_loss_converges_to(tau):
    """Of n equally likely images with different rewards, draw all groups of G = 3. The mean loss is minimal
    at the distribution of the image that is kept. Its KL to rho is at most log G, and for tau = 0 it is about
    log G - (G - 1)/G."""
    n, G = 24, 3
    rewards = torch.linspace(0, 1, n, dtype=torch.float64)
    groups = torch.tensor(list(itertools.product(range(n), repeat=G)))                        # [n^G,G]
    index, weights = imitated(rewards[groups], tau)
    weights = torch.where((rewards[groups].amax(1) > rewards[groups].amin(1))[:, None], weights,
                          1 / weights.shape[1])            # groups of one image, which the loop leaves out
    kept = torch.zeros(n, dtype=torch.float64).index_add(
        0, groups.gather(1, index).flatten(), weights.flatten().double()) / len(groups)
    logits = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    for _ in range(60):                                    # Newton's method on the mean loss
        logp = logits.log_softmax(0)
        loss = imitation_loss(logp[groups].gather(1, index)[..., None], weights).mean()
        gradient = torch.autograd.grad(loss, logits)[0]
        logits = (logits - gradient / logp.exp().detach().clamp_min(1e-9)).detach().requires_grad_()
    assert torch.allclose(logits.softmax(0), kept, atol=1e-6)
    kl = (kept * (kept * n).log()).sum().item()
    assert 0 < kl < math.log(G) and (tau or kl == pytest.approx(math.log(G) - (G - 1) / G, abs=.02))


def test_imitation_is_a_policy_gradient():
    """Over all groups of 3 samples of a policy of 4 images: E[-grad loss] = E[sum_i (w_i - 1/G) s_i]."""
    logits, r, G, tau = numbers(4, seed=3).requires_grad_(), numbers(4, seed=4), 3, .5
    logp = logits.log_softmax(0)
    imitation = policy_gradient = 0
    for group in itertools.product(range(4), repeat=G):
        a = torch.tensor(group)
        probability, w = logp[a].sum().exp().detach(), imitated(r[a][None], tau)[1][0]
        w = w if w.sum() else torch.full_like(w, 1 / G)    # one image three times: its gradient cancels
        imitation = imitation + probability * imitation_loss(logp[a][None, :, None], w[None])[0]
        policy_gradient = policy_gradient - probability * ((w - 1 / G) * logp[a]).sum()
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (imitation, policy_gradient)]
    assert torch.allclose(*grads, atol=1e-12) and grads[0].norm() > .01


def test_dpo_at_the_reference():
    logp, beta = numbers(5, 2, 3, seed=6).requires_grad_(), .3
    loss = dpo_loss(logp, logp.detach(), beta)
    assert torch.allclose(loss, torch.full((5,), math.log(2), dtype=torch.float64))
    gradient = torch.autograd.grad(loss.sum(), logp)[0]
    expected = torch.tensor([-beta / 2, beta / 2], dtype=torch.float64)[None, :, None].expand(5, 2, 3)
    assert torch.allclose(gradient, expected)
    other = logp.detach() + numbers(5, 2, 3, seed=7)
    margin = (other - logp.detach()).sum(2)
    by_hand = -torch.log(1 / (1 + torch.exp(-beta * (margin[:, 0] - margin[:, 1]))))
    assert torch.allclose(dpo_loss(other, logp.detach(), beta), by_hand)


# ---- the loop ----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def small(small_evaluations):
    pass


def lines(folder, name="metrics.jsonl"):
    return [{k: v for k, v in json.loads(text).items() if not k.startswith("t_")}
            for text in open(folder / name)]


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])
    return files.load(str(folder / "ckpt.pt"))


def test_a_resumed_run_remembers(mini_base, tmp_path):
    """AWR keeps the groups of earlier steps, and the checkpoint holds them."""
    whole = go(tmp_path / "whole", mini_base, "--replay=2")
    half = go(tmp_path / "half", mini_base, "--replay=2", "--stop_after=3")
    assert len(half["memory"]) == 2 and half["memory"][0]["tokens"].shape == (4, 4, 16)      # --replay=2
    train.main([f"--out_dir={tmp_path / 'half'}", "--resume"])
    rest = files.load(str(tmp_path / "half" / "ckpt.pt"))
    assert all(torch.equal(v, rest["model"][k]) for k, v in whole["model"].items())
    assert lines(tmp_path / "whole") == lines(tmp_path / "half")
    first = lines(tmp_path / "whole")[0]               # --groups=6, but 4 exist so far: it imitates all
    assert first["imitated_reward"] > first["reward"]


def test_a_pool_is_continued(mini_base, tmp_path, monkeypatch):
    """A run is stopped while it samples its pool. Resumed, it samples the rest, and ends like a whole run."""
    flags = ["--pool=3", "--tau=0"]
    whole = go(tmp_path / "whole", mini_base, *flags)
    original, drawn = rejection.rated_samples, []

    def interrupted(cfg, run, *rest):
        drawn.append(1)
        run.stop.name = "SIGTERM" if len(drawn) == 2 else ""
        return original(cfg, run, *rest)
    monkeypatch.setattr(rejection, "rated_samples", interrupted)
    with pytest.raises(Fault, match="stopped by a signal after 2 of 3 steps of the pool"):
        go(tmp_path / "half", mini_base, *flags)
    train.main([f"--out_dir={tmp_path / 'half'}", "--resume"])
    assert len(drawn) == 3                                          # the third step only
    rest = files.load(str(tmp_path / "half" / "ckpt.pt"))
    assert "memory" not in rest and all(torch.equal(v, rest["model"][k]) for k, v in whole["model"].items())
    assert {"table.md", "before_after.png", "curves.png"} <= {p.name for p in (tmp_path / "half").iterdir()}
    assert "reward" not in lines(tmp_path / "half")[0]              # nothing is sampled any more
    (tmp_path / "half" / "pool" / "00001.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="00001.pt is damaged: delete it"):
        train.main([f"--out_dir={tmp_path / 'half'}", "--resume"])


def test_a_step_is_maximum_likelihood(mini_base, tmp_path, monkeypatch):
    """With tau = infinity the gradient of a step is that of the cross-entropy to the samples. Micro-batches
    change nothing."""
    found = []

    def no_step(self, step):
        found.append({n: p.grad.clone() for n, p in self.policy.named_parameters()})
        self.grad_norm = 0.0
    monkeypatch.setattr(run.Run, "optimizer_step", no_step)
    for size in (64, 4):
        go(tmp_path / f"{size}", mini_base, "--tau=1e9", "--max_steps=2", "--stop_after=1", "--groups=4",
           f"--micro_batch={size}")
    memory = files.load(str(tmp_path / "64" / "ckpt.pt"))["memory"][0]
    cfg, _ = config.load(evaluate.options, [f"--init_from={mini_base}", *QUICK])
    _, pipeline = evaluate.open_world(cfg, torch.device("cpu"))
    conditions, tokens = pipeline.encode(memory["prompts"]), memory["tokens"].long().flatten(0, 1)
    rows = torch.arange(4).repeat_interleave(4)
    logits = pipeline.policy.train(False)(tokens, conditions.cond[rows], conditions.mask[rows])
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, p in pipeline.policy.named_parameters():
        for gradient in found:
            assert torch.allclose(gradient[name], p.grad, atol=1e-6), name


def test_dpo_learns_the_order(mini_base, tmp_path):
    go(tmp_path / "run", mini_base, "--pool=1", "--loss=dpo", "--max_steps=12", "--eval_interval=12",
       "--groups=4", "--learning_rate=0.01", "--tau=0.1")
    log = lines(tmp_path / "run")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["preferred"] == 1 and log[-1]["loss"] < .5


def test_what_it_refuses(mini_base, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--shard needs equally many"):
        config.load(evaluate.options, ["--algorithm=rejection", "--shard"])
    with pytest.raises(UserError, match="needs a policy of tokens"):
        config.load(evaluate.options, ["--algorithm=rejection", "--world=tiny_flow"])
    for words, message in ((["--beta=0.1"], "no option 'beta'"), (["--loss=dpo", "--tau=0"], "--tau must be"),
                           (["--tau=1e-9"], "--tau must be"), (["--pool=2", "--replay=3"], "--replay has no"),
                           (["--micro_batch=4"], "--micro_batch must be at least 8")):
        with pytest.raises(UserError, match=message):
            config.load(evaluate.options, ["--algorithm=rejection", *words])
    cfg, _ = config.load(evaluate.options, ["--algorithm=rejection", "--groups=2"])
    with pytest.raises(UserError, match="must be at least 4, the number of processes"):
        evaluate.check_shares(cfg, 4)
    monkeypatch.setattr("tiny.judge.Judge.forward", lambda _, images, prompts: torch.full(
        (len(images),), float("nan")))
    with pytest.raises(Fault, match="the rewards of 16 images are not finite"):
        go(tmp_path / "nan", mini_base)
