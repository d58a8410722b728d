"""Pretrain the base of the tiny world from nothing: image tokenizer, then policy, then judge.

    python pretrain.py                                writes out/tiny_base.pt, about 13 minutes on 2 CPU cores
    python pretrain.py --out=assets/tiny_base.pt --overwrite     replaces the base of the repository
    python pretrain.py --policy=flow --out=out/flow.pt           a flow policy, on a tokenizer that exists

 1. The tokenizer (vqgan.py) learns to reconstruct an image from 64 tokens.
 2. The policy (model.py) learns to predict the tokens of an image from its caption, by maximum likelihood. On
    purpose a fifth of the captions belongs to another image, as many captions on the web do. So the base
    draws a wrong image more often than a right one, and reinforcement learning has something to fix.
 3. The judge (tiny/judge.py) learns to tell true captions of an image from false captions.
With --policy=flow, only a flow policy (flow.py) is trained. It learns to turn noise into latents, which are
the tokenizer's vectors before they are rounded to codes. Its loss is the squared error of the velocity.
Policy and judge see no captions and no images with an unseen pair of color and shape (shapes.UNSEEN). The
tokenizer reads no captions. It does see images of unseen pairs, because the policy should later generate
them. The same seed on the same machine gives the same file, bit for bit.

Shapes: n images, B images of a batch, T = 64 tokens of an image, V codes, H = W = 32.
"""
import copy
import math
import os
import random
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import trange

from common import config, device, files
from common.config import UserError, option
from common.device import batched
from common.muon import Muon, hidden_matrices
from common.sit import SiTConfig
from flow import SiTPolicy
from model import GPT, GPTConfig
from tiny import shapes, text
from tiny.judge import Judge
from tiny.world import Latents, load_models
from vqgan import VQGAN, VQConfig

VQ = VQConfig(codebook_size=256, codebook_embed_dim=8, ch=24, ch_mult=(1, 2, 2), num_res_blocks=1,
              z_channels=48, num_groups=8, l1_weight=1.0, commit_weight=1.0, collage_weight=.03,
              temperature=.1)
AR = GPTConfig(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=VQ.codebook_size, block_size=64,
               cls_token_num=text.LENGTH, caption_dim=text.DIM, initializer_range=.06,
               # no dropout: training passes over the images only 3.3 times
               token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)

FLOW = SiTConfig(depth=4, dim=128, heads=4, patch=2, channels=VQ.codebook_embed_dim, side=8,
                 caption_dim=text.DIM)


@dataclass(frozen=True)
class Config:
    out: str = option("out/tiny_base.pt", "file to write", ending=".pt")
    policy: Literal["tokens", "flow"] = option("tokens", "flow: train only a flow policy, see --tokenizer")
    tokenizer: str = option("assets/tiny_base.pt", "with --policy=flow: a base that has one", ending="")
    overwrite: bool = option(False, "replace the file if it exists; runs of the old base cannot go on then")
    seed: int = option(0, "seed of scenes, weights and batches", low=0)
    scenes: int = option(24000, "number of images for training", low=2)
    wrong_captions: float = option(0.2, "fraction of captions that belong to another image", low=0, high=1)
    vq_steps: int = option(2400, "steps of the tokenizer, each on 4 images and 4 collages", low=1)
    vq_lr: float = option(1e-3, "peak learning rate of the tokenizer: 50 steps up, then cosine to 2 %", low=0)
    flow_steps: int = option(5000, "steps of the flow policy, each on 64 images", low=1)
    gpt_steps: int = option(5000, "steps of the policy, each on 16 images", low=1)
    gpt_lr: float = option(2e-3, "peak learning rate of the policy with AdamW, same schedule", low=0)
    muon_lr: float = option(1e-2, "peak learning rate of the policy with Muon, same schedule", low=0)
    judge_steps: int = option(1200, "steps of the judge, each on 64 images with 128 captions", low=1)
    judge_lr: float = option(2e-3, "peak learning rate of the judge, same schedule", low=0)


def train(name, optimizers, steps, loss_of):
    """Take `steps` steps on loss_of(step) -> (loss, {name: value to show in the progress bar}).
    An optimizer comes with its peak learning rate. The rate rises to this peak in 50 steps. It falls along a
    cosine to 2 % of the peak at the end."""
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    bar = trange(steps, desc=name, dynamic_ncols=True)
    for step in bar:
        for group, peak in groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * (
                .02 + .98 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss, shown = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group, _ in groups for p in group["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix({k: f"{float(v):.4f}" for k, v in shown.items()})


def adamw(params, lr):
    return torch.optim.AdamW(params, lr, betas=(.9, .98), weight_decay=.01)


@torch.no_grad()
def revive(vq, images, dead):
    """Move unused codes, True in dead [V], to outputs of the encoder on images [B,3,H,W].
    Otherwise these codes would stay unused, because a code that no image uses gets no gradient. Candidates
    are the outputs farthest from their nearest code, four per unused code. A random quarter is taken."""
    count = int(dead.sum())
    _, unit, cosine = vq.quantize(vq.quant_conv(vq.encoder(images)))
    far = cosine.amax(2).flatten().argsort()[:4 * count]
    chosen = far[torch.randperm(len(far))[:count]]
    vq.quantize.embedding.weight[dead] = unit.flatten(0, 1)[chosen]


def pretrain_tokenizer(cfg, images):
    """Train a VQGAN on images [n,3,H,W] in [-1,1] and return it."""
    vq = VQGAN(VQ)
    side, used = shapes.SIDE // 2 ** (len(VQ.ch_mult) - 1), torch.zeros(VQ.codebook_size, dtype=torch.bool)

    def loss(step):
        if step and step % 40 == 0 and step < .7 * cfg.vq_steps:
            revive(vq, images[torch.randint(len(images), (32,))], ~used)
            used.fill_(False)
        # A collage is cut at a random row or column of tokens (vqgan.py explains collages). `first`
        # [4,side,side] is True at the tokens of the first image.
        cut, place = torch.randint(1, side, (4, 1, 1)), torch.arange(side)
        first = torch.where(torch.rand(4, 1, 1) < .5, place.view(1, -1, 1) < cut, place.view(1, 1, -1) < cut)
        total, terms, tokens = vq.loss(images[torch.randint(len(images), (4,))], first)
        used.index_fill_(0, tokens.flatten(), True)
        return total, {k: terms[k] for k in ("l1", "l2", "collage")}
    train("tokenizer", [adamw(vq.parameters(), cfg.vq_lr)], cfg.vq_steps, loss)
    return vq.eval()


def pretrain_policy(cfg, tokens, captions, rng):
    """Train a GPT on the tokens [n,T] of n images and their captions, and return it."""
    gpt = GPT(AR)
    # Muon (Jordan 2024) orthogonalizes the step of a matrix, so the step is equally large in all directions.
    # It is meant for hidden layers. Embeddings, norms and the output layer keep AdamW. After 1,500 steps the
    # reader accepts .24 of the images with Muon and .06 without.
    hidden = [p for k, p in gpt.named_parameters()
              if p.dim() == 2 and k.startswith(("layers", "cls_embedding"))]
    rest = [p for p in gpt.parameters() if all(p is not h for h in hidden)]

    def loss(step):
        i = torch.randint(len(tokens), (16,))
        wrong = torch.rand(16) < cfg.wrong_captions
        texts = [rng.choice(captions) if w else captions[j] for j, w in zip(i.tolist(), wrong.tolist())]
        nll = F.cross_entropy(gpt(tokens[i], *text.encode(texts)).flatten(0, 1), tokens[i].flatten())
        return nll, {"nll": nll.detach()}
    train("policy", [torch.optim.Muon(hidden, cfg.muon_lr, weight_decay=0), adamw(rest, cfg.gpt_lr)],
          cfg.gpt_steps, loss)
    return gpt.eval()


def pretrain_flow(cfg, vqgan, images, captions, rng):
    """Train a flow policy on the latents of images [n,3,H,W] -> (SiTPolicy, tiny.world.Latents).

    The loss of flow matching (arXiv 2210.02747 eq. 23) is |v(x, t) - (eps - x0)|^2 at a random time t.
    What an image shows is decided near the noise: with a wrong prompt, the squared error of x0 grows by .18
    at t = .8 and by .005 at t = .5 (assets/trajectory.png). So t is drawn near 1: t = 1/(1 + e^-u) with
    u ~ N(1, 1). The result is an exponential moving average of the weights.
    """
    latents = Latents(VQ.codebook_embed_dim)
    x0 = batched(lambda some: latents.encode(vqgan, some), images, 250)
    latents.mean.copy_(x0.mean((0, 2, 3)).view(-1, 1, 1))
    latents.std.copy_(x0.std((0, 2, 3)).view(-1, 1, 1))
    x0 = (x0 - latents.mean) / latents.std
    policy = SiTPolicy(FLOW)
    average = copy.deepcopy(policy).requires_grad_(False)
    hidden = hidden_matrices(policy)
    rest = [p for p in policy.parameters() if all(p is not h for h in hidden)]

    def loss(step):
        for mean, p in zip(average.parameters(), policy.parameters()):
            mean.lerp_(p.detach(), 1 - min(.999, (1 + step) / (10 + step)))
        i = torch.randint(len(x0), (64,))
        wrong = torch.rand(64) < cfg.wrong_captions
        texts = [rng.choice(captions) if w else captions[j] for j, w in zip(i.tolist(), wrong.tolist())]
        t, eps = torch.sigmoid(1 + torch.randn(64)), torch.randn(64, *policy.shape)
        x = (1 - t.view(-1, 1, 1, 1)) * x0[i] + t.view(-1, 1, 1, 1) * eps
        error = F.mse_loss(policy(x, t, *text.encode(texts, times=1)), eps - x0[i])
        return error, {"error": error.detach()}
    train("flow policy", [Muon(hidden, 2 * cfg.muon_lr), adamw(rest, 1.5 * cfg.gpt_lr)], cfg.flow_steps, loss)
    return average.eval(), latents


def near_miss(caption, rng):
    """Return a caption of the same form that differs in one color, shape, number or direction.
    It names no unseen pair: the judge would learn to reject unseen pairs, because captions with one are false
    of all training images. After 20 failed attempts the result is the caption itself."""
    words, kinds = caption.split(), (tuple(shapes.COLORS), shapes.SHAPES, tuple(shapes.NUMBERS),
                                     ("above", "below"), ("left", "right"))
    for _ in range(20):
        i = rng.randrange(len(words))
        kind = next((k for k in kinds if words[i] in k), None)
        if kind:
            new = " ".join(words[:i] + [rng.choice(kind)] + words[i + 1:])
            if new != caption and new in shapes.CAPTIONS and not shapes.names_unseen(shapes.CAPTIONS[new]):
                return new
    return caption


def pretrain_judge(cfg, images, scenes, captions, rng):
    """Train a Judge on images [n,3,H,W], with their n true scenes and n captions, and return it."""
    judge = Judge()

    def loss(step):
        i = torch.randint(len(images), (64,)).tolist()
        texts = [captions[j] for j in i] + [near_miss(captions[j], rng) for j in i]
        parsed = [shapes.CAPTIONS[t] for t in texts]
        truth = torch.tensor([[shapes.matches(scenes[j], c) for c in parsed] for j in i], dtype=torch.float)
        nll = judge.loss(images[i], texts, truth)
        return nll, {"loss": nll.detach()}
    train("judge", [adamw(judge.parameters(), cfg.judge_lr)], cfg.judge_steps, loss)
    return judge.eval()


def main(argv):
    cfg, _ = config.load(Config, argv)
    device.start("cpu")
    if os.path.exists(cfg.out) and not cfg.overwrite:
        raise UserError(f"{cfg.out} exists already, and runs may build on it: choose another --out, or add "
                        f"--overwrite")
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)    # an error here comes before the work
    start = time.time()
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    with_unseen = shapes.random_scenes(cfg.scenes // 2, rng, allow_unseen=True)
    captions, scenes = zip(*shapes.random_scenes(cfg.scenes, rng))
    captions, images = [c.text for c in captions], shapes.render(scenes)
    if cfg.policy == "flow":
        _, vq, judge, _ = load_models(cfg.tokenizer, "cpu")
        policy, latents = pretrain_flow(cfg, vq, images, captions, rng)
        files.save({"flow": files.pack(policy, FLOW, torch.float16), "latents": files.pack(latents, None),
                    "made_by": config.show(cfg)}, cfg.out)
        return print(f"wrote {cfg.out} in {(time.time() - start) / 60:.1f} minutes")

    vq = pretrain_tokenizer(cfg, shapes.render([scene for _, scene in with_unseen]))
    tokens = batched(vq.encode, images, 250)
    decoded = batched(vq.decode, tokens, 250)
    print("fraction that the reader reads correctly after encoding and decoding:",
          {k: round(v, 3) for k, v in shapes.reader_accuracy(scenes[:2000], decoded[:2000]).items()})
    gpt = pretrain_policy(cfg, tokens, captions, rng)
    # The judge will only see decoded images, so it learns from decoded images.
    judge = pretrain_judge(cfg, decoded, scenes, captions, rng)

    half = torch.float16
    files.save({"gpt": files.pack(gpt, AR, half), "vqgan": files.pack(vq, VQ, half),
                "judge": files.pack(judge, None, half), "made_by": config.show(cfg)}, cfg.out)
    print(f"wrote {cfg.out} in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    config.run(main)
