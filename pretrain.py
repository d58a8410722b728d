"""Builds the tiny world's base from nothing: tokenizer, then policy, then judge.
About 13 minutes on 2 CPU cores.

    python pretrain.py                                writes out/tiny_base.pt
    python pretrain.py --out=assets/tiny_base.pt      replaces the base that the repository ships

 1. Tokenizer (vqgan.py): reconstruct pictures through a bottleneck of 64 codes.
 2. Policy (model.py): predict the codes of a picture from its caption, by maximum likelihood. On purpose a
    fifth of the captions belongs to another picture, as on the web, so the base draws the wrong thing more
    often than not: that is what reinforcement learning then has to mend.
 3. Judge (reward.py): tell captions that are true of a picture from those that are not.
Captions and pictures with a held-out pair (shapes.HELD_OUT) are kept from policy and judge. The tokenizer,
which reads no captions, sees such pictures: it has to be able to draw what the policy should generalise to.
Same seed, same machine: same file, bit for bit.
"""
import math
import os
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import trange

from common import files as checkpoint
from common import config
from tiny import shapes
from tiny import text
from model import GPT, GPTConfig
from common.device import batched
from vqgan import VQGAN, VQConfig
from tiny.judge import Judge

VQ = VQConfig(codebook_size=256, codebook_embed_dim=8, ch=24, ch_mult=(1, 2, 2), num_res_blocks=1,
              z_channels=48, num_groups=8, l1_weight=1.0, commit_weight=1.0, collage_weight=.03,
              temperature=.1)
AR = GPTConfig(dim=128, n_layer=4, n_head=4, multiple_of=32, vocab_size=VQ.codebook_size, block_size=64,
               cls_token_num=text.LENGTH, caption_dim=text.DIM, initializer_range=.06,
               # every picture is new: no over-fitting
               token_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0)


@dataclass(frozen=True)
class Config:
    out: str = "out/tiny_base.pt"      # where the base is written
    seed: int = 0                      # of everything: scenes, weights, order
    scenes: int = 24000                # pictures rendered for training
    wrong_captions: float = 0.2        # share of training captions that belong to another picture
    # ---- optimisation
    vq_steps: int = 2400               # batches of 4 pictures and 4 collages
    vq_lr: float = 1e-3                # peak; warm-up over 50 steps, then cosine to 2 %
    gpt_steps: int = 5000              # batches of 16 pictures
    gpt_lr: float = 2e-3               # peak of AdamW, same schedule
    muon_lr: float = 1e-2              # peak of Muon, same schedule
    judge_steps: int = 1200            # batches of 64 pictures x 128 captions
    judge_lr: float = 2e-3             # peak, same schedule


def train(name, optimizers, steps, loss_of):
    """`steps` steps on loss_of(step) -> (loss, {figure: value}), with a bar that shows the figures.

    Learning rates rise to that of each optimizer over 50 steps, then fall along a cosine to 2 % of it.
    """
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    bar = trange(steps, desc=name, ncols=110)
    for step in bar:
        for group, peak in groups:
            group["lr"] = peak * min(1, (step + 1) / 50) * (
                .02 + .98 * (1 + math.cos(math.pi * step / steps)) / 2)
        loss, figures = loss_of(step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group, _ in groups for p in group["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix({k: f"{float(v):.4f}" for k, v in figures.items()})


def adamw(params, lr):
    return torch.optim.AdamW(params, lr, betas=(.9, .98), weight_decay=.01)


@torch.no_grad()
def revive(vq, images, dead):
    """Moves codes that nothing uses to vectors that are far from every code: a code without users has no
    gradient."""
    _, unit, cosine = vq.quantize(vq.quant_conv(vq.encoder(images)))
    worst = cosine.amax(2).flatten().argsort()[:4 * int(dead.sum())]
    chosen = worst[torch.randperm(len(worst))[:int(dead.sum())]]
    vq.quantize.embedding.weight[dead] = unit.flatten(0, 1)[chosen]


def pretrain_tokenizer(cfg, images):
    vq = VQGAN(VQ)
    side, used = shapes.SIDE // 2 ** (len(VQ.ch_mult) - 1), torch.zeros(VQ.codebook_size, dtype=torch.bool)

    def loss(step):
        if step and step % 40 == 0 and step < .7 * cfg.vq_steps:
            revive(vq, images[torch.randint(len(images), (32,))], ~used)
            used.fill_(False)
        # Collages are cut at a random row or column (vqgan.py, departure 4).
        cut, place = torch.randint(1, side, (4, 1, 1)), torch.arange(side)
        own = torch.where(torch.rand(4, 1, 1) < .5, place.view(1, -1, 1) < cut, place.view(1, 1, -1) < cut)
        total, terms, tokens = vq.loss(images[torch.randint(len(images), (4,))], own)
        used.index_fill_(0, tokens.flatten(), True)
        return total, {k: terms[k] for k in ("l1", "l2", "collage")}
    train("tokenizer", [adamw(vq.parameters(), cfg.vq_lr)], cfg.vq_steps, loss)
    return vq.eval()


def pretrain_policy(cfg, tokens, captions, rng):
    gpt = GPT(AR)
    # Muon (Jordan 2024) turns the step of each matrix into one that moves all directions alike. It is meant
    # for hidden layers; embeddings, norms and the logits keep AdamW. At 1,500 steps: reader .24 against .06.
    hidden = [p for k, p in gpt.named_parameters()
              if p.dim() == 2 and k.startswith(("layers", "cls_embedding"))]
    rest = [p for p in gpt.parameters() if all(p is not h for h in hidden)]

    def loss(step):
        i = torch.randint(len(tokens), (16,))
        wrong = torch.rand(16) < cfg.wrong_captions
        told = [rng.choice(captions) if w else captions[j] for j, w in zip(i.tolist(), wrong.tolist())]
        nll = F.cross_entropy(gpt(tokens[i], *text.encode(told)).flatten(0, 1), tokens[i].flatten())
        return nll, {"nll": nll.detach()}
    train("policy", [torch.optim.Muon(hidden, cfg.muon_lr, weight_decay=0), adamw(rest, cfg.gpt_lr)],
          cfg.gpt_steps, loss)
    return gpt.eval()


def near_miss(caption, rng):
    """A caption of the same form that differs in a colour, shape, number or side; never a held-out one, which
    would be false of every picture and so teach the judge to reject the pair."""
    words, kinds = caption.split(), (tuple(shapes.COLORS), shapes.SHAPES, tuple(shapes.NUMBERS),
                                     ("above", "below"), ("left", "right"))
    for _ in range(20):
        i = rng.randrange(len(words))
        kind = next((k for k in kinds if words[i] in k), None)
        if kind:
            new = " ".join(words[:i] + [rng.choice(kind)] + words[i + 1:])
            if new != caption and new in shapes.CAPTIONS and not shapes.held_out(shapes.CAPTIONS[new]):
                return new
    return caption


def pretrain_judge(cfg, images, scenes, captions, rng):
    judge = Judge()

    def loss(step):
        i = torch.randint(len(images), (64,)).tolist()
        told = [captions[j] for j in i] + [near_miss(captions[j], rng) for j in i]
        parsed = [shapes.CAPTIONS[c] for c in told]
        truth = torch.tensor([[shapes.matches(scenes[j], c) for c in parsed] for j in i], dtype=torch.float)
        nll = judge.loss(images[i], told, truth)
        return nll, {"loss": nll.detach()}
    train("judge", [adamw(judge.parameters(), cfg.judge_lr)], cfg.judge_steps, loss)
    return judge.eval()


def check(cfg):
    config.at_least(cfg, seed=0, scenes=2, wrong_captions=0, vq_steps=1, gpt_steps=1, judge_steps=1, vq_lr=0,
                    gpt_lr=0, muon_lr=0, judge_lr=0)
    config.named(cfg, out=".pt")
    if cfg.wrong_captions > 1:
        raise config.UserError(f"wrong_captions is a share, at most 1, not {cfg.wrong_captions}")


def main(argv):
    cfg, _ = config.load(Config, argv)
    check(cfg)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)    # now, not after all the work
    start = time.time()
    torch.manual_seed(cfg.seed)
    rng = random.Random(cfg.seed)
    every = shapes.render([s for _, s in shapes.random_scenes(cfg.scenes // 2, rng, allow_heldout=True)])
    told, scenes = zip(*shapes.random_scenes(cfg.scenes, rng))
    images, captions = shapes.render(scenes), [c.text for c in told]

    vq = pretrain_tokenizer(cfg, every)
    tokens = batched(vq.encode, images, 250)
    painted = batched(vq.decode, tokens, 250)
    print("read right after the tokenizer's round trip:",
          {k: round(v, 3) for k, v in shapes.reader_accuracy(scenes[:2000], painted[:2000]).items()})
    gpt = pretrain_policy(cfg, tokens, captions, rng)
    # The judge will see painted pictures only, so it learns from those, with the truth about the scene
    # behind them.
    judge = pretrain_judge(cfg, painted, scenes, captions, rng)

    half = torch.float16
    checkpoint.save({"gpt": checkpoint.pack(gpt, AR, half), "vqgan": checkpoint.pack(vq, VQ, half),
                     "judge": checkpoint.pack(judge, None, half), "made_by": config.show(cfg)}, cfg.out)
    print(f"wrote {cfg.out} in {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    config.run(main)
