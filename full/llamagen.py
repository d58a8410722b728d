"""LlamaGen's released models as a pipeline: policy, reference, image tokenizer, and features of the prompts.

The policy is kept in fp32, because sums of many small steps need it. The reference is its frozen copy. With
--lora_rank the policy shares the weights of the reference and trains adapters (common/lora.py). Prompts are
encoded by T5 once, before the other models are loaded, and T5 is freed before training starts (full/t5.py).
"""
import copy
import os

import torch

from common import lora
from common.config import UserError
from common.device import batched, freeze
from common.interfaces import Conditions, SingleActions
from full import t5
from model import GPT
from vqgan import VQGAN


class Classes:
    """The encoder of a class-conditional policy: the name of a class -> its label. label_of: {name: label},
    or None where the names are the labels as text, such as "207"."""

    def __init__(self, label_of=None):
        self.label_of = label_of

    def check(self, texts, n):
        """Raise UserError unless all texts are class numbers below n."""
        if not all(text.isdecimal() and int(text) < n for text in texts):
            raise UserError(f"--prompt must be class numbers from 0 to {n - 1} with ; between them, got "
                            f"{'; '.join(texts):.99}: this model reads classes")

    def encode(self, names, device):
        labels = [self.label_of[name] if self.label_of else int(name) for name in names]
        return torch.tensor(labels, device=device), torch.ones(len(names), 1, device=device)     # [P], [P,1]


class Pipeline(SingleActions):
    """The models of LlamaGen. o: full.world.Options. found: {name: path} of its files. text: an encoder of
    prompts, an object with encode(prompts, device). Raises UserError."""

    model_files, text_files = ("gpt_ckpt", "vq_ckpt"), ("t5",)     # options that name files of weights

    @staticmethod
    def text_encoder(o, found, device, prompts):
        """Return the encoder of prompts. It has encoded these `prompts` already, and T5 is freed again."""
        captions = t5.Captions(found[o.t5], os.path.join(o.weights, "cache"), device=device)
        captions.prepare(prompts)
        return captions

    @staticmethod
    def load_models(o, found, known):
        """Return (policy, tokenizer) on the CPU, in fp32. known: what neither tensors nor file names tell."""
        policy = GPT.from_pretrained(found[o.gpt_ckpt], **known)
        vqgan = VQGAN.from_pretrained(found[o.vq_ckpt])
        if policy.config.vocab_size != vqgan.config.codebook_size:
            raise UserError(f"{o.gpt_ckpt} writes {policy.config.vocab_size} codes, and {o.vq_ckpt} has "
                            f"{vqgan.config.codebook_size}: they do not belong together")
        return policy, vqgan

    def __init__(self, o, found, text, device, dtype="float32", train=True):
        self.text, self.device = text, device
        known = {key: n for key, n in (("n_head", o.n_head), ("block_size", o.block_size)) if n}
        policy, vqgan = self.load_models(o, found, known)
        policy.bf16 = dtype == "bfloat16"
        self.policy, self.vqgan = policy.to(device), freeze(vqgan.to(device))
        if o.lora_rank:
            self.reference = freeze(self.policy, dtype)
            self.policy = lora.adapt(self.reference, o.lora_rank)
        elif train:                                        # sample.py needs no reference
            self.reference = freeze(copy.deepcopy(self.policy), dtype)
        self.kind, self.tokens = policy.config.model_type, policy.config.block_size
        self.codebook = vqgan.codes()
        # A token is a square of pixels: of 16 x 16 pixels in VQ-16.
        self.pixels = int(self.tokens ** .5) * 2 ** (len(vqgan.config.ch_mult) - 1)

    def encode(self, prompts):
        return Conditions(*self.text.encode(prompts, self.device))

    def decode(self, tokens):
        return batched(self.vqgan.decode, tokens)

    def encode_images(self, images):
        return self.vqgan.encode(images)
