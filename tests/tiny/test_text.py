"""python -m pytest tests/tiny/test_text.py"""
from collections import Counter

import pytest
import torch

from common.config import UserError
from tiny import shapes, text


def test_bpe_learns_the_most_frequent_pair_first():
    ranks = text.train_bpe(Counter({"aab": 3, "ab": 1, "cd": 3}))
    order = sorted((rank, token) for token, rank in ranks.items() if rank >= 256)
    assert [token for _, token in order] == [b"ab", b"cd", b"aab"]        # ab 4 times, cd 3 times, then a+ab


def test_every_word_of_the_world_is_one_token_and_decodes_back():
    for caption in shapes.CAPTIONS:
        ids = text.tokenize(caption)
        assert len(ids) == len(caption.split()) <= text.MAX_WORDS
        assert text.encoding().decode(ids) == " " + caption


def test_upper_case_and_spaces_do_not_matter():
    assert text.normalize("  A RED\tCircle ") == "a red circle"
    assert text.tokenize("A  RED circle") == text.tokenize("a red circle")


def test_padding_is_on_the_left_and_zero():
    features, mask = text.encode(["a red circle", "a red circle left of a blue square"])
    assert features.shape == (2, text.LENGTH, text.DIM) and mask.sum(1).tolist() == [12, 32]
    assert mask[0].tolist() == [False] * 20 + [True] * 12 and (features[~mask] == 0).all()
    assert torch.equal(features[0, 20:23], features[1, :3])    # a position counts from the start of the text


def test_a_text_is_repeated_four_times():
    often, once = text.encode(["a red circle"]), text.encode(["a red circle"], times=1)
    assert once[0].shape == (1, text.MAX_WORDS, text.DIM)
    for a, b in zip(often, once):
        assert torch.equal(a[0, 20:], b[0, 5:].repeat(4, *[1] * (a.dim() - 2)))


def test_bags_of_features_tell_captions_apart():
    """The model reads the mean of the prefix, so two captions must not have the same set of features."""
    features, mask = text.encode(list(shapes.CAPTIONS))
    bags = {tuple(sorted(map(tuple, f[m].tolist()))) for f, m in zip(features[:, :, :160], mask)}
    assert len(bags) == len(shapes.CAPTIONS)


def test_features_never_change():
    """The base in assets/ was trained on these numbers. With other numbers it cannot read its prompts."""
    features, _ = text.encode(["three blue crosses"])
    assert text.tokenize("three blue crosses") == [text.tokenize(w)[0] for w in ("three", "blue", "crosses")]
    assert features[0, -1, :3].tolist() == pytest.approx(FROZEN, abs=1e-6)


FROZEN = [-0.837066, 1.062415, -0.922275]


@pytest.mark.parametrize("caption, message", [
    ("a mauve circle", "no word 'mauve'"), ("", "empty"), ("   ", "empty"),
    ("ein roter Kreis", "no word 'ein'"), ("a red circle left of a blue square and", "9 words"),
    ("円", "no word '円'"), ("a " * 5000, "5000 words")])
def test_errors_name_what_cannot_be_read(caption, message):
    with pytest.raises(UserError, match=message):
        text.encode([caption])
