"""Performance and diversity of a policy, on fixed prompts with fixed seeds, beside its base.

    python evaluate.py out/tiny_js                      one run against its base
    python evaluate.py out/tiny_js out/tiny_none ...    compare; runs that differ only in seed are averaged

Every prompt is drawn `draws` times. Reported, as means over prompts:
  reward, heldout     the run's own reward and one that it was not trained on, also per category
  unseen              held-out reward on captions with a pair (shapes.HELD_OUT) that the policy has never seen
  open_entropy        nat; sum over the attributes that the caption leaves open (shapes.open_attributes) of
                      the entropy of their values. Always of 64 pictures: the plug-in estimate is biased, by
                      about (values-1)/(2*64) each, so it compares only at equal numbers. Pictures that are
                      unreadable or show too few objects do not enter; `unreadable` is their share. A prompt
                      with fewer than 64 others has no entropy
  entropy_kept        open_entropy as a share of the base's, on the prompts where both have one
  pairwise            mean of 1 - cosine between pictures of one prompt, in judge features
  vendi               exp of the entropy of the eigenvalues of their cosine matrix / n: an effective number
                      of distinct pictures, between 1 and n. Vendi score, arXiv 2210.02410 eq. 2
  token_entropy       nat per token of the policy on its own samples
  kl_reverse          KL(policy || base), nat per image on the policy's samples; exact sums over the codes
  kl_forward          KL(base || policy), nat per image on the base's samples
and for the base also best-of-N: of N samples the one that the *trained* reward likes best. It costs N times
the sampling and no training, so a run should be held against it before its reward is praised.
"""
import math
import os
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm, trange

import checkpoint
import config
import pictures
import reward
import shapes
import text
from config import UserError

COUNTED = 64                    # readable pictures a prompt that enter open_entropy
KL_DRAWS = 16                   # draws a prompt that enter the KLs and the token entropy
UNSEEN_DRAWS = 8                # draws a prompt for captions with held-out pairs
BEST_OF = 8
CHUNK = 256                     # sequences sampled at once


@dataclass(frozen=True)
class Config:
    runs: tuple = ()                   # run folders, e.g. out/tiny_js, given as bare words
    prompts: int = 3                   # fixed training prompts of each category
    draws: int = 96                    # pictures a prompt; at least 64 must be readable for open_entropy
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    picture: str = "out/compare.png"   # where the picture of all runs goes


def fixed_prompts(per_category, heldout=False):
    """The same captions whoever asks: `per_category` of each category, drawn with their own generator."""
    rng = random.Random(1234)
    pools = [shapes.captions(category, heldout) for category in shapes.CATEGORIES]
    return [c for pool in pools for c in rng.sample(pool, min(per_category, len(pool)))]


@torch.no_grad()
def draw(policy, vqgan, prompts, draws, *, cfg_scale=1.0, temperature=1.0, seed=0, **cut):
    """`draws` samples of each prompt -> tokens [P*draws,T], images [P*draws,3,H,W]; one prompt's in a row."""
    device = next(policy.parameters()).device
    features, mask = text.encode(prompts, device)
    prompt = torch.arange(len(prompts), device=device).repeat_interleave(draws)
    generator, tokens, images = torch.Generator(device).manual_seed(seed), [], []
    for i in trange(0, len(prompt), CHUNK, desc="drawing", ncols=110, leave=False,
                    disable=len(prompt) <= CHUNK):
        used, own = prompt[i:i + CHUNK].unique(return_inverse=True)
        tokens.append(policy.generate(features[used], mask[used], own, cfg_scale=cfg_scale,
                                      temperature=temperature, generator=generator, **cut))
        images.append(vqgan.decode(tokens[-1]))
    return torch.cat(tokens), torch.cat(images)


def entropy(values):
    """Plug-in entropy, in nat, of a list of hashable values."""
    return -sum(n / len(values) * math.log(n / len(values)) for n in Counter(values).values())


def open_entropy(scenes, caption):
    """(entropy in nat or None, unreadable): of the first 64 usable scenes of one prompt, and how many were
    not."""
    found = [shapes.open_attributes(s, caption) for s in scenes]
    usable = [f for f in found if f is not None]
    if len(usable) < COUNTED:
        return None, len(found) - len(usable)
    return sum(entropy([f[k] for f in usable[:COUNTED]]) for k in usable[0]), len(found) - len(usable)


def pairwise(features):
    """Unit vectors [P,n,d] -> mean over the prompts of 1 - cosine between two different ones of a prompt."""
    n = features.shape[1]
    # the cosines of all pairs add up to the squared length of the sum; n of them are of a vector with itself
    total = features.sum(1).square().sum(1)                                                  # [P]
    return (1 - (total - n) / (n * (n - 1))).mean().item()


def vendi(features):
    """Unit vectors [n,d] -> the Vendi score, in 1..n. The d x d matrix has the same eigenvalues as the
    n x n one."""
    p = torch.linalg.eigvalsh(features.T.double() @ features.double() / len(features)).clamp_min(1e-12)
    return (-(p * p.log()).sum()).exp().item()


@torch.no_grad()
def divergence_to(policy, other, prompts, tokens, **sampling):
    """Exact sum over tokens of KL(policy || other) along `tokens` [P*n,T], nat per image; policy's nat per
    token."""
    kl = token_entropy = 0.0
    for caption, own in zip(prompts, tokens.chunk(len(prompts))):
        cond = *text.encode([caption], tokens.device), torch.zeros_like(own[:, 0])
        logp, logq = (m(own, *cond, **sampling).log_softmax(-1) for m in (policy, other))
        kl += (logp.exp() * (logp - logq)).sum().item()
        token_entropy -= (logp.exp() * logp).sum().item()
    return kl / len(tokens), token_entropy / tokens.numel()


@torch.no_grad()
def evaluate(policy, vqgan, judge, rewards, *, base=None, prompts=3, draws=96, cfg_scale=1.0,
             temperature=1.0):
    """-> (results: {figure: number, "reward/single": ...}, tokens [P*draws,T], images).
    See the module's docstring.

    rewards: {"reward": f, "heldout_reward": f}; base: (its policy, and the results and tokens that this
    returned for it), to compare with.
    """
    sampling = dict(cfg_scale=cfg_scale, temperature=temperature)
    seen, unseen = fixed_prompts(prompts), fixed_prompts(prompts, heldout=True)
    tokens, images = draw(policy, vqgan, seen, draws, **sampling)
    captions = [p for p in seen for _ in range(draws)]
    scores = {name: f(images, captions).view(len(seen), draws).cpu() for name, f in rewards.items()}
    out = {name: s.mean().item() for name, s in scores.items()}
    for category in shapes.CATEGORIES:
        rows = [i for i, p in enumerate(seen) if shapes.parse(p).category == category]
        out |= {f"{name}/{category}": s[rows].mean().item() for name, s in scores.items()}
    best = scores["reward"].view(len(seen), -1, BEST_OF).max(2)
    out["best_of_n_reward"] = best.values.mean().item()
    out["best_of_n_heldout_reward"] = scores["heldout_reward"].view(len(seen), -1, BEST_OF).gather(
        2, best.indices[..., None]).mean().item()
    _, others = draw(policy, vqgan, unseen, UNSEEN_DRAWS, seed=1, **sampling)
    out["unseen"] = rewards["heldout_reward"](
        others, [p for p in unseen for _ in range(UNSEEN_DRAWS)]).mean().item()

    scenes = shapes.read(images)
    measured = [open_entropy(scenes[i * draws:(i + 1) * draws], shapes.parse(p)) for i, p in enumerate(seen)]
    per_prompt = out["open_entropy_of"] = [h for h, _ in measured]
    known = [h for h in per_prompt if h is not None]
    out["open_entropy"] = sum(known) / len(known) if known else float("nan")
    both = [(h, b) for h, b in zip(per_prompt, base[1]["open_entropy_of"] if base else per_prompt)
            if h is not None and b is not None]
    out["entropy_kept"] = sum(h for h, _ in both) / sum(b for _, b in both) if both else float("nan")
    out["unreadable"] = sum(n for _, n in measured) / len(scenes)
    features = judge.embed_images(images).view(len(seen), draws, -1)[:, :COUNTED]            # [P,64,width]
    out["pairwise"] = pairwise(features)
    out["vendi"] = sum(vendi(f) for f in features) / len(seen)

    def some(t):
        return t.view(len(seen), draws, -1)[:, :KL_DRAWS].flatten(0, 1)
    out["kl_reverse"], out["token_entropy"] = divergence_to(
        policy, base[0] if base else policy, seen, some(tokens), **sampling)
    out["kl_forward"] = divergence_to(base[0], policy, seen, some(base[2]), **sampling)[0] if base else 0.0
    return out, tokens, images


COLUMNS = ["reward", "heldout_reward", "unseen", "open_entropy", "entropy_kept", "pairwise", "vendi",
           "token_entropy", "kl_reverse", "kl_forward", "unreadable"]


def table(rows):
    """[(name, results or list of results)] -> the text of a table; of a list, mean +- std over members."""
    def cell(results, key):
        values = torch.tensor([r[key] for r in results], dtype=torch.float64)
        return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")
    rows = [(name, r if isinstance(r, list) else [r]) for name, r in rows]
    body = [["run"] + COLUMNS] + [[name] + [cell(r, key) if key in r[0] else "-" for key in COLUMNS]
                                  for name, r in rows]
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    body.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in body)


def best_of_n(base):
    """The row of best-of-N, from the base's own results."""
    return {"reward": base["best_of_n_reward"], "heldout_reward": base["best_of_n_heldout_reward"]}


def picture(path, prompts, columns, a_row=2):
    """A grid: a row a prompt (two of each category), side by side the first pictures of each (heading,
    images)."""
    every = fixed_prompts(prompts)
    draws, shown = len(columns[0][1]) // len(every), max(3, 8 // len(columns))
    rows = []
    for i, caption in enumerate(every):
        if i % prompts < a_row:
            groups = [images[i * draws:i * draws + shown] for _, images in columns]
            rows.append((caption, groups, [reward.reader(g, [caption] * shown) for g in groups]))
    pictures.grid(rows, path, [heading for heading, _ in columns])


def main(argv):
    cfg, _ = config.load(Config, argv, positional="runs")
    if not cfg.runs:
        raise UserError("name at least one run: python evaluate.py out/tiny_js")
    if cfg.draws < COUNTED or cfg.draws % BEST_OF or cfg.prompts < 1:
        raise UserError(f"draws must be at least {COUNTED} and a multiple of {BEST_OF}, prompts at least 1")
    device = config.pick_device(cfg.device)
    bases, groups, columns, rows = {}, {}, [], []
    for run in tqdm(cfg.runs, desc="evaluating", unit="run"):
        policy, vqgan, judge, options = checkpoint.load_models(run, device)
        if not options:
            raise UserError(f"{run} is a base, not a run; every run is shown beside its base anyway")
        rewards = {"reward": reward.build(options["reward"], judge),
                   "heldout_reward": reward.build(options["heldout_reward"], judge)}
        settings = dict(prompts=cfg.prompts, draws=cfg.draws, cfg_scale=options["cfg_scale"],
                        temperature=options["temperature"])
        key = (options["init_from"], options["reward"], options["heldout_reward"], *settings.values())
        if key not in bases:
            base = checkpoint.load_models(config.locate(options["init_from"]), device)[0]
            bases[key] = base, *evaluate(base, vqgan, judge, rewards, **settings)
            name = "base" + (f" ({options['reward']}, {options['init_from']})" if len(bases) > 1 else "")
            rows += [(name, bases[key][1]), (f"best of {BEST_OF} of the {name}", best_of_n(bases[key][1]))]
            columns.append((name, bases[key][3]))
        results, _, images = evaluate(policy, vqgan, judge, rewards, base=bases[key][:3], **settings)
        alike = str({k: v for k, v in options.items()
                     if k not in ("seed", "out_dir", "resume", "stop_after", "device")})
        if alike not in groups:
            groups[alike] = (run, [])
            columns.append((run, images))
        groups[alike][1].append(results)
    rows += [(name + (f" and alike, {len(found)} seeds" if len(found) > 1 else ""), found)
             for name, found in groups.values()]
    print(table(rows))
    os.makedirs(os.path.dirname(cfg.picture) or ".", exist_ok=True)
    picture(cfg.picture, cfg.prompts, columns)
    print(f"pictures of each (green: the reader finds what the caption says): {cfg.picture}")


if __name__ == "__main__":
    config.run(main)
