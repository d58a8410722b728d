"""The tiny world: its prompts, its rewards, what can be measured in it, and its models.

    World       prompts and rewards; common/interfaces.py says what a world offers
    Pipeline    policy, reference and tokenizer, from a run or from a base. A base is the file of
                pretrained models that pretrain.py writes
    FlowPipeline   the same with a flow policy (flow.py), which writes latents: the vectors of the tokenizer
                before they are rounded to codes
    Images      rendered images with their captions, for algorithms that learn from images (vapi.py)

Every attribute of a tiny image can be read exactly. So this world adds to an evaluation:
  reward/single ...   rewards by category
  transfer            held-out reward in the categories that a run does not train on (--categories)
  unseen              held-out reward of prompts with a color and shape that were never seen together
                      (shapes.UNSEEN)
  open_entropy        nat; the entropy of the values of each attribute that the prompt leaves open
                      (shapes.open_attributes), summed over these attributes. It always uses 64 images:
                      an entropy measured on few samples is below the true one, so only equally many images
                      can be compared. Images that are unreadable or show too few objects do not count. A
                      prompt with fewer than 64 usable images has no open_entropy
  unreadable          the share of images that do not count
  entropy_kept        open_entropy as a share of the base's, on the prompts where both have one
and in a run that learns from images:
  frechet, precision, recall   the sampled images compared with as many rendered images of the same prompts,
                      in the judge's features (metrics.py)
"""
import copy
import math
import random
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import flow
import metrics
import reward
from common import files, images, sit
from common.config import UserError, option
from common.device import freeze
from common.folder import checkpoint_of
from common.interfaces import Conditions, SingleActions
from model import GPT, GPTConfig
from tiny import shapes, text
from tiny.judge import Judge, reader
from vqgan import VQGAN, VQConfig

REWARDS = ("judge", "reader")
COUNTED = 64                    # readable images of a prompt that enter open_entropy
FIXED_IMAGES = 128              # images for `reconstruction` in vapi.py
UNSEEN_DRAWS = 8                # images of each prompt with an unseen pair


@dataclass(frozen=True)
class Options:
    """---- tiny world"""
    init_from: str = option("assets/tiny_base.pt", "a base made by pretrain.py, or a run", ending="")
    categories: tuple = option(shapes.CATEGORIES, "of training prompts, such as ('single', 'two')")

    def check(cfg):
        reward.check(cfg, REWARDS)
        if not cfg.categories or any(c not in shapes.CATEGORIES for c in cfg.categories):
            raise UserError(f"--categories must be some of {shapes.CATEGORIES}, got {cfg.categories}")
        if cfg.eval_draws < COUNTED:
            raise UserError(f"--eval_draws must be at least {COUNTED} in the tiny world, got "
                            f"{cfg.eval_draws}: fewer images give no open_entropy")


@dataclass(frozen=True)
class FlowOptions(Options):
    """---- tiny world, with a flow policy"""
    init_from: str = option("assets/tiny_flow_base.pt", "a flow base of pretrain.py, or a run", ending="")
    tokenizer: str = option("assets/tiny_base.pt", "a base: its tokenizer and judge", ending="")


@dataclass(frozen=True)
class ImageOptions:
    """---- images of the tiny world"""
    wrong_captions: float = option(0.2, "share of images with a random caption, as in pretraining",
                                   low=0, high=1)


def fixed_prompts(per_category, unseen=False):
    """The same prompts for every caller: `per_category` of each category, from a local random generator.
    Runs train on these prompts too, unless `unseen`."""
    rng = random.Random(1234)
    pools = [shapes.captions(category, unseen) for category in shapes.CATEGORIES]
    return [c for pool in pools for c in rng.sample(pool, min(per_category, len(pool)))]


def entropy(values):
    """Return the entropy, in nat, of the observed frequencies in a list of hashable values."""
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


def open_entropy(scenes, caption):
    """Return (entropy in nat, number of unusable scenes) of one prompt. The entropy is that of the first 64
    usable scenes, summed over the open attributes, or None if fewer are usable."""
    found = [shapes.open_attributes(s, caption) for s in scenes]
    usable = [f for f in found if f is not None]
    if len(usable) < COUNTED:
        return None, len(found) - len(usable)
    return sum(entropy([f[k] for f in usable[:COUNTED]]) for k in usable[0]), len(found) - len(usable)


def load_models(path, device, depth=0):
    """(policy, tokenizer, judge, options of the run), in fp32 and eval mode. The options of a base are {}.

    path: a base made by pretrain.py, a run folder, or a checkpoint. depth: how many runs were
    followed so far, because a run may start from another run. Raises UserError.
    """
    path = checkpoint_of(path)
    if depth > 9:
        raise UserError(f"{path}: more than 9 runs were followed and none starts from a base; is it a "
                        f"circle?")
    parts = files.load(path, device)
    if {"gpt", "vqgan", "judge"} <= set(parts):
        return (files.unpack(GPT, GPTConfig, parts["gpt"], device, path),
                files.unpack(VQGAN, VQConfig, parts["vqgan"], device, path),
                files.unpack(Judge, None, parts["judge"], device, path), {})
    try:
        begin, state = checkpoint_of(parts["config"]["init_from"]), parts["model"]
    except (KeyError, TypeError):
        raise UserError(f"{path} is no base (gpt, vqgan, judge) and no run (config, model) of this "
                        f"version") from None
    policy, vqgan, judge, _ = load_models(begin, device, depth + 1)
    files.check_made_from(parts, {"init_from": begin}, path)
    files.load_weights(policy, state, path)
    return policy, vqgan, judge, parts["config"]


class World:
    """Prompts and rewards. judge: a tiny.judge.Judge. with_images: the algorithm learns from images."""

    def __init__(self, options, judge, device, with_images=False):
        self.judge = judge
        known = {"judge": judge, "reader": reader} | reward.REWARDS
        self.reward = reward.weighted(options.reward, known)
        self.heldout = reward.weighted(options.heldout_reward, known)
        self.pools = [shapes.captions(category) for category in options.categories]
        self.held_out = [c for c in shapes.CATEGORIES if c not in options.categories]
        self.images = Images(options.wrong_captions, self, device) if with_images else None
        self.columns = ["transfer"] * bool(self.held_out) + [
            "unseen", "open_entropy", "entropy_kept", "unreadable"]
        self.columns += ["reconstruction", "frechet", "precision", "recall"] if with_images else []

    def draw(self, n):
        return [random.choice(random.choice(self.pools)) for _ in range(n)]

    fixed_prompts = staticmethod(fixed_prompts)

    def embed(self, images):
        return self.judge.embed_images(images)

    def measure(self, prompts, pixels, rewards, base, sample):
        out, draws = {}, len(pixels) // len(prompts)
        for category in shapes.CATEGORIES:
            rows = [i for i, p in enumerate(prompts) if shapes.parse(p).category == category]
            out |= {f"{name}/{category}": r[rows].mean().item() for name, r in rewards.items()}
        if self.held_out:
            out["transfer"] = sum(out[f"heldout_reward/{c}"] for c in self.held_out) / len(self.held_out)
        unseen = fixed_prompts(len(prompts) // len(shapes.CATEGORIES), unseen=True)
        out["unseen"] = self.heldout(sample(unseen, UNSEEN_DRAWS),
                                     [p for p in unseen for _ in range(UNSEEN_DRAWS)]).mean().item()
        scenes = shapes.read(pixels)
        measured = [open_entropy(scenes[i * draws:(i + 1) * draws], shapes.parse(p))
                    for i, p in enumerate(prompts)]
        per_prompt = out["open_entropy_of"] = [h for h, _ in measured]
        known = [h for h in per_prompt if h is not None]
        out["open_entropy"] = sum(known) / len(known) if known else math.nan
        both = [(h, b) for h, b in zip(per_prompt, base["open_entropy_of"] if base else per_prompt)
                if h is not None and b is not None]
        out["entropy_kept"] = sum(h for h, _ in both) / sum(b for _, b in both) if both else math.nan
        out["unreadable"] = sum(n for _, n in measured) / len(scenes)
        if self.images:
            rng = random.Random(1234)
            real = self.embed(self.images.load([shapes.sample_scene(shapes.parse(p), rng) for p in prompts
                                                for _ in range(draws)]))
            sampled = self.embed(pixels)
            out["frechet"] = metrics.frechet(real, sampled)
            out["precision"], out["recall"] = metrics.precision_recall(real, sampled)
        return out

    def picture(self, path, prompts, columns, rows_of_category=2):
        """Write a grid with one row per prompt, for two prompts of each category. In each row, a column
        (heading, images) shows the first images of the prompt. A frame is green where the reader finds what
        the prompt says."""
        draws, shown = len(columns[0][1]) // len(prompts), max(3, 8 // len(columns))
        of_category, rows = len(prompts) // len(shapes.CATEGORIES), []
        for i, prompt in enumerate(prompts):
            if i % of_category < rows_of_category:
                groups = [pixels[i * draws:i * draws + shown] for _, pixels in columns]
                rows.append((prompt, groups, [reader(g, [prompt] * shown) for g in groups]))
        images.grid(rows, path, [heading for heading, _ in columns])


class Images:
    """Rendered images with their captions."""

    def __init__(self, wrong_captions, world, device):
        self.wrong_captions, self.world, self.device = wrong_captions, world, device

    def draw(self, n):
        drawn = shapes.random_scenes(n, random)
        return [(self.world.draw(1)[0] if random.random() < self.wrong_captions else caption.text, scene)
                for caption, scene in drawn]

    def load(self, scenes):
        return shapes.render(scenes).to(self.device)

    def fixed_images(self):
        """Return (captions, images). They are drawn like training images: 78 of 128 are among the images that
        the policy of assets/tiny_base.pt was pretrained on."""
        captions, scenes = zip(*shapes.random_scenes(FIXED_IMAGES, random.Random(4321)))
        return [c.text for c in captions], self.load(scenes)

    def perceptual(self, images, originals):
        """A perceptual distance like LPIPS (metrics.py) on the judge's three convolutions. They were trained
        to tell captions apart, so they see shape, color and number. They hardly see noise in a plain area,
        but the squared error does."""
        return metrics.lpips(self.world.judge.activations, images, originals)


class Pipeline(SingleActions):
    """Policy, reference and tokenizer of the tiny world, and the features of its prompts."""

    def __init__(self, policy, vqgan, device, dtype="float32"):
        self.policy, self.vqgan, self.device = policy, vqgan, device
        self.reference = freeze(copy.deepcopy(policy), dtype)
        freeze(vqgan)                                          # the tokenizer always stays in fp32
        self.policy.bf16 = self.reference.bf16 = dtype == "bfloat16"
        self.tokens, self.codebook = policy.config.block_size, vqgan.codes()

    def encode(self, prompts):
        return Conditions(*text.encode(prompts, self.device))

    def decode(self, tokens):
        return self.vqgan.decode(tokens)

    def encode_images(self, images):
        return self.vqgan.encode(images)


class Latents(torch.nn.Module):
    """Normalizes latents [b,8,8,8]. pretrain_flow measures the mean and standard deviation [8,1,1].

    The tokenizer compares directions only (vqgan.py), so a latent is a unit vector at each place before this.
    """

    def __init__(self, channels=8):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def encode(self, vqgan, images):
        """Turn images [b,3,H,W] into latents, each channel with mean 0 and standard deviation 1."""
        return (F.normalize(vqgan.quant_conv(vqgan.encoder(images)), dim=1) - self.mean) / self.std

    def decode(self, vqgan, latents):
        vectors = latents * self.std + self.mean
        return vqgan.decode_vectors(vectors.flatten(2).transpose(1, 2), *latents.shape[2:])


def load_flow(path, device, o=flow.Options(), depth=0):
    """Return (SiTPolicy, Latents) of a flow base or of a run, as `load_models` does for tokens."""
    path = checkpoint_of(path)
    parts = files.load(path, device)
    if {"flow", "latents"} <= set(parts):
        policy = files.unpack(flow.SiTPolicy, sit.SiTConfig, parts["flow"], device, path)
        policy.set_sampler(o)
        return policy, files.unpack(Latents, None, parts["latents"], device, path)
    config = parts.get("config", {})
    if depth > 9 or not {"init_from", "tokenizer"} <= set(config):
        raise UserError(f"{path} is neither a flow base nor a run of one: see --init_from")
    policy, latents = load_flow(config["init_from"], device, o, depth + 1)
    files.check_made_from(parts, {"init_from": checkpoint_of(config["init_from"])}, path)
    files.load_weights(policy, parts["model"], path)
    return policy, latents


class FlowPipeline:
    """Policy, reference, latents and tokenizer of the tiny world with a flow policy. o: flow.Options."""
    codebook, generates_actions = None, False      # `generate` follows the ODE, which has no density

    def __init__(self, o, policy, latents, vqgan, device, dtype="float32"):
        self.options, self.policy, self.latents, self.device = o, policy, freeze(latents), device
        self.reference, self.vqgan = freeze(copy.deepcopy(policy), dtype), freeze(vqgan)
        policy.bf16 = self.reference.bf16 = dtype == "bfloat16"
        self.tokens = (policy.config.side // policy.config.patch) ** 2
        self.per = math.prod(policy.shape) if o.logp_per_dim else 1
        self.chunks = flow.sizes(o, self.reference, self.encode(fixed_prompts(3)))
        self.shared = o.chunk_ratio

    def encode(self, prompts):
        return Conditions(*text.encode(prompts, self.device, times=1))

    def decode(self, states):
        return self.latents.decode(self.vqgan, states[:, -1])

    def weights(self, rollout, rows, B, generator):
        return flow.action_weights(self.options, self.policy, self.chunks, rollout, rows, B, generator)


def open_flow(path, o, device):
    """Return the FlowPipeline of a flow base or a run at `path`. o: its options, or None for the defaults."""
    tokenizer = checkpoint_of(o.tokenizer if o else FlowOptions.tokenizer)
    _, vqgan, judge, _ = load_models(tokenizer, device)
    o = o or flow.Options()
    pipeline = FlowPipeline(o, *load_flow(path, device, o), vqgan, device, getattr(o, "dtype", "float32"))
    pipeline.judge, pipeline.made_from = judge, {"init_from": path, "tokenizer": tokenizer}
    return pipeline


def open_world(options, device, with_images=False):
    """Return (World, Pipeline) of the options of a run. Raises UserError for a base that cannot be loaded."""
    path = checkpoint_of(options.init_from)
    if options.world == "tiny_flow":
        pipeline = open_flow(path, options, device)
        world = World(options, freeze(pipeline.judge), device)
        world.columns += ["sampler_reward", "sampler_heldout_reward"]
        return world, pipeline
    policy, vqgan, judge, _ = load_models(path, device)
    pipeline = Pipeline(policy, vqgan, device, options.dtype)
    pipeline.made_from = {"init_from": path}
    return World(options, freeze(judge), device, with_images), pipeline
