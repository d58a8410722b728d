"""Captions to the features that condition the policy: [B,L,C] plus a mask [B,L], padded on the left.

The full-size model reads frozen T5 features of a caption; this is the tiny world's stand-in behind the same
function. It has the two parts of any text encoder, both frozen:
  1. a byte-pair encoding (BPE), learned on the world's captions in a few milliseconds and run by tiktoken;
  2. a feature for each token: random vectors for the token, for the token before it, and for its position.
The transformer reads its prefix as a bag of tokens of equal weight (model.py, surprise 1), hence two choices.
Features carry the neighbour and the position: if those of "red" were the same everywhere, "a red circle and
a blue square" and "a blue circle and a red square" would be one caption. (T5's features carry their context
too, by attention.) And a caption is said four times over: three words would drown among 64 image tokens, and
the policy would learn to paint long before it learned to listen. With all else equal, after 1,500 steps of
pretraining the reader agrees with .13 of its pictures if captions are said once, with .48 if four times
(LOG.md). T5 fills up to 120 tokens for 256 image tokens.

Try it:   python text.py
"""
import functools
from collections import Counter

import numpy as np
import tiktoken
import torch

from tiny import shapes
from common.config import UserError

WORDS = 8                       # the longest caption, "a red circle left of a blue square", has 8 tokens
TIMES = 4                       # that a caption is said over: see 3 above
LENGTH = TIMES * WORDS          # L
WIDTHS = (128, 128, 64)         # of the three parts of a feature: token, token before, position
DIM = sum(WIDTHS)               # C
PATTERN = r" ?[^\s]+|\s+"       # how a text is cut before merging: words, each with the space before it


def train_bpe(words):
    """{bytes: rank} of a BPE: start from the 256 bytes, keep joining the commonest pair of neighbours.
    Sennrich 2016.

    words: Counter of strings. With as few words as ours it ends when each is one token.
    """
    ranks = {bytes([i]): i for i in range(256)}
    split = {w: [bytes([b]) for b in w.encode()] for w in words}
    while pairs := Counter(pair for w, n in sorted(words.items()) for pair in zip(split[w], split[w][1:])
                           for _ in range(n)):
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))     # ties by bytes: deterministic
        ranks[a + b] = len(ranks)
        for w, parts in split.items():
            joined, i = [], 0
            while i < len(parts):
                take = 2 if parts[i:i + 2] == [a, b] else 1
                joined.append(b"".join(parts[i:i + take]))
                i += take
            split[w] = joined
    return ranks


@functools.cache
def encoding():
    """The tiktoken Encoding of the world's captions; a word of it is one token with the space before it."""
    words = sorted({" " + w for caption in shapes.CAPTIONS for w in caption.split()})
    return tiktoken.Encoding("tiny_world", pat_str=PATTERN, mergeable_ranks=train_bpe(Counter(words)),
                             special_tokens={})


@functools.cache
def _tables():
    """Frozen features of tokens, tokens before, and positions. NumPy fixes RandomState's stream for ever."""
    rng = np.random.RandomState(0)
    rows = (encoding().n_vocab, encoding().n_vocab + 1, WORDS)                       # + 1: "no token before"
    return [torch.from_numpy(rng.standard_normal((n, w))).float() for n, w in zip(rows, WIDTHS)]


def tokenize(caption):
    """Token ids of a caption. UserError for a word that the world does not know, or one word too many."""
    known = encoding()
    ids = [known.encode(" " + word) for word in caption.lower().split()]
    strange = [word for word, parts in zip(caption.split(), ids) if len(parts) > 1]
    if strange or not ids:
        words = sorted({w for c in shapes.CAPTIONS for w in c.split()})
        raise UserError((f"the tiny world has no word {strange[0]!r}" if strange else "the caption is empty")
                        + f"; its words are: {' '.join(words)}")
    if len(ids) > WORDS:
        raise UserError(f"the caption has {len(ids)} words, the tiny model reads {WORDS} at most: "
                        f"{caption!r}")
    return [parts[0] for parts in ids]


@functools.cache
def said_once(caption):
    """A caption of n words -> [n,C]."""
    token, before, position = _tables()
    ids = tokenize(caption)
    return torch.cat([token[ids], before[[len(before) - 1] + ids[:-1]], position[:len(ids)]], 1)


def encode(captions, device="cpu", times=TIMES):
    """B captions -> features [B,L,C] (zero in the padding) and mask [B,L], True at the caption's tokens.

    Said `times` over, so that L = times * WORDS. Raises UserError for captions outside the vocabulary or
    longer than WORDS.
    """
    features = torch.zeros(len(captions), times * WORDS, DIM)
    mask = torch.zeros(len(captions), times * WORDS, dtype=torch.bool)
    for b, caption in enumerate(captions):
        once = said_once(caption)
        features[b, -times * len(once):] = once.repeat(times, 1)
        mask[b, -times * len(once):] = True
    return features.to(device), mask.to(device)


if __name__ == "__main__":
    for caption in ("three red crosses", "a red circle left of a blue square"):
        features, mask = encode([caption])
        print(f"{caption!r}: tokens {tokenize(caption)}, {int(mask.sum())} of {LENGTH} places visible, "
              f"features {list(features.shape)}")
