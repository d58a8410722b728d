"""python -m pytest tests/core/test_step_by_hand.py

Steps of train.grpo_loop on a policy that is a table (tests/helpers/by_hand.py), against losses written out
from probabilities. Nothing here calls grpo.loss. The optimizer step of common/run.py is compared with AdamW.
"""
import math
import random
import signal
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from by_hand import V, Pipeline, Table, World
from common import run
from critical import critical_tokens
from divergences import DIVERGENCES

P, G, STEP, BETA = 2, 4, 3, .575             # a linear schedule from .7 to .2 has .575 after 3 of 12 steps
RATE = 4.                                    # of the gradient descent between the two passes over a batch


class Recorder:
    """Takes the place of a Run for one step. It keeps the gradients, and moves the policy along them."""
    device, generator = torch.device("cpu"), torch.Generator()

    def __init__(self, policy):
        self.policy, self.gradients = policy, []
        self.generator.manual_seed(5)

    def rows(self, total):
        return torch.arange(total)

    def steps(self):
        yield STEP

    def phase(self, name):
        pass

    def optimizer_step(self, step):
        self.gradients.append(descend(self.policy))

    def log(self, step, line, stats):
        self.line = line | {name: value.item() for name, value in stats.items()}


def descend(policy):
    """Take a step along the gradients, and return these."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    with torch.no_grad():
        for p, gradient in zip(policy.parameters(), gradients):
            p -= RATE * gradient
    policy.zero_grad(set_to_none=True)
    return gradients


def loss_by_hand(cfg, policy, reference, tokens, prompt, adv, p_old):
    """Return the loss of each token of a step, from probabilities, and statistics of these tokens."""
    scale = cfg.score_cfg or cfg.cfg_scale
    pi = policy.logits(tokens, prompt, scale, cfg.temperature, cfg.uncond_grad).softmax(-1)      # [8,16,V]
    rho = reference.logits(tokens, prompt, scale, cfg.temperature).softmax(-1)
    p, q = ((x * torch.eye(V)[tokens]).sum(-1) for x in (pi, rho))                               # [8,16]
    w, m, mean = q / p, (pi + rho) / 2, (1 + q / p) / 2           # mean: m / pi at the sampled token
    f, total = {"reverse_kl": (w - w.log() - 1, (pi * (pi / rho).log()).sum(-1)),
                "forward_kl": (w * w.log() - w + 1, (rho * (rho / pi).log()).sum(-1)),
                "js": ((w * (w / mean).log() - mean.log()) / 2,
                       (pi * (pi / m).log() + rho * (rho / m).log()).sum(-1) / 2),
                "none": (0 * w, 0 * w)}[cfg.divergence]
    ratio, up = p / p_old, adv[:, None] > 0
    clipped = torch.where(up, ratio > 1 + cfg.clip_eps, ratio < 1 - cfg.clip_eps)
    limit = torch.where(up, 1 + cfg.clip_eps, 1 - cfg.clip_eps)
    gain = torch.where(clipped, limit, ratio) * adv[:, None]
    if cfg.dynamic_weight:
        e = (p / q).clamp(math.exp(-.5), math.exp(.5))
        gain = gain * torch.stack([e[:, :t + 1].mean(1) for t in range(16)], 1)
    penalty = {"sampled": f, "unbiased": ratio * f, "exact": total}[cfg.estimator]
    each = BETA * penalty - gain
    return each, {"clip_share": clipped.double().mean().item(),
                  "entropy": -(pi * pi.log()).sum(-1).mean().item(),
                  "kl_reverse": (pi * (pi / rho).log()).sum(-1).mean().item()}


@pytest.mark.parametrize("options", [dict(divergence="none")] + [
    dict(divergence=d, estimator=e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")] + [
    dict(critical_tokens=True), dict(dynamic_weight=True), dict(uncond_grad=False), dict(score_cfg=1.)],
    ids=lambda options: "-".join(map(str, options.values() if "divergence" in options else options)))
def test_two_passes_over_a_batch_by_hand(options):
    """The second pass has a policy that is not the sampler any more: ratios are clipped, and micro-batches
    that cut groups need their own rows of everything."""
    cfg = evaluate.options({"world": "llamagen"})(**dict(
        max_steps=12, prompts_per_step=P, group_size=G, micro_batch=3, cfg_scale=2., temperature=.8, beta=.7,
        beta_end=.2, beta_schedule="linear", clip_eps=.1, inner_epochs=2) | options)
    world, pipeline = World(), Pipeline()
    policy, reference, recorder = pipeline.policy, pipeline.reference, Recorder(pipeline.policy)
    random.seed(0)
    train.grpo_loop(cfg, recorder, world, pipeline)

    random.seed(0)
    prompts, twin, tokens = world.draw(P), Table(0), policy.kept.actions
    asked = [p for p in prompts for _ in range(G)]
    prompt, images = pipeline.encode(asked).cond, pipeline.decode(tokens)
    rewards = world.reward(images, asked).view(P, G)
    adv = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    scale = cfg.score_cfg or cfg.cfg_scale
    at_loss, at_rollout = (twin.logits(tokens, prompt, s, .8).softmax(-1).detach() for s in (scale, 2.))
    p_old, sampled = ((pi * torch.eye(V)[tokens]).sum(-1) for pi in (at_loss, at_rollout))       # [8,16]
    kept, found = torch.ones_like(tokens, dtype=torch.bool), []
    if cfg.critical_tokens:
        kept = critical_tokens(-(at_loss * at_loss.log()).sum(-1), tokens, pipeline.codebook, G, 4)
    for gradients in recorder.gradients:
        each, stats = loss_by_hand(cfg, twin, reference, tokens, prompt, adv, p_old)
        each[kept].mean().backward()                             # critical tokens: the mean over these alone
        assert all(map(torch.allclose, gradients, descend(twin)))
        found.append(stats)
    assert len(found) == 2 and found[1]["clip_share"] > 0 == found[0]["clip_share"]
    line = recorder.line
    assert line["beta"] == pytest.approx(BETA) and line["reward"] == pytest.approx(rewards.mean().item())
    assert line["heldout_reward"] == pytest.approx(images[:, 0, 0, 0].mean().item())
    assert line["clip_share"] == pytest.approx(found[1]["clip_share"])
    for name in ("entropy", "kl_reverse"):
        assert line[name] == pytest.approx(found[0][name])
    mismatch = (p_old / sampled - 1).abs().max().item()          # 0 unless the loss has another guidance
    assert line["max_ratio_error"] == pytest.approx(mismatch, abs=1e-12)
    f = world.embed(images).view(P, G, -1)
    pairs = [1 - f[i, a] @ f[i, b] for i in range(P) for a in range(G) for b in range(G) if a != b]
    assert line["diversity"] == pytest.approx(torch.stack(pairs).mean().item())


@pytest.mark.parametrize("grad_clip", [0., .5])
def test_the_optimizer_step_is_adamw_with_a_clipped_gradient(grad_clip, tmp_path):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cfg = evaluate.options({})(out_dir=str(tmp_path / "run"), max_steps=4, learning_rate=.1, warmup=.5,
                               weight_decay=.3, grad_clip=grad_clip, device="cpu")
    policy, w = Table(0), torch.cat([p.detach().flatten() for p in Table(0).parameters()])
    nothing = SimpleNamespace(results={}, images=None)
    plumbing = run.Run(cfg, None, policy, Table(1), torch.device("cpu"), lambda *args: nothing,
                       lambda *args: None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    mean, square = torch.zeros_like(w), torch.zeros_like(w)
    for step, size in enumerate((3., .2, 1., 7.)):
        gradient = torch.cos(torch.arange(len(w)) + step).double()
        gradient *= size / gradient.norm()
        start = 0
        for p in policy.parameters():
            p.grad, start = gradient[start:start + p.numel()].view_as(p).clone(), start + p.numel()
        plumbing.optimizer_step(step)
        assert plumbing.grad_norm == pytest.approx(size)                      # before clipping
        assert all(p.grad is None for p in policy.parameters())
        rate = .1 * ((.5, 1)[step] if step < 2 else .1 + .9 * (1 + math.cos(math.pi * (step - 2) / 2)) / 2)
        gradient *= min(1, grad_clip / size) if grad_clip else 1
        mean, square = .9 * mean + .1 * gradient, .95 * square + .05 * gradient ** 2
        m, s = mean / (1 - .9 ** (step + 1)), square / (1 - .95 ** (step + 1))
        w = w - rate * .3 * w - rate * m / (s.sqrt() + 1e-8)
        ours = torch.cat([p.detach().flatten() for p in policy.parameters()])
        assert torch.allclose(ours, w, rtol=1e-5, atol=1e-5)                  # torch clips by norm + 1e-6
