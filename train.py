"""GRPO post-training of a text-to-image policy, with a divergence that keeps it near its starting point.

    python train.py                                   the tiny world, 90 seconds on 2 CPU cores
    python train.py configs/tiny_none.py              the same without a divergence: watch the diversity fall
    python train.py configs/tiny_js.py --beta=0.2 --seed=1 --out_dir=out/mine
    python train.py configs/tiny_js.py --resume       continue the run in its out_dir
    python train.py configs/llamagen_js.py            the 775M LlamaGen with real prompts, on one GPU
    torchrun --nproc_per_node=8 train.py configs/llamagen_js.py         the same on eight (common/parallel.py)
    python train.py configs/tiny_vapi.py              another algorithm: learns from given images (vapi.py)
    python train.py configs/tiny_awr.py               another: imitates its own better images (rejection.py)

The policy is an autoregressive model: it writes an image as a sequence of tokens. Each step samples G images
for each of P prompts, rewards them, and turns the rewards into advantages within each group of G. Then it
takes one gradient step (or --inner_epochs steps) on the GRPO loss (grpo.py), with a divergence to the frozen
reference (divergences.py), such as JS, the Jensen-Shannon divergence. `grpo_loop` below is the whole
algorithm. Method: "Balancing Performance and Diversity in GRPO Autoregressive Text-to-Image Post-Training",
arXiv 2606.21498.

The distribution that samples *is* the distribution that is trained: sampler, loss and reference have the same
temperature and the same classifier-free guidance (cfg_scale, see model.py). Only --score_cfg breaks this
rule, to reproduce the script of full/janus.py. `max_ratio_error` in the log checks the rule at every step.
It is the largest abs(pi_loss / pi_sampler - 1) over all tokens. It is not 0, because rollout and loss add up
the same numbers in different orders. In fp32 and without --score_cfg it stays below 1e-4. A larger value is
then a bug: the loss trains another distribution than the one that samples.

The run folder gets config.py (all options), metrics.jsonl (one line per step), evaluations.jsonl,
samples_*.png, ckpt.pt, and at the end before_after.png, curves.png and table.md. Options stand beside the
code that reads them, and `--help` prints them. With one process, `parallel` changes nothing, so ignore it
when you read the code.

The paper's released script also uses critical tokens and a dynamic weight. Both are off by default
(critical.py).
"""
import sys
if sys.version_info < (3, 11):
    print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)

import math

import torch

import evaluate
import grpo
import metrics
import rejection
import vapi
from common import config, device, images, parallel
from common.folder import open_run
from common.run import Run, schedule
from critical import critical_tokens


def grpo_loop(cfg, run, world, pipeline):
    """Train pipeline.policy by GRPO.

    cfg: the options. run: a common.run.Run, for steps, optimizer, log and files. world: prompts and rewards.
    pipeline: the models. common/interfaces.py says what world and pipeline offer. A step has B = P * G
    samples of T tokens, and this process has b = B / (number of processes) of them.
    """
    policy, reference, G = pipeline.policy, pipeline.reference, cfg.group_size
    B = cfg.prompts_per_step * G
    mine = run.rows(B)                                        # [b], the rows of this process among the B
    sampling = dict(cfg_scale=cfg.cfg_scale, temperature=cfg.temperature)
    scoring = sampling | dict(cfg_scale=cfg.score_cfg or cfg.cfg_scale)            # usually the same
    for step in run.steps():
        # 1. sample: G images for each of P prompts
        prompts = world.draw(cfg.prompts_per_step)
        conditions = pipeline.encode(prompts)
        rollout = policy.rollout(conditions, mine // G, generator=run.generator, at_once=cfg.sample_batch,
                                 part=(parallel.RANK, parallel.SIZE), **sampling)       # actions, logp [b,T]
        mismatch = 0.0
        if scoring != sampling:
            rollout.logp, mismatch = rescored(cfg, policy, rollout, conditions, scoring)
        run.phase("sample")

        # 2. reward: decode the tokens, and rate the images
        with torch.no_grad():
            pixels = pipeline.decode(rollout.actions)                                            # [b,3,H,W]
            asked = [prompts[i] for i in rollout.prompt.tolist()]
            rewards = parallel.gather(world.reward(pixels, asked))                   # [B], what is trained on
            heldout = parallel.gather(world.heldout(pixels, asked))                  # [B], only reported
            features = parallel.gather(world.embed(pixels)).unflatten(0, (-1, G))                # [P,G,d]
        run.phase("reward")

        # 3. advantage: each image against the other images of its prompt
        all_advantages, zero_spread = grpo.advantages(rewards, G)                                # [B]
        advantages = all_advantages[mine]                                                        # [b]
        weights = pipeline.weights(rollout, mine, B, run.generator)      # [b,T], or None: all weigh the same
        if cfg.critical_tokens:
            weights = token_weights(cfg, mine, pipeline, rollout, conditions, scoring)           # [b,T]
        run.phase("advantage")

        # 4. update: a gradient step on the clipped loss, in micro-batches that add up to the loss of the step
        beta = schedule(cfg.beta_schedule, cfg.beta, cfg.beta_end, step / cfg.max_steps)
        T = rollout.logp.shape[1]
        epochs = []                                                   # statistics of each pass over the batch
        for _ in range(cfg.inner_epochs):
            epochs.append({})
            for rows, part, chunks in grpo.micro_batches(len(mine), T, cfg.micro_batch, cfg.action_batch,
                                                         pipeline.chunks):
                pi = policy.distribution(rollout, conditions, rows, uncond_grad=cfg.uncond_grad, **scoring)
                with torch.no_grad():
                    rho = reference.distribution(rollout, conditions, rows, **scoring)
                loss, stats = grpo.loss(
                    pi.at(*part), rho.at(*part), rollout.actions[rows], rollout.logp[rows, slice(*part)],
                    advantages[rows], B * T, None if weights is None else weights[rows, slice(*part)],
                    divergence=cfg.divergence, estimator=cfg.estimator, beta=beta, clip_eps=cfg.clip_eps,
                    dynamic=cfg.dynamic_weight, logit_chunk=cfg.logit_chunk, chunks=chunks,
                    whole=(T, len(pipeline.chunks)), per=pipeline.per, shared=pipeline.shared)
                loss.backward()
                grpo.accumulate(epochs[-1], stats)
            run.optimizer_step(step)
        run.phase("update")

        # 5. log: statistics of the first pass, where the policy still is the sampler. Shares of ratios are
        # those of the last pass, because in the first pass all ratios are 1.
        stats = epochs[0] | {key: epochs[-1][key] for key in ("clip_share", "outside_share")} | {
            "max_ratio_error": epochs[0]["max_ratio_error"].clamp_min(mismatch)}
        run.log(step, {"reward": rewards.mean().item(), "heldout_reward": heldout.mean().item(),
                       "reward_std": rewards.view(-1, G).std(1).mean().item(), "zero_spread": zero_spread,
                       "diversity": metrics.pairwise(features), "beta": beta}, stats)


# ---- two extras of released scripts, off by default: --score_cfg and --critical_tokens ---------------------
def distributions(cfg, policy, rollout, conditions, scoring):
    """Yield for each micro-batch its tokens [r,T] and the policy's distribution, guided as in the loss."""
    for rows in torch.arange(len(rollout.prompt), device=rollout.prompt.device).split(cfg.micro_batch):
        yield rollout.actions[rows], policy.distribution(rollout, conditions, rows, **scoring)


@torch.no_grad()
def rescored(cfg, policy, rollout, conditions, scoring):
    """--score_cfg: the loss has another guidance than the sampler. Return the samples' log-probabilities
    [b,T] under the guidance of the loss, and the largest abs(pi_loss / pi_sampler - 1)."""
    logp = torch.cat([pi.log_prob(tokens) for tokens, pi in
                      distributions(cfg, policy, rollout, conditions, scoring)])
    return logp, ((logp - rollout.logp).exp() - 1).abs().max().item()


@torch.no_grad()
def token_weights(cfg, mine, pipeline, rollout, conditions, scoring):
    """--critical_tokens: return the weight of each token in the loss [b,T], with mean 1 over the step."""
    entropy = torch.cat([pi.entropy() for _, pi in distributions(
        cfg, pipeline.policy, rollout, conditions, scoring)])                                    # [b,T], nat
    picked = critical_tokens(*map(parallel.gather, (entropy, rollout.actions)), pipeline.codebook,
                             cfg.group_size, int(pipeline.tokens ** .5))                         # [B,T]
    return (picked / picked.float().mean())[mine]


# ---- the program -------------------------------------------------------------------------------------------
LOOPS = {"grpo": grpo_loop, "vapi": vapi.vapi_loop, "rejection": rejection.rejection_loop}


def main(argv):
    cfg, saved = open_run(evaluate.options, argv)           # evaluate.py says what a run consists of
    here = parallel.start(device.start(cfg.device))
    evaluate.check_shares(cfg, parallel.SIZE)
    world, pipeline = evaluate.open_world(cfg, here)
    if parallel.RANK == 0:
        print(f"options that differ from the defaults (all of them: {cfg.out_dir}/config.py):\n"
              f"{config.changed(cfg) or 'none'}")
    pipeline.policy.compile_step = getattr(cfg, "compile", False)
    prompts = world.fixed_prompts(cfg.eval_prompts)

    def evaluation(model, base):
        return evaluate.evaluate(world, pipeline, model, base, prompts=cfg.eval_prompts, draws=cfg.eval_draws,
                                 cfg_scale=getattr(cfg, "cfg_scale", 1.0), temperature=cfg.temperature)
    run = Run(cfg, saved, pipeline.policy, pipeline.reference, here, evaluation,
              lambda path, columns: world.picture(path, prompts, columns), pipeline.made_from)
    with run.rescue():
        LOOPS[cfg.algorithm](cfg, run, world, pipeline)
    if run.finish():
        report(cfg, run, world, pipeline, prompts)


def report(cfg, run, world, pipeline, prompts):
    """Write table.md, before_after.png and curves.png of a finished run, then print some of the table."""
    before, after = run.before.results, run.after.results
    best = f"best of {evaluate.BEST_OF} of the base", evaluate.best_of_n(before)
    rows = [("base", before), best, (cfg.out_dir, after)]
    with open(run.file("table.md"), "w", encoding="utf-8") as file:
        file.write(evaluate.table(rows, world.columns) + "\n")
    world.picture(run.file("before_after.png"), prompts, [
        ("base", run.before.images), (f"after {cfg.max_steps} steps, {cfg.algorithm}, {cfg.divergence}",
                                      run.after.images)])
    images.curves(run.metrics.lines, run.file("curves.png"), run.evaluations.lines,
                  trained="reconstruction" if world.images else "reward",
                  fifth="entropy" if pipeline.generates_actions else "outside_share")
    print(evaluate.table(rows, world.columns, evaluate.TERMINAL))
    kept = after.get("entropy_kept", math.nan)
    print(f"held-out reward {after['heldout_reward'] - before['heldout_reward']:+.2f}"
          + f", entropy kept {kept:.0%}" * (not math.isnan(kept))
          + f"; see table.md, before_after.png and curves.png in {cfg.out_dir}")


if __name__ == "__main__":
    config.run(main)
