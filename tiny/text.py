"""Text features of the tiny world: texts to features [B,L,C] and a mask [B,L], padded on the left.

The full-size model reads features of a frozen T5. In the tiny world this file replaces T5. Its `encode`
returns the same kinds of tensors: features and a mask. A text is a caption in pretraining and a prompt in
post-training. Like any text encoder this one has two parts, and both are frozen:
  1. A byte-pair encoding (BPE) cuts a text into tokens. It is learned from the world's captions in a few
     milliseconds, and tiktoken runs it. Every word of the world becomes one token. A dictionary would do the
     same. BPE is shown here because real text encoders use it.
  2. The feature of a token is three random vectors, concatenated: of token, token before, and position.

The transformer reads its prefix as a bag of tokens of equal weight (model.py explains why). So:
  - A feature contains its position and the token before. Otherwise "a red circle and a blue square" and
    "a blue circle and a red square" would be the same bag. T5's features know their context by attention.
  - A text is repeated four times. Otherwise its few words would have little weight among 64 image tokens, and
    the policy would learn to draw long before it learned to read. After 1,500 steps of pretraining, .13 of
    the images were correct without repetition, and .48 with it, with all else equal (tiny/judge.reader;
    LOG.md). At full size the prompt has more weight anyway: up to 120 tokens of T5 beside 256 image tokens.

    python -m tiny.text          encodes two texts

Symbols: B texts, n tokens of a text, L = 32 tokens of the prefix (LENGTH), C = 320 width of a feature (DIM).
"""
import functools
from collections import Counter

import numpy as np
import tiktoken
import torch

from common.config import UserError
from tiny import shapes

MAX_WORDS = 8                   # the longest text, "a red circle left of a blue square", has 8 tokens
TIMES = 4                       # repetitions of a text
LENGTH = TIMES * MAX_WORDS      # L
WIDTHS = (128, 128, 64)         # of the three parts of a feature: token, token before, position
DIM = sum(WIDTHS)               # C
PATTERN = r" ?[^\s]+|\s+"       # cuts a text before BPE: into words, each with the space before it


def train_bpe(words):
    """Learn a BPE from a Counter of words -> {bytes of a token: rank}. Source: Sennrich et al. 2016.
    It starts from the 256 bytes and joins the most frequent pair of neighbors until every word is one
    token."""
    ranks = {bytes([i]): i for i in range(256)}
    split = {w: [bytes([b]) for b in w.encode()] for w in words}
    while pairs := Counter(pair for w, n in sorted(words.items()) for pair in zip(split[w], split[w][1:])
                           for _ in range(n)):
        (a, b), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))    # ties by bytes
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
    """Return the tiktoken Encoding of the world's captions. A token is a word with the space before it."""
    words = sorted({" " + w for caption in shapes.CAPTIONS for w in caption.split()})
    return tiktoken.Encoding("tiny_world", pat_str=PATTERN, mergeable_ranks=train_bpe(Counter(words)),
                             special_tokens={})


@functools.cache
def _tables():
    """Return three tables of random vectors: of tokens, of tokens before, and of positions."""
    rng = np.random.RandomState(0)                  # NumPy guarantees that this stream never changes
    rows = (encoding().n_vocab, encoding().n_vocab + 1, MAX_WORDS)         # + 1: a row for "no token before"
    return [torch.from_numpy(rng.standard_normal((n, w))).float() for n, w in zip(rows, WIDTHS)]


def normalize(text):
    """Return a text as captions are written: in lower case, with one space between words."""
    return " ".join(text.lower().split())


def tokenize(text):
    """Return the n token ids of a text. Raise UserError for no word, unknown words, or too many words."""
    ids = [encoding().encode(" " + word) for word in normalize(text).split()]
    unknown = [word for word, parts in zip(text.split(), ids) if len(parts) > 1]
    if unknown or not ids:
        words = sorted({w for c in shapes.CAPTIONS for w in c.split()})
        raise UserError((f"the tiny world has no word {unknown[0]!r}" if unknown else "the prompt is empty")
                        + f"; use these words: {' '.join(words)}")
    if len(ids) > MAX_WORDS:
        raise UserError(f"the prompt has {len(ids)} words, and the tiny model reads at most {MAX_WORDS}; "
                        f"shorten it: {text!r}")
    return [parts[0] for parts in ids]


@functools.cache
def _features(text):
    """Return the features [n,C] of a text, without repetition."""
    token, before, position = _tables()
    ids = tokenize(text)
    return torch.cat([token[ids], before[[len(before) - 1] + ids[:-1]], position[:len(ids)]], 1)


def encode(texts, device="cpu", times=TIMES):
    """Encode B texts -> features [B,L,C], zero in the padding, and mask [B,L], True at tokens of the text.

    Each text is repeated `times` times, so L = times * MAX_WORDS. Raises UserError as `tokenize` does.
    """
    features = torch.zeros(len(texts), times * MAX_WORDS, DIM)
    mask = torch.zeros(len(texts), times * MAX_WORDS, dtype=torch.bool)
    for b, text in enumerate(texts):
        once = _features(text)
        features[b, -times * len(once):] = once.repeat(times, 1)
        mask[b, -times * len(once):] = True
    return features.to(device), mask.to(device)


if __name__ == "__main__":
    for text in ("three red crosses", "a red circle left of a blue square"):
        features, mask = encode([text])
        print(f"{text!r}: tokens {tokenize(text)}, {int(mask.sum())} of {LENGTH} places visible, "
              f"features {list(features.shape)}")
