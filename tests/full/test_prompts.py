"""python -m pytest tests/full/test_prompts.py"""
import json

import pytest

from full import prompts
from tiny import shapes
from common.config import UserError

PROMPTS = ["a red fox, asleep", "Two cats", "a sign that says \"open\""]


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


FILES = {
    "a.txt": 'a red fox, asleep\nTwo cats\na sign that says "open"\n',
    "gaps.txt": '# what it is\n#\n\na red fox, asleep  \n \t\n\tTwo cats\n# more\na sign that says "open"',
    "texts.json": json.dumps(PROMPTS),
    "records.json": json.dumps([{"prompt": PROMPTS[0]}, {"Caption": PROMPTS[1]}, PROMPTS[2]], indent=1),
    "a.jsonl": '{"text": "a red fox, asleep"}\n\n{"id": 3, "text": " Two cats "}\n'
               '"a sign that says \\"open\\""\n',
    "a.csv": 'id,prompt\n1,"a red fox, asleep"\n2,Two cats\n3,"a sign that says ""open"""\n',
    "bare.csv": 'caption\n"a red fox, asleep"\n\nTwo cats\na sign that says "open"\n',
    "a.tsv": 'Prompt\tKind\na red fox, asleep\tanimal\nTwo cats\tcount\na sign that says "open"\ttext\n',
    "UPPER.TXT": 'a red fox, asleep\nTwo cats\na sign that says "open"',
}


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", FILES)
def test_every_format_with_and_without_byte_order_mark_and_carriage_returns(tmp_path, name, mark, ends):
    path = write(tmp_path, name, mark + FILES[name].replace("\n", ends).encode())
    assert prompts.read(path) == PROMPTS


@pytest.mark.parametrize("record, caption", [
    ({"text": "c", "caption": "b", "prompt": "a"}, "a"), ({"text": "c", "caption": "b"}, "b"),
    ({"tag": "x", "text": "c"}, "c"), ({" PROMPT ": "a", "text": "c"}, "a"),
    ({"prompts": "x", "Text": "c"}, "c")])
def test_the_first_field_of_prompt_caption_text_is_read(tmp_path, record, caption):
    assert prompts.records(write(tmp_path, "a.jsonl", json.dumps(record))) == [(caption, record)]
    table = ",".join(record) + "\n" + ",".join(record.values()) + "\n"
    assert prompts.records(write(tmp_path, "a.csv", table)) == [(caption, record)]


def test_prompts_are_kept_to_the_letter(tmp_path):
    odd = ["#1 on the wall", "#hashtag", "photo of soil", "caf\u00e9 \U0001f642 at night", "a  b\u2028c", "'"]
    assert prompts.read(write(tmp_path, "a.txt", "\n".join(odd))) == odd
    assert prompts.read(write(tmp_path, "a.json", json.dumps(odd))) == odd
    raw = "\n".join(json.dumps(x, ensure_ascii=False) for x in odd)
    assert prompts.read(write(tmp_path, "a.jsonl", raw)) == odd
    assert prompts.read(write(tmp_path, "a.csv", 'text\r\n"one, two\r\nthree"\r\n')) == ["one, two\r\nthree"]


def test_records_keep_what_geneval_says_of_a_prompt(tmp_path):
    lines = [{"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"},
             {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"}]
    path = write(tmp_path, "evaluation_metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert prompts.records(path) == [(line["prompt"], line) for line in lines]
    assert prompts.records(write(tmp_path, "a.txt", " a bench \n")) == [("a bench", {"prompt": "a bench"})]


@pytest.mark.parametrize("name, content, message", [
    ("a.parquet", "x", "a.parquet: unknown kind of file '.parquet'"), ("a", "x", "unknown kind of file ''"),
    ("a.txt", "", "a.txt has no entries"), ("a.txt", "# only this\n\n", "has no entries"),
    ("a.json", "[]", "has no entries"), ("a.csv", "prompt\n", "has no entries"),
    ("a.txt", b"a cat\na d\xf6g\n", "a.txt, line 2: 'prompt' must be a text in UTF-8 .* 'a d"),
    ("a.csv", b"prompt\nx\n" + b"y\n" * 9999 + b"\xff\n", "a.csv, line 10002: 'prompt' must be .* in UTF-8"),
    ("a.json", r'["a", "\ud83d"]', "a.json, entry 2: 'prompt' must be a text in UTF-8"),
    ("a.jsonl", '"a cat"\n\n{"prompt": "a dog"\n', "a.jsonl, line 3: Expecting"),
    ("a.jsonl", "[" * 100000, "a.jsonl, line 1: "),
    ("a.json", '["a cat",\n"a dog" "a cow"]', "a.json: Expecting ',' delimiter: line 2"),
    ("a.json", '{"prompt": "a cat"}', "a.json: the file must hold a list, got a dict"),
    ("a.json", '["a cat", 5]', "entry 2: it is neither a text nor a record"),
    ("a.jsonl", '["a cat"]', "line 1: it is neither a text nor a record"),
    ("a.csv", 'id,prompt\n1,a cat\n2,a red fox, asleep\n', "line 3: it is neither .* needs quotes"),
    ("a.csv", 'id,prompt\n1,a cat\n2\n', "line 3: 'prompt' must be .* got None"),
    ("a.csv", 'id,prompt\n1,a cat\n2,"a dog\n3,a cow\n', "a.csv, line 4: unexpected end"),
    ("a.csv", 'a,b\n1,2\n', "line 2: no field prompt, caption or text; its fields are 'a', 'b'"),
    ("a.json", '["a cat", {"prompts": "a dog"}]', "entry 2: no field .* its fields are 'prompts'"),
    ("a.jsonl", '{"prompt": 5}', "line 1: 'prompt' must be a text in UTF-8 that is not blank, got 5"),
    ("a.jsonl", '{"prompt": null, "text": "a cat"}', "'prompt' must be a text .* None"),
    ("a.json", '["a cat", "  "]', "entry 2: 'prompt' must be .* got ''"),
    ("a.tsv", 'text\tid\n \t1\n', "line 2: 'text' must be a text in UTF-8 that is not blank"),
])
def test_errors_are_one_line_and_name_the_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message) as error:
        prompts.read(write(tmp_path, name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["none.txt", "folder.txt"])
def test_no_such_file(tmp_path, name):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserError, match=f"no file .*{name}"):
        prompts.read(str(tmp_path / name))


def test_the_shipped_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                     # found from any folder
    captions = prompts.read("assets/prompts.txt")
    assert len(captions) >= 1200 and len({c.lower() for c in captions}) == len(captions)
    assert all(c.isascii() and c.isprintable() and 3 <= len(c.split()) <= 30 for c in captions)
    assert not set(captions) & set(shapes.CAPTIONS)
    words = [pair for c in captions for pair in zip(c.lower().split(), c.lower().split()[1:])]
    assert not [(a, b) for a, b in words if a in ("a", "an") and (a == "an") != (b[0] in "aeiou") or a == b]
