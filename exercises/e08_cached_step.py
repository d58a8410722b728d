"""Exercise 8. One step with a cache.

Check yourself:   python -m pytest exercises/test_e08_cached_step.py

First read Attention.forward in common/llama.py and ImageTransformer.generate in model.py. Teacher forcing
computes all T rows of causal attention at once. A sampler learns the tokens one by one, and in row t only q,
k and v of token t are new. The keys and values of tokens 0 .. t-1 were computed before. They are kept in
buffers of the full length T, which are made once and never copied or grown. A step
    1. writes the new k and v into place t of the buffers, *in place*,
    2. attends with the one query to places 0 .. t, and to nothing after them:
           y = sum_{j <= t} softmax_j(q.k_j / sqrt(hd)) v_j
Beyond t the buffers hold anything, zeros or an older image. A key of zero is not "nothing": its logit is 0
and its weight is exp(0) = 1, as in exercise 7.

Hint: a slice of a tensor is a view, so cache[:, :, t:t+1] = new writes into the buffer itself. You need
no mask.
"""


def step(q, k, v, cache_k, cache_v, t):
    """Return y [B,heads,1,hd], row t of causal attention.

    q, k, v [B,heads,1,hd] are those of token t. cache_k, cache_v [B,heads,T,hd] are filled up to place t-1,
    and this function writes place t.
    """
    raise NotImplementedError("your turn")
