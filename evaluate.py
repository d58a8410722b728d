"""Performance and diversity of a policy, on fixed prompts with fixed seeds, beside its base.

    python evaluate.py out/tiny_js                      one run against its base
    python evaluate.py out/tiny_js out/tiny_none ...    compare runs, averaged over seeds
    python evaluate.py out/llamagen_js --cfg_scale=7.5 --draws=8 --eval_prompts=16
    python evaluate.py out/tiny_vapi --temperature=0.8  at another temperature than in training
Runs that differ only in their seed, and have taken equally many steps, share a row. The terminal shows a few
columns. out/compare.md has all of them, and out/compare.png shows samples.
(sample.py --save samples the prompts of a benchmark, such as GenEval, for the benchmark's own program.)

Every prompt is sampled `draws` times. Reported, as means over prompts:
  reward, heldout_reward   the run's own reward, and one that it was not trained on
  pairwise            mean of 1 - cosine between images of one prompt, in features of the judge (tiny world)
                      or of CLIP (full size)
  vendi               an effective number of distinct images, between 1 and the number of images (metrics.py)
  token_entropy       of the policy on its own samples, nat per token; a flow policy has none
  sampler_reward, sampler_heldout_reward   flow policies: of images drawn with noise, as in training. All
                      other measurements are of images that the ODE draws, as users do
  kl_reverse          KL(policy || base) on the policy's samples, nat per *image* (metrics.jsonl: per token)
  kl_forward          KL(base || policy) on the base's samples, nat per image
and what only the world of the run can measure (for example tiny/world.py). For the base there is also
best-of-N: of N samples, take the one with the highest training reward of the run. It costs N times
the sampling and no training. So compare a run with it before you praise the run's reward.

This file also says what a run consists of: `options` composes the options of a run, `open_world` opens its
world and its models.
"""
import os
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm, trange

import flow
import full.world
import grpo
import metrics
import rejection
import reward
import tiny.world
import vapi
from common import config, device, files, run
from common.config import UserError, option
from common.folder import FREE, checkpoint_of
from common.interfaces import Rollout
from common.tables import TERMINAL, best_of_n, table

FLOWS = ("tiny_flow", "sd3", "sana")      # worlds whose policy is of flow.py, not of model.py
BEST_OF = 8                     # N of best-of-N
VENDI_OF = 64                   # images of each prompt, at most, that enter pairwise and vendi
KL_DRAWS = 16                   # samples of each prompt, at most, that enter the KLs and the token entropy
TOKENS_AT_ONCE = 2 ** 14        # tokens of the images that are sampled at once


# ---- what a run consists of --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """---- what is trained, and how"""
    world: Literal["tiny", "tiny_flow", "llamagen", "janus", "sd3", "sana"] = option(
        "tiny", "prompts, rewards and models")
    algorithm: Literal["grpo", "vapi", "rejection"] = option(
        "grpo", "its loop is in train.py, vapi.py or rejection.py")

    def check(cfg):
        if cfg.algorithm != "grpo" and cfg.world in FLOWS:
            raise UserError(f"--algorithm={cfg.algorithm} needs a policy of tokens, not --world={cfg.world}")


@dataclass(frozen=True)
class Evaluation:
    """---- evaluation"""
    eval_prompts: int = option(3, "fixed prompts: per category in the tiny world, else in total", low=1)
    eval_draws: int = option(96, "images of each prompt, a multiple of 8; tiny world, at least 64", low=8)

    def check(cfg):
        if cfg.eval_draws % BEST_OF:
            raise UserError(f"--eval_draws must be a multiple of {BEST_OF}, got {cfg.eval_draws}")


def options(values):
    """Return the dataclass of a run's options: general ones, and those of its world, models and algorithm.

    Only values["world"] and values["algorithm"] are read. Other values are not checked here.
    """
    kind = values.get("world", "tiny")
    full_size, flows = kind in full.world.PIPELINES, kind in FLOWS
    parts = [run.Files, Kind, run.Machine, run.Length, Evaluation, grpo.RolloutOptions, reward.Options]
    if values.get("algorithm") == "vapi":
        parts += [vapi.Options, full.world.ImageOptions if full_size else tiny.world.ImageOptions]
    elif values.get("algorithm") == "rejection":
        parts += [grpo.SamplingOptions, rejection.Options]
    elif flows:
        parts += [flow.Options]
    else:
        parts += [grpo.SamplingOptions, grpo.TokenOptions] + [grpo.ReleasedOptions] * full_size
    if values.get("algorithm") != "rejection":
        parts += [grpo.LossOptions]
    parts += [grpo.UpdateOptions, run.Optimizer, full.world.Options if full_size else
              tiny.world.FlowOptions if flows else tiny.world.Options]
    return config.compose(*parts)


def open_world(options, device):
    """Return (World, Pipeline) of a run (common/interfaces.py). Raises UserError for missing files."""
    kind = full.world if options.world in full.world.PIPELINES else tiny.world
    world, pipeline = kind.open_world(options, device, with_images=options.algorithm == "vapi")
    if size := getattr(options, "chunk_size", 0):
        if pipeline.tokens % size:
            raise UserError(f"--chunk_size must divide the {pipeline.tokens} tokens of an image, got {size}")
        pipeline.chunks = (size,) * (pipeline.tokens // size)
    return world, pipeline


def check_shares(cfg, size):
    """Raise UserError unless a step's samples divide among `size` processes, and each share into batches."""
    B, at_once = cfg.prompts_per_step * cfg.group_size, getattr(cfg, "sample_batch", 0)
    # In rejection.py, a process without a group would have no gradient to add.
    if cfg.algorithm == "rejection" and min(cfg.groups, cfg.prompts_per_step) < size:
        raise UserError(f"--groups and --prompts_per_step must be at least {size}, the number of processes")
    if B % size:
        raise UserError(f"{cfg.prompts_per_step} prompts x {cfg.group_size} images do not divide evenly "
                        f"among {size} processes")
    if (B // size) % min(at_once or B, B // size):
        raise UserError(f"the {B // size} images of a process do not divide into batches of "
                        f"--sample_batch={at_once}")


# ---- the evaluation ----------------------------------------------------------------------------------------
class Evaluated(NamedTuple):
    results: dict               # {name of a measurement: number, or a list with an entry per prompt}
    actions: torch.Tensor       # [P*n,..], n samples of a prompt are consecutive; the KLs are along them
    images: torch.Tensor        # [P*draws,3,H,W]


@torch.no_grad()
def sample(pipeline, policy, prompts, draws, *, cfg_scale=1.0, temperature=1.0, seed=0, **cut):
    """Sample each prompt `draws` times -> tokens [P*draws,T] (or latents), images [P*draws,3,H,W].

    The samples of one prompt are consecutive. cut: top_k and top_p of `generate`.
    """
    conditions = pipeline.encode(prompts)
    where = conditions.cond.device
    prompt = torch.arange(len(prompts), device=where).repeat_interleave(draws)
    generator, tokens, images = torch.Generator(where).manual_seed(seed), [], []
    size = max(8, TOKENS_AT_ONCE // pipeline.tokens)
    for i in trange(0, len(prompt), size, desc="sampling", dynamic_ncols=True,
                    leave=False, disable=len(prompt) <= size):
        with policy.autocast():
            tokens.append(policy.generate(*conditions.of(prompt[i:i + size]), cfg_scale=cfg_scale,
                                          temperature=temperature, generator=generator, **cut))
        images.append(pipeline.decode(tokens[-1]))
    return torch.cat(tokens), torch.cat(images)


@torch.no_grad()
def divergence_to(pipeline, policy, other, prompts, actions, **sampling):
    """Return (KL(policy || other) in nat per image, entropy of the policy in nat per action) along `actions`
    [P*n,..]. Both are exact: sums over the codes at every token, or closed forms of Gaussians."""
    kl = entropy = n = 0.0
    for prompt, own in zip(prompts, actions.chunk(len(prompts))):
        conditions, rows = pipeline.encode([prompt]), torch.arange(len(own), device=own.device)
        along = Rollout(own, None, torch.zeros_like(rows))
        # A flow policy reads an image once for each of its states.
        size = len(own) if pipeline.generates_actions else TOKENS_AT_ONCE // (pipeline.tokens * own.shape[1])
        for some in rows.split(size or 1):
            pi, rho = (m.distribution(along, conditions, some, **sampling) for m in (policy, other))
            of_actions = pi.divergence("reverse_kl", rho)                                        # [size,T]
            kl += of_actions.sum().item()
            entropy += pi.entropy().sum().item()
            n += of_actions.numel()
    return kl / len(actions), entropy / n


@torch.no_grad()
def trajectories(pipeline, policy, prompts, n, **sampling):
    """Sample each prompt n times as in training -> actions [P*n,K+1,C,H,W] of a flow policy."""
    conditions = pipeline.encode(prompts)
    where = conditions.cond.device
    rows = torch.arange(len(prompts), device=where).repeat_interleave(n)
    generator = torch.Generator(where).manual_seed(2)
    return policy.rollout(conditions, rows, generator=generator, at_once=max(8, TOKENS_AT_ONCE // (
        pipeline.tokens)), **sampling).actions


@torch.no_grad()
def evaluate(world, pipeline, policy, base=None, *, prompts=3, draws=96, cfg_scale=1.0, temperature=1.0):
    """Measure a policy -> Evaluated. The docstring of this file says what is measured.

    base: what this function returned for pipeline.reference, to compare with; None for the reference itself.
    prompts: how many fixed prompts. draws: samples of each, a multiple of 8.
    """
    sampling = dict(cfg_scale=cfg_scale, temperature=temperature)
    prompts = world.fixed_prompts(prompts)
    P = len(prompts)
    tokens, images = sample(pipeline, policy, prompts, draws, **sampling)
    asked = [p for p in prompts for _ in range(draws)]
    rewards = {name: f(images, asked).view(P, draws).cpu()
               for name, f in (("reward", world.reward), ("heldout_reward", world.heldout))}
    out = {name: r.mean().item() for name, r in rewards.items()}
    best = rewards["reward"].view(P, -1, BEST_OF).max(2)
    out["best_of_n_reward"] = best.values.mean().item()
    out["best_of_n_heldout_reward"] = rewards["heldout_reward"].view(P, -1, BEST_OF).gather(
        2, best.indices[..., None]).mean().item()
    out |= world.measure(prompts, images, rewards, base and base.results,
                         lambda others, n: sample(pipeline, policy, others, n, seed=1, **sampling)[1])
    if world.images:
        out["reconstruction"] = vapi.reconstruction(world, pipeline, policy, temperature)
    features = world.embed(images).view(P, draws, -1)[:, :VENDI_OF]
    out["pairwise"] = metrics.pairwise(features)
    out["vendi"] = sum(metrics.vendi(f) for f in features) / P

    n = min(draws, KL_DRAWS)
    if pipeline.generates_actions:
        actions = tokens.view(P, draws, -1)[:, :n].flatten(0, 1)
    else:                           # images come from the ODE, but only the noisy sampler has probabilities
        actions = trajectories(pipeline, policy, prompts, n, **sampling)
        noisy, asked = pipeline.decode(actions), [p for p in prompts for _ in range(n)]
        out |= {"sampler_reward": world.reward(noisy, asked).mean().item(),
                "sampler_heldout_reward": world.heldout(noisy, asked).mean().item()}
    out["kl_reverse"], entropy = divergence_to(pipeline, policy, pipeline.reference, prompts, actions,
                                               **sampling)
    out |= {"token_entropy": entropy} if pipeline.generates_actions else {}
    out["kl_forward"] = divergence_to(pipeline, pipeline.reference, policy, prompts, base.actions,
                                      **sampling)[0] if base else 0.0
    return Evaluated(out, actions, images)


# ---- the program -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config:
    runs: tuple = option((), "run folders, such as out/tiny_js, given without an option name")
    draws: int = option(96, "images of each prompt, a multiple of 8; tiny world, 64 or more", low=BEST_OF)
    eval_prompts: int = option(3, "fixed prompts: per category in the tiny world, else in total", low=1)
    cfg_scale: float = option(0.0, "guidance, of images and KLs; 0 = as in training", low=0)
    temperature: float = option(0.0, "of images and KLs; 0 = as in training", low=0)
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, then mps, then cpu")
    picture: str = option("out/compare.png", "sample images; the table goes beside, as .md", ending=".png")

    def check(cfg):
        if not cfg.runs:
            raise UserError("name at least one run: python evaluate.py out/tiny_js")
        if cfg.draws % BEST_OF:
            raise UserError(f"--draws must be a multiple of {BEST_OF}, got {cfg.draws}")
        if 0 < cfg.cfg_scale < 1:
            raise UserError(f"--cfg_scale must be at least 1, or 0 for the run's own, got {cfg.cfg_scale}")


def options_of(run_folder):
    """Return (options of a run, its whole checkpoint). Raises UserError if it is no run."""
    path = checkpoint_of(run_folder)
    saved = files.load(path, lazy=True)
    if not {"config", "model", "step"} <= set(saved):
        raise UserError(f"{run_folder} is a base, not a run; every run is shown beside its base anyway")
    return config.restore(options, saved["config"], path), saved


def what_decides(options, *without):
    """Return the options of a run as {name: value}, except those named in `without`."""
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in without}


def open_runs(cfg):
    """Return [(row, run folder, options, checkpoint), ...]. Runs that differ only in their seed share a row,
    with the name of the first. Raises UserError for what is no run, or for equal runs of one seed."""
    opened, rows = [], {}
    for folder in cfg.runs:
        own, saved = options_of(folder)
        try:
            config.validate(replace(own, eval_draws=cfg.draws))
        except UserError as error:
            raise UserError(str(error).replace("--eval_draws", "--draws")) from None
        seeds = rows.setdefault(str((saved["step"], what_decides(own, "seed", *FREE))), {})
        if own.seed in seeds:
            raise UserError(f"{seeds[own.seed]} and {folder} both have seed {own.seed} and the same options: "
                            f"they count as one run, so leave one out")
        seeds[own.seed] = folder
        opened.append((next(iter(seeds.values())), folder, own, saved))
    return opened


def label(name, values, shown):
    """Return the name of a row, and after it the values that the name does not tell."""
    return ", ".join([name, *(f"{key} {values[key]}" for key in shown if key in values)])


def main(argv):
    cfg, _ = config.load(Config, argv, positional="runs")
    here = device.start(cfg.device)
    opened, bases, groups, columns, rows = open_runs(cfg), {}, {}, [], []
    os.makedirs(os.path.dirname(cfg.picture) or ".", exist_ok=True)
    given = dict(temperature=cfg.temperature, cfg_scale=cfg.cfg_scale)         # 0 = as in training
    # Runs share their base and its evaluation if they agree in all options but these.
    training = {f.name for part in (run.Files, run.Machine, run.Length, Evaluation, grpo.RolloutOptions,
                                    grpo.LossOptions, grpo.UpdateOptions, grpo.SamplingOptions,
                                    grpo.TokenOptions, grpo.ReleasedOptions, run.Optimizer, vapi.Options,
                                    rejection.Options)
                for f in fields(part)} - {"dtype", *given}
    decides = [what_decides(own, *training) | {key: value for key, value in given.items() if value}
               for _, _, own, _ in opened]
    several = [key for key, value in decides[0].items()
               if all(key in d for d in decides) and any(d[key] != value for d in decides)]
    for (row, folder, own, saved), values in zip(
            tqdm(opened, desc="evaluating", unit="run", dynamic_ncols=True), decides):
        settings = dict(prompts=cfg.eval_prompts, draws=cfg.draws)
        settings |= {key: values[key] for key in given if key in values}
        if str(values) not in bases:
            world, pipeline = open_world(own, here)
            base = evaluate(world, pipeline, pipeline.reference, **settings)
            bases[str(values)] = world, pipeline, base
            name = label("base", values, several)
            rows += [(name, base.results), (f"best of {BEST_OF} of the {name}", best_of_n(base.results))]
            columns.append((name, base.images))
        world, pipeline, base = bases[str(values)]
        files.check_made_from(saved, pipeline.made_from, folder)
        files.load_weights(pipeline.policy, saved["model"], folder)
        found = evaluate(world, pipeline, pipeline.policy, base, **settings)
        name = label(row, values | saved, [key for key in given if given[key] or key in several]
                     + ["step"] * (saved["step"] != own.max_steps))
        if name not in groups:
            columns.append((name, found.images))
        groups.setdefault(name, []).append(found.results)
    rows += [(name + (f", mean of {len(some)} seeds" if len(some) > 1 else ""), some)
             for name, some in groups.items()]
    # Write first: printing fails if it goes to `head -2`, which closes the pipe.
    path = os.path.splitext(cfg.picture)[0] + ".md"
    with open(path, "w", encoding="utf-8") as file:
        file.write(table(rows, world.columns) + "\n")
    world.picture(cfg.picture, world.fixed_prompts(cfg.eval_prompts), columns)
    print(table(rows, world.columns, TERMINAL))
    print(f"all columns: {path}; images of each: {cfg.picture}")


if __name__ == "__main__":
    config.run(main)
