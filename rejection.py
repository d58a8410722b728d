"""Imitate the best of your own images: the simplest alternatives to GRPO.

    python train.py configs/tiny_best_of_n.py       sample once from the base, imitate the best of each group
    python train.py configs/tiny_awr.py             sample in every step, imitate better images more
    python train.py configs/tiny_dpo.py             raise the best of each group against the worst
    python train.py configs/llamagen_best_of_n.py   the 775M LlamaGen

All three sample groups of G images, as GRPO does, and rate them. Then they train by supervised learning, with
no ratio and no clip. Only DPO uses the reference.

Symbols: pi the policy, rho the reference, r the reward of an image a, tau a temperature in units of the
reward, G samples of each prompt, n groups in an update, T tokens of an image. An image's log pi(a) is the sum
over its tokens.

Why imitation improves a policy. [test_name] names a test of tests/core/test_rejection.py.
 1. Ask for much reward, but near rho:    maximize  J = E_pi[r] - tau KL(pi || rho).
 2. Let pi* = rho exp(r / tau) / Z, with Z = E_rho[exp(r / tau)]. Then log pi* = log rho + r / tau - log Z, so
        J = tau E_pi[log pi* - log pi] + tau log Z = tau log Z - tau KL(pi || pi*).
    The maximum is pi = pi*. GRPO with an unbiased reverse KL of weight beta = tau stops there too, if its
    advantages are not divided by their standard deviation.                [test_the_optimum_is_tilted]
 3. Move pi to pi* by maximum likelihood. Samples of pi* are not needed. Weighted samples of rho suffice:
        KL(pi* || pi) = -E_pi*[log pi] + const = -E_rho[ exp(r / tau) / Z  log pi ] + const.
 4. Replace Z by the mean of exp(r / tau) over a group of G samples. The weights become a softmax:
        w_i = exp(r_i / tau) / sum_j exp(r_j / tau),        loss = -sum_i w_i log pi(a_i).
    tau = 0 keeps only the best image: best-of-n fine-tuning, or RAFT (arXiv 2304.06767).
    tau = infinity is plain maximum likelihood on the policy's own samples.               [test_two_limits]
 5. With finite G, the loss is minimal not at pi*, but at the distribution of this game: draw G samples of
    rho, keep sample i with probability w_i. Its KL to rho is at most log G. For tau = 0 and rewards without
    ties the KL is log G - (G - 1)/G, which is 1.2 nat for G = 8.                    [test_best_of_n_in_nat]
    So one round of imitation goes only so far. Take a larger G, or repeat it with the new policy.
 6. Online: sample from the current policy in every step. This repeats line 2 with pi in the place of rho, so
    the exponents add up: after k rounds, pi is about rho exp(k r / tau) / Z. Nothing pulls back to rho.
    `replay` also reuses the groups of earlier steps. This is AWR (arXiv 1910.00177).
    While the samples come from pi itself, E_pi[grad log pi] = 0. So the mean gradient is a policy gradient
    with advantages w_i - 1/G. It has more noise.                       [test_imitation_is_a_policy_gradient]

DPO (arXiv 2305.18290) solves line 2 for r = tau (log pi* - log rho) + tau log Z. In the difference of two
images of one prompt Z cancels. DPO then fits by logistic regression which of the two images is better.

Departures from the papers:
 1. RAFT repeats sampling and imitation in rounds of thousands of images. Here --pool samples once, and
    without it every step samples.
 2. AWR weighs by the advantage over a learned value, and cuts the weights at 20. Here the group gives the
    baseline: a softmax within it is unchanged by a constant.
 3. DPO learns from preferences of people. Here the reward prefers.
"""
import math
import os
import random
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import trange

import metrics
from common import files, parallel
from common.config import Fault, UserError, option
from common.folder import resume_command
from common.interfaces import Rollout


MEANS = ("reward", "heldout_reward", "diversity")          # of the samples of a step, for the log


@dataclass(frozen=True)
class Options:
    """---- imitation of the policy's own images"""
    loss: Literal["imitation", "dpo"] = option("imitation", "dpo: the best of a group against its worst")
    tau: float = option(0.05, "weights are softmax(reward / tau) within a group; 0 = only the best", low=0)
    dpo_beta: float = option(0.1, "DPO: strength of the reference", low=0)
    pool: int = option(0, "sample so many steps once, from the base; 0 = sample in every step", low=0)
    replay: int = option(40, "without a pool: how many of the last steps are kept to learn from", low=1)
    groups: int = option(16, "n, groups of an update, drawn from what is kept", low=1)
    divergence = "none"             # a constant here, which the bar and the report name

    def check(cfg):
        if cfg.shard:
            raise UserError("--shard needs equally many passes on all processes, and --algorithm=rejection "
                            "may have different ones: leave it out")


# ---- pure tensor functions ---------------------------------------------------------------------------------
def chosen(rewards, tau, loss="imitation"):
    """Choose k images of each group: rewards [n,G] -> (their places in the group [n,k], weights [n,k]).

    imitation: all G images with the weights of line 4 above, or for tau = 0 the best with weight 1. dpo: the
    best with weight 1 and the worst with weight -1.
    """
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    if loss == "dpo":
        return torch.cat([best, worst], 1), torch.tensor([[1., -1.]]).expand(len(best), 2)
    if tau == 0:
        return best, torch.ones(best.shape)
    return torch.arange(rewards.shape[1]).expand(rewards.shape), (rewards / tau).softmax(1)


def imitation_loss(logp, weights):
    """logp [n,k,T] of tokens, weights [n,k] -> loss [n], in nat per token: the weighted sum of line 4 / T."""
    return -(weights * logp.mean(2)).sum(1)


def dpo_loss(logp, logp_ref, weights, beta):
    """Return -log sigmoid(beta (x_best - x_worst)) [n], with x = log pi(a) - log rho(a) of a whole image.

    logp, logp_ref [n,2,T]: of the best and the worst image. weights [n,2]: 1 and -1. At pi = rho the gradient
    is -beta/2 (grad log pi(best) - grad log pi(worst)).                         [test_dpo_at_the_reference]
    """
    return -F.logsigmoid(beta * (weights * (logp - logp_ref).sum(2)).sum(1))


# ---- the loop ----------------------------------------------------------------------------------------------
def rejection_loop(cfg, run, world, pipeline):
    """Train pipeline.policy on its own images. Arguments as in train.py's grpo_loop."""
    policy, P = pipeline.policy, cfg.prompts_per_step
    if min(cfg.groups, P) < parallel.SIZE:
        raise UserError(f"--groups and --prompts_per_step must be at least {parallel.SIZE}, the number of "
                        f"processes, got {cfg.groups} and {P}")
    kept = base_pool(cfg, run, world, pipeline) if cfg.pool else run.memory
    for step in run.steps():
        # 1. sample and rate, unless all was sampled before
        if not cfg.pool:
            kept = [*run.memory, rated_samples(cfg, run, world, pipeline, policy, run.generator)]
            kept = kept[-cfg.replay:]
        run.phase("sample")

        # 2. update: imitate groups of what is kept
        for _ in range(cfg.inner_epochs):
            drawn = torch.randperm(len(kept) * P, generator=run.generator, device=run.device)[:cfg.groups]
            prompts, tokens, rewards = groups_of(kept, drawn.tolist(), P)            # [n], [n,G,T], [n,G]
            places, weights = chosen(rewards, cfg.tau, cfg.loss)                                 # [n,k]
            tokens = tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))         # [n,k,T]
            conditions, stats, n = pipeline.encode(prompts), {}, len(prompts)
            for some in run.rows(n).split(max(1, cfg.micro_batch // places.shape[1])):
                loss, found = loss_of(cfg, pipeline, conditions, some, tokens[some.cpu()].to(run.device),
                                      weights[some.cpu()].to(run.device))
                (loss.sum() / n).backward()
                for key, value in (found | {"loss": loss.detach()}).items():
                    stats[key] = stats.get(key, 0) + value.sum() / n
            run.optimizer_step(step)
        run.phase("update")

        # 3. log
        imitated = (weights.clamp_min(0) * rewards.gather(1, places)).sum(1).mean().item()
        newest = kept if cfg.pool else kept[-1:]
        line = {key: sum(some[key] for some in newest) / len(newest) for key in MEANS}
        run.memory = [] if cfg.pool else kept
        run.log(step, line | {"imitated_reward": imitated}, stats)


def loss_of(cfg, pipeline, conditions, some, tokens, weights):
    """Return the losses [m] of m groups and their statistics [m]. some [m]: their rows in the conditions.
    tokens [m,k,T], weights [m,k]."""
    m, k, T = tokens.shape
    rollout = Rollout(tokens.flatten(0, 1), None, some.repeat_interleave(k))
    rows = torch.arange(m * k, device=some.device)
    settings = dict(cfg_scale=cfg.cfg_scale, temperature=cfg.temperature)
    pi = pipeline.policy.distribution(rollout, conditions, rows, **settings)
    logp = pi.log_prob(rollout.actions).view(m, k, T)
    found = {"entropy": pi.entropy().detach().view(m, -1).mean(1)}
    if cfg.loss == "imitation":
        return imitation_loss(logp, weights), found
    with torch.no_grad():
        rho = pipeline.reference.distribution(rollout, conditions, rows, **settings)
        logp_ref = rho.log_prob(rollout.actions).view(m, k, T)
    loss = dpo_loss(logp, logp_ref, weights, cfg.dpo_beta)
    return loss, found | {"preferred": (loss.detach() < math.log(2)).float()}      # the share of right orders


@torch.no_grad()
def rated_samples(cfg, run, world, pipeline, policy, generator):
    """Sample G images for each of P prompts, and rate them -> a dict, equal on all processes, on the CPU.

    prompts [P], tokens [P*G,T], rewards [P*G], and means of the step as numbers. Raises Fault if a reward is
    not finite: a group with such a reward has no best image.
    """
    G, mine = cfg.group_size, run.rows(cfg.prompts_per_step * cfg.group_size)
    prompts = world.draw(cfg.prompts_per_step)
    rollout = policy.rollout(pipeline.encode(prompts), mine // G, cfg_scale=cfg.cfg_scale,
                             temperature=cfg.temperature, generator=generator, at_once=cfg.sample_batch,
                             part=(parallel.RANK, parallel.SIZE))
    pixels, asked = pipeline.decode(rollout.actions), [prompts[i] for i in rollout.prompt.tolist()]
    rewards, heldout = (parallel.gather(f(pixels, asked)) for f in (world.reward, world.heldout))
    if not rewards.isfinite().all():
        raise Fault(f"the reward of {int((~rewards.isfinite()).sum())} images is not finite, so they cannot "
                    f"be compared: make --reward={cfg.reward} return numbers")
    features = parallel.gather(world.embed(pixels)).unflatten(0, (-1, G))
    return {"prompts": prompts, "tokens": parallel.gather(rollout.actions).int().cpu(),
            "rewards": rewards.float().cpu(), "reward": rewards.mean().item(),
            "heldout_reward": heldout.mean().item(), "diversity": metrics.pairwise(features)}


def base_pool(cfg, run, world, pipeline):
    """Sample --pool steps from the base -> list of what `rated_samples` returns.

    Each is a file in the run folder and has its own random stream. So a run that was stopped continues where
    it stopped, with the same images.
    """
    folder, stream, pool = run.file("pool"), random.getstate(), []
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f"{i:05d}.pt") for i in range(cfg.pool)]
    there = torch.tensor([sum(map(os.path.exists, paths))], device=run.device)
    there = int(parallel.gather(there).min())              # on every machine, if they do not share a disk
    for i in trange(cfg.pool, desc="sampling the pool", dynamic_ncols=True, disable=not run.first):
        if i < there:
            pool.append(files.load(paths[i]))
            continue
        if run.stop.name:
            raise Fault(f"stopped by {run.stop.name} after {i} of {cfg.pool} steps of the pool; continue "
                        f"with `{resume_command(cfg)}`")
        random.seed(f"{cfg.seed} {i}")
        generator = torch.Generator(run.device).manual_seed(cfg.seed * 10 ** 6 + i)
        pool.append(rated_samples(cfg, run, world, pipeline, pipeline.reference, generator))
        if run.first:
            files.save(pool[-1], paths[i])
    random.setstate(stream)
    return pool


def groups_of(kept, numbers, P):
    """Return the prompts [n], tokens [n,G,T] and rewards [n,G] of groups. Group i is group i % P of the step
    kept[i // P]."""
    parts = [(kept[i // P]["prompts"][i % P], *(kept[i // P][key].unflatten(0, (P, -1))[i % P]
                                               for key in ("tokens", "rewards"))) for i in numbers]
    prompts, tokens, rewards = zip(*parts)
    return list(prompts), torch.stack(tokens).long(), torch.stack(rewards)
