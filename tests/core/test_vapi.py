"""python -m pytest tests/core/test_vapi.py

What vapi.py claims, each against a second statement of it. That its ablation comes out as README.md says is
ablation.py's business.
"""
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common import files as checkpoint
import evaluate
import grpo
import train
import vapi
from common.config import UserError
from divergences import DIVERGENCES
from model import GPT
from test_train import lines, same
import metrics

QUICK = ["--algorithm=vapi", "--eval_interval=3", "--eval_prompts=1", "--eval_draws=64",
         "--prompts_per_step=3", "--group_size=4", "--micro_batch=12", "--context_noise=.3",
         "--device=cpu", "--beta=.1", "--divergence=reverse_kl"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the derivation ----------------------------------------------------------------------------------------
def test_the_elbo_bounds_the_likelihood():
    """Three codes, two tokens, one picture: all nine sequences can be listed."""
    g = generator()
    prior, posterior = (torch.rand(9, generator=g, dtype=torch.float64) for _ in range(2))
    prior, d = prior / prior.sum(), 3 * torch.rand(9, generator=g, dtype=torch.float64)
    likelihood = (prior * (-d).exp()).sum().log()

    def elbo(q):
        return (q * -d).sum() - (q * (q / prior).log()).sum()
    for q in (posterior / posterior.sum(), prior, torch.full((9,), 1 / 9, dtype=torch.float64)):
        assert elbo(q) < likelihood
    exact = prior * (-d).exp() / (prior * (-d).exp()).sum()
    assert elbo(exact).item() == pytest.approx(likelihood.item(), abs=1e-12)


def test_the_policy_term_descends_the_expected_distance():
    """Step 4: the mean over all sequences of what grpo_loss gives for each is the gradient of E_q[d]."""
    T, V = 2, 3
    logits = torch.randn(1, T, V, generator=generator(), dtype=torch.float64).requires_grad_()
    every = torch.tensor(list(itertools.product(range(V), repeat=T)))                            # [9,T]
    d = torch.rand(9, generator=generator(1), dtype=torch.float64)
    q = logits[0].log_softmax(-1)[torch.arange(T), every].sum(1).exp()                           # [9]
    (exact,) = torch.autograd.grad((q * d).sum(), logits)
    own, old = torch.zeros(9, dtype=torch.long), logits[0].log_softmax(-1)[torch.arange(T), every].detach()
    # a weight q on each sequence takes the place of drawing them; -d its advantage; n_tokens = 1: plain sums
    loss, _ = grpo.grpo_loss(logits, logits.detach(), every, old, -d, 1, q.detach()[:, None].expand(-1, T),
                             own=own, divergence="none")
    (ours,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(ours, exact, atol=1e-12)


# ---- noise, drawing, distances -----------------------------------------------------------------------------
def test_noise_has_its_rate_and_leaves_the_targets():
    tokens = torch.arange(50).repeat(400, 4)                                                     # [400,200]
    kept = tokens.clone()
    noisy = vapi.corrupt(tokens, .3, 50, generator())
    assert torch.equal(tokens, kept)
    # a random token is the old one once in 50; 5 standard deviations of 80,000 draws
    assert (noisy != tokens).double().mean().item() == pytest.approx(.3 * 49 / 50, abs=.009)
    assert noisy[noisy != tokens].bincount(minlength=50).min() > 300                # of 480 on average
    assert torch.equal(vapi.corrupt(tokens, 0., 50, generator()), tokens)


def test_draws_follow_the_table():
    logits = torch.randn(3, 11, generator=generator()) * 2
    logits[:, [4, 10]] = -torch.inf                              # two codes that cannot be, one at the end
    p = logits.softmax(1)
    drawn = vapi.draw(p, torch.rand(100_000, 3, generator=generator(1)))                         # [G,T]
    for t in range(3):
        counts = drawn[:, t].bincount(minlength=11)
        assert counts[4] == counts[10] == 0
        expected = 100_000 * p[t].clamp_min(1e-9)
        assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square of 8 degrees: one in 200,000
    ends = torch.tensor([[0.] * 3, [1 - 2 ** -24] * 3])          # the ends of what torch.rand returns
    assert not p.gather(1, vapi.draw(p, ends).T).eq(0).any()


def test_distance_is_that_of_the_formulas():
    a, b = torch.randn(2, 2, 3, 4, 4, generator=generator())
    layers = [torch.randn(2, 5, 2, 2, generator=generator(s)) for s in range(4)]

    def features(images):                                        # two layers, other ones for each picture
        return layers[:2] if images is a else layers[2:]
    by_hand = torch.zeros(2)
    for i, x, y in itertools.product(range(2), range(2), range(2)):
        for n in range(2):
            u, v = (layers[n + k][i, :, y, x] for k in (0, 2))
            by_hand[i] += ((u / u.norm() - v / v.norm()) ** 2).sum() / 4
    far = vapi.lpips_of(features, a, b)
    assert torch.allclose(far, by_hand, atol=1e-6)
    mse = torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b)])
    assert torch.allclose(vapi.distance(a, b, lambda *p: far, 2., .5), 2 * mse + .5 * by_hand, atol=1e-6)
    assert (vapi.distance(a, a.clone(), lambda x, y: vapi.lpips_of(lambda i: [i], x, y)) == 0).all()


def test_frechet_distance_of_gaussians():
    x = torch.randn(4000, 1, generator=generator(), dtype=torch.float64)
    x = (x - x.mean()) / x.std()                         # on a line: (difference of means)^2 + that of stds^2
    assert metrics.frechet(2 * x + 1, 5 * x - 3) == pytest.approx(4 ** 2 + 3 ** 2)
    a, b = torch.randn(2, 500, 6, generator=generator(1), dtype=torch.float64)
    b = b @ torch.randn(6, 6, generator=generator(2), dtype=torch.float64)
    # the second way: the eigenvalues of the product itself, which is not symmetric
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.sqrt().sum()
    other = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    assert metrics.frechet(a, b) == pytest.approx(other.item())
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_brute_force():
    real, drawn = torch.randn(40, 2, generator=generator()), .4 * torch.randn(30, 2, generator=generator(1))

    def share(points, cloud):
        def inside(p):
            return any((p - c).norm() <= sorted((c - o).norm() for o in cloud)[3] for c in cloud)
        return sum(map(inside, points)) / len(points)
    assert metrics.precision_recall(real, drawn) == (
        pytest.approx(share(drawn, real)), pytest.approx(share(real, drawn)))
    assert metrics.precision_recall(real, real) == (1, 1)
    assert metrics.precision_recall(real, real + 100) == (0, 0)


# ---- the step ----------------------------------------------------------------------------------------------
@pytest.fixture
def step(mini_base):
    """A world, options, and a batch of 3 pictures x 4 samples in float64."""
    cfg = train.Config(algorithm="vapi", prompts_per_step=3, group_size=4, init_from=mini_base, beta=.3,
                       dtype="float64", temperature=1.3, context_noise=.3, device="cpu", micro_batch=5)
    random.seed(0)
    world = evaluate.open_world(cfg, torch.device("cpu"))
    with torch.no_grad():
        world.policy.output.weight.add_(.2 * torch.randn(world.policy.output.weight.shape,
                                                         generator=generator()))
    return cfg, world, vapi.sample(cfg, world, generator(5))


def test_a_batch_is_what_it_says(step):
    cfg, world, batch = step
    assert batch.tokens.shape == batch.logp_old.shape == (12, 16) and batch.originals.shape == (3, 3, 32, 32)
    assert torch.equal(batch.targets, world.vqgan.encode(batch.originals))
    assert batch.prompt.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    changed = (batch.context != batch.targets).double().mean().item()
    assert 0 < changed < .7
    # log-probabilities again, sequence by sequence, by a forward pass of its own
    for n in range(12):
        i = batch.prompt[n:n + 1]
        logits = world.policy(batch.context[i], batch.cond[i], batch.mask[i]) / cfg.temperature
        logp = torch.distributions.Categorical(logits=logits).log_prob(batch.tokens[n:n + 1])
        assert torch.allclose(logp[0], batch.logp_old[n], atol=1e-10)
    random.seed(0)
    again = vapi.sample(cfg, world, generator(5))
    assert torch.equal(again.tokens, batch.tokens) and torch.equal(again.context, batch.context)


@pytest.mark.parametrize("divergence, estimator", [("none", "sampled")] + [
    (d, e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")])
def test_one_forward_for_all_samples_is_a_forward_for_each(step, divergence, estimator):
    """Departure 1: the loss and its gradient, against the repeated form written out, for a micro-batch that
    cuts groups in two."""
    cfg, world, batch = step
    cfg = SimpleNamespace(**vars(cfg) | dict(divergence=divergence, estimator=estimator))
    adv, weight = torch.randn(12, generator=generator(), dtype=torch.float64), torch.ones_like(batch.logp_old)
    batch.logp_old = batch.logp_old + .1 * torch.randn(12, 16, generator=generator(3), dtype=torch.float64)
    params = list(world.policy.parameters())
    total = {}
    for rows in grpo.pieces(cfg, batch):                                  # 5 + 5 + 2 rows
        loss, stats = vapi.loss_of(cfg, world, batch, rows, adv, weight, cfg.beta)
        loss.backward()
        grpo.accumulate(total, stats | {"loss": loss.detach()})
    ours = [p.grad.clone() for p in params if p.grad is not None]
    world.policy.zero_grad()
    i = batch.prompt                                                      # every picture G times
    logits, ref = (m(batch.context[i], batch.cond[i], batch.mask[i]) for m in (world.policy, world.reference))
    loss, stats = grpo.grpo_loss(logits / 1.3, ref / 1.3, batch.tokens, batch.logp_old, adv, 12 * 16, beta=.3,
                                 divergence=divergence, estimator=estimator)
    prior = -logits.log_softmax(-1).gather(2, batch.targets[i][..., None]).mean()
    (loss + cfg.prior_weight * prior).backward()
    assert total["loss"].item() == pytest.approx((loss + cfg.prior_weight * prior).item(), abs=1e-12)
    for a, b in zip(ours, [p.grad for p in params if p.grad is not None], strict=True):
        assert torch.allclose(a, b, atol=1e-11)
    for key in ("kl_reverse", "entropy", "max_ratio_error", "clip_share"):
        assert total[key].item() == pytest.approx(stats[key].item(), abs=1e-12)
    assert total["prior"].item() == pytest.approx(prior.item())


def test_the_answer_is_not_in_the_input(step):
    """Alignment: the i-th token of the context never alters what is said of tokens up to i. (The code of
    VA-pi for Janus is one off: there the model sees the token that it is asked for.)"""
    _, world, batch = step
    everything = torch.arange(3)
    with torch.no_grad():
        before = vapi.logits_of(world.policy, batch, everything)
        for i in range(16):
            batch.context[:, i] = (batch.context[:, i] + 1) % world.policy.config.vocab_size
            after = vapi.logits_of(world.policy, batch, everything)
            assert torch.equal(before[:, :i + 1], after[:, :i + 1])
            assert i == 15 or not torch.allclose(before[:, i + 1], after[:, i + 1])
            before = after


def test_the_prior_is_the_likelihood_of_clean_tokens_on_a_noisy_context(step):
    _, world, batch = step
    logits = vapi.logits_of(world.policy, batch, torch.arange(3)).detach().requires_grad_()
    loss = vapi.prior_loss(logits, batch.targets)
    assert loss[1, 7].item() == pytest.approx(-math.log(logits[1, 7].softmax(0)[batch.targets[1, 7]].item()))
    (grad,) = torch.autograd.grad(loss.sum(), logits)            # softmax - onehot
    assert torch.allclose(grad, logits.softmax(-1) - F.one_hot(batch.targets, logits.shape[-1]), atol=1e-12)


def test_dropout_of_the_prior_leaves_the_policy_term_alone(step):
    cfg, world, batch = step
    adv, weight, rows = torch.ones(12, dtype=torch.float64), torch.ones_like(batch.logp_old), torch.arange(12)
    with_it = SimpleNamespace(**vars(cfg) | {"prior_dropout": True})
    losses = [vapi.loss_of(c, world, batch, rows, adv, weight, .3) for c in (cfg, with_it)]
    assert not world.policy.training
    assert losses[0][1]["max_ratio_error"] == losses[1][1]["max_ratio_error"] < 1e-10
    assert losses[0][1]["prior"] != losses[1][1]["prior"]
    rest = [loss - cfg.prior_weight * stats["prior"] for loss, stats in losses]
    assert rest[0].item() == pytest.approx(rest[1].item(), abs=1e-12)
    for module in world.policy.modules():                        # with nothing to drop both are the same
        module.dropout = 0.
    world.policy.config.class_dropout_prob = world.policy.config.token_dropout_p = 0.
    losses = [vapi.loss_of(c, world, batch, rows, adv, weight, .3)[0].item() for c in (cfg, with_it)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


# ---- runs --------------------------------------------------------------------------------------------------
def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])
    return checkpoint.load(str(folder / "ckpt.pt"))


def test_six_steps_are_three_and_three_bit_for_bit(mini_base, tmp_path):
    whole = go(tmp_path / "whole", mini_base, "--max_steps=6", "--prior_dropout")
    go(tmp_path / "halves", mini_base, "--max_steps=6", "--prior_dropout", "--stop_after=3")
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    rest = checkpoint.load(str(tmp_path / "halves" / "ckpt.pt"))
    assert all(same(whole[key], rest[key]) for key in ("model", "optimizer", "rng", "step"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "halves")
    first = lines(tmp_path / "whole")[0]
    assert first["max_ratio_error"] < 1e-5 and first["kl_reverse"] == pytest.approx(0, abs=1e-6)
    assert "reconstruction" in lines(tmp_path / "whole", "evaluations.jsonl")[-1]


def test_micro_batches_do_not_change_the_step(mini_base, tmp_path):
    """In float64: one token that falls to the other side of a number drawn would be another run."""
    runs = [go(tmp_path / f"m{m}", mini_base, "--max_steps=2", f"--micro_batch={m}", "--dtype=float64",
               "--inner_epochs=2", "--learning_rate=.01") for m in (12, 5)]
    for a, b in zip(lines(tmp_path / "m12"), lines(tmp_path / "m5"), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    for name, value in runs[0]["model"].items():
        assert torch.allclose(value, runs[1]["model"][name], atol=1e-8), name


def test_it_learns_to_reconstruct(tmp_path):
    """A dozen steps of the real base: samples come nearer to the pictures, by more than chance does."""
    train.main(["configs/tiny_vapi.py", f"--out_dir={tmp_path / 'run'}", "--max_steps=12", "--warmup=0",
                "--eval_prompts=1", "--eval_draws=64", "--eval_interval=12", "--device=cpu"])
    before, after = lines(tmp_path / "run", "evaluations.jsonl")
    assert after["reconstruction"] > before["reconstruction"] + .02


def test_what_means_nothing_to_vapi_is_refused(mini_base, tmp_path):
    for option in ("cfg_scale=2.0", "score_cfg=1.0", "critical_tokens", "dynamic_weight", "chunk=4",
                   "sample_batch=8"):
        with pytest.raises(UserError, match=option.split("=")[0] + " means nothing"):
            go(tmp_path / "run", mini_base, f"--{option}")
    for option in ("context_noise=1.5", "wrong_captions=2", "prior_weight=-1"):
        with pytest.raises(UserError, match=option.split("=")[0]):
            go(tmp_path / "run", mini_base, f"--{option}")
    assert not (tmp_path / "run").exists()


def test_the_share_of_wrong_captions(mini_base):
    from tiny import shapes
    cfg = train.Config(algorithm="vapi", init_from=mini_base, device="cpu")
    world = evaluate.open_world(cfg, torch.device("cpu"))
    random.seed(0)
    drawn = world.draw_pictures(2000)
    right = sum(shapes.matches(scene, shapes.parse(caption)) for caption, scene in drawn) / 2000
    assert .79 < right < .85                                     # a wrong caption may be true by chance
    assert world.load([s for _, s in drawn[:2]]).shape == (2, 3, 32, 32)
    assert isinstance(world.policy, GPT) and len(set(world.held_back_pictures()[0])) > 50
