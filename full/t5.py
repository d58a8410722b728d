"""Captions to the T5 features that condition the full-size model: [B,L,C], a mask [B,L], padded on the left.

LlamaGen reads its caption by the frozen encoder of flan-t5-xl: 1.2B parameters, C = 2048, L = 120 tokens.
text.py is the tiny world's stand-in behind the same function, encode(captions, device) -> (features, mask).
Nothing complains of features that are not made as for LlamaGen's training; the pictures just get worse:
 1. Captions are cleaned, twice, by rules made for captions scraped from web shops (`clean`). For T5 alone:
    rewards judge what the user asked for, so they always see the caption verbatim.
 2. T5 gets the mask of its padding, or tokens would attend to it. The paper's code gave it in sampling,
    not in training, and so trained on other features than it sampled from. Here `encode` is for both.
 3. T5 pads on the right, the policy on the left: the last place of its prefix predicts image token 0.
 4. T5 runs in bf16, in which it was trained; its activations leave the range of fp16.
As the encoder never changes, each caption is encoded once; then the encoder's 2.4 GB are freed. Sources: T5,
arXiv 1910.10683; LlamaGen, arXiv 2406.06525, whose `clean_caption` (language/t5.py, from DeepFloyd IF) has
these rules. Departure 1: where its HTML parser stops with an error ("<![x"), we keep the tags.

Try it:   python t5.py "Blue_Cat &amp;quot;on-sale&amp;quot;, FREE shipping: https://cats.com/1"
          Captions("weights/flan-t5-xl", "cache").encode(["a photo of a cat"])     # [1,120,2048], [1,120]
"""
import contextlib
import functools
import gc
import hashlib
import html
import importlib
import json
import os
import re
import urllib.parse

import torch
from tqdm import trange

from common import files as checkpoint
from common.config import UserError, run

# The rules of cleaning, in order: (what is found, what takes its place). The text is in lower case by then.
SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
LINKS = [("<person>", "person")] + [                # the HTML parser would drop it; "www:" is as released
    (rf"\b(?:{start}:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "") for start in ("https?", "www")]
MARKS = [(r"@\w+", ""), (r"[\u31c0-\u9fff]+", ""),  # @nickname, Chinese characters (kana and Hangul stay)
         ("[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
          "\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),                                # dashes of all kinds
         ("[`´«»“”¨]", '"'), ("[‘’]", "'"),                                        # quotation marks too
         ("&quot;?", ""), ("&amp", ""),                                            # escaped twice
         (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "), (r"\d:\d\d\s+$", ""),       # 127.0.0.1, "3:45 "
         (r"\\n", " "), (r"#(?:\d{1,3}|\d{5,})\b", ""), (r"\b\d{6,}\b", ""),       # \n, #123, #12345, 123456
         (rf"\S+\.(?:{FILE})", ""), ("[\"']{2,}", '"'), (r"\.{2,}", " "),          # img_1.png, ""sale"", ...
         (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "), (r"\s+\.\s+", " ")]            # ***sale***, "a . b"
WORDS = [(r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""), (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),   # jc6640, jc6640vc
         (r"\b\d+[a-zA-Z]+\d+\b", ""),                                             # 6640vc231
         (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""), (r"(?:free\s)?download(?:\sfree)?", ""),
         (r"\bclick\b\s(?:for|on)\s\w+", ""), (rf"\b(?:{FILE})(?:\simages?)?", ""), (r"\bpage\s+\d+\b", ""),
         (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),                     # j2d1a2a
         (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),      # 20x30 by a Latin x, a Cyrillic one, or a times sign
         (r"\b\s+:\s+", ": "), (r"(\D[,./])\b", r"\1 "), (r"\s+", " "),            # "a : b"; at last the ends
         (r"""^["']([\w\W]+)["']$""", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", "")]


def need(name):
    """The optional package `name`. UserError if it, or something that it wants, is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"no package {error.name or name}: pip install -r requirements-full.txt") from None


def _replace(rules, text):
    return functools.reduce(lambda text, rule: re.sub(*rule, text), rules, text)


def clean_caption(text):
    """One pass of the cleaning that LlamaGen was trained with. UserError without packages bs4 and ftfy."""
    bs4, ftfy = need("bs4"), need("ftfy")
    text = _replace(LINKS, urllib.parse.unquote_plus(text).strip().lower())
    if "<" in text or "&" in text:                  # else it is no HTML, but bs4 might warn: a file's name?
        with contextlib.suppress(bs4.ParserRejectedMarkup, UnicodeEncodeError):    # departure 1
            text = bs4.BeautifulSoup(text, "html.parser").text
    text = _replace(MARKS, text)
    if len(re.findall("[-_]", text)) > 3:           # this_is_my_cute_cat, but black-and-white stays
        text = re.sub("[-_]", " ", text)
    return _replace(WORDS, html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()


@functools.cache
def clean(caption):
    """The caption as T5 reads it. Twice, as released: what one rule leaves is often food for another."""
    return clean_caption(clean_caption(caption))


class Captions:
    """T5 features of captions, kept in a file in the folder `cache`. folder: a T5 as Hugging Face stores it;
    length: L; device, dtype: of the encoder; batch: captions at a time. UserError for no T5, bad cache."""

    def __init__(self, folder, cache, length=120, device="cpu", dtype=torch.bfloat16, batch=32):
        self.folder, self.length, self.device, self.dtype, self.batch = folder, length, device, dtype, batch
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
            self.width = config["d_model"]                                                        # C
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"no T5 in {folder}: get *.json, *.safetensors of google/flan-t5-xl") from None
        # A file for each way to make features. Sizes tell encoders apart without reading gigabytes.
        sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
                 if name.endswith((".safetensors", ".bin", "tokenizer.json", "spiece.model"))}
        self.made_with = {"config": config, "sizes": sizes, "length": length, "dtype": str(dtype)}
        key = hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()[:8]
        self.path, self.rows = os.path.join(cache, f"t5_{key}.pt"), {}    # cleaned caption: features [n,C]
        if os.path.exists(self.path):
            try:                                    # mmap: rows come from the disk when they are read
                stored = checkpoint.load(self.path, lazy=True)
                rows = stored["features"].split(stored["lengths"])                                # [sum n,C]
                if (rows[0].shape[1] != self.width or max(map(len, rows)) > length
                        or not rows[0].is_floating_point()):
                    raise ValueError
                self.rows.update(zip(stored["captions"], rows, strict=True))
            except Exception as error:              # each damage raises its own kind
                raise UserError(f"{self.path} is damaged ({type(error).__name__}): delete it") from None

    def _load(self):
        """Tokenizer and encoder. The Hub has whole T5s; the decoder is left in its file. Raises UserError."""
        transformers = need("transformers")
        transformers.logging.set_verbosity_error()  # what it would report of the weights is refused below
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            encoder, info = transformers.T5EncoderModel.from_pretrained(
                self.folder, dtype=self.dtype, local_files_only=True, output_loading_info=True)
        except Exception as error:
            raise UserError(f"transformers cannot load the T5 in {self.folder}: {error!r:.99}") from None
        if info["missing_keys"]:                    # or they would be random, silently
            raise UserError(f"the weights in {self.folder} lack {min(info['missing_keys'])}: get them again")
        checkpoint.examine(encoder.state_dict(), self.folder, sum(self.made_with["sizes"].values()))
        return tokenizer, encoder.to(self.device).eval()

    @torch.no_grad()
    def prepare(self, captions):
        """Encodes captions that the cache lacks, adds them to its file, and frees the encoder; if it lacks
        none, nothing is loaded. One process at a time. Raises UserError."""
        missing = [text for text in dict.fromkeys(map(clean, captions)) if text not in self.rows]
        if not missing:
            return
        (tokenizer, encoder), rows = self._load(), []
        try:
            for i in trange(0, len(missing), self.batch, desc="T5", unit="batch", ncols=110):
                tokens = tokenizer(missing[i:i + self.batch], padding="max_length", truncation=True,
                                   max_length=self.length, return_tensors="pt").to(self.device)
                hidden = encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state    # [B,L,C]
                # Visible tokens alone: 80 MB in bf16 for 1,000 captions of 20; padded to 120, 490 MB.
                rows += [h[m].cpu() for h, m in zip(hidden, tokens["attention_mask"].bool())]
        finally:                                    # Ctrl-C keeps what is done: on a CPU it may be hours
            del encoder
            gc.collect()
            torch.cuda.empty_cache()
            if rows:                                # who maps the old file keeps it, unlinked (Linux, macOS)
                self.rows.update(zip(missing, rows))
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                checkpoint.save({"made_with": self.made_with, "captions": list(self.rows),
                                 "features": torch.cat(list(self.rows.values())),
                                 "lengths": [len(row) for row in self.rows.values()]}, self.path)

    def encode(self, captions, device="cpu"):
        """B captions -> features [B,L,C], fp32, 0 in the padding, and mask [B,L], True at their tokens, on
        `device`. What is not in the cache is prepared first. Raises UserError."""
        self.prepare(captions)
        features = torch.zeros(len(captions), self.length, self.width)
        mask = torch.zeros(len(captions), self.length, dtype=torch.bool)
        for b, row in enumerate(self.rows[clean(caption)] for caption in captions):
            features[b, self.length - len(row):] = row                                   # to fp32: exact
            mask[b, self.length - len(row):] = True
        return features.to(device), mask.to(device)


if __name__ == "__main__":
    run(lambda argv: print(clean(" ".join(argv))))
