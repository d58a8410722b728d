"""Captions from a file, for instance assets/prompts.txt: what `--prompts=` takes.

    .txt            a caption a line; blank lines and comments, lines of `#` and a space, are skipped
    .jsonl .json    a line each, or a list: of texts, or of records {"prompt": "...", ...}
    .csv .tsv       a table; its first line names the fields

Of a record the field prompt, caption or text is read, the first that is there, in upper or lower case.
Files are UTF-8; captions are kept to the letter, but for white space around them ("#1 on the wall" is one).
"""
import csv
import json
import os

from common.config import UserError, locate


def field(record, *names):
    """The key of a record that is the first of `names` that is there, or None. ValueError for no record."""
    if not isinstance(record, dict) or None in record:                     # None: cells beyond the last field
        raise ValueError("neither a text nor a record (in a table, a caption with a comma wants quotes)")
    return next((k for f in names for k in record if k.strip().lower() == f), None)


def caption_of(record):
    """The caption of a record; ValueError says why there is none."""
    key = field(record, "prompt", "caption", "text")
    if key is None:
        raise ValueError("no field prompt, caption or text; there are: " + ", ".join(map(repr, record)))
    caption = record[key]                               # d800 to dfff: where bytes end up that are no UTF-8
    if not isinstance(caption, str) or not caption.strip() or any(0xd800 <= ord(c) < 0xe000 for c in caption):
        raise ValueError(f"{key!r} must be a text in UTF-8, and not a blank one, but is {caption!a:.60}")
    return caption.strip()


def records(path, read=caption_of, tables=(".csv", ".tsv")):
    """File -> [(what `read` makes of a record, the record)]; that of a bare text is {"prompt": text}. Raises
    UserError. tables: kinds of files whose first line names the fields (data.py has a .tsv without)."""
    path, kind, out, entries, n = locate(path), os.path.splitext(path)[1].lower(), [], (), 0
    if kind not in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        raise UserError(f"{path}: captions are read from .txt, .jsonl, .json, .csv and .tsv files")
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            entries = (csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
                       if kind in tables else json.load(file) if kind == ".json" else file)
            if kind == ".json" and not isinstance(entries, list):
                raise ValueError("the file must be a list")
            for n, entry in enumerate(entries, 1):
                if entries is file and entry.split(None, 1)[:1] in ([], ["#"]):
                    continue
                entry = json.loads(entry) if kind == ".jsonl" else entry
                record = {"prompt": entry.strip()} if isinstance(entry, str) else entry
                out.append((read(record), record))
    except (ValueError, csv.Error, RecursionError) as error:
        n = entries.reader.line_num if isinstance(entries, csv.DictReader) else n
        place = f", {'entry' if kind == '.json' else 'line'} {n}" if n else ""
        raise UserError(f"{path}{place}: {error}") from None
    if not out:
        raise UserError(f"{path} holds no captions")
    return out


def read(path):
    """The captions alone. (What else a record holds is for rewards like GenEval's.) Raises UserError."""
    return [caption for caption, _ in records(path)]
