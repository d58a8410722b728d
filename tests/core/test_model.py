"""python -m pytest tests/core/test_model.py          (and -m slow: a compiled step, about a minute)

These tests compare model.py with an independent, naive transformer (naive_gpt.py), and with the rules of the
released LlamaGen checkpoints one by one. All models are tiny and random, and run on the CPU in a few seconds.
"""
import math
import re

import pytest
import torch
from torch.testing import assert_close

import naive_gpt
from common import lora
from common.interfaces import Conditions
from model import GPT, GPTConfig, PRESETS, PrefixAttention
from naive_gpt import naive_logits

NO_DROPOUT = dict(token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0)
both_types = pytest.mark.parametrize("model_type", ["t2i", "c2i"])
both_scales = pytest.mark.parametrize("cfg_scale", [1.0, 3.0])      # 1 is no guidance


def build(model_type="t2i", dtype=torch.float32, batch=4, **changes):
    """Return a tiny model in eval mode with random tensors, its config, and a batch of tokens, cond, mask."""
    sizes = dict(dim=32, n_layer=2, n_head=2, multiple_of=8, vocab_size=37, block_size=16, caption_dim=12,
                 num_classes=7, cls_token_num=5 if model_type == "t2i" else 1, model_type=model_type)
    cfg = GPTConfig(**(sizes | changes))
    gpt, noise = GPT(cfg), torch.Generator().manual_seed(0)
    # At the default scale (.02, output 0) every score is near 0 and attention near a mean, which would hide
    # most mistakes. At .2 and width 32 the scores have a spread of about 1.3.
    gpt.load_state_dict({name: torch.randn(tensor.shape, generator=noise) * 0.2 + ("norm" in name)
                         for name, tensor in gpt.state_dict().items()})
    gpt.to(dtype).eval()
    tokens = torch.randint(cfg.vocab_size, (batch, cfg.block_size), generator=noise)
    if model_type == "c2i":
        return gpt, cfg, tokens, torch.randint(cfg.num_classes, (batch,), generator=noise), None
    cond = torch.randn(batch, cfg.cls_token_num, cfg.caption_dim, generator=noise).to(dtype)
    # Prompts are padded on the left. Their lengths are 5, 3, 1, 0 features, and again from 5.
    real = torch.tensor([5, 3, 1, 0]).repeat(batch)[:batch, None]
    return gpt, cfg, tokens, cond, torch.arange(cfg.cls_token_num) >= cfg.cls_token_num - real


def unconditional(gpt, cfg, cond):
    """Return the empty condition. For classes it is a row of the table, for texts a constant in *feature*
    space."""
    if cfg.model_type == "c2i":
        return torch.full_like(cond, cfg.num_classes)
    return gpt.cls_embedding.uncond_embedding.expand_as(cond)


def truncated(probs, top_k, top_p):
    """Cut one distribution [V] to its top_k, and then to the fewest codes that hold top_p of what is left."""
    order = probs.argsort(descending=True)[: top_k or None]
    before = probs[order].cumsum(0) - probs[order]
    kept = order[before < top_p * probs[order].sum()]               # the code that reaches top_p is kept
    return torch.zeros_like(probs).scatter(0, kept, probs[kept] / probs[kept].sum())


# ---- the forward pass ----

@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("model_type", ["t2i", "t2i without mask", "c2i"])
@pytest.mark.parametrize("length", [16, 7, 1])                      # a whole image, a part, the first token
def test_agrees_with_the_naive_transformer(model_type, length, dtype, atol):
    gpt, cfg, tokens, cond, mask = build(model_type[:3], dtype)
    tokens, mask = tokens[:, :length], None if "without" in model_type else mask    # None: nothing is padding
    gpt.bfloat16().to(dtype)            # may round the weights, but not the rotation, which is no weight
    logits = gpt(tokens, cond, mask)
    assert logits.shape == (4, length, 37) and logits.std() > 0.5   # the agreement must be about something
    assert_close(logits, naive_logits(gpt.state_dict(), cfg, tokens, cond, mask), rtol=0, atol=atol)


def test_padded_features_are_never_read():
    gpt, _, tokens, cond, mask = build()
    changed = torch.where(mask[:, :, None], cond, 100.0)
    # The last prompt is padding alone: its token 0 is predicted from a padded position, which sees itself.
    assert_close(gpt(tokens, changed, mask), gpt(tokens, cond, mask), rtol=0, atol=1e-6)


def test_prefix_acts_as_one_token(monkeypatch):
    # Prefix keys are zero, so the n visible ones have score 0 each and together weigh n·exp(0) = exp(log n).
    # In one layer an image token thus sees *one* prefix token: key 0, score log n, value mean(V_visible).
    def attention_to_one_token(state, cfg, layer, x, visible, L, n=3):
        q, k, v = naive_gpt.head_qkv(state, cfg, layer, x, head=0)
        q, k = naive_gpt.rotate(q, L, cfg), naive_gpt.rotate(k, L, cfg)
        k[:, L - 1], v[:, L - 1] = 0, v[:, L - n : L].mean(1)               # the last one stands for all
        visible[:, L:, : L - 1] = False
        scores = torch.einsum("bih,bjh->bij", q, k) / math.sqrt(cfg.dim)
        scores[:, :, L - 1] += math.log(n)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        return naive_gpt.linear(weights @ v, state["layers.0.attention.wo.weight"])

    gpt, cfg, *batch = build(dtype=torch.float64, n_layer=1, n_head=1)
    tokens, cond, mask = (x[1:2] for x in batch)                            # the prompt of 3 features
    logits, shuffled = gpt(tokens, cond, mask), gpt(tokens, cond[:, [0, 1, 4, 2, 3]], mask)
    monkeypatch.setattr(naive_gpt, "attention", attention_to_one_token)
    expected = naive_logits(gpt.state_dict(), cfg, tokens, cond, mask)
    # Row 0 is left out: it is the last prefix token's, which hands on its own feature besides the mean.
    assert_close(logits[:, 1:], expected[:, 1:], rtol=0, atol=1e-10)
    assert_close(logits[:, 1:], shuffled[:, 1:], rtol=0, atol=1e-10)        # a mean has no order
    assert not torch.allclose(logits[:, 0], shuffled[:, 0])


@both_types
def test_guidance(model_type):
    gpt, cfg, tokens, cond, mask = build(model_type, torch.float64)
    with_cond, without = (naive_logits(gpt.state_dict(), cfg, tokens, c, mask)      # under the same mask
                          for c in (cond, unconditional(gpt, cfg, cond)))
    guided = gpt(tokens, cond, mask, cfg_scale=3.0, temperature=0.7)
    expected = (without + 3 * (with_cond - without)) / 0.7
    # Not compared: token 0 of the prompt that is padding alone. It sees a padded uncond_embedding, and the
    # rules do not say whether that one is zeroed as a padded feature is.
    expected[3, 0] = guided[3, 0]
    assert_close(guided, expected, rtol=0, atol=1e-9)


@both_types
def test_causality(model_type):
    gpt, cfg, tokens, cond, mask = build(model_type)
    for t in range(16):
        changed = (tokens + (torch.arange(16) == t)) % cfg.vocab_size
        moved = (gpt(changed, cond, mask) - gpt(tokens, cond, mask)).abs().amax((0, 2)) > 1e-4
        assert moved.tolist() == [row > t for row in range(16)]


@both_types
@both_scales
def test_images_of_a_prompt_share_what_is_read_of_it(model_type, cfg_scale):
    gpt, _, tokens, cond, mask = build(model_type, torch.float64, batch=6)
    few, prompt = 3, torch.tensor([2, 0, 0, 1, 2, 2])                   # any order, any number a prompt
    cond, mask = cond[:few], mask if mask is None else mask[:few]
    shared = gpt(tokens, cond, mask, prompt, cfg_scale=cfg_scale)
    apart = gpt(tokens, cond[prompt], mask if mask is None else mask[prompt], cfg_scale=cfg_scale)
    assert_close(shared, apart, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), list(gpt.parameters())) for y in (shared, apart)]
    assert_close(*grads, rtol=1e-10, atol=1e-10)
    a = gpt.generate(cond, mask, prompt, cfg_scale=cfg_scale, generator=torch.Generator().manual_seed(1))
    b = gpt.generate(cond[prompt], mask if mask is None else mask[prompt], cfg_scale=cfg_scale,
                     generator=torch.Generator().manual_seed(1))
    assert torch.equal(a, b)


@both_scales
@pytest.mark.parametrize("training", [False, True])
def test_recomputing_activations_changes_nothing(cfg_scale, training):
    gpt, _, *batch = build()
    grads = []
    for gpt.recompute in (False, True):
        torch.manual_seed(0)
        gpt.train(training)
        loss = gpt(*batch, cfg_scale=cfg_scale).log_softmax(-1)[..., 0].mean()
        gpt.eval()                                  # before the backward pass, as in vapi.py
        grads.append((loss, *torch.autograd.grad(loss, list(gpt.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert not any(module.training for module in gpt.modules())


def test_in_bf16_the_prompt_gets_the_correction_of_adapters():
    """The correction is a fit of 2048 random rows. With W + BA rounded to bf16, its error was .39."""
    torch.manual_seed(0)
    attention = PrefixAttention(64, 2)
    base, x = attention.wqkv, torch.randn(2048, 1, 64).bfloat16()
    attention.wqkv = low_rank = lora.LowRank(base, 4, torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, (_, before) = attention.forward_prompt(x, torch.ones(1, 2, 1))
        low_rank.b.normal_(0, 2e-4)
        _, (_, after) = attention.forward_prompt(x, torch.ones(1, 2, 1))
    exact = (low_rank.scale * low_rank.b @ low_rank.a)[-64:]
    print("correction / W:", (exact.norm() / base.weight[-64:].norm()).item())
    fit = torch.linalg.lstsq(x[:, 0].float(), (after.float() - before.float()).flatten(1)).solution.T
    assert (fit - exact).norm() < .1 * exact.norm()


# ---- the released checkpoints ----

@both_types
def test_state_dict_is_the_released_one(model_type):
    gpt, _, _, cond, mask = build(model_type)
    gpt.generate(cond, mask)                                # must not leave a cache behind
    block = {"attention.wqkv": (96, 32), "attention.wo": (32, 32), "attention_norm": (32,), "ffn_norm": (32,),
             "feed_forward.w1": (88, 32), "feed_forward.w3": (88, 32), "feed_forward.w2": (32, 88)}
    shapes = {"tok_embeddings": (37, 32), "norm": (32,), "output": (37, 32)}
    shapes |= {f"layers.{i}.{name}": block[name] for i in range(2) for name in block}
    shapes |= {"cls_embedding.embedding_table": (8, 32)} if model_type == "c2i" else {
        "cls_embedding.cap_proj.fc1": (32, 12), "cls_embedding.cap_proj.fc2": (32, 32)}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    assert {name: tuple(p.shape) for name, p in gpt.named_parameters()} == shapes
    if model_type == "t2i":                                 # not a parameter, yet part of the file
        shapes["cls_embedding.uncond_embedding"] = (5, 12)
    assert {name: tuple(t.shape) for name, t in gpt.state_dict().items()} == shapes


@pytest.mark.parametrize("preset, model_type, millions", [("GPT-B", "c2i", 111), ("GPT-XL", "t2i", 775)])
def test_sizes_of_the_presets(preset, model_type, millions):
    n_layer, n_head, dim = PRESETS[preset]
    cfg = GPTConfig(dim=dim, n_layer=n_layer, n_head=n_head, model_type=model_type)
    with torch.device("meta"):                              # shapes without memory
        assert sum(p.numel() for p in GPT(cfg).parameters()) == pytest.approx(millions * 1e6, rel=0.01)


# ---- sampling ----

@both_types
@both_scales
def test_greedy_generation_is_the_argmax_of_the_full_forward(model_type, cfg_scale):
    gpt, _, _, *both = build(model_type, batch=5)
    for batch in (4, 2, 5):                                 # nothing cached may outlive its batch
        cond, mask = (x if x is None else x[:batch] for x in both)
        tokens, logp = gpt.generate(cond, mask, cfg_scale=cfg_scale, temperature=0.0, return_logp=True)
        # Row t of the forward sees the tokens before t alone, so this compares token by token.
        assert torch.equal(tokens, gpt(tokens, cond, mask, cfg_scale=cfg_scale).argmax(-1))
        assert torch.equal(logp, torch.zeros(batch, 16))    # a certain choice


@both_types
@both_scales
def test_generation_reports_the_log_probs_of_teacher_forcing(model_type, cfg_scale):
    gpt, _, _, cond, mask = build(model_type, torch.float64)    # in fp32, CFG amplifies rounding to 1e-5
    tokens, logp = gpt.generate(cond, mask, cfg_scale=cfg_scale, temperature=0.7, return_logp=True)
    logits = gpt(tokens, cond, mask, cfg_scale=cfg_scale, temperature=0.7)
    again = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert_close(logp, again, rtol=0, atol=1e-12)
    again.sum().backward()      # a policy gradient takes this path, and nothing made in sampling may block it
    assert all(p.grad.isfinite().all() and p.grad.any() for p in gpt.parameters())


def test_generator_alone_decides_the_sample():
    gpt, _, _, cond, mask = build()
    a, b, c = (gpt.generate(cond, mask, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.slow
def test_a_compiled_step_samples_the_same_tokens():
    """It attends to all places of the cache and masks those that are not filled (about a minute)."""
    for model_type, cfg_scale, dtype in (("t2i", 2.0, torch.float32), ("c2i", 1.0, torch.float64)):
        gpt, _, _, cond, mask = build(model_type, dtype)
        results = [gpt.generate(cond, mask, cfg_scale=cfg_scale, return_logp=True,
                                generator=torch.Generator().manual_seed(3))
                   for gpt.compile_step in (False, True)]
        assert torch.equal(results[0][0], results[1][0]) and len(results[0][0].unique()) > 10
        assert_close(results[0][1], results[1][1], rtol=0, atol=1e-4)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1      # one graph serves all steps
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


# ---- as a policy: rollout and distribution ----

@both_scales
def test_a_rollout_does_not_depend_on_how_it_is_cut(cfg_scale):
    """Into pieces of at_once samples, and into the parts of several processes."""
    gpt, _, _, cond, mask = build(dtype=torch.float64, batch=3)
    conditions, prompt = Conditions(cond, mask), torch.tensor([2, 2, 0, 0, 1, 1, 2, 0])
    sampling = dict(cfg_scale=cfg_scale, temperature=.9)

    def rollout(prompt, **options):
        return gpt.rollout(conditions, prompt, generator=torch.Generator().manual_seed(3), **sampling,
                           **options)
    whole = rollout(prompt)
    tokens, logp = gpt.generate(cond, mask, prompt, generator=torch.Generator().manual_seed(3),
                                return_logp=True, **sampling)
    assert torch.equal(whole.actions, tokens) and torch.equal(whole.logp, logp)
    assert torch.equal(whole.prompt, prompt)
    for n, at_once in ((1, 2), (1, 4), (2, 0), (2, 2)):
        parts = [rollout(piece, at_once=at_once, part=(i, n)) for i, piece in enumerate(prompt.chunk(n))]
        assert torch.equal(torch.cat([part.actions for part in parts]), tokens)
        assert_close(torch.cat([part.logp for part in parts]), logp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bf16", [False, True])
@both_scales
def test_the_distribution_is_the_one_that_sampled(cfg_scale, bf16):
    gpt, _, _, cond, mask = build(batch=3)
    gpt.bf16 = bf16
    conditions, prompt, rows = Conditions(cond, mask), torch.tensor([2, 2, 0, 1]), torch.tensor([3, 0])
    sampling = dict(cfg_scale=cfg_scale, temperature=.9)
    rollout = gpt.rollout(conditions, prompt, **sampling)
    pi = gpt.distribution(rollout, conditions, rows, **sampling)
    logits = gpt(rollout.actions, cond, mask, prompt, **sampling)
    # In bf16 the two take other kernels, which round differently (8 bits; the log-probabilities are about 5).
    error = .3 if bf16 else 1e-4
    assert_close(pi.log_prob(rollout.actions[rows]), rollout.logp[rows], rtol=0, atol=error)
    assert_close(pi.logp, logits.log_softmax(-1)[rows], rtol=0, atol=error)
    assert pi.logp.dtype == torch.float32
    part = pi.at(5, 9)
    assert_close(part.log_prob(rollout.actions[rows, 5:9]), pi.log_prob(rollout.actions[rows])[:, 5:9])
    if bf16:                                                               # autocast was on
        gpt.bf16 = False
        assert not torch.equal(gpt(rollout.actions, cond, mask, prompt, **sampling), logits)


def test_uncond_grad_reaches_the_distribution():
    gpt, _, _, cond, mask = build(dtype=torch.float64)
    conditions, rows = Conditions(cond, mask), torch.arange(4)
    rollout = gpt.rollout(conditions, rows, cfg_scale=3.0)
    grads = []
    for uncond_grad in (True, False):
        pi = gpt.distribution(rollout, conditions, rows, cfg_scale=3.0, uncond_grad=uncond_grad)
        hidden = pi.hidden
        grads.append(torch.autograd.grad(pi.log_prob(rollout.actions).sum(), hidden)[0])
    assert torch.equal(grads[0][:4], grads[1][:4]) and grads[0][4:].any() and not grads[1][4:].any()


def test_parts_of_a_batch_are_sampled_with_the_noise_of_the_whole():
    """Processes sample parts of a batch, and so does a single process that samples its images in pieces."""
    gpt, _, _, cond, mask = build(dtype=torch.float64, batch=6)
    whole = gpt.generate(cond, mask, generator=torch.Generator().manual_seed(3))
    for n in (2, 3):
        parts = [gpt.generate(c, m, generator=torch.Generator().manual_seed(3), part=(i, n))
                 for i, (c, m) in enumerate(zip(cond.chunk(n), mask.chunk(n)))]
        assert torch.equal(torch.cat(parts), whole)


def test_the_unconditional_branch_without_a_gradient():
    """The guided distribution stays the same. Its gradient s c - (s - 1) u loses the part of u."""
    gpt, _, tokens, cond, mask = build(dtype=torch.float64)
    hidden = gpt.hidden(tokens, cond, mask, cfg_scale=3.0)
    both, one = (gpt.logits(hidden, 3.0, uncond_grad=g) for g in (True, False))
    assert torch.equal(both, one)
    weight = torch.randn(both.shape, dtype=torch.float64)
    full, part = (torch.autograd.grad((y * weight).sum(), hidden, retain_graph=True)[0] for y in (both, one))
    n = len(tokens)
    assert torch.equal(full[:n], part[:n]) and (part[n:] == 0).all() and (full[n:] != 0).any()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (6, 1.0), (0, 0.8), (8, 0.8), (1, 1.0), (0, 1e-6)])
def test_samples_follow_the_truncated_distribution(top_k, top_p):
    # 1,000 images of 2x2 codes out of 11: none is outside the allowed set, and counts match probabilities: at
    # each position a code's count, less the sum of its probabilities, over its standard deviation is about
    # normal if its variance is 25 or more. A right sampler passes 6 in under one of 10^5 runs (of new seeds).
    gpt, _, _, *both = build(block_size=4, vocab_size=11, n_layer=1)
    cond, mask = (x[:1].expand(1000, *x.shape[1:]) for x in both)
    tokens, logp = gpt.generate(cond, mask, cfg_scale=1.5, temperature=1.2, top_k=top_k, top_p=top_p,
                                generator=torch.Generator().manual_seed(5), return_logp=True)
    probs = gpt(tokens, cond, mask, cfg_scale=1.5, temperature=1.2).softmax(-1).detach().flatten(0, 1)
    probs = torch.stack([truncated(p, top_k, top_p) for p in probs]).view(1000, 4, 11)
    chosen = torch.nn.functional.one_hot(tokens, 11)
    assert_close(logp, (probs * chosen).sum(-1).log(), rtol=0, atol=1e-5)   # -inf for a code outside the set
    error, variance = (chosen - probs).sum(0), (probs * (1 - probs)).sum(0)
    assert (variance > 25).sum() > 8 or top_k == 1 or top_p < 0.1           # those two are as good as greedy
    assert (error.abs() < 6 * variance.sqrt())[variance > 25].all()


# ---- training mode, bad input ----

@pytest.mark.parametrize("name", NO_DROPOUT)
def test_each_dropout_is_live_in_training_only(name):
    gpt, _, *batch = build(**(NO_DROPOUT | {name: 0.9}))
    torch.manual_seed(0)                # without it, nothing would be dropped in 1 of 10^3 runs
    assert torch.equal(gpt(*batch), gpt(*batch)) and not torch.allclose(gpt(*batch), gpt.train()(*batch))


@both_types
def test_condition_drop(model_type):
    # Without the other dropouts, each sequence is trained with its condition or wholly without.
    gpt, cfg, tokens, cond, _ = build(model_type, batch=32, **(NO_DROPOUT | {"class_dropout_prob": 0.5}))
    torch.manual_seed(0)                                                    # 32 equal draws: 5 in 10^10 seeds
    trained = gpt.train()(tokens, cond)
    same = [(naive_logits(gpt.state_dict(), cfg, tokens, c) - trained).abs().amax((1, 2)) < 1e-5
            for c in (cond, unconditional(gpt, cfg, cond))]
    assert (same[0] ^ same[1]).all() and same[0].any() and same[1].any()


def test_bad_input_is_refused():
    gpt, _, tokens, cond, mask = build()
    for batch in [(tokens, cond[..., :-1], mask), (tokens, cond[:, :-1], mask), (tokens, cond, mask[:, :-1]),
                  (tokens[:-1], cond, mask), (tokens, cond, mask[:-1]), (tokens.repeat(1, 2), cond, mask),
                  (tokens, cond, mask, torch.arange(3)), (tokens, cond, mask, cond[:, 0, 0]),
                  (tokens, cond, mask, torch.arange(4) - 1), (tokens, cond, mask, torch.arange(4) + 1)]:
        with pytest.raises(ValueError):                                     # width, length, batch, T, prompt
            gpt(*batch)
    for batch, shape in [((cond * math.nan, mask), "(4, 5, 12)"), ((cond[:0], mask[:0]), "(0, 5, 12)"),
                         ((cond, mask, torch.arange(4)[:0]), "(0,)")]:
        with pytest.raises(ValueError, match=re.escape(shape)):
            gpt.generate(*batch)
    for knobs in [dict(temperature=-1.0), dict(top_p=0.0), dict(top_p=1.5)]:
        with pytest.raises(ValueError):
            gpt.generate(cond, mask, **knobs)
