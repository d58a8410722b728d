"""Exercise 7. A caption is one token.

Check yourself:   python -m pytest exercises/test_e07_caption_is_one_token.py

Read surprise 1 in the docstring of model.py first. LlamaGen's caption tokens have keys of zero, so the score
q.k of an image token towards each of them is 0, whatever the image token asks for. Plain attention of one
query over n caption tokens and t image tokens is then
    y = [ sum_j exp(0) p_j  +  sum_i exp(s_i) v_i ] / [ n + sum_i exp(s_i) ],      s_i = q.k_i / sqrt(hd)
with p_j the values of the caption. Write the same with *one* caption token, so that the softmax runs over 1 +
t numbers and not over n + t. That token has key 0; its value and its score are for you to find.

Hint: n p = exp(?) p. The full-size model has hd = 64 and up to n = 120 caption tokens.
"""


def collapsed(q, k, v, prefix_v):
    """q [B,hd], one query each; k, v [B,t,hd] of t >= 0 image tokens; prefix_v [B,n,hd], values of the n
    caption tokens -> y [B,hd], by a softmax over 1 + t scores."""
    raise NotImplementedError("your turn")
