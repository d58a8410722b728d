"""T5 features of prompts, which condition the full-size policy: [B,L,C] and mask [B,L], padded on the left.

LlamaGen reads a prompt through the frozen encoder of flan-t5-xl: 1.2B parameters, C = 2048, L = 120 tokens.
tiny/text.py is the counterpart in the tiny world. Features that are made in another way than for LlamaGen's
training raise no error. The images only get worse. Four points matter:
 1. A prompt is cleaned twice, by rules for captions that were scraped from web shops (`clean`). Only T5 reads
    the cleaned text. Rewards judge what the user asked for, so they see the prompt unchanged.
 2. T5 gets the mask of its padding. Otherwise tokens would attend to the padding. The paper's code passed the
    mask in sampling but not in training, so the features of the two differed. Here `encode` serves both.
 3. T5 pads on the right, the policy on the left. The last position of the prefix predicts image token 0.
 4. T5 runs in bf16, in which it was trained. Its activations leave the range of fp16.
The encoder never changes, so each prompt is encoded once. Then the encoder's 2.4 GB are freed.

Sources: T5, arXiv 1910.10683. LlamaGen, arXiv 2406.06525. The rules are those of its `clean_caption`
(language/t5.py, from DeepFloyd IF). Departure 1: where its HTML parser fails ("<![x"), we keep the tags.

    Captions("weights/flan-t5-xl", "cache").encode(["a photo of a cat"])              # [1,120,2048], [1,120]
"""
import contextlib
import functools
import gc
import hashlib
import html
import json
import os
import re
import urllib.parse

import torch
from tqdm import trange

from common import files
from common.config import UserError

# The rules of cleaning, in order: (regular expression, replacement). The text is already in lower case.
SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
FILE = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
LINKS = [("<person>", "person")] + [                # the HTML parser would drop <person>; "www:": as released
    (rf"\b(?:{start}:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "") for start in ("https?", "www")]
MARKS = [(r"@\w+", ""), (r"[\u31c0-\u9fff]+", ""),  # @nickname, Chinese characters (kana and Hangul stay)
         ("[-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
          "\ufe31\ufe32\ufe58\ufe63\uff0d]+", "-"),                                # all kinds of dashes
         ("[`´«»“”¨]", '"'), ("[‘’]", "'"),                                        # and of quotation marks
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
         (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),      # 20x30 with a Latin x, a Cyrillic x, or a times sign
         (r"\b\s+:\s+", ": "), (r"(\D[,./])\b", r"\1 "), (r"\s+", " "),            # "a : b"; spaces; the ends
         (r"""^["']([\w\W]+)["']$""", r"\1"), (r"^['_,\-:;]", ""), (r"['_,\-:+]$", ""), (r"^\.\S+$", "")]


def _replace(rules, text):
    return functools.reduce(lambda text, rule: re.sub(*rule, text), rules, text)


def clean_caption(text):
    """Clean a text once, as for LlamaGen's training. Raises UserError if package bs4 or ftfy is missing."""
    with files.explain("prompts cannot be cleaned"):
        import bs4
        import ftfy
    text = _replace(LINKS, urllib.parse.unquote_plus(text).strip().lower())
    if "<" in text or "&" in text:                  # without these it is no HTML, and bs4 may warn
        with contextlib.suppress(bs4.ParserRejectedMarkup, UnicodeEncodeError):    # departure 1
            text = bs4.BeautifulSoup(text, "html.parser").text
    text = _replace(MARKS, text)
    if len(re.findall("[-_]", text)) > 3:           # splits this_is_my_cute_cat, but not black-and-white
        text = re.sub("[-_]", " ", text)
    return _replace(WORDS, html.unescape(html.unescape(ftfy.fix_text(text))).strip()).strip()


@functools.cache
def clean(prompt):
    """Return the prompt as T5 reads it. As released, it is cleaned twice: a rule may enable another rule."""
    return clean_caption(clean_caption(prompt))


class Captions:
    """T5 features of prompts, kept in a file in the folder `cache`. folder: a T5 in Hugging Face's layout.
    length: L. device, dtype: of the encoder. batch: prompts at once. Raises UserError for damaged files."""

    def __init__(self, folder, cache, length=120, device="cpu", dtype=torch.bfloat16, batch=32):
        self.folder, self.length, self.device, self.dtype, self.batch = folder, length, device, dtype, batch
        with files.explain(f"no T5 in {folder}", ": fetch *.json, *.safetensors of google/flan-t5-xl"):
            config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
            self.width = config["d_model"]                                                        # C
        # Each way to make features has its own file. Sizes identify an encoder without reading gigabytes.
        sizes = {name: os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder)
                 if name.endswith((".safetensors", ".bin", "tokenizer.json", "spiece.model"))}
        self.made_with = {"config": config, "sizes": sizes, "length": length, "dtype": str(dtype)}
        key = hashlib.sha256(json.dumps(self.made_with, sort_keys=True).encode()).hexdigest()[:8]
        self.path, self.rows = os.path.join(cache, f"t5_{key}.pt"), {}    # cleaned prompt: features [n,C]
        if os.path.exists(self.path):
            try:                                    # lazy: a row is read from disk when it is used
                stored = files.load(self.path, lazy=True)
                rows = stored["features"].split(stored["lengths"])                                # [sum n,C]
                if not (rows[0].shape[1] == self.width and max(map(len, rows)) <= length
                        and rows[0].is_floating_point()):
                    raise ValueError
                self.rows.update(zip(stored["captions"], rows, strict=True))
            except Exception as error:              # each kind of damage raises another exception
                raise UserError(f"{self.path} is damaged ({type(error).__name__}): delete it") from None

    def _load(self):
        """Load the tokenizer and the encoder. The Hub's files have a decoder too, which is not loaded."""
        with files.explain(f"transformers cannot load the T5 in {self.folder}", ": fetch it again"):
            import transformers
            transformers.logging.set_verbosity_error()    # it would warn of missing weights, refused below
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            encoder, info = transformers.T5EncoderModel.from_pretrained(
                self.folder, dtype=self.dtype, local_files_only=True, output_loading_info=True)
        if info["missing_keys"]:                    # transformers would leave these weights random
            raise UserError(f"the T5 in {self.folder} lacks {min(info['missing_keys'])}: fetch it again")
        files.examine(encoder.state_dict(), self.folder)
        return tokenizer, encoder.to(self.device).eval()

    @torch.no_grad()
    def prepare(self, prompts):
        """Encode the prompts that the cache lacks, add them to its file, and free the encoder. If all are
        cached, nothing is loaded. Only one process at a time may call this. Raises UserError."""
        missing = [text for text in dict.fromkeys(map(clean, prompts)) if text not in self.rows]
        if not missing:
            return
        (tokenizer, encoder), rows = self._load(), []
        try:
            for i in trange(0, len(missing), self.batch, desc="T5", unit="batch", dynamic_ncols=True):
                tokens = tokenizer(missing[i:i + self.batch], padding="max_length", truncation=True,
                                   max_length=self.length, return_tensors="pt").to(self.device)
                hidden = encoder(tokens["input_ids"], tokens["attention_mask"]).last_hidden_state    # [B,L,C]
                # Keep only real tokens: 1,000 prompts of 20 tokens take 80 MB in bf16; padded to 120, 490 MB.
                rows += [h[m].cpu() for h, m in zip(hidden, tokens["attention_mask"].bool())]
        finally:                                    # Ctrl-C keeps what is done, perhaps hours of work
            del encoder
            gc.collect()
            torch.cuda.empty_cache()
            if rows:                                # on Linux and macOS, readers of the old file keep it open
                self.rows.update(zip(missing, rows))
                files.save({"made_with": self.made_with, "captions": list(self.rows),
                            "features": torch.cat(list(self.rows.values())),
                            "lengths": [len(row) for row in self.rows.values()]}, self.path)

    def encode(self, prompts, device="cpu"):
        """Return features [B,L,C] of B prompts and their mask [B,L] on `device`. Features are fp32, and 0 in
        the padding. The mask is True at tokens. Missing prompts are prepared first. Raises UserError."""
        self.prepare(prompts)
        features = torch.zeros(len(prompts), self.length, self.width)
        mask = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for b, row in enumerate(self.rows[clean(prompt)] for prompt in prompts):
            features[b, self.length - len(row):] = row                                # bf16 to fp32 is exact
            mask[b, self.length - len(row):] = True
        return features.to(device), mask.to(device)
