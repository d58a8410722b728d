"""Read prompts from a file, such as assets/prompts.txt. The option `--prompts=` names the file.

    .txt            one prompt per line; blank lines and comments are skipped
    .jsonl .json    one value per line, or a list of values: a text, or a record {"prompt": "...", ...}
    .csv .tsv       a table, whose first line names the fields

The prompt of a record is its first field of prompt, caption and text, in upper or lower case. Comments begin
with `#` and a space, so "#1 on the wall" is a prompt. Files are in UTF-8, and prompts are stripped.
"""
import csv
import json
import os

from common.config import UserError, locate


def field(record, *names):
    """Return the record's key that comes first in `names`, or None. ValueError if the record is no dict."""
    if not isinstance(record, dict) or None in record:         # csv puts surplus cells under the key None
        raise ValueError("it is neither a text nor a record; in a table, a text with a comma needs quotes")
    return next((k for f in names for k in record if k.strip().lower() == f), None)


def caption_of(record):
    """Return the stripped prompt or caption of a record. Raises a ValueError that says why there is none."""
    key = field(record, "prompt", "caption", "text")
    if key is None:
        raise ValueError(f"no field prompt, caption or text; its fields are {', '.join(map(repr, record))}")
    caption = record[key]                                    # d800 to dfff stand for bytes that are not UTF-8
    if not isinstance(caption, str) or not caption.strip() or any(0xd800 <= ord(c) < 0xe000 for c in caption):
        raise ValueError(f"{key!r} must be a text in UTF-8 that is not blank, got {caption!a:.60}")
    return caption.strip()


def records(path, read=caption_of, tables=(".csv", ".tsv")):
    """Return [(read(record), record)] for each entry. A bare text counts as {"prompt": text}. `tables` are
    endings of files whose first line names the fields. Raises UserError, also for a ValueError of `read`."""
    path, kind, out, entries, n = locate(path), os.path.splitext(path)[1].lower(), [], (), 0
    if kind not in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        raise UserError(f"{path}: unknown kind of file {kind!r}; use .txt, .jsonl, .json, .csv or .tsv")
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}: check the path")
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            entries = (csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
                       if kind in tables else json.load(file) if kind == ".json" else file)
            if kind == ".json" and not isinstance(entries, list):
                raise ValueError(f"the file must hold a list, got a {type(entries).__name__}")
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
        raise UserError(f"{path} has no entries: it needs at least one")
    return out


def read(path):
    """Return the prompts of a file, without the other fields of its records. Raises UserError."""
    return [prompt for prompt, _ in records(path)]
