"""Exercise 8. One step with a cache.

Check yourself:   python -m pytest exercises/test_e08_cached_step.py

Read Attention.forward and GPT.generate in model.py first. Teacher forcing computes all T rows of causal
attention at once. A sampler gets to know them one by one, and in row t only q, k and v of token t are new:
the keys and values of tokens 0 .. t-1 were there before. So they are kept in buffers of full length T, made
once and never copied or grown, and a step
    1. writes the new k and v into place t of the buffers, *in place*,
    2. attends with the one query to places 0 .. t, and to nothing after them:
           y = sum_{j <= t} softmax_j(q.k_j / sqrt(hd)) v_j
Beyond t the buffers hold whatever was there, zeros or an older image. A zero key is not "nothing": its score
is 0 and its weight exp(0) = 1, as exercise 7 knows.

Hint: a slice of a tensor is a view, so cache[:, :, t:t+1] = new writes into the buffer itself. No mask
is needed.
"""


def step(q, k, v, cache_k, cache_v, t):
    """q, k, v [B,heads,1,hd] of token t; cache_k, cache_v [B,heads,T,hd], filled up to t-1, written at t
    -> y [B,heads,1,hd], row t of causal attention."""
    raise NotImplementedError("your turn")
