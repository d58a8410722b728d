"""python -m pytest tests/core/test_vapi.py

Each claim of vapi.py is compared with a second statement of it. Whether its ablation comes out as
docs/vapi.md says is tested by lab/ablation.py.
"""
import itertools
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import grpo
import train
import vapi
from common import files
from common.config import UserError
from divergences import DIVERGENCES, Categorical
from model import GPT
from test_train import Recorder, in_float64, lines, moved, same
from tiny import shapes
QUICK = ["--algorithm=vapi", "--eval_interval=3", "--eval_prompts=1", "--eval_draws=8",
         "--prompts_per_step=3", "--group_size=4", "--micro_batch=12", "--context_noise=.3",
         "--device=cpu", "--beta=.1", "--divergence=reverse_kl"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the derivation ----------------------------------------------------------------------------------------
def test_the_elbo_bounds_the_likelihood():
    """Three codes, two tokens, and one image: all nine sequences can be listed."""
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
    """Step 4: the mean over all sequences of the gradient of grpo.loss is the gradient of E_q[d]."""
    T, V = 2, 3
    logits = torch.randn(1, T, V, generator=generator(), dtype=torch.float64).requires_grad_()
    every = torch.tensor(list(itertools.product(range(V), repeat=T)))                            # [9,T]
    d = torch.rand(9, generator=generator(1), dtype=torch.float64)
    q = logits[0].log_softmax(-1)[torch.arange(T), every].sum(1).exp()                           # [9]
    (exact,) = torch.autograd.grad((q * d).sum(), logits)
    row, old = torch.zeros(9, dtype=torch.long), logits[0].log_softmax(-1)[torch.arange(T), every].detach()
    # A weight q on each sequence takes the place of sampling it, with the advantage -d. n_actions = 1: sums.
    loss, _ = grpo.loss(Categorical(logits, rows=row), Categorical(logits.detach(), rows=row), every, old, -d,
                        1, q.detach()[:, None].expand(-1, T), divergence="none")
    (ours,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(ours, exact, atol=1e-12)


# ---- noise, samples, distances -----------------------------------------------------------------------------
def test_noise_has_its_rate_and_leaves_the_targets():
    tokens = torch.arange(50).repeat(400, 4)                                                     # [400,200]
    kept = tokens.clone()
    noisy = vapi.corrupt(tokens, .3, 50, generator())
    assert torch.equal(tokens, kept)
    # A random token equals the old one once in 50. The bound is 5 standard deviations of 80,000 samples.
    assert (noisy != tokens).double().mean().item() == pytest.approx(.3 * 49 / 50, abs=.009)
    assert noisy[noisy != tokens].bincount(minlength=50).min() > 300                # of 480 on average
    assert torch.equal(vapi.corrupt(tokens, 0., 50, generator()), tokens)


def test_samples_follow_the_table():
    logits = torch.randn(3, 11, generator=generator()) * 2
    logits[:, [4, 10]] = -torch.inf                           # two impossible codes, one of them at the end
    p = logits.softmax(1)
    sampled = vapi.sample_table(p, torch.rand(100_000, 3, generator=generator(1)))               # [G,T]
    for t in range(3):
        counts = sampled[:, t].bincount(minlength=11)
        assert counts[4] == counts[10] == 0
        expected = 100_000 * p[t].clamp_min(1e-9)
        assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square of 8 degrees: one in 200,000
    ends = torch.tensor([[0.] * 3, [1 - 2 ** -24] * 3])          # the smallest and largest of torch.rand
    assert not p.gather(1, vapi.sample_table(p, ends).T).eq(0).any()


def test_distance_is_that_of_the_formula():
    a, b = torch.randn(2, 2, 3, 4, 4, generator=generator())
    far = torch.tensor([3., 4.])                                 # a perceptual distance
    mse = torch.stack([((x - y) ** 2).mean() for x, y in zip(a, b)])
    assert torch.allclose(vapi.distance(a, b, lambda *pair: far, 2., .5), 2 * mse + .5 * far, atol=1e-6)
    to_one = vapi.distance(a, b[:1], lambda *pair: far, 1., 0.)
    assert torch.allclose(to_one, (a - b[0]).square().mean((1, 2, 3)))
    assert (vapi.distance(a, a.clone(), lambda x, y: (x - y).square().sum((1, 2, 3))) == 0).all()


# ---- the step ----------------------------------------------------------------------------------------------
@pytest.fixture
def step(mini_base, monkeypatch):
    """Return what vapi_loop passes to its loss in a step of 3 images x 4 samples, in float64, and what it
    started from: cfg, world, pipeline, recorder, captions, originals, and the arguments of vapi.loss_of."""
    cfg = evaluate.options({"algorithm": "vapi"})(
        algorithm="vapi", prompts_per_step=3, group_size=4, init_from=mini_base, beta=.3, temperature=1.3,
        context_noise=.3, device="cpu", micro_batch=5)

    def one_step():
        world, pipeline = in_float64(*evaluate.open_world(cfg, torch.device("cpu")))
        moved(pipeline)
        drawn, calls = [], []
        draw, loss_of = world.images.draw, vapi.loss_of
        world.images.draw = lambda n: drawn.extend(draw(n)) or drawn
        with monkeypatch.context() as patch:
            patch.setattr(vapi, "loss_of", lambda *args: calls.append(args) or loss_of(*args))
            random.seed(0)
            recorder = Recorder(pipeline.policy)
            vapi.vapi_loop(cfg, recorder, world, pipeline)
        _, policy, reference, context, conditions, targets, *_ = calls[0]
        image_of, tokens, logp_old, adv = (torch.cat([args[k] for args in calls]) for k in (6, 7, 8, 9))
        captions, scenes = zip(*drawn)
        return SimpleNamespace(
            cfg=cfg, world=world, pipeline=pipeline, recorder=recorder, captions=list(captions),
            originals=world.images.load(list(scenes)), policy=policy, reference=reference, context=context,
            conditions=conditions, targets=targets, image_of=image_of, tokens=tokens, logp_old=logp_old,
            adv=adv, n_tokens=calls[0][10], beta=calls[0][11], again=one_step)
    return one_step()


def loss_of(step, rows, cfg=None, adv=None, seeds=None):
    """vapi.loss_of for some rows of the step."""
    return vapi.loss_of(
        cfg or step.cfg, step.policy, step.reference, step.context, step.conditions, step.targets,
        step.image_of[rows], step.tokens[rows], step.logp_old[rows], (step.adv if adv is None else adv)[rows],
        step.n_tokens, step.beta, seeds)


def logits_of_images(step):
    """The policy's logits for all three images, at temperature 1."""
    return step.policy.distribution(step.context, step.conditions, torch.arange(3)).logits


def test_a_batch_is_what_it_says(step):
    assert step.tokens.shape == step.logp_old.shape == (12, 16) and step.originals.shape == (3, 3, 32, 32)
    assert torch.equal(step.targets, step.pipeline.encode_images(step.originals))
    assert step.image_of.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (step.n_tokens, step.beta) == (12 * 16, .3)
    context = step.context.actions
    assert 0 < (context != step.targets).double().mean().item() < .7
    # the log-probabilities again, sequence by sequence, each by its own forward pass
    cond, mask = step.conditions.cond, step.conditions.mask
    for n in range(12):
        i = step.image_of[n:n + 1]
        logits = step.policy(context[i], cond[i], mask[i]) / step.cfg.temperature
        logp = torch.distributions.Categorical(logits=logits).log_prob(step.tokens[n:n + 1])
        assert torch.allclose(logp[0], step.logp_old[n], atol=1e-10)
    # the rewards and advantages again, sample by sample
    pixels = step.pipeline.decode(step.tokens)
    rewards = torch.stack([-vapi.distance(pixels[n:n + 1], step.originals[n // 4:n // 4 + 1],
                                          step.world.images.perceptual)[0] for n in range(12)]).detach()
    assert torch.allclose(step.adv, grpo.advantages(rewards, 4)[0], atol=1e-8)
    assert step.recorder.line["reward"] == pytest.approx(rewards.mean().item())
    again = step.again()
    assert torch.equal(again.tokens, step.tokens) and torch.equal(again.context.actions, context)


@pytest.mark.parametrize("divergence, estimator", [("none", "sampled")] + [
    (d, e) for d in DIVERGENCES for e in ("sampled", "unbiased", "exact")])
def test_one_forward_for_all_samples_is_a_forward_for_each(step, divergence, estimator):
    """Departure 1: loss and gradient equal the repeated form, for a micro-batch that cuts groups in two."""
    cfg = replace(step.cfg, divergence=divergence, estimator=estimator)
    adv = torch.randn(12, generator=generator(), dtype=torch.float64)
    step.logp_old = step.logp_old + .1 * torch.randn(12, 16, generator=generator(3), dtype=torch.float64)
    params = list(step.policy.parameters())
    total = {}
    for rows in torch.arange(12).split(5):                                # 5 + 5 + 2 rows
        loss, stats = loss_of(step, rows, cfg, adv)
        loss.backward()
        grpo.accumulate(total, stats | {"loss": loss.detach()})
    ours = [p.grad.clone() for p in params if p.grad is not None]
    step.policy.zero_grad()
    i, cond, mask = step.image_of, step.conditions.cond, step.conditions.mask        # every image G times
    logits, ref = (m(step.context.actions[i], cond[i], mask[i]) for m in (step.policy, step.reference))
    loss, stats = grpo.loss(Categorical(logits / 1.3), Categorical(ref / 1.3), step.tokens, step.logp_old,
                            adv, 12 * 16, beta=.3, divergence=divergence, estimator=estimator)
    prior = -logits.log_softmax(-1).gather(2, step.targets[i][..., None]).mean()
    (loss + cfg.prior_weight * prior).backward()
    assert total["loss"].item() == pytest.approx((loss + cfg.prior_weight * prior).item(), abs=1e-12)
    for a, b in zip(ours, [p.grad for p in params if p.grad is not None], strict=True):
        assert torch.allclose(a, b, atol=1e-11)
    for key in ("kl_reverse", "entropy", "max_ratio_error", "clip_share"):
        assert total[key].item() == pytest.approx(stats[key].item(), abs=1e-12)
    assert total["prior"].item() == pytest.approx(prior.item())


def test_the_answer_is_not_in_the_input(step):
    """Alignment: token i of the context never alters the logits of tokens up to i. (VA-pi's code for Janus is
    off by one: there the model sees the token that it has to predict.)"""
    context, V = step.context.actions, step.policy.config.vocab_size
    with torch.no_grad():
        before = logits_of_images(step)
        for i in range(16):
            context[:, i] = (context[:, i] + 1) % V
            after = logits_of_images(step)
            assert torch.equal(before[:, :i + 1], after[:, :i + 1])
            assert i == 15 or not torch.allclose(before[:, i + 1], after[:, i + 1])
            before = after


def test_the_prior_is_the_likelihood_of_clean_tokens_on_a_noisy_context(step):
    logits = logits_of_images(step).detach().requires_grad_()
    loss = vapi.prior_loss(logits, step.targets)
    by_hand = -math.log(logits[1, 7].softmax(0)[step.targets[1, 7]].item())
    assert loss[1, 7].item() == pytest.approx(by_hand)
    (grad,) = torch.autograd.grad(loss.sum(), logits)            # softmax - onehot
    assert torch.allclose(grad, logits.softmax(-1) - F.one_hot(step.targets, logits.shape[-1]), atol=1e-12)


def test_dropout_of_the_prior_leaves_the_policy_term_alone(step):
    adv, rows = torch.ones(12, dtype=torch.float64), torch.arange(12)
    both = None, [5, 6, 7]
    losses = [loss_of(step, rows, adv=adv, seeds=seeds) for seeds in both]
    assert not step.policy.training
    assert losses[0][1]["max_ratio_error"] == losses[1][1]["max_ratio_error"] < 1e-10
    assert losses[0][1]["prior"] != losses[1][1]["prior"]
    rest = [loss - step.cfg.prior_weight * stats["prior"] for loss, stats in losses]
    assert rest[0].item() == pytest.approx(rest[1].item(), abs=1e-12)
    for module in step.policy.modules():                         # with nothing to drop, both are equal
        module.dropout = module.token_dropout = 0.
    step.policy.config.class_dropout_prob = step.policy.config.token_dropout_p = 0.
    losses = [loss_of(step, rows, adv=adv, seeds=seeds)[0].item() for seeds in both]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_dropout_depends_on_seeds_and_not_on_micro_batches(step):
    """Rows 5 and 10 are cut out of the middle of a group, so two images have their forward passes twice."""
    step.policy.recompute = True                                 # as in both full-size configs
    found = []
    for size, seeds in ((12, [5, 6, 7]), (5, [5, 6, 7]), (12, [5, 6, 8])):
        step.policy.zero_grad()
        loss = sum(loss_of(step, rows, seeds=seeds)[0] for rows in torch.arange(12).split(size))
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in step.policy.parameters() if p.grad is not None])
    for one, cut in zip(*found[:2], strict=True):
        assert torch.allclose(one, cut, atol=1e-12)
    assert abs(found[2][0] - found[0][0]) > 1e-3


# ---- runs --------------------------------------------------------------------------------------------------
@pytest.fixture
def small(small_evaluations, monkeypatch):
    """`small_evaluations`, and a reconstruction of 16 images."""
    monkeypatch.setattr("tiny.world.FIXED_IMAGES", 16)


def go(folder, base, *more):
    train.main([f"--out_dir={folder}", f"--init_from={base}", *QUICK, *more])
    return files.load(str(folder / "ckpt.pt"))


def test_six_steps_are_three_and_three_bit_for_bit(mini_base, tmp_path, small):
    options = ["--max_steps=6", "--prior_dropout", "--recompute"]
    whole = go(tmp_path / "whole", mini_base, *options)
    go(tmp_path / "halves", mini_base, *options, "--stop_after=3")
    train.main([f"--out_dir={tmp_path / 'halves'}", "--resume"])
    rest = files.load(str(tmp_path / "halves" / "ckpt.pt"))
    assert all(same(whole[key], rest[key]) for key in ("model", "optimizer", "rng", "step"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "halves")
    first = lines(tmp_path / "whole")[0]
    assert first["max_ratio_error"] < 1e-5 and first["kl_reverse"] == pytest.approx(0, abs=1e-6)
    assert "reconstruction" in lines(tmp_path / "whole", "evaluations.jsonl")[-1]


def test_micro_batches_do_not_change_the_step(mini_base, tmp_path, monkeypatch, small):
    """This needs float64: rounding in fp32 could turn a uniform number into another token, and then the runs
    would differ."""
    opened = evaluate.open_world
    monkeypatch.setattr(evaluate, "open_world", lambda *args: in_float64(*opened(*args)))
    runs = [go(tmp_path / f"m{m}", mini_base, "--max_steps=2", f"--micro_batch={m}", "--inner_epochs=2",
               "--learning_rate=.01") for m in (12, 5)]
    for a, b in zip(lines(tmp_path / "m12"), lines(tmp_path / "m5"), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    for name, value in runs[0]["model"].items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, runs[1]["model"][name], atol=1e-8), name


def test_it_learns_to_reconstruct(tmp_path, small_evaluations):
    """In a dozen steps of the real base, samples come nearer to the images than chance would bring them."""
    train.main(["configs/tiny_vapi.py", f"--out_dir={tmp_path / 'run'}", "--max_steps=12", "--warmup=0",
                "--eval_prompts=1", "--eval_draws=8", "--eval_interval=12", "--device=cpu"])
    before, after = lines(tmp_path / "run", "evaluations.jsonl")
    assert after["reconstruction"] > before["reconstruction"] + .02


def test_options_that_mean_nothing_to_vapi_are_unknown_to_it(mini_base, tmp_path):
    for option in ("cfg_scale=2.0", "score_cfg=1.0", "critical_tokens", "dynamic_weight", "logit_chunk=4",
                   "sample_batch=8"):
        with pytest.raises(UserError, match=f"no option '{option.split('=')[0]}' for this run"):
            go(tmp_path / "run", mini_base, f"--{option}")
    for option in ("context_noise=1.5", "wrong_captions=2", "prior_weight=-1", "prior_dropout --shard"):
        with pytest.raises(UserError, match=re.split("[= ]", option)[0]):
            go(tmp_path / "run", mini_base, *f"--{option}".split())
    assert not (tmp_path / "run").exists()


def test_the_share_of_wrong_captions(mini_base):
    cfg = evaluate.options({"algorithm": "vapi"})(algorithm="vapi", init_from=mini_base, device="cpu")
    world, pipeline = evaluate.open_world(cfg, torch.device("cpu"))
    random.seed(0)
    drawn = world.images.draw(2000)
    right = sum(shapes.matches(scene, shapes.parse(caption)) for caption, scene in drawn) / 2000
    assert .79 < right < .85                                     # a wrong caption may be true by chance
    assert world.images.load([s for _, s in drawn[:2]]).shape == (2, 3, 32, 32)
    assert isinstance(pipeline.policy, GPT) and len(set(world.images.fixed_images()[0])) > 50
