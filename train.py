"""GRPO post-training of an autoregressive text-to-image policy, with a divergence to its reference.

    python train.py                                   the tiny world with JS, under 3 minutes on 2 CPU cores
    python train.py configs/tiny_none.py              the same without a divergence: watch the diversity go
    python train.py configs/tiny_js.py --beta=0.2 --seed=1 --out_dir=out/mine
    python train.py configs/tiny_js.py --resume       go on where the run in its out_dir stopped
    python train.py configs/llamagen_js.py            the 775M LlamaGen with real captions, on one GPU
    torchrun --nproc_per_node=8 train.py configs/llamagen_js.py             the same on eight (parallel.py)
    python train.py configs/tiny_vapi.py              another algorithm in the same loop (vapi.py)

Each step: sample G pictures for each of some captions, score them, turn scores into advantages within each
group, and take one gradient step on the GRPO loss (grpo.py) with a divergence to the frozen base
(divergences.py). Method: "Balancing Performance and Diversity in GRPO Autoregressive Text-to-Image
Post-Training", arXiv 2606.21498. What each phase does is in grpo.py, for VA-pi in vapi.py; when, is here.

The distribution that samples *is* the one that is trained: same temperature and same CFG scale in the
rollout, in the loss, and for the reference (but see --score_cfg). `max_ratio_error` in the log checks that at
every step. In the run folder you find metrics.jsonl (a line a step), evaluations.jsonl, samples_*.png,
ckpt.pt, and at the end before_after.png, curves.png and table.md. Models, captions and rewards are the
business of the *world*: tiny.py says what that is, llamagen.py is the one with released weights.

Options are in options.py, their defaults those of the tiny world; configs/llamagen_js.py has the paper's
recipe. Departures:
 1. Critical tokens and dynamic advantage weight, on in the paper's released script, are off (critical.py).
"""
import math
import os
import random
import time
from dataclasses import asdict

import torch

import metrics
from tqdm import tqdm

from common import files as checkpoint
from common import config
import evaluate
import grpo
from common import parallel
from common import images as pictures
from common import run as runs
import vapi
from common.config import Fault, UserError
from options import Config, check
from common.device import pick_device

ALGORITHMS = {"grpo": grpo, "vapi": vapi}       # files with the functions of the phases: sample, score ...
MOST_SKIPPED = 10                       # steps in a row without a finite gradient, after which a run gives up


def ramp(kind, start, end, progress):
    """A schedule's value at progress in [0,1]."""
    if kind == "constant":
        return start
    share = progress if kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


def learning_rate(cfg, step):
    """Linear warm-up from 1/n to 1 of the peak, then a cosine down to min_lr_ratio of it."""
    n = max(1, round(cfg.warmup * cfg.max_steps))
    if step < n:
        return cfg.learning_rate * (step + 1) / n
    return cfg.learning_rate * ramp("cosine", 1, cfg.min_lr_ratio, (step - n) / max(1, cfg.max_steps - n))


def main(argv):
    # ---- plumbing: everything that is made once ------------------------------------------------------------
    cfg, saved = runs.open_run(Config, check, argv)
    rank, size = parallel.RANK, parallel.SIZE
    device = parallel.start(pick_device(cfg.device))
    if cfg.prompts_per_step * cfg.group_size % size or grpo.share(cfg) % grpo.at_once(cfg):
        raise UserError(f"{cfg.prompts_per_step} prompts x {cfg.group_size} pictures cannot be shared out "
                        f"evenly to {size} processes, each drawing sample_batch = {cfg.sample_batch} at once")
    if rank == 0:
        print(config.show(cfg))
    world = evaluate.open_world(cfg, device)
    policy, reference = world.policy, world.reference
    policy.eval()                               # dropout off: the loss must see the distribution that sampled
    policy.recompute = cfg.recompute
    if saved:
        checkpoint.load_weights(policy, saved["model"], os.path.join(cfg.out_dir, "ckpt.pt"))
    if cfg.shard:
        parallel.shard(policy)
        parallel.shard(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), cfg.learning_rate, betas=(.9, .95),
                                  weight_decay=cfg.weight_decay, fused=device.type == "cuda")
    random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    generator = torch.Generator(device).manual_seed(cfg.seed)
    phases, (sampling, _) = ALGORITHMS[cfg.algorithm], grpo.distributions(cfg)
    takes_part = rank == 0 or cfg.shard         # in evaluations and saving: shares are put together by all
    asked_to_stop = runs.Stop()

    def file(name):
        return os.path.join(cfg.out_dir, name)

    def save(step):
        state = {"model": parallel.whole(policy.state_dict()), "step": step, "config": asdict(cfg),
                 "optimizer": parallel.whole(optimizer.state_dict()), "rng": checkpoint.rng_state(generator)}
        if rank == 0:
            runs.save(state, file("ckpt.pt"), cfg.keep)

    def tick():
        """Notes the time, of which a GPU has to be asked whether it is done: it works behind our back."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    def assess(model, step):
        """The evaluation of evaluate.py, logged, with a picture. Its random stream is its own."""
        with parallel.gathered(policy), parallel.gathered(reference):
            results, tokens, images = evaluate.evaluate(
                world, model, None if model is reference else before[1:], prompts=cfg.eval_prompts,
                draws=cfg.eval_draws, **sampling)
        if rank == 0:
            world.picture(file(f"samples_{step:05d}.png"), world.fixed_prompts(cfg.eval_prompts),
                          [("step %d" % step, images)])
        return {"step": step} | results, results, tokens, images

    start, skipped = 0, 0                       # skipped: steps in a row whose gradient was not finite
    if saved:
        start = saved["step"]
        try:
            optimizer.load_state_dict(parallel.shares(saved["optimizer"], policy.parameters()))
            checkpoint.set_rng_state(saved["rng"], generator)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{file('ckpt.pt')} is no checkpoint of this version: "
                            f"{' '.join(str(error).split())[:200]}") from None
    if rank == 0:
        lock = runs.claim(cfg.out_dir)          # held until the process ends
    if takes_part:
        if not saved:
            save(0)
        before = assess(reference, 0)           # the base, and what every later evaluation is compared with
    if rank == 0:
        log = checkpoint.Log(file("metrics.jsonl"), start)         # lines of steps that will be done again go
        evaluations = checkpoint.Log(file("evaluations.jsonl"), start + 1)
        if not evaluations.lines:
            evaluations.write(before[0])

    # ---- algorithm -----------------------------------------------------------------------------------------
    stop = min(cfg.max_steps, start + (cfg.stop_after or cfg.max_steps))
    bar = tqdm(range(start, stop), initial=start, total=cfg.max_steps, ncols=110, disable=rank > 0,
               desc=f"{cfg.algorithm}, {cfg.divergence}")
    for step in bar:
        clock = []
        tick()

        # 1. sample: G sequences of tokens for each caption. B = prompts * G in all, b = B / size here
        batch = phases.sample(cfg, world, generator)                                     # tokens [b,T]
        tick()

        # 2. reward: decode, then score with what is trained and with what is only watched
        with torch.no_grad():
            images = world.decode(batch.tokens)                                                  # [b,3,H,W]
            scores, heldout = phases.score(cfg, world, batch, images)                            # [B], [B]
            seen = parallel.gather(world.embed(images)).unflatten(0, (-1, cfg.group_size))
        tick()

        # 3. advantage: each picture against the others of its group
        adv, zero_spread, selected = phases.weigh(cfg, world, batch, scores)             # [B], number, [b,T]
        tick()

        # 4. update: gradient steps on the clipped objective, in micro-batches that add up to the same loss
        beta = ramp(cfg.beta_schedule, cfg.beta, cfg.beta_end, step / cfg.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        epochs = []                                 # statistics of each pass over the batch
        for _ in range(cfg.inner_epochs):
            epochs.append({})
            optimizer.zero_grad(set_to_none=True)
            for rows in grpo.pieces(cfg, batch):
                loss, stats = phases.loss_of(cfg, world, batch, rows, adv, selected, beta)
                loss.backward()
                grpo.accumulate(epochs[-1], stats)
            parallel.add_gradients(policy.parameters())
            grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(),
                                                                      cfg.grad_clip or math.inf))
            if grad_norm.isfinite():
                optimizer.step()
        skipped = 0 if grad_norm.isfinite() else skipped + 1
        tick()

        # 5. log: a line a step; now and then an evaluation, a picture, a checkpoint; all by process 0
        # Statistics are those of the first pass, of the policy that sampled; only the last can be clipped.
        stopping = torch.tensor(float(bool(asked_to_stop.name)), device=device)   # in any process
        update = parallel.combine(epochs[0] | {
            "clip_share": epochs[-1]["clip_share"], "max_stop": stopping,
            "max_ratio_error": epochs[0]["max_ratio_error"].maximum(batch.mismatch)})
        leave = update.pop("max_stop") > 0 or skipped == MOST_SKIPPED
        line = {"step": step, "reward": scores.mean().item(), "heldout_reward": heldout.mean().item(),
                "reward_std": scores.view(-1, cfg.group_size).std(1).mean().item(),
                "zero_spread": zero_spread, "diversity": metrics.pairwise(seen), **update,
                "grad_norm": grad_norm.item(), "beta": beta, "learning_rate": optimizer.param_groups[0]["lr"]}
        if skipped:
            line["skipped"] = "gradient" if scores.isfinite().all() else "reward"      # what was not finite
        bar.set_postfix(reward=f"{line['reward']:.2f}", heldout=f"{line['heldout_reward']:.2f}",
                        diversity=f"{line['diversity']:.2f}", kl=f"{line['kl_reverse']:.3f}")
        done, last = step + 1, step + 1 == cfg.max_steps
        if takes_part and (last or done % cfg.eval_interval == 0):
            after = assess(policy, done)
            if rank == 0:
                evaluations.write(after[0])
        times = ("t_sample", "t_reward", "t_advantage", "t_update", "t_log")
        tick()
        if rank == 0:
            log.write(line | {name: round(b - a, 4) for name, a, b in zip(times, clock, clock[1:])})
        if takes_part and (last or leave or done == stop or done % cfg.eval_interval == 0):
            save(done)
        if leave:
            break

    # ---- what came of it -----------------------------------------------------------------------------------
    if start == stop and takes_part:            # resumed at the very end: only the pictures were missing
        after = assess(policy, stop)
    parallel.stop()
    if rank:
        return
    if start < stop and done < cfg.max_steps:
        where = f"saved {file('ckpt.pt')} after step {done} of {cfg.max_steps}"
        if skipped == MOST_SKIPPED:
            raise Fault(f"the last {skipped} steps had a {line['skipped']} that is not finite; {where}")
        print(f"{where}; go on with --resume")
        if asked_to_stop.name:
            raise Fault(f"stopped by {asked_to_stop.name}")
        return
    world.picture(file("before_after.png"), world.fixed_prompts(cfg.eval_prompts),
                  [("base", before[3]), (f"after {stop} steps, {cfg.algorithm}, {cfg.divergence}", after[3])])
    pictures.curves(log.lines, file("curves.png"), evaluations.lines)
    rows = [("base", before[0]), ("best of 8 of the base", evaluate.best_of_n(before[0])),
            (cfg.out_dir, after[0])]
    print(report := evaluate.table(rows, world.columns))
    with open(file("table.md"), "w", encoding="utf-8") as f:
        f.write(report + "\n")
    kept = after[0].get("entropy_kept", math.nan)
    print(f"held-out reward {after[0]['heldout_reward'] - before[0]['heldout_reward']:+.2f}"
          + f", open-attribute entropy kept {kept:.0%}" * math.isfinite(kept) + "; "
          f"see {file('before_after.png')} and {file('curves.png')}")


if __name__ == "__main__":
    config.run(main)
