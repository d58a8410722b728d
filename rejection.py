"""Imitate the best of your own images: the simplest alternatives to GRPO.

    python train.py configs/tiny_best_of_n.py       sample once from the base, imitate the best of each group
    python train.py configs/tiny_awr.py             sample in every step, imitate better images more
    python train.py configs/tiny_dpo.py             raise the best of each group against the worst
    python train.py configs/llamagen_best_of_n.py   the 775M LlamaGen

All three sample groups of G images and rate them, as GRPO does. Then they train by supervised learning. The
name comes from rejection sampling: keep the best samples, reject the others. None of the losses has the ratio
pi / pi_old or its clip. Only the loss of DPO has the reference.

Symbols: pi the policy, rho the reference, r the reward of an image a, tau a temperature in units of the
reward (not --temperature), G samples of a prompt, n groups in an update, T tokens of an image. log pi(a) of
an image is the sum over its tokens.

Why imitation improves a policy. [test_name] names a test of tests/core/test_rejection.py.
 1. Maximize the reward and stay close to rho:    J = E_pi[r] - tau KL(pi || rho).
 2. Let pi* = rho exp(r / tau) / Z, with Z = E_rho[exp(r / tau)]. Then r / tau = log pi* - log rho + log Z, so
        J = tau E_pi[log pi* - log pi] + tau log Z = tau log Z - tau KL(pi || pi*).
    A KL is at least 0, and 0 only if both are equal. So the maximum is pi = pi*.
                                                                                  [test_the_optimum_is_tilted]
    GRPO with reverse KL of weight tau stops near pi* too. It misses pi* because its baseline contains the
    image's own reward, and because its penalty ignores later tokens (Divergence.exact in divergences.py).
 3. Move pi to pi* by maximum likelihood. Samples of pi* are not needed. Weighted samples of rho suffice:
        KL(pi* || pi) = -E_pi*[log pi] + const = -E_rho[ exp(r / tau) / Z  log pi ] + const.
 4. Replace Z by the mean of exp(r / tau) over a group of G samples. The weights become a softmax:
        w_i = exp(r_i / tau) / sum_j exp(r_j / tau),        loss = -sum_i w_i log pi(a_i).
    tau = 0 keeps only the best image. This is best-of-n fine-tuning, where n is our G, or RAFT (arXiv
    2304.06767). tau = infinity is plain maximum likelihood on the samples.                  [test_two_limits]
 5. With finite G, the loss is not minimal at pi*. Draw G samples of rho, and keep sample i with probability
    w_i. The loss is minimal at the distribution of the kept sample. Its KL to rho is at most log G per image.
    For tau = 0 and rewards without ties it is log G - (G - 1)/G, which is 1.2 nat for G = 8. So one round
    moves the policy only so far, unless it memorizes a small pool.          [test_what_the_loss_converges_to]
 6. Online, --pool=0: sample from the current policy in every step. If every round fitted its target fully, k
    rounds with large G would give rho exp(k r / tau) / Z. Here a round is one gradient step, so pi moves only
    a part of the way. Without replay nothing pulls back to rho. --replay reuses the groups of earlier steps,
    so it pulls to earlier policies. This is AWR (arXiv 1910.00177).
    For samples of the current policy, E_pi[grad log pi] = 0. So the mean gradient is a policy gradient with
    advantages w_i - 1/G. Without the baseline 1/G it usually has more noise.
                                                                         [test_imitation_is_a_policy_gradient]

DPO (arXiv 2305.18290) solves step 2 for the reward: r = tau (log pi* - log rho) + tau log Z. In the
difference of two images of one prompt Z cancels. DPO fits by logistic regression which of the two images is
better. It calls tau beta. If the better image always wins, as here, the loss has no finite minimum: the
margin grows with every step. So the number of steps and the learning rate limit the distance to rho, and tau
only slows the growth (arXiv 2310.12036 explains this).

Departures from the papers:
 1. RAFT repeats sampling and imitation in rounds of thousands of images. With --pool we sample once. Without
    --pool we sample in every step.
 2. AWR weighs by the advantage over a learned value, and cuts weights at 20. Here the group is the baseline:
    adding a constant to the rewards of a group leaves the softmax unchanged.
 3. DPO learns from preferences of people. Here the image with the larger reward always wins.
 4. Groups whose rewards are all equal are left out, as in grpo.py.
"""
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


@dataclass(frozen=True)
class Options:
    """---- imitation of the policy's own images"""
    loss: Literal["imitation", "dpo"] = option("imitation", "dpo: the best of a group against its worst")
    tau: float = option(0.05, "weights in a group: softmax(reward / tau); 0: the best. DPO: its beta", low=0)
    pool: int = option(0, "sample this many steps before training; 0 = sample in every step", low=0)
    replay: int = option(40, "without a pool: how many of the last steps are kept to learn from", low=1)
    groups: int = option(16, "groups of an update, drawn from what is kept", low=1)
    divergence = "none"             # a constant here. The progress bar and the report print it

    def check(cfg):
        at_once = 2 if cfg.loss == "dpo" else cfg.group_size if cfg.tau else 1
        if cfg.shard:
            raise UserError("--shard needs equally many passes on all processes, and --algorithm=rejection "
                            "may have different ones: leave it out")
        if cfg.loss == "dpo" and not cfg.tau or 0 < cfg.tau < 1e-6:
            raise UserError(f"--tau must be at least 1e-6, or 0 for --loss=imitation, got {cfg.tau}")
        if cfg.pool and cfg.replay != Options.replay:
            raise UserError("--replay has no effect with --pool: leave one of them out")
        if cfg.micro_batch < at_once:
            raise UserError(f"--micro_batch must be at least {at_once}, the images of a group that an update "
                            f"reads, got {cfg.micro_batch}")


# ---- pure tensor functions ---------------------------------------------------------------------------------
def imitated(rewards, tau):
    """Return which k images of each group are imitated, and how much: rewards [n,G] -> (index [n,k], weights
    [n,k]). The weights of a group add up to 1, or to 0 if its rewards are all equal."""
    spread = (rewards.amax(1, keepdim=True) > rewards.amin(1, keepdim=True)).float()
    if tau == 0:
        return rewards.argmax(1, keepdim=True), spread
    index = torch.arange(rewards.shape[1]).expand(rewards.shape)
    return index, spread * ((rewards - rewards.amax(1, keepdim=True)) / tau).softmax(1)


def imitation_loss(logp, weights):
    """logp [n,k,T] of tokens, weights [n,k] -> losses [n] of groups: step 4, divided by T. In nat."""
    return -(weights * logp.mean(2)).sum(1)


def dpo_loss(logp, logp_ref, beta):
    """Return -log sigmoid(beta (x_best - x_worst)) [n], with x = log pi(a) - log rho(a) of a whole image.

    logp, logp_ref [n,2,T]: of the tokens of the best and the worst image. At pi = rho the gradient is -beta/2
    (grad log pi(best) - grad log pi(worst)).                                     [test_dpo_at_the_reference]
    """
    x = (logp - logp_ref).sum(2)
    return -F.logsigmoid(beta * (x[:, 0] - x[:, 1]))


# ---- the loop ----------------------------------------------------------------------------------------------
def rejection_loop(cfg, run, world, pipeline):
    """Train pipeline.policy on its own images. Arguments as in train.py's grpo_loop."""
    P = cfg.prompts_per_step
    kept = sample_pool(cfg, run, world, pipeline) if cfg.pool else run.memory
    for step in run.steps():
        # 1. sample and rate. run.memory stays as it is until the update is made: if this step fails, the run
        # is saved without its samples, and --resume draws them again
        line = {}
        if not cfg.pool:
            line, newest = rated_samples(cfg, run, world, pipeline, pipeline.policy, run.generator)
            kept = [*run.memory, newest][-cfg.replay:]
        run.phase("sample")

        # 2. update. Each inner epoch draws other groups. The log shows the last one
        for _ in range(cfg.inner_epochs):
            drawn = torch.randperm(len(kept) * P, generator=run.generator, device=run.device)[:cfg.groups]
            prompts, tokens, rewards = groups_of(kept, drawn.tolist(), P)            # [n], [n,G,T], [n,G]
            index, weights = imitated(rewards, cfg.tau)                                          # [n,k]
            if cfg.loss == "dpo":
                index = torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)                   # [n,2]
                weights = (rewards.amax(1) > rewards.amin(1)).float()[:, None]
            tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))          # [n,k,T]
            conditions, stats, n = pipeline.encode(prompts), {}, len(prompts)
            for rows in run.rows(n).split(cfg.micro_batch // index.shape[1]):
                losses, found = losses_of(cfg, pipeline, conditions, rows, tokens[rows.cpu()].to(run.device),
                                          weights[rows.cpu()].to(run.device))
                (losses.sum() / n).backward()
                for key, value in (found | {"loss": losses.detach()}).items():
                    stats[key] = stats.get(key, 0) + value.sum() / n
            run.optimizer_step(step)
        run.phase("update")

        # 3. log. With a pool there are no new samples, so only evaluations show the policy's reward
        chosen = rewards.gather(1, index[:, :weights.shape[1]])      # for DPO only that of the best image
        line["imitated_reward"] = (weights * chosen).sum(1).mean().item()
        run.memory = [] if cfg.pool else kept
        run.log(step, line, stats)


def losses_of(cfg, pipeline, conditions, rows, tokens, weights):
    """Return the losses [m] of m groups, and statistics [m]. rows [m]: their rows in the conditions. tokens
    [m,k,T]. weights [m,k], or [m,1] for DPO: 0 for groups that teach nothing."""
    m, k, T = tokens.shape
    rollout = Rollout(tokens.flatten(0, 1), None, rows.repeat_interleave(k))
    every = torch.arange(m * k, device=rows.device)
    settings = dict(cfg_scale=cfg.cfg_scale, temperature=cfg.temperature)
    logp = pipeline.policy.distribution(rollout, conditions, every, **settings).log_prob(rollout.actions)
    logp = logp.view(m, k, T)
    if cfg.loss == "imitation":
        return imitation_loss(logp, weights), {}
    with torch.no_grad():
        rho = pipeline.reference.distribution(rollout, conditions, every, **settings)
        logp_ref = rho.log_prob(rollout.actions).view(m, k, T)
    x = (logp.detach() - logp_ref).sum(2)
    return (weights[:, 0] * dpo_loss(logp, logp_ref, cfg.tau),
            {"preferred": (x[:, 0] > x[:, 1]).float()})              # the share of groups in the right order


@torch.no_grad()
def rated_samples(cfg, run, world, pipeline, policy, generator):
    """Sample and rate G images for each of P prompts, as grpo_loop does -> ({name: mean over the step}, group
    data: prompts [P], tokens [P,G,T], rewards [P,G]), on the CPU and equal on all processes. Raises Fault if
    a reward is not finite: its group has no best image."""
    G, mine = cfg.group_size, run.rows(cfg.prompts_per_step * cfg.group_size)
    prompts = world.draw(cfg.prompts_per_step)
    rollout = policy.rollout(pipeline.encode(prompts), mine // G, cfg_scale=cfg.cfg_scale,
                             temperature=cfg.temperature, generator=generator, at_once=cfg.sample_batch,
                             part=(parallel.RANK, parallel.SIZE))
    pixels, asked = pipeline.decode(rollout.actions), [prompts[i] for i in rollout.prompt.tolist()]
    rewards, heldout = (parallel.gather(f(pixels, asked)) for f in (world.reward, world.heldout))
    if not rewards.isfinite().all():
        raise Fault(f"the rewards of {int((~rewards.isfinite()).sum())} images are not finite, so they "
                    f"cannot be compared: repair --reward={cfg.reward}, then use --resume")
    tokens, features = (parallel.gather(x).unflatten(0, (-1, G)) for x in (
        rollout.actions.int(), world.embed(pixels)))
    means = {"reward": rewards.mean().item(), "heldout_reward": heldout.mean().item(),
             "diversity": metrics.pairwise(features)}
    return means, {"prompts": prompts, "tokens": tokens.cpu(),
                   "rewards": rewards.float().unflatten(0, (-1, G)).cpu()}


def sample_pool(cfg, run, world, pipeline):
    """Sample --pool steps from the reference -> list of group data, as of `rated_samples`.

    The data of each step is a file in the run folder, with its own random stream. So a run that was stopped
    continues with the first file that is missing. Machines that share no disk sample all of it again.
    """
    folder, python_random, pool = run.file("pool"), random.getstate(), []
    os.makedirs(folder, exist_ok=True)
    paths = [os.path.join(folder, f"{i:05d}.pt") for i in range(cfg.pool)]
    missing = next((i for i, path in enumerate(paths) if not os.path.exists(path)), cfg.pool)
    for i in trange(cfg.pool, desc="sampling the pool", dynamic_ncols=True, disable=not run.first):
        # All processes must agree on what comes next, or one would wait for another.
        first, stopped = parallel.gather(torch.tensor([[missing, -bool(run.stop.name)]],
                                                      device=run.device)).amin(0).tolist()
        if i < first:
            try:
                pool.append(files.load(paths[i]))
            except UserError:
                raise UserError(f"{paths[i]} is damaged: delete it, and --resume samples it again") from None
            continue
        if stopped:
            raise Fault(f"stopped by a signal after {i} of {cfg.pool} steps of the pool; continue with "
                        f"`{resume_command(cfg)}`")
        random.seed(f"{cfg.seed} {i}")
        generator = torch.Generator(run.device).manual_seed(random.getrandbits(62))
        pool.append(rated_samples(cfg, run, world, pipeline, pipeline.reference, generator)[1])
        if run.first:
            files.save(pool[-1], paths[i])
    random.setstate(python_random)             # training prompts do not depend on where the pool was resumed
    return pool


def groups_of(kept, numbers, P):
    """Return prompts [n], tokens [n,G,T], rewards [n,G] of groups. Group i is row i % P of kept[i // P]."""
    steps, rows = [kept[i // P] for i in numbers], [i % P for i in numbers]
    tokens, rewards = (torch.stack([step[key][row] for step, row in zip(steps, rows)])
                       for key in ("tokens", "rewards"))
    return [step["prompts"][row] for step, row in zip(steps, rows)], tokens.long(), rewards
