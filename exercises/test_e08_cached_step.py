"""python -m pytest exercises/test_e08_cached_step.py"""
import torch

B, H, T, HD = 2, 3, 9, 4
OLD = 7.                                                    # what an older image left in the buffers


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, T, HD, generator=g, dtype=torch.float64) for _ in range(3)]


def causal(q, k, v):
    """Return all rows of causal attention, by an explicit mask."""
    logits = q @ k.transpose(2, 3) / HD ** .5
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1) @ v


def caches():
    return [torch.full((B, H, T, HD), OLD, dtype=torch.float64) for _ in range(2)]


def row(x, t):
    return x[:, :, t:t + 1]


def test_every_step_is_a_row_of_causal_attention(exercise):
    q, k, v = batch()
    full, (cache_k, cache_v) = causal(q, k, v), caches()
    for t in range(T):
        yours = exercise.step(row(q, t), row(k, t), row(v, t), cache_k, cache_v, t)
        assert yours.shape == (B, H, 1, HD), f"y must be [B,heads,1,hd], not {tuple(yours.shape)}"
        why = "the softmax of q.k / sqrt(hd) runs over places 0 .. t"
        for seen, what in ((slice(0, t), "token t does not see itself, so the slice must end at t + 1"),
                           (slice(None), "it attends to places beyond t, which hold an older image")):
            logits = row(q, t) @ cache_k[:, :, seen].transpose(2, 3) / HD ** .5
            if torch.allclose(yours, logits.softmax(-1) @ cache_v[:, :, seen]) and t < T - 1:
                why = what
        error = (yours - row(full, t)).abs().max()
        assert error < 1e-10, f"step {t} is off by up to {error:.3f} from row {t} of causal attention: {why}"


def test_first_step_returns_its_own_value(exercise):
    q, k, v = batch(seed=1)
    yours = exercise.step(row(q, 0), row(k, 0), row(v, 0), *caches(), 0)
    assert torch.allclose(yours, row(v, 0)), "at t = 0 a token sees only itself, so y = v whatever q is"


def test_cache_is_written_at_t_in_place_and_nowhere_else(exercise):
    q, k, v = batch(seed=2)
    cache_k, cache_v = caches()
    for t in range(T):
        exercise.step(row(q, t), row(k, t), row(v, t), cache_k, cache_v, t)
        for name, cache, new in (("cache_k", cache_k, k), ("cache_v", cache_v, v)):
            assert torch.equal(row(cache, t), row(new, t)), (
                f"after step {t}, place {t} of {name} must hold the new row, in the buffer, not a copy")
            assert torch.equal(cache[:, :, :t], new[:, :, :t]), f"step {t} changed a place of {name} before t"
            assert (cache[:, :, t + 1:] == OLD).all(), f"step {t} changed a place of {name} beyond t"
