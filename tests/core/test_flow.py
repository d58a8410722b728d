"""Run: python -m pytest tests/core/test_flow.py

The steps of a flow-matching policy are checked on normal data, where the best velocity is known.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common.config import UserError
from common.interfaces import Conditions
from common.sit import PRESETS, SiT, SiTBlock, SiTConfig, from_sit, sincos_2d
from flow import (Options, SiTPolicy, Transitions, action_weights, adaptive_chunks, chunk_weights,
                  relative_change, step_table, time_grid)

TINY = SiTConfig(depth=2, dim=32, heads=2, channels=3, side=4, caption_dim=6)
OPTIONS = Options(denoise_steps=6, noisy_steps=4, shift=1.0)
SPREAD = .64                                               # standard deviation of the normal data


def slope(t, spread=SPREAD):
    """The best velocity for x0 ~ N(0, spread^2) is E[eps - x0 | x] = slope(t) x."""
    return (t - (1 - t) * spread ** 2) / ((1 - t) ** 2 * spread ** 2 + t ** 2)


def spread_of_samples(steps, spread=SPREAD, shift=1.0, **how):
    """The standard deviation of samples, by an exact recursion over the steps."""
    times, variance = time_grid(steps, shift), 1.0
    for t, c_x, c_v, std in zip(times.tolist(), *(y.tolist() for y in step_table(times, **how))):
        variance = (c_x + c_v * slope(t, spread)) ** 2 * variance + std ** 2
    return variance ** .5


def randomized(module, seed=0):
    """Replace all parameters, so that no gate is zero."""
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=.2)
    return module.eval()


@pytest.fixture
def policy():
    return randomized(SiTPolicy(TINY, OPTIONS))


@pytest.fixture
def conditions():
    torch.manual_seed(1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    return Conditions(torch.randn(3, 4, 6), mask)


# ---- steps -------------------------------------------------------------------------------------------------
def test_time_grid():
    assert time_grid(4).tolist() == [1, .75, .5, .25, 0]
    assert time_grid(17, 3)[[1, 15, 16]].tolist() == pytest.approx([.97959, .28571, .15789], abs=1e-5)


def test_score_of_a_gaussian():
    for t in (.1, .5, .9):
        x = torch.linspace(-2, 2, 5)
        score = -(x + (1 - t) * slope(t) * x) / t
        assert torch.allclose(score, -x / ((1 - t) ** 2 * SPREAD ** 2 + t ** 2), atol=1e-6)


@pytest.mark.parametrize("how", [dict(sampler="ode"), dict(), dict(noise=1.0), dict(noisy=300),
                                 dict(sampler="constant", noise=.3)])
def test_steps_keep_the_data(how):
    """With many steps, every sampler but cps returns the spread of the data."""
    assert spread_of_samples(1000, **how) == pytest.approx(SPREAD, abs=.004)


@pytest.mark.parametrize("steps, expected", [(8, (.539, .557, .584, .610, .634, .503, .444)),
                                             (10, (.558, .573, .596, .617, .635, .519, .456))])
def test_few_steps(steps, expected):
    """Numbers that were computed by other code."""
    found = [spread_of_samples(steps, sampler="ode"),
             *(spread_of_samples(steps, noise=a) for a in (.3, .5, .7, 1.)),
             *(spread_of_samples(steps, sampler="cps", noise=a) for a in (.5, .8))]
    assert found == pytest.approx(expected, abs=6e-4)


def test_cps_narrows():
    assert spread_of_samples(40, sampler="cps", noise=.8) == pytest.approx(.497, abs=.001)


@pytest.mark.parametrize("shift", [1., 3.])
def test_first_std_is_the_noise(shift):
    for steps in (2, 8, 17):
        std = step_table(time_grid(steps, shift), noise=.7)[2]
        assert std[0].item() == pytest.approx(.7) and std[-1] == 0 and (std[:-1] > 0).all()


def test_without_noise_all_are_the_ode():
    times = time_grid(9, 2)
    ode = step_table(times, "ode", noise=.7)
    assert torch.equal(ode[0], torch.ones(9)) and torch.allclose(ode[1], times.diff().float())
    assert not ode[2].any()
    for sampler in ("sde", "constant", "cps"):
        for same in (step_table(times, sampler, noise=0.), step_table(times, sampler, noisy=0)):
            assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(same, ode))
        window = step_table(times, sampler, noisy=3)
        assert (window[2] > 0).tolist() == [True] * 3 + [False] * 6
        assert all(torch.allclose(a[3:], b[3:], atol=1e-7) for a, b in zip(window, ode))
    with pytest.raises(ValueError, match="must be ode, sde, constant or cps"):
        step_table(times, "euler")


# ---- the network -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, millions", [("S/2", 33.0), ("B/2", 130.5), ("L/2", 458.1), ("XL/2", 675.1)])
def test_sizes_are_the_published_ones(name, millions):
    depth, dim, heads = PRESETS[name]
    with torch.device("meta"):
        sit = SiT(SiTConfig(depth, dim, heads))
    positions = sit.pos_embed.numel()                      # the official code counts them as parameters
    assert (sum(p.numel() for p in sit.parameters()) + positions) / 1e6 == pytest.approx(millions, abs=.06)
    keys = set(sit.state_dict())
    assert {"pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.2.bias", "final_layer.linear.weight",
            "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias",
            "blocks.0.mlp.fc1.weight", "blocks.0.adaLN_modulation.1.weight",
            "final_layer.adaLN_modulation.1.bias"} <= keys
    assert not any("norm" in key for key in keys)


def test_positions_are_columns_then_rows():
    """Position (row 1, column 2) of a grid of 3."""
    found = sincos_2d(3, 8)[5]
    expected = [f(place * rate) for place in (2, 1) for f in (math.sin, math.cos) for rate in (1, .01)]
    assert found.tolist() == pytest.approx(expected)


def test_at_first_the_velocity_is_zero():
    sit = SiT(TINY)
    assert not sit(torch.randn(2, 3, 4, 4), torch.rand(2), torch.randn(2, 5, 6), torch.ones(2, 5)).any()


def test_patches_are_put_where_they_belong():
    """A network without blocks returns its input, if the last layer inverts the first one."""
    sit = SiT(SiTConfig(depth=0, dim=16, heads=2, channels=4, side=6, num_classes=2))
    first = torch.nn.init.orthogonal_(torch.empty(16, 16)).view(16, 4, 2, 2)                     # [D,C,p,p]
    sit.pos_embed.zero_()
    sit.x_embedder.proj.weight.data = first

    class Inverse(torch.nn.Module):
        def forward(self, hidden, time):
            return hidden @ first.permute(0, 2, 3, 1).flatten(1)                                 # [B,T,p*p*C]
    sit.final_layer, x = Inverse(), torch.randn(2, 4, 6, 6)
    assert torch.allclose(sit(x, torch.rand(2), torch.zeros(2, dtype=torch.long)), x, atol=1e-5)


def test_padding_of_a_prompt_changes_nothing(conditions):
    sit = randomized(SiT(TINY))
    x, t = torch.randn(3, 3, 4, 4), torch.rand(3)
    cond = conditions.cond.clone()
    cond[conditions.mask == 0] = 100.
    wider = torch.nn.functional.pad(cond, (0, 0, 2, 0)), torch.nn.functional.pad(conditions.mask, (2, 0))
    found = sit(x, t, conditions.cond, conditions.mask)
    assert torch.allclose(sit(x, t, cond, conditions.mask), found, atol=1e-5)
    assert torch.allclose(sit(x, t, *wider), found, atol=1e-5)
    assert not torch.allclose(sit(x, t, conditions.cond.flip(0), conditions.mask), found, atol=1e-3)


def test_official_files_are_turned_to_our_convention():
    """An official SiT with learn_sigma, called at 1 - t, against ours: v and -v_SiT are equal."""
    config = dict(depth=2, dim=32, heads=2, channels=4, side=4, num_classes=5)
    ours = SiT(SiTConfig(**config, reverse_time=True))
    official = randomized(SiT(SiTConfig(**config)))
    state = {k: v.clone() for k, v in official.state_dict().items()}
    useful = {name: state[f"final_layer.linear.{name}"].view(4, 4, -1) for name in ("weight", "bias")}
    for name, rows in useful.items():                      # [p*p,C,..] beside as many rows of learn_sigma
        both = torch.cat([rows, torch.randn_like(rows)], 1)
        state[f"final_layer.linear.{name}"] = both.flatten(0, 1) if name == "weight" else both.flatten()
    ours.load_state_dict(from_sit(state))
    x, t, y = torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])
    assert torch.allclose(ours(x, t, y), -official(x, 1 - t, y), atol=1e-6)


def test_a_block_has_its_parameters_in_the_official_order():
    """shift, scale and gate of the attention, then of the feed-forward part."""
    torch.manual_seed(0)
    block = SiTBlock(TINY).eval()
    x, c = torch.randn(2, 5, 32), torch.zeros(2, 32)
    shift, scale, gate, none = (torch.full((32,), value) for value in (.3, .5, 2., 0.))
    normal = torch.nn.functional.layer_norm(x, (32,), eps=1e-6) * 1.5 + .3
    for inner, bias in ((block.attn, [shift, scale, gate, none, none, none]),
                        (block.mlp, [none, none, none, shift, scale, gate])):
        block.adaLN_modulation[1].bias.data = torch.cat(bias)
        assert torch.allclose(block(x, c), x + 2 * inner(normal), atol=1e-5)


def test_the_network_reads_our_time_or_the_official_one():
    for reverse, expected in ((False, [.9, .2]), (True, [.1, .8])):
        sit, seen = SiT(replace(TINY, reverse_time=reverse)), []
        sit.t_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        sit(torch.randn(2, 3, 4, 4), torch.tensor([.9, .2]), torch.randn(2, 4, 6), torch.ones(2, 4))
        assert seen[0].tolist() == pytest.approx(expected)


def test_files_of_repa_have_our_convention():
    repa = randomized(SiT(SiTConfig(depth=2, dim=32, heads=2, side=4, num_classes=5)))
    state = repa.state_dict() | {"projectors.0.0.weight": torch.ones(8, 32)}
    ours = SiT(repa.config)
    ours.load_state_dict(from_sit(state))
    x, t, y = torch.randn(3, 4, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])
    assert torch.equal(ours(x, t, y), repa(x, t, y))


# ---- the policy --------------------------------------------------------------------------------------------
def sample(policy, conditions, prompt=(0, 0, 1, 1, 2, 2), **options):
    return policy.rollout(conditions, torch.tensor(prompt), generator=torch.Generator().manual_seed(7),
                          **options)


@pytest.mark.parametrize("cfg_scale", [1., 2.5])
def test_the_loss_sees_the_distribution_that_sampled(cfg_scale, policy, conditions):
    rollout = sample(policy, conditions, cfg_scale=cfg_scale)
    with pytest.raises(ValueError, match="no temperature"):
        sample(policy, conditions, temperature=.5)
    assert rollout.actions.shape == (6, 7, 3, 4, 4) and rollout.logp.shape == (6, 4)
    pi = policy.distribution(rollout, conditions, torch.arange(6), cfg_scale=cfg_scale)
    assert ((pi.log_prob(rollout.actions) - rollout.logp).exp() - 1).abs().max() < 1e-4
    some = policy.distribution(rollout, conditions, torch.tensor([4, 1]), cfg_scale=cfg_scale)
    assert torch.allclose(some.log_prob(rollout.actions[[4, 1]]), rollout.logp[[4, 1]], atol=1e-4)


def test_states_of_lower_precision_spoil_the_ratio(policy, conditions):
    """Exercise material: the log-probabilities are of the states before they were rounded."""
    rollout = sample(policy, conditions)
    rollout.actions = rollout.actions.bfloat16().float()
    pi = policy.distribution(rollout, conditions, torch.arange(6))
    ratio = (pi.log_prob(rollout.actions) - rollout.logp).exp()
    assert (ratio - 1).abs().max() > .01


def test_samples_depend_neither_on_batches_nor_on_processes(policy, conditions):
    whole = sample(policy, conditions)
    assert torch.allclose(sample(policy, conditions, at_once=2).actions, whole.actions, atol=1e-5)
    parts = [sample(policy, conditions, (0, 0, 1), part=(0, 2)),
             sample(policy, conditions, (1, 2, 2), part=(1, 2))]
    assert torch.allclose(torch.cat([part.actions for part in parts]), whole.actions, atol=1e-5)
    assert torch.allclose(torch.cat([part.logp for part in parts]), whole.logp, atol=1e-3)


def test_steps_after_the_noisy_ones_follow_the_velocity(policy, conditions):
    rollout = sample(policy, conditions)
    x, t = rollout.actions[:, 4], policy.times[4].expand(6)
    cond, mask = conditions.cond[rollout.prompt], conditions.mask[rollout.prompt]
    expected = x + (policy.times[5] - policy.times[4]) * policy.velocity(x, t, cond, mask)
    assert torch.allclose(rollout.actions[:, 5], expected, atol=1e-6)


def test_guidance(policy, conditions):
    x, t, (cond, mask) = torch.randn(3, 3, 4, 4), torch.rand(3), (conditions.cond, conditions.mask)
    with_prompt, without = policy(x, t, cond, mask), policy(x, t, cond, 0 * mask)
    assert not torch.allclose(with_prompt, without, atol=1e-3)
    assert torch.allclose(policy.velocity(x, t, cond, mask, 3.), 3 * with_prompt - 2 * without, atol=1e-5)
    grads = [torch.autograd.grad(policy.velocity(x, t, cond, mask, 3., uncond_grad=g).sum(),
                                 policy.final_layer.linear.weight)[0] for g in (True, False)]
    assert not torch.allclose(*grads)


def test_the_divergence_to_the_reference_has_a_gradient_and_is_zero_there(policy, conditions):
    rollout, rows = sample(policy, conditions), torch.arange(6)
    with torch.no_grad():
        rho = policy.distribution(rollout, conditions, rows)
        mean = rho.mean + .1
    moved = Transitions(lambda *span: mean, rho.stds, rho.target)
    pi = policy.distribution(rollout, conditions, rows)
    for name in ("reverse_kl", "forward_kl", "js"):
        assert pi.divergence(name, rho).abs().max() < 1e-6
        pi.divergence(name, moved).sum().backward(retain_graph=True)
        gradient = policy.final_layer.linear.weight.grad
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        policy.zero_grad()


def test_the_distribution_is_computed_in_parts(policy, conditions):
    rollout, rows = sample(policy, conditions), torch.arange(6)
    whole = policy.distribution(rollout, conditions, rows)
    assert torch.allclose(whole.at(1, 4).at(1, 2).mean, whole.mean[:, 2:3], atol=1e-6)
    cond, mask = conditions.cond[rollout.prompt], conditions.mask[rollout.prompt]
    for k in range(4):                                     # by hand: from state k to state k + 1
        x, after = rollout.actions[:, k], rollout.actions[:, k + 1]
        c_x, c_v, std = (y[k].item() for y in policy.table)
        mean = c_x * x + c_v * policy(x, policy.times[k].expand(6), cond, mask)
        by_hand = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).sum(1)
        assert torch.allclose(rollout.logp[:, k], by_hand, rtol=1e-4, atol=1e-3)
    parts = [policy.distribution(rollout, conditions, rows).at(*span) for span in ((0, 1), (1, 4))]
    assert torch.allclose(torch.cat([part.mean for part in parts], 1), whole.mean, atol=1e-6)
    logp = torch.cat([part.log_prob(rollout.actions) for part in parts], 1)
    assert torch.allclose(logp, whole.log_prob(rollout.actions), atol=1e-4)


def test_elbo_is_the_pretraining_loss(conditions):
    policy = randomized(SiTPolicy(TINY, replace(OPTIONS, likelihood="elbo")))
    rollout, rows = sample(policy, conditions), torch.arange(6)
    assert rollout.actions.shape == (6, 5, 3, 4, 4)        # 4 mixtures and the image
    x0, cond, mask = rollout.actions[:, -1], conditions.cond[rollout.prompt], conditions.mask[rollout.prompt]
    pi = policy.distribution(rollout, conditions, rows)
    constant = [-48 * math.log(t.item() * math.pi ** .5) for t in policy.times[:4]]
    for k, t in enumerate(policy.times[:4]):
        x = rollout.actions[:, k]
        eps = (x - (1 - t) * x0) / t
        error = (policy(x, t.expand(6), cond, mask) - (eps - x0)).square().flatten(1).sum(1)
        assert torch.allclose(rollout.logp[:, k], constant[k] - error, rtol=1e-4, atol=1e-3)
    assert torch.allclose(pi.log_prob(rollout.actions), rollout.logp, rtol=1e-4, atol=1e-3)
    noise = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    policy.ode = policy.times                              # images come from the ODE
    images = policy.generate(conditions.cond, conditions.mask, rollout.prompt, noise=noise)
    assert torch.allclose(images[:, 0], x0, atol=1e-4)


# ---- chunks ------------------------------------------------------------------------------------------------
def test_the_adaptive_rule_cuts_where_the_change_turns():
    assert adaptive_chunks([.5, .5, .5, .5]) == (4,)
    assert adaptive_chunks([.77, .84, .61, .55, .55]) == (1, 2, 2)
    assert adaptive_chunks([.9, .5, .3, .2, .15, .1]) == (1, 2, 3)
    assert sum(adaptive_chunks([.75, .77, .53, .45, .40, .37, .36])) == 7


def test_relative_change():
    states = torch.tensor([4., 2., 1.]).view(1, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    assert relative_change(states).tolist() == [[1, 1]] * 2


@pytest.mark.parametrize("draw", ["uniform", "change"])
def test_drawn_chunks(draw):
    """Each sample trains half of its chunks; the mean weight is 1, and `change` prefers the first chunk."""
    n, generator = 4000, torch.Generator().manual_seed(0)
    states = torch.tensor([1., 2, 1, 1.25, 1, 1.25, 1, 1.25, 1]).view(1, 9, 1).expand(n, 9, 2)
    u = 1 - torch.rand(n, 4, generator=generator)
    weights = chunk_weights(states, (2, 2, 2, 2), .5, draw, u)
    assert weights.shape == (n, 8) and (weights.sum(1) == 8).all() and weights.unique().tolist() == [0, 2]
    assert torch.equal(weights[:, ::2], weights[:, 1::2])                          # whole chunks
    first = (weights[:, 0] > 0).float().mean().item()
    assert first == pytest.approx(.5, abs=.03) if draw == "uniform" else first > .75


def test_weights_of_actions(policy, conditions):
    rollout, rows = sample(policy, conditions), torch.arange(6)

    def weights(chunks=(), part=rows, **options):
        few = replace(rollout, actions=rollout.actions[part], logp=rollout.logp[part])
        return action_weights(replace(OPTIONS, **options), policy, chunks, few, part, 6,
                              torch.Generator().manual_seed(3))
    assert torch.equal(weights(), torch.ones(6, 4))
    std, c_v = policy.table[2][:4], policy.table[1][:4]
    assert torch.allclose(weights(step_weights="noise")[2], std / c_v.abs() / (std / c_v.abs()).mean())
    half = dict(chunks=(2, 2), chunk_share=.5)
    assert torch.equal(torch.cat([weights(part=rows[:3], **half), weights(part=rows[3:], **half)]),
                       weights(**half))                    # the same on two processes


@pytest.mark.parametrize("wrong", [dict(temperature=.5), dict(noisy_steps=8), dict(noise=0.), dict(
    chunks=(2, 2)), dict(chunks=(5,), adaptive_chunks=True), dict(chunk_share=.5), dict(chunk_share=0.)])
def test_options_are_checked(wrong):
    cfg = SimpleNamespace(**{"temperature": 1.0} | vars(Options()) | wrong)
    with pytest.raises(UserError):
        Options.check(cfg)
