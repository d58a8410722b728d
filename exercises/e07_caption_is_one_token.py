"""Exercise 7. A prompt acts as one token.

Check yourself:   python -m pytest exercises/test_e07_caption_is_one_token.py

First read "The prompt acts as one token" in the docstring of model.py. LlamaGen's prompt tokens have keys of
zero. So the product q.k of an image token with each prompt token is 0, whatever the query q is. Plain
attention of one query over n prompt tokens and t image tokens is then
    y = [ sum_j exp(0) p_j  +  sum_i exp(s_i) v_i ] / [ n + sum_i exp(s_i) ],      s_i = q.k_i / sqrt(hd),
where p_j are the values of the prompt tokens. Write the same with *one* prompt token, so that the softmax
runs over 1 + t numbers instead of n + t. This token has key 0. Find its value and its attention
logit.

Hint: n p = exp(?) p. The full-size model has hd = 64 and up to n = 120 prompt tokens.
"""


def collapsed(q, k, v, prefix_v):
    """Return y [B,hd] by a softmax over 1 + t attention logits.

    q [B,hd] has one query per sample. k, v [B,t,hd] are those of t >= 0 image tokens, and prefix_v [B,n,hd]
    holds the values of the n prompt tokens.
    """
    raise NotImplementedError("your turn")
