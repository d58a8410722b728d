"""python -m pytest tests/full/test_t5.py

A tiny random T5 replaces flan-t5-xl. It is saved with its decoder, as on the Hub, and its tokenizer knows
nine words. The oracle runs T5 by transformers on one prompt alone, without padding or mask.
"""
import functools
import json
import os
import random
import shutil
import sys
import weakref

import pytest
import torch

from full import t5
from common.config import UserError
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")
pytest.importorskip("bs4")
L, C = 12, 32
IDS = {"a red cat on the dog": [3, 4, 6, 8, 9, 7, 1], "": [1], "blue photo": [5, 10, 1],
       "the cat of the dog of the cat of a blue red dog on a cat": [9, 6, 11, 9, 7, 11, 9, 6, 11, 3, 5, 1]}
PROMPTS = list(IDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder as on the Hub: an encoder, a decoder, and a tokenizer that ends texts with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    path = str(tmp_path_factory.mktemp("t5"))
    torch.manual_seed(0)
    whole = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=40, d_model=C, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False))
    for p in whole.parameters():                                   # fresh blocks have almost no effect
        torch.nn.init.normal_(p, std=.3)
    whole.save_pretrained(path)
    words = ["<pad>", "</s>", "<unk>"] + "a red blue cat dog on the photo of".split()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(path)
    return path


def make(folder, tmp_path, **options):
    return t5.Captions(folder, str(tmp_path / "cache"), **{"length": L, "dtype": torch.float32, **options})


@functools.cache
def reference(folder):
    return transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32).eval()


def alone(folder, ids):
    """Return the hidden states [n,C] of the ids of one prompt, without padding or mask: the oracle."""
    with torch.no_grad():
        return reference(folder)(torch.tensor([ids])).last_hidden_state[0]


def test_features_are_those_of_each_prompt_alone(folder, tmp_path):
    """The last prompt is too long: its first 11 tokens and </s> stay. The empty prompt is </s> alone."""
    features, mask = make(folder, tmp_path, batch=3).encode(PROMPTS)
    assert features.shape == (4, L, C) and features.dtype == torch.float32 and mask.dtype == torch.bool
    for row, visible, prompt in zip(features, mask, PROMPTS):
        n = len(IDS[prompt])
        assert visible.tolist() == [False] * (L - n) + [True] * n
        assert (row[:L - n] == 0).all()
        torch.testing.assert_close(row[L - n:], alone(folder, IDS[prompt]), rtol=0, atol=1e-5)
    assert features[mask].std() > .1                                  # so a tolerance of 1e-5 is small


def test_bf16_is_stored_and_comes_back_exactly(folder, tmp_path):
    cache = make(folder, tmp_path, dtype=torch.bfloat16)
    features, mask = cache.encode(PROMPTS)
    assert features.dtype == torch.float32 and torch.equal(features, features.bfloat16().float())
    assert (features[0, L - 7:] - alone(folder, IDS[PROMPTS[0]])).abs().max() < .1
    stored = torch.load(cache.path, weights_only=True)
    assert stored["features"].dtype == torch.bfloat16
    assert torch.equal(stored["features"].float(), features[mask])    # only the visible tokens
    assert stored["captions"] == PROMPTS and stored["lengths"] == mask.sum(1).tolist() == [7, 1, 3, L]
    assert torch.equal(make(folder, tmp_path, dtype=torch.bfloat16).encode(PROMPTS)[0], features)


def test_cached_prompts_need_no_encoder(folder, tmp_path, monkeypatch):
    first = make(folder, tmp_path)
    first.prepare(PROMPTS)
    features, mask = first.encode(PROMPTS[::-1])

    def refuse(*args, **kwargs):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", refuse)
    second = make(folder, tmp_path)
    second.prepare(PROMPTS)
    assert torch.equal(second.encode(PROMPTS[::-1])[0], features)
    assert torch.equal(second.encode(PROMPTS[::-1])[1], mask)
    nothing = second.encode([])
    assert nothing[0].shape == (0, L, C) and nothing[1].shape == (0, L)
    with pytest.raises(UserError, match="the encoder was loaded"):
        second.prepare(["a new prompt"])


def test_each_prompt_is_encoded_once_and_the_encoder_freed(folder, tmp_path, monkeypatch):
    seen, alive, freed = [], [], []
    load, forward = transformers.T5EncoderModel.from_pretrained, transformers.T5EncoderModel.forward

    def watch(*args, **kwargs):
        result = load(*args, **kwargs)
        alive.append(weakref.ref(result[0]))
        return result

    def count(self, input_ids, attention_mask):
        seen.extend(ids[m.bool()].tolist() for ids, m in zip(input_ids, attention_mask))
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", watch)
    monkeypatch.setattr(transformers.T5EncoderModel, "forward", count)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(alive[-1]() is None))
    cache = make(folder, tmp_path, batch=2)
    cache.prepare(["red cat", "blue cat", "red cat", "  Red   CAT", "<b>red</b> cat", "dog"])
    assert seen == [[4, 6, 1], [5, 6, 1], [7, 1]]                     # equal after cleaning: encoded once
    features, _ = cache.encode(["dog", "a dog", "Dog", "a dog"])     # "a dog" is prepared first
    assert seen[3:] == [[3, 7, 1]] and torch.equal(features[0], features[2])
    assert freed == [True, True]                                      # freed before the cache is emptied


def test_appending_leaves_entries_and_open_readers_alone(folder, tmp_path):
    make(folder, tmp_path).prepare(["red cat", "dog"])
    reader = make(folder, tmp_path)                                   # maps the file that is replaced below
    writer = make(folder, tmp_path)
    before = writer.encode(["dog", "red cat"])[0]
    writer.prepare(["a photo", "dog", "the cat"])
    assert torch.equal(reader.encode(["dog", "red cat"])[0], before)
    again = make(folder, tmp_path)
    assert list(again.rows) == ["red cat", "dog", "a photo", "the cat"]
    assert torch.equal(again.encode(["dog", "red cat"])[0], before)
    assert torch.equal(again.encode(["the cat", "a photo"])[0], writer.encode(["the cat", "a photo"])[0])
    assert os.listdir(tmp_path / "cache") == [os.path.basename(again.path)]        # no temporary file is left


def test_ctrl_c_keeps_what_is_done(folder, tmp_path, monkeypatch):
    cache, forward = make(folder, tmp_path, batch=2), transformers.T5EncoderModel.forward

    def stop_at_dog(self, input_ids, attention_mask):
        if 7 in input_ids:
            raise KeyboardInterrupt
        return forward(self, input_ids, attention_mask)

    monkeypatch.setattr(transformers.T5EncoderModel, "forward", stop_at_dog)
    with pytest.raises(KeyboardInterrupt):
        cache.prepare(["red", "blue", "dog", "cat"])
    assert list(make(folder, tmp_path).rows) == ["red", "blue"]
    monkeypatch.undo()
    cache.prepare(["red", "blue", "dog", "cat"])
    features, _ = make(folder, tmp_path).encode(["blue", "cat"])
    torch.testing.assert_close(features[:, -2:], torch.stack([alone(folder, [5, 1]), alone(folder, [6, 1])]),
                               rtol=0, atol=1e-5)


def test_a_cache_belongs_to_one_encoder_length_and_precision(folder, tmp_path):
    other = str(tmp_path / "other")
    shutil.copytree(folder, other)
    path = make(folder, tmp_path).path
    assert make(other, tmp_path).path == path                         # a copy counts as the same encoder
    with open(os.path.join(other, "model.safetensors"), "ab") as file:
        file.write(b" ")
    paths = {path, make(other, tmp_path).path, make(folder, tmp_path, length=L + 1).path,
             make(folder, tmp_path, dtype=torch.bfloat16).path}
    shutil.copy(os.path.join(folder, "model.safetensors"), other)
    with open(os.path.join(other, "config.json"), "r+", encoding="utf-8") as file:
        config = json.load(file)
        file.seek(0)
        json.dump({**config, "layer_norm_epsilon": 1e-5}, file)
        file.truncate()
    paths.add(make(other, tmp_path).path)
    assert len(paths) == 5
    assert all(os.path.basename(p).startswith("t5_") and len(os.path.basename(p)) == 14 for p in paths)


def test_the_policy_reads_them(folder, tmp_path):
    """A prompt gives the same logits in every batch, and another prompt gives other logits."""
    torch.manual_seed(0)
    policy = GPT(GPTConfig(dim=16, n_layer=2, n_head=2, multiple_of=16, vocab_size=20, block_size=4,
                           cls_token_num=L, caption_dim=C)).eval()
    torch.nn.init.normal_(policy.output.weight)
    cache, tokens = make(folder, tmp_path), torch.tensor([[1, 2, 3, 4]])
    logits = policy(tokens.expand(3, -1), *cache.encode(["red cat", "a blue dog", "red cat"]))
    torch.testing.assert_close(logits[:1], policy(tokens, *cache.encode(["red cat"])), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[0], logits[2], rtol=0, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > .01


# ---- cleaning: the expected texts follow by hand from the official rules, in the order of the rules

CASES = [
    ("A RED Cat", "a red cat"),                                       # lower case
    ("a+red+cat%21", "a red cat!"),                                   # URL quoting
    ("a photo of <person> smiling", "a photo of person smiling"),
    ("a dog https://dogs.com/pics/1 runs", "a dog runs"),             # "https://" goes, then the site
    ("see example.org/shop now", "see now"), ("joe.com@home", "joe. com"),         # no site before an @
    ("www://cats red", "cats red"),
    ("<b>bold</b> cat", "bold cat"), ("a cat<br/>a dog", "a cata dog"),            # no gap where tags were
    ("a cat by @joe_99 today", "a cat by today"),
    ("a cat 漢字 on a mat", "a cat on a mat"), ("ネコ 한글 cat", "ネコ 한글 cat"),
    ("㍿ ㊗ ㇀ 㐀 ䷀ cat", "cat"),                                       # the smaller Chinese blocks
    ("a — b – c", "a - b - c"), ("a――b", "a-b"), ("a〜b", "a-b"),
    ("“red” ‘cat’", "red\" 'cat"),                                    # outer quotes go
    ("so «big» a cat", 'so "big" a cat'), ("a `cat´ sat", 'a "cat" sat'),
    ("a cat &amp;quot;sale&amp;quot;", "a cat sale"), ("&quot;a&quot; cat", '"a" cat'),
    ("cats &amp; dogs", "cats dogs"), ("cats &amp;amp; dogs", "cats ; dogs"),
    ("server 192.168.0.1 room", "server room"),
    ("at 3:45 漢", "at"), ("at 3:45", "at 3:45"),                     # only before a final gap
    ("line\\nbreak", "line break"), ("line\nbreak", "line break"),
    ("#123 cat", "cat"), ("#1234 cat", "1234 cat"), ("#12345 cat", "cat"), ("#123456 cat", "cat"),
    ("order 123456 of cats", "order of cats"), ("order 12345 of cats", "order 12345 of cats"),
    ("see img_001.png here", "see here"), ("see /a/b.c.jpeg here", "see here"),
    ('"""wow""" cat', '"wow" cat'), ("wait... what", "wait what"),
    ("***sale*** (cat) [dog] {ox} a|b c\\d ~½", "sale cat dog ox a b c d"),
    ("a cat . a dog", "a cat a dog"),
    ("this-is-my-cute-cat", "this is my cute cat"), ("a_b_c-d_e", "a b c d e"),    # four or more
    ("a_b-c_d", "a_b-c_d"), ("black-and-white cat", "black-and-white cat"),        # up to three
    ("ｃａｔ and ﬁsh", "cat and fish"),                                 # ftfy: full width, ligatures
    ("model jc6640 car", "model car"), ("model jc6640vc car", "model car"),
    ("part 6640vc231 red", "part red"), ("j2d1a2a cat", "cat"), ("mp3 abcd123", "mp3 abcd123"),
    ("cats worldwide free shipping today", "cats today"), ("free shipping", ""),
    ("free download cats", "cats"), ("download free cats", "cats"),
    ("click for details cat", "cat"), ("click here cat", "click here cat"),
    ("png images of cats", "of cats"), ("page 3 of a cat", "of a cat"),
    ("frame 20x30 red", "frame red"), ("frame 2.5×3 red", "frame red"), ("frame 5х6 red", "frame red"),
    ("title : cat", "title: cat"), ("red,blue", "red, blue"), ("1,000 cats", "1,000 cats"),
    ("- a cat -", "a cat"), ("'a cat'", "a cat"), (".hidden", ""), ("", ""), ("   ", ""),
]


@pytest.mark.parametrize("prompt, expected", CASES)
def test_cleaning(prompt, expected):
    assert t5.clean(prompt) == expected


def test_cleaning_twice_is_more_than_once():
    """An article number leaves a gap at the start. The gap hides the quote behind it from the last rules."""
    assert t5.clean_caption("jc6640 'a cat'") == "'a cat" and t5.clean("jc6640 'a cat'") == "a cat"


def test_single_quotes_are_made_straight_before_they_are_counted():
    """ftfy straightens quotes too, but after the rule for double quotes. A second pass would hide that."""
    assert t5.clean_caption("a ‘‘red’’ cat") == 'a "red" cat'


@pytest.mark.parametrize("prompt", ["a photo of a cat", "a red circle left of a blue square",
                                    "three dogs, two cats: 5 o'clock!", "a café in 1984, half-timbered",
                                    "is it a \"cat\"? yes.", "ネコ", "😀 a smiling face"])
def test_plain_prompts_stay(prompt):
    assert t5.clean(prompt) == prompt == t5.clean(t5.clean(prompt))


def test_any_text_can_be_cleaned():
    """Half of the characters are special to the rules. The others are random, with unpaired surrogates."""
    rng = random.Random(0)
    for _ in range(100):
        text = "".join(rng.choice([rng.choice("ab1 <>!&;#@.-_:/'\"[%漢é\n\0"), chr(rng.randrange(0x110000))])
                       for _ in range(rng.randrange(40)))
        cleaned = t5.clean(text)
        assert cleaned == cleaned.strip() and "  " not in cleaned and "\n" not in cleaned
        cleaned.encode()                                              # T5 gets no lone surrogate


def test_strange_prompts_do_not_crash(folder, tmp_path):
    strange = ["😀" * 50, "漢字", "a" * 10_000, "a cat " * 1700, "<" * 10_000, "%", "a\0b", "\n"]
    features, mask = make(folder, tmp_path).encode(strange)
    assert features.isfinite().all()
    assert mask.sum(1).tolist() == [2, 1, 2, L, 2, 2, 2, 1]           # <unk> for an unknown word, and </s>


def test_what_the_html_parser_refuses_keeps_its_tags(monkeypatch):
    """Versions of Python refuse different texts, so here the parser refuses every text."""
    import bs4

    def refuse(*args):
        raise bs4.ParserRejectedMarkup("no")

    monkeypatch.setattr(bs4, "BeautifulSoup", refuse)
    assert t5.clean_caption("A <b>cat!") == "a <b>cat!"


# ---- errors

@pytest.mark.parametrize("name", ["ftfy", "bs4"])
def test_missing_packages_of_the_cleaning(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)                      # importing it now fails
    with pytest.raises(UserError, match=f"no package {name}: pip install -r requirements-full.txt"):
        t5.clean_caption("a cat")


def test_missing_transformers(folder, tmp_path, monkeypatch):
    cache = make(folder, tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="no package transformers: pip install -r requirements-full.txt"):
        cache.encode(["a cat"])


def save(path, *values):
    torch.save(dict(zip(["captions", "lengths", "features"], values)), path)


DAMAGES = {
    "torn": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: open(path, "w").write("what is this"),
    "code": lambda path: save(path, [print], [1], torch.zeros(1, C)),
    "other": lambda path: torch.save({"model": torch.zeros(3)}, path),
    "list": lambda path: torch.save([1, 2], path),
    "rows": lambda path: save(path, ["a"], [2], torch.zeros(3, C)),
    "captions": lambda path: save(path, [], [3], torch.zeros(3, C)),
}


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    cache = make(folder, tmp_path_factory.mktemp("prepared"))
    cache.prepare(["a cat", "dog"])
    return cache


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_says_which_file_to_delete(damage, prepared, folder, tmp_path):
    shutil.copytree(os.path.dirname(prepared.path), tmp_path / "cache")
    good = make(folder, tmp_path)
    assert list(good.rows) == ["a cat", "dog"]
    DAMAGES[damage](good.path)
    with pytest.raises(UserError) as error:
        make(folder, tmp_path)
    assert str(error.value).startswith(good.path) and str(error.value).endswith("delete it")
    assert "\n" not in str(error.value)
    os.remove(good.path)
    assert make(folder, tmp_path).rows == {}                          # deleting the file is the fix


def without_a_weight(path):
    from safetensors.torch import load_file, save_file
    state = load_file(path + "/model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, path + "/model.safetensors", {"format": "pt"})


FAULTS = [
    (shutil.rmtree, "no T5 in"), (lambda p: os.remove(p + "/config.json"), "no T5 in"),
    (lambda p: open(p + "/config.json", "w").write("{"), "no T5 in"),
    (lambda p: open(p + "/config.json", "w").write("[]"), "no T5 in"),
    (lambda p: open(p + "/config.json", "w").write('{"model_type": "gpt2"}'), "no T5 in"),
    (lambda p: os.remove(p + "/model.safetensors"), "transformers cannot load"),
    (lambda p: os.truncate(p + "/model.safetensors", 1000), "transformers cannot load"),
    (lambda p: os.remove(p + "/tokenizer.json"), "transformers cannot load"),
    (without_a_weight, "lacks encoder.block.1.layer.0.SelfAttention.q.weight"),
]


@pytest.mark.parametrize("fault, message", FAULTS)
def test_what_is_wrong_with_the_folder_is_said_in_one_line(fault, message, folder, tmp_path):
    path = str(tmp_path / "t5")
    shutil.copytree(folder, path)
    fault(path)
    with pytest.raises(UserError) as error:
        make(path, tmp_path).prepare(["a cat"])
    assert message in str(error.value) and path in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(tmp_path / "cache")                     # no partial cache is left
