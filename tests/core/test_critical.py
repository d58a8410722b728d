"""python -m pytest tests/core/test_critical.py"""
import math

import pytest
import torch
import torch.nn.functional as F

from critical import critical_tokens, dynamic_weight, entropy_gradient, group_similarity

ONE_HOT = torch.eye(2, 8)                                           # two codes at right angles: cosine 0 or 1


def positions(mask):
    return [set(row.nonzero()[:, 0].tolist()) for row in mask]


def random_case(side=16, B=8, V=50, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(B, side * side, generator=g) * 9, torch.randint(V, (B, side * side), generator=g),
            F.normalize(torch.randn(V, 8, generator=g), dim=1))


def slow_gradient(entropy, side):
    """The same, computed one token at a time. entropy is a list of T numbers."""
    h = [list(entropy[i * side:(i + 1) * side]) for i in range(side)]

    def smooth(i, j):
        there = [(i, j), (i, j - 1), (i - 1, j - 1), (i - 1, j), (i - 1, j + 1)]
        values = [h[a][b] for a, b in there if 0 <= a < side and 0 <= b < side]
        return sum(values) / len(values)

    def slope(f, i):
        low, high = max(i - 1, 0), min(i + 1, side - 1)
        return (f(high) - f(low)) / (high - low)

    return [math.hypot(slope(lambda a: smooth(a, j), i), slope(lambda b: smooth(i, b), j))
            for i in range(side) for j in range(side)]


def slow_pick(entropy, tokens, codebook, group_size, side, share):
    """Return the three picks as a list of sets, computed one sequence and one position at a time."""
    T, out = side * side, []
    k = int(share * T)
    for b in range(len(tokens)):
        start = b // group_size * group_size
        gradient, similar = slow_gradient(entropy[b].tolist(), side), []
        for t in range(T):
            c = [codebook[tokens[i, t]].tolist() for i in range(start, start + group_size)]
            pairs = [sum(x * y for x, y in zip(c[i], c[j]))
                     for i in range(len(c)) for j in range(len(c)) if i != j]
            similar.append(sum(pairs) / len(pairs))
        picked = set(range(k))
        middle = [t for t in range(int(.1 * T), int(.1 * T) + int(.8 * T)) if t not in picked]
        picked |= set(sorted(middle, key=lambda t: -gradient[t])[:k])
        picked |= set(sorted(set(range(T)) - picked, key=lambda t: similar[t])[:k])
        out.append(picked)
    return out


def test_four_by_four_by_hand():
    """A peak at row 1, column 1. Token (2,0) has the peak at its upper right and averages only three tokens.
    So row 1 is  0 .2 .2 0,  row 2 is  1/3 .2 .2 0,  and the other rows are 0. The steepest change is the drop
    from 1/3 below (2,0), at position 12, which is just inside the middle 1 .. 12."""
    entropy = torch.zeros(1, 16)
    entropy[0, 5] = 1
    gradient = entropy_gradient(entropy, 4)[0].view(4, 4)
    assert gradient[:, 0].tolist() == pytest.approx([0, math.hypot(1 / 6, .2), 2 / 15, 1 / 3])
    assert gradient[:, 1].tolist() == pytest.approx([.2, math.hypot(.1, .1), math.hypot(.1, 1 / 15), .2])
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[1, 7] = 1                                                # the two images differ only at 7
    mask = critical_tokens(entropy.expand(2, 16), tokens, ONE_HOT, 2, 4)
    assert mask.dtype == torch.bool and positions(mask) == [{0, 12, 7}] * 2


def test_ten_by_ten_step_edge_by_hand():
    """The entropy is 0 left of column 5, and 1 from there on. Smoothed, columns 3 to 6 are 0 .2 .6 1, and
    their slopes are .1 .3 .4 .2. Row 1 is a little steeper, because row 0 has no neighbors above. Rows 0 and
    9 are outside of the middle. So `edge` is column 5 of rows 1 to 8, and then column 4 of rows 1 and 2."""
    entropy = (torch.arange(100) % 10 >= 5).float().expand(3, 100)
    edge = {15, 25, 35, 45, 55, 65, 75, 85, 14, 24}
    tokens = torch.zeros(3, 100, dtype=torch.long)
    tokens[2, 50:60] = 1
    tokens[2, :3] = 1                                               # `first` takes these before `variety` can
    # variety: nine of 50..59 (55 is taken), then the first free position, as all agree at the others
    assert positions(critical_tokens(entropy, tokens, ONE_HOT, 3, 10)) == [
        set(range(10)) | edge | {50, 51, 52, 53, 54, 56, 57, 58, 59} | {10}] * 3


def test_one_odd_position_among_identical_images():
    """The mean cosine over pairs is 1 where all four images agree. Where one image differs, 3 of 6 pairs have
    the cosine 0. Where two images have one code and two the other, 4 of 6 pairs have it."""
    tokens = torch.zeros(8, 16, dtype=torch.long)
    tokens[2, 9], tokens[6, 3], tokens[6:, 4] = 1, 1, 1
    similar = group_similarity(tokens, ONE_HOT, 4)
    expected = torch.ones(8, 16)
    expected[:4, 9], expected[4:, 3], expected[4:, 4] = .5, .5, 1 / 3
    assert torch.allclose(similar, expected)
    flat = torch.ones(8, 16)                                        # no gradient anywhere: edge is position 1
    assert positions(critical_tokens(flat, tokens, ONE_HOT, 4, 4)) == [{0, 1, 9}] * 4 + [{0, 1, 4}] * 4


def test_gradient_equals_the_slow_one():
    for side in (2, 3, 8):
        entropy, _, _ = random_case(side, 3, seed=side)
        for row, ours in zip(entropy, entropy_gradient(entropy, side)):
            assert ours.tolist() == pytest.approx(slow_gradient(row.tolist(), side), abs=1e-5)


@pytest.mark.parametrize("side, group_size, share", [(16, 4, .1), (8, 2, .1), (6, 8, .2), (4, 2, 1 / 3)])
def test_picks_equal_the_slow_ones(side, group_size, share):
    entropy, tokens, codebook = random_case(side)
    mask = critical_tokens(entropy, tokens, codebook, group_size, side, share)
    assert positions(mask) == slow_pick(entropy, tokens, codebook, group_size, side, share)


def test_seventy_five_of_256():
    entropy, tokens, codebook = random_case()
    mask = critical_tokens(entropy, tokens, codebook, 4, 16)
    assert mask.sum(1).tolist() == [75] * 8 and mask[:, :25].all()
    assert not torch.equal(mask[0], mask[1])                        # outlines differ between images
    # Now the last 27 positions are the steepest by far, but they are outside of the middle. All positions tie
    # for variety, so it takes the first free ones.
    entropy[:, 229:] *= 1000
    assert entropy_gradient(entropy, 16).topk(10)[1].min() > 200
    mask = critical_tokens(entropy, torch.zeros_like(tokens), codebook, 4, 16)
    assert mask.sum(1).tolist() == [75] * 8 and not mask[:, 229:].any()


def test_the_order_of_a_group_does_not_matter():
    """With two codes and G = 8, about 70 of 256 positions have four of each code, so they tie. The rounding
    of sums, which depends on the order, must not break the tie. The earliest positions must win."""
    entropy, tokens, codebook = random_case(V=2, seed=1)
    entropy = entropy[:1].expand(8, -1)
    mask = critical_tokens(entropy, tokens, codebook, 8, 16)
    assert (mask == mask[0]).all()                                  # one entropy gives one mask for the group
    for seed in range(20):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(critical_tokens(entropy, tokens[order], codebook, 8, 16), mask)


def test_two_groups_are_two_calls():
    entropy, tokens, codebook = random_case(8)
    both = critical_tokens(entropy, tokens, codebook, 4, 8)
    halves = [critical_tokens(entropy[s], tokens[s], codebook, 4, 8) for s in (slice(4), slice(4, 8))]
    assert torch.equal(both, torch.cat(halves))


@pytest.mark.parametrize("change, error, part", [
    (dict(share=.01), ValueError, "between 1 and a third of the 16 tokens, got 0.01"),
    (dict(share=.5), ValueError, "got 0.5"), (dict(share=-.1), ValueError, "got -0.1"),
    (dict(side=5), ValueError, "5"), (dict(group_size=3), ValueError, "multiple of a group of 3"),
    (dict(group_size=1), ValueError, "group of 1"), (dict(entropy=torch.zeros(8, 15)), ValueError, "8, 15"),
])
def test_arguments_that_do_not_fit_are_refused(change, error, part):
    entropy, tokens, codebook = random_case(4)
    arguments = dict(entropy=entropy, tokens=tokens, codebook=codebook, group_size=2, side=4) | change
    with pytest.raises(error, match=part):
        critical_tokens(**arguments)


def slow_weight(logp, logp_ref, clip):
    rows = []
    for p, q in zip(logp, logp_ref):
        ratios = [torch.exp(torch.clamp(a - b, -clip, clip)) for a, b in zip(p, q)]
        rows.append(torch.stack([sum(ratios[:t + 1]) / (t + 1) for t in range(len(ratios))]))
    return torch.stack(rows)


def logps(B=3, T=12):
    g = torch.Generator().manual_seed(3)
    a, b = -3 * torch.rand(2, B, T, generator=g, dtype=torch.float64)
    return a.requires_grad_(), b


def test_dynamic_weight_by_hand():
    # The ratios are e^.1, e^-.2, and e^.5, which is clipped. The weights are their running mean.
    weight = dynamic_weight(torch.tensor([[-1., -2., -1.]]), torch.tensor([[-1.1, -1.8, -3.]]))
    a, b, c = math.exp(.1), math.exp(-.2), math.exp(.5)
    assert weight[0].tolist() == pytest.approx([a, (a + b) / 2, (a + b + c) / 3])


def test_dynamic_weight_and_its_gradient_equal_the_slow_ones():
    logp, logp_ref = logps()
    outer = torch.randn(3, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    for clip in (.2, .5, 2.):
        ours, slow = dynamic_weight(logp, logp_ref, clip), slow_weight(logp, logp_ref, clip)
        assert torch.allclose(ours, slow, atol=1e-12)
        gradients = [torch.autograd.grad((w * outer).sum(), logp)[0] for w in (ours, slow)]
        assert torch.allclose(*gradients, atol=1e-12)


def test_no_gradient_where_clipped():
    logp, logp_ref = logps()
    (g,) = torch.autograd.grad(dynamic_weight(logp, logp_ref).sum(), logp)
    clipped = (logp - logp_ref).abs() > .5
    assert 0 < clipped.sum() < clipped.numel() and torch.equal(g == 0, clipped)


def test_what_the_weight_adds_to_the_gradient():
    """Formula and numbers of the docstring, for A = 1. At ratio 1 the policy term is -pi / stop_grad(pi)."""
    def force(logp, logp_ref, mask):
        loss = -(mask * dynamic_weight(logp, logp_ref) * (logp - logp.detach()).exp()).sum()
        return -torch.autograd.grad(loss, logp)[0]

    same = torch.zeros(1, 256, dtype=torch.float64, requires_grad=True)
    plain = force(same, same.detach(), torch.ones(1, 256))[0]
    assert plain.tolist() == pytest.approx([1 + sum(1 / t for t in range(s, 257)) for s in range(1, 257)])
    assert round(plain[0].item(), 1) == 7.1 and round(plain[-1].item(), 3) == 1.004
    assert plain.mean().item() == pytest.approx(2)
    logp, logp_ref = logps()
    mask = (torch.rand(3, 12, generator=torch.Generator().manual_seed(5)) < .4).double()
    x, weight = (logp - logp_ref).detach(), dynamic_weight(logp, logp_ref).detach()
    ours = force(logp, logp_ref, mask)
    for b in range(3):
        for s in range(12):
            later = sum(mask[b, t].item() / (t + 1) for t in range(s, 12))
            expected = mask[b, s] * weight[b, s] + (x[b, s].exp() * later if x[b, s].abs() <= .5 else 0)
            assert ours[b, s].item() == pytest.approx(expected.item())
