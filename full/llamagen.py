"""The full-size world: released LlamaGen weights, T5 captions, CLIP rewards. What a world is, tiny.py says.

    python train.py configs/llamagen_js.py

Files are looked for in the folder `weights`, and fetched from the Hugging Face Hub if they are not there
(weights.py lists them, with sizes and licences). Captions come from a text file; a fixed handful of them is
kept from training and serves all evaluations. They are encoded by T5 once, before anything else is loaded,
and T5 is gone when training starts (t5.py). Rewards see the captions as they were written.

A run of vapi.py takes pictures, with captions or classes, from `data` (data.py) in place of the text file. A
class-conditional policy, a file whose name begins with c2i_, reads a number and no text: there is no T5, and
rewards get the name of the class, which is a folder's. CLIPScore and HPS can judge by "golden retriever", but
not by "n02099601".

Where the memory goes is printed before the run starts. For LlamaGen-XL (P = 775 million parameters) on one
24 GB card, 32 pictures a step, `dtype = "bfloat16"`:
    policy and gradient in fp32          2 x 4 P    6.2 GB   sums of many small steps need fp32: bf16 has
    AdamW's two moments in fp32          2 x 4 P    6.2 GB   8 bits, a step of 1e-5 on a weight of .02 is lost
    autocast's bf16 copy of the policy       2 P    1.6 GB
    reference, matrices in bf16              2 P    1.6 GB
    rewards in fp16, tokenizer in fp32              3.1 GB   HPSv2.1 and the held-out CLIPScore
    the largest of sampling (keys and values), update (activations, logits) and decoding: 2 to 3 GB
"""
import copy
import os
import random

import torch

from full import clip
from full import data
from full import lpips
from common.device import freeze
from common import lora
from common import parallel
from common import images as pictures
from full import prompts
import reward
from full import t5
import vapi
from full import weights
from common.config import UserError, locate
from model import GPT
from common.device import batched
from vqgan import VQGAN

CLIP_L = "clip-vit-large-patch14"
REWARD_FILES = {                    # of each reward; HPS and PickScore share the tokenizer of OpenAI's CLIP
    "hps": {"model": "HPS_v2.1_compressed.pt", "tokenizer": CLIP_L},
    "pickscore": {"model": "PickScore_v1", "tokenizer": CLIP_L},
    "clipscore": {"model": CLIP_L, "tokenizer": CLIP_L},
    "aesthetic": {"model": CLIP_L, "tokenizer": CLIP_L, "head": "sac+logos+ava1-l14-linearMSE.pth"}}
COMPARED = 8                        # pictures compared at once, by LPIPS


class World:
    columns = []

    # These four are all that janus.py has to put in other words. o: options of train.py, or of sample.py.
    @staticmethod
    def model_files(o):
        return [o.gpt_ckpt, o.vq_ckpt]

    @staticmethod
    def text_files(o):
        return [o.t5]

    @staticmethod
    def load_models(o, files, device):
        """-> (policy in fp32, tokenizer), of the files {name: path} that options o name."""
        # Overrides for files whose heads or number of tokens nothing tells (0: look in table and file name).
        known = {k: v for k, v in (("n_head", o.n_head), ("block_size", o.block_size)) if v}
        policy = GPT.from_pretrained(files[o.gpt_ckpt], **known)
        vqgan = VQGAN.from_pretrained(files[o.vq_ckpt])
        if policy.config.vocab_size != vqgan.config.codebook_size:
            raise UserError(f"{o.gpt_ckpt} writes {policy.config.vocab_size} codes, {o.vq_ckpt} has "
                            f"{vqgan.config.codebook_size}: they do not belong together")
        return policy.to(device), vqgan.to(device)

    @staticmethod
    def captions_of(o, files, device):
        """What turns captions into conditions: here T5 features, kept on the disk beside the files."""
        return t5.Captions(files[o.t5], os.path.join(o.weights, "cache"), device=device)

    def __init__(self, options, device):
        """options: those of train.py. Raises UserError naming every file that is missing."""
        o, self.device = options, device
        from_pictures = o.algorithm == "vapi"
        self.classes = os.path.basename(o.gpt_ckpt).startswith("c2i_")
        if self.classes and not from_pictures:
            raise UserError(f"{o.gpt_ckpt} reads classes, not the captions of {o.prompts}: it can be trained "
                            f"with --algorithm=vapi, where pictures have classes")
        self.data = data.Pictures(o.data, o.prompts_per_step, self.classes) if from_pictures else None
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16")
        spec = {name: reward.parse(getattr(o, name), o.world) for name in ("reward", "heldout_reward")}
        # Diversity is seen with the eyes of a model that is not trained on, where there is one.
        seeing = [n for s in ("heldout_reward", "reward") for n in spec[s] if n in REWARD_FILES]
        if not seeing:
            raise UserError("reward or heldout_reward must name one of " + ", ".join(REWARD_FILES)
                            + ": diversity is measured in its image features")
        learned = sorted(set(seeing))
        names = self.model_files(o) + self.text_files(o) * (not self.classes)
        names += [lpips.VGG_FILE, lpips.HEADS_FILE] * from_pictures
        names += [f for n in learned for f in REWARD_FILES[n].values()]
        # One process downloads and encodes, then one of each other machine (if their disks are the same, all
        # is there), then the rest.
        turn = 0 if parallel.RANK == 0 else 1 if parallel.LOCAL_RANK == 0 else 2
        for _ in range(turn):
            parallel.wait()
        files = weights.find(list(dict.fromkeys(names)), o.weights)
        self.held_back, self.pool = self.split_captions(o)
        if not self.classes:
            self.text = self.captions_of(o, files, device)
            self.text.prepare(self.held_back + self.pool)
        for _ in range(2 - turn):
            parallel.wait()

        self.policy, self.vqgan = self.load_models(o, files, device)
        if self.classes != (self.policy.config.model_type == "c2i"):
            raise UserError(f"{o.gpt_ckpt} is of model_type {self.policy.config.model_type}: c2i_ must begin "
                            f"the names of policies that read classes, and no others")
        if self.classes and max(self.data.label_of.values()) >= self.policy.config.num_classes:
            raise UserError(f"{o.data} has a class {max(self.data.label_of.values())}, and {o.gpt_ckpt} "
                            f"knows those from 0 to {self.policy.config.num_classes - 1}")
        self.reference = self.policy if o.lora_rank else copy.deepcopy(self.policy)
        freeze(self.reference, o.dtype)
        if o.lora_rank:
            self.policy = lora.adapt(self.reference, o.lora_rank)
        freeze(self.vqgan, "float64" if o.dtype == "float64" else "float32")
        if o.dtype == "float64":
            self.policy.double()
        towers = torch.bfloat16 if o.dtype == "bfloat16" else torch.float32
        if device.type == "cuda":
            towers = torch.float16                         # as in the code of HPS
        models = {n: clip.build(n, {k: files[f] for k, f in REWARD_FILES[n].items()}, device, towers,
                                o.antialias or n != "hps") for n in learned}
        self.rewards = {name: reward.build(s, reward.REWARDS | models) for name, s in spec.items()}
        self.embed = models[seeing[0]].embed_images
        others = [self.vqgan, *(m.model for m in models.values())]
        if from_pictures:
            self.columns = ["reconstruction"]
            # a token is a square of so many pixels: 16 in VQ-16
            self.side = self.policy.side * 2 ** (len(self.vqgan.config.ch_mult) - 1)
            self.lpips = lpips.LPIPS(files[lpips.VGG_FILE], files[lpips.HEADS_FILE]).to(device)
            freeze(self.lpips, "float64" if o.dtype == "float64" else "float32")
            others.append(self.lpips)
        if parallel.RANK == 0:
            print(memory_plan(o, self.policy, others, parallel.SIZE))

    def split_captions(self, o):
        """-> (captions of evaluations, each once; those to train on). UserError if there are too few."""
        if self.data:
            seen = list(dict.fromkeys(caption for caption, *_ in self.data.held_back))
            if len(seen) < o.eval_prompts:
                raise UserError(f"{o.data}: the {len(self.data.held_back)} pictures that are kept from "
                                f"training have {len(seen)} captions: eval_prompts must be no more")
            return seen, [caption for caption, *_ in self.data.training]
        found = list(dict.fromkeys(prompts.read(locate(o.prompts))))
        if len(found) <= o.eval_prompts:
            raise UserError(f"{o.prompts} has {len(found)} captions, and eval_prompts = {o.eval_prompts} "
                            f"of them would be kept from training: none would be left")
        random.Random(1234).shuffle(found)
        return found[:o.eval_prompts], found[o.eval_prompts:]

    def draw(self, n):
        return [random.choice(self.pool) for _ in range(n)]

    def draw_pictures(self, n):
        return [(caption, file) for caption, file, _ in random.sample(self.data.training, n)]

    def load(self, files):
        pictures = torch.stack([data.load(file, self.side) for file in files])
        return pictures.to(self.device, self.policy.norm.weight.dtype)

    def held_back_pictures(self):
        captions, files, _ = zip(*self.data.held_back)
        return list(captions), self.load(files)

    def perceptual(self, images, originals):
        pieces = images.split(COMPARED)
        others = [originals] * len(pieces) if len(originals) == 1 else originals.split(COMPARED)
        return torch.cat([self.lpips(*pair) for pair in zip(pieces, others)])

    def encode(self, captions):
        if self.classes:
            labels = torch.tensor([self.data.label_of[caption] for caption in captions], device=self.device)
            return labels, torch.ones(len(captions), 1, device=self.device)                      # [P], [P,1]
        features, mask = self.text.encode(captions, self.device)
        return features.to(self.policy.norm.weight.dtype), mask

    def decode(self, tokens):
        return batched(self.vqgan.decode, tokens)

    def fixed_prompts(self, n):
        if n > len(self.held_back):
            raise UserError(f"eval_prompts must be at most {len(self.held_back)}, the captions that were "
                            f"kept from training, not {n}")
        return self.held_back[:n]

    def extra(self, policy, *args, temperature, **sampling):
        return {"reconstruction": vapi.reconstruction(self, policy, temperature)} if self.data else {}

    def picture(self, path, prompts, columns, shown=4):
        """A grid: a row for each of the first eight prompts, side by side the pictures of each (heading,
        images)."""
        draws = len(columns[0][1]) // len(prompts)
        rows = [(caption, [images[i * draws:i * draws + min(shown, draws)] for _, images in columns], None)
                for i, caption in enumerate(prompts[:8])]
        pictures.grid(rows, path, [heading for heading, _ in columns])


def parts_of_memory(o, policy, others, size=1):
    """{what: bytes} of a run on one device, and of each phase what comes on top.

    o: options of train.py; policy: a GPT (it may be on the meta device); others: modules besides, as stored.
    size: processes. Counted, not measured; tests/test_llamagen.py holds it against what autograd keeps.
    """
    c, P = policy.config, sum(p.numel() for p in policy.parameters())
    Q = sum(p.numel() for p in policy.parameters() if p.requires_grad)     # all, but with adapters (lora.py)
    frozen, what = (P, "policy") if P == Q else (P - Q, "adapters")
    cut = size if o.shard else 1                                           # parallel.py
    linear = [m for m in policy.modules() if isinstance(m, torch.nn.Linear)]
    matrices = sum(p.numel() for m in linear for p in m.parameters())
    low = 2 if o.dtype == "bfloat16" else 4                        # bytes of a number in a matrix product
    B = o.prompts_per_step * o.group_size // size
    b, drawn, rows = min(B, o.micro_batch), min(B, o.sample_batch or B), 2 if o.cfg_scale > 1 else 1
    t, passes = min(o.chunk or c.block_size, c.block_size), 1
    if o.algorithm == "vapi":          # a pass serves all samples of a picture, and needs no cache
        b, drawn, passes = -(-b // o.group_size), 0, 1 + o.prior_dropout
    inside = KEPT_INSIDE[low] * c.dim                                      # bytes a token and layer
    kept = 4 * c.dim if o.recompute else inside
    layers = c.n_layer * kept + (inside if o.recompute else 0)
    return {
        f"{what}, fp32": 4 * Q // cut, "gradient": 4 * Q // cut, "AdamW's two moments": 8 * Q // cut,
        "reference" + " and policy in one" * (P > Q): (low * matrices + 4 * (frozen - matrices)) // cut,
        f"autocast's copy of the {what}": 2 * Q if low == 2 else 0,
        "tokenizer and rewards": sum(p.numel() * p.element_size() for m in others for p in m.parameters()),
        "sampling: keys and values": 2 * c.n_layer * rows * drawn * c.block_size * c.dim * low,
        "sampling: weights gathered from all processes": 4 * P if cut > 1 else 0,
        "update: activations": passes * rows * b * c.block_size * layers,
        "update: logits": LOGITS[o.algorithm] * rows * b * t * c.vocab_size * 4}


# Bytes that autograd keeps inside a layer, for a token and a channel of width: measured by that test.
KEPT_INSIDE = {2: 55, 4: 90}
# Tensors as large as the logits that are there at once. grpo: logits and log-probabilities of two models, and
# the gradients of two of these. vapi: these four, and three in the statistics (measured, at temperature 1).
LOGITS = {"grpo": 6, "vapi": 7}


def memory_plan(o, policy, others, size=1):
    """The parts in GB, as text."""
    parts = parts_of_memory(o, policy, others, size)
    fixed = sum(v for k, v in parts.items() if ":" not in k)
    phases = {}
    for k, v in parts.items():
        if ":" in k:
            phases[k.split(":")[0]] = phases.get(k.split(":")[0], 0) + v
    lines = [f"  {v / 1e9:6.2f} GB  {k}" for k, v in parts.items() if v]
    total = fixed + max(phases.values())
    return "\n".join([f"memory on each device, counted: about {total / 1e9:.1f} GB", *lines])
