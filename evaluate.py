"""Performance and diversity of a policy, on fixed prompts with fixed seeds, beside its base.

    python evaluate.py out/tiny_js                      one run against its base
    python evaluate.py out/tiny_js out/tiny_none ...    compare; runs that differ only in seed are averaged
    python evaluate.py out/llamagen_js --cfg_scale=7.5 --draws=8 --eval_prompts=16
    python evaluate.py out/tiny_vapi --temperature=0.8  both under another temperature than in training
(sample.py --save draws a benchmark's prompts for its own scorer, GenEval's say.)

Every prompt is drawn `draws` times. Reported, as means over prompts:
  reward, heldout     the run's own reward and one that it was not trained on
  pairwise            mean of 1 - cosine between pictures of one prompt, in the world's features (judge, CLIP)
  vendi               exp of the entropy of the eigenvalues of their cosine matrix / n: an effective number
                      of distinct pictures, between 1 and n. Vendi score, arXiv 2210.02410 eq. 2
  token_entropy       nat per token of the policy on its own samples
  kl_reverse          KL(policy || base), nat per image on the policy's samples; exact sums over the codes
  kl_forward          KL(base || policy), nat per image on the base's samples
then what only this world can measure (tiny.py), and for the base also best-of-N: of N samples the one that
the *trained* reward likes best. It costs N times the sampling and no training, so a run should be held
against it before its reward is praised.
"""
import importlib
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch

import metrics
from tqdm import tqdm, trange

from common import files as checkpoint
from common import config
from common import run as runs
from common.config import UserError
from options import BEST_OF
from common.device import pick_device

WORLD_IS = ("world", "init_from", "weights", "gpt_ckpt", "vq_ckpt", "t5", "n_head", "block_size", "prompts",
            "dtype", "lora_rank", "antialias", "reward", "heldout_reward", "algorithm", "data")
                                # runs that share a world agree in these
VENDI_OF = 64                   # pictures a prompt, at most, that enter pairwise and vendi
KL_DRAWS = 16                   # draws a prompt, at most, that enter the KLs and the token entropy
CHUNK = 2 ** 14                 # tokens of the sequences that are sampled at once


@dataclass(frozen=True)
class Config:
    runs: tuple = ()                   # run folders, e.g. out/tiny_js, given as bare words
    draws: int = 96                    # pictures a prompt, a multiple of 8; 64 or more in the tiny world
    eval_prompts: int = 3              # fixed prompts: of each category in the tiny world, else in all
    cfg_scale: float = 0.0             # classifier-free guidance, for pictures and KLs; 0 = as it was trained
    temperature: float = 0.0           # likewise; 0 = as it was trained
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    picture: str = "out/compare.png"   # where the picture of all runs goes


def open_world(options, device):
    """The world (tiny.py says what that is) of a run's options, an object with train.py's Config's fields."""
    return importlib.import_module({"tiny": "tiny.world", "llamagen": "full.llamagen", "janus": "full.janus"}[options.world]).World(options, device)


def options_in(saved, path):
    """The options of a run, from its checkpoint `saved`. UserError unless train.py would take them."""
    import train                                           # here, as it imports this file
    return SimpleNamespace(**vars(runs.restore(train.Config, train.check, saved["config"], path)))


def options_of(run):
    """(options of a run, the state dict of its policy). UserError if it is none."""
    path = os.path.join(run, "ckpt.pt") if os.path.isdir(run) else run
    saved = checkpoint.load(path)
    if not {"config", "model"} <= set(saved):
        raise UserError(f"{run} is a base, not a run; every run is shown beside its base anyway")
    return options_in(saved, path), saved["model"]


@torch.no_grad()
def draw(world, policy, captions, draws, *, cfg_scale=1.0, temperature=1.0, seed=0, **cut):
    """`draws` samples of each caption -> tokens [P*draws,T], images [P*draws,3,H,W]; a caption's in a row."""
    features, mask = world.encode(captions)
    prompt = torch.arange(len(captions), device=features.device).repeat_interleave(draws)
    generator, tokens, images = torch.Generator(features.device).manual_seed(seed), [], []
    size = max(8, CHUNK // policy.config.block_size)
    for i in trange(0, len(prompt), size, desc="drawing", ncols=110, leave=False,
                    disable=len(prompt) <= size):
        used, own = prompt[i:i + size].unique(return_inverse=True)
        with world.autocast:
            tokens.append(policy.generate(features[used], mask[used], own, cfg_scale=cfg_scale,
                                          temperature=temperature, generator=generator, **cut))
        images.append(world.decode(tokens[-1]))
    return torch.cat(tokens), torch.cat(images)


@torch.no_grad()
def divergence_to(world, policy, other, captions, tokens, **sampling):
    """Exact sum over tokens of KL(policy || other) along `tokens` [P*n,T], nat per image; policy's nat per
    token."""
    kl = token_entropy = 0.0
    for caption, own in zip(captions, tokens.chunk(len(captions))):
        cond = *world.encode([caption]), torch.zeros_like(own[:, 0])
        with world.autocast:
            logp, logq = (m(own, *cond, **sampling).log_softmax(-1) for m in (policy, other))
        kl += (logp.exp() * (logp - logq)).sum().item()
        token_entropy -= (logp.exp() * logp).sum().item()
    return kl / len(tokens), token_entropy / tokens.numel()


@torch.no_grad()
def evaluate(world, policy, base=None, *, prompts=3, draws=96, cfg_scale=1.0, temperature=1.0):
    """-> (results: {figure: number, ...}, tokens [P*draws,T], images). See the module's docstring.

    base: (results, tokens, ...) that this returned for world.reference, to compare with; None for that
    itself. draws: a multiple of 8.
    """
    sampling = dict(cfg_scale=cfg_scale, temperature=temperature)
    captions = world.fixed_prompts(prompts)
    P = len(captions)
    tokens, images = draw(world, policy, captions, draws, **sampling)
    every = [c for c in captions for _ in range(draws)]
    scores = {name: f(images, every).view(P, draws).cpu() for name, f in world.rewards.items()}
    out = {name: s.mean().item() for name, s in scores.items()}
    best = scores["reward"].view(P, -1, BEST_OF).max(2)
    out["best_of_n_reward"] = best.values.mean().item()
    out["best_of_n_heldout_reward"] = scores["heldout_reward"].view(P, -1, BEST_OF).gather(
        2, best.indices[..., None]).mean().item()
    out |= world.extra(policy, captions, scores, images, base and base[0], **sampling)
    features = world.embed(images).view(P, draws, -1)[:, :VENDI_OF]
    out["pairwise"] = metrics.pairwise(features)
    out["vendi"] = sum(metrics.vendi(f) for f in features) / P

    def some(t):
        return t.view(P, draws, -1)[:, :KL_DRAWS].flatten(0, 1)
    out["kl_reverse"], out["token_entropy"] = divergence_to(
        world, policy, world.reference, captions, some(tokens), **sampling)
    out["kl_forward"] = divergence_to(world, world.reference, policy, captions, some(base[1]),
                                      **sampling)[0] if base else 0.0
    return out, tokens, images


COLUMNS = ["reward", "heldout_reward", "pairwise", "vendi", "token_entropy", "kl_reverse", "kl_forward"]


def table(rows, more=()):
    """[(name, results or list of results)] -> the text of a table; of a list, mean +- std over members.
    more: names of further columns, a world's own."""
    def cell(results, key):
        values = torch.tensor([r[key] for r in results], dtype=torch.float64)
        return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")
    rows = [(name, r if isinstance(r, list) else [r]) for name, r in rows]
    columns = COLUMNS[:2] + list(more) + COLUMNS[2:]
    body = [["run"] + columns] + [[name] + [cell(r, key) if key in r[0] else "-" for key in columns]
                                  for name, r in rows]
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    body.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in body)


def best_of_n(base):
    """The row of best-of-N, from the base's own results."""
    return {"reward": base["best_of_n_reward"], "heldout_reward": base["best_of_n_heldout_reward"]}


def check(cfg):
    if not cfg.runs:
        raise UserError("name at least one run: python evaluate.py out/tiny_js")
    config.at_least(cfg, draws=BEST_OF, eval_prompts=1, temperature=0)
    config.named(cfg, picture=".png")
    if cfg.draws % BEST_OF:
        raise UserError(f"draws must be a multiple of {BEST_OF}, not {cfg.draws}")
    if cfg.cfg_scale and cfg.cfg_scale < 1:
        raise UserError(f"cfg_scale must be at least 1, or 0 for the run's own, not {cfg.cfg_scale}")


def main(argv):
    cfg, _ = config.load(Config, argv, positional="runs")
    check(cfg)
    device = pick_device(cfg.device)
    bases, groups, columns, rows = {}, {}, [], []
    for run in tqdm(cfg.runs, desc="evaluating", unit="run"):
        options, state = options_of(run)
        options.eval_draws = cfg.draws
        settings = dict(prompts=cfg.eval_prompts, draws=cfg.draws,
                        cfg_scale=cfg.cfg_scale or options.cfg_scale,
                        temperature=cfg.temperature or options.temperature)
        key = *(getattr(options, k) for k in WORLD_IS), *settings.values()
        if key not in bases:
            world = open_world(options, device)
            bases[key] = world, evaluate(world, world.reference, **settings)
            file = options.init_from if options.world == "tiny" else options.gpt_ckpt
            name = "base" + f" ({options.reward}, {file})" * (len(bases) > 1)
            rows += [(name, bases[key][1][0]), (f"best of {BEST_OF} of the {name}",
                                                best_of_n(bases[key][1][0]))]
            columns.append((name, bases[key][1][2]))
        world, base = bases[key]
        checkpoint.load_weights(world.policy, state, run)
        results, _, images = evaluate(world, world.policy, base, **settings)
        alike = str({k: v for k, v in vars(options).items()
                     if k not in ("seed", *runs.FREE)})
        if alike not in groups:
            groups[alike] = (run, [])
            columns.append((run, images))
        groups[alike][1].append(results)
    rows += [(name + (f" and alike, {len(found)} seeds" if len(found) > 1 else ""), found)
             for name, found in groups.values()]
    print(table(rows, world.columns))
    os.makedirs(os.path.dirname(cfg.picture) or ".", exist_ok=True)
    world.picture(cfg.picture, world.fixed_prompts(cfg.eval_prompts), columns)
    print(f"pictures of each: {cfg.picture}")


if __name__ == "__main__":
    config.run(main)
