"""A training run without its algorithm: optimizer, signals, clocks, log, evaluations and checkpoints.

What may happen to a run, and what is left:
  - killed (kill -9, power, out of memory): the last checkpoint remains, at least the checkpoint of step 0.
    --resume repeats the lost steps, bit for bit on a CPU.
  - Ctrl-C or SIGTERM (a cluster that wants its GPU back): the step is finished and saved first. A second
    signal ends the process at once, and the last checkpoint remains.
  - an error in a step (a reward that fails, a GPU without memory): the run is saved as it was before it.
  - a full disk: the checkpoint before remains, and one line says so.
  - a second process in the same folder: refused.
On a GPU, parallel threads add up in any order. So two runs with one seed differ in the last bits from the
first step on, and visibly after some dozens of steps. The same holds for a resumed run.
"""
import contextlib
import dataclasses
import math
import os
import random
import signal
import time
from typing import Literal

import torch
from tqdm import tqdm

from common import config, files, muon, parallel
from common.config import Fault, UserError, option
from common.folder import claim, resume_command

MAX_SKIPPED = 10                     # steps in a row without a finite gradient, after which a run gives up
SHOWN = {"reward": "r", "heldout_reward": "held", "kl_reverse": "kl"}             # beside the progress bar
BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"         # fits into 80 columns


@dataclasses.dataclass(frozen=True)
class Files:
    """---- files"""
    out_dir: str = option("out/tiny_js", "the run folder; a used one is refused", ending="")
    resume: bool = option(False, "resume the run in out_dir, with its own options")
    keep: int = option(0, "earlier checkpoints to keep beside ckpt.pt, as ckpt_STEP.pt", low=0)


@dataclasses.dataclass(frozen=True)
class Machine:
    """---- machine"""
    seed: int = option(0, "of prompts and samples", low=0)
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "auto: cuda, then mps, then cpu")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of matrix products; trained weights are fp32")
    recompute: bool = option(False, "keep no activations inside layers; saves memory, costs time")
    shard: bool = option(False, "with torchrun: each process holds a part of the weights (parallel.py)")


@dataclasses.dataclass(frozen=True)
class Length:
    """---- length"""
    max_steps: int = option(120, "number of steps; the schedules of learning rate and beta end there", low=1)
    stop_after: int = option(0, "save and stop this many steps after start or --resume; 0 = never", low=0)
    eval_interval: int = option(60, "steps between evaluations, sample images and checkpoints", low=1)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """---- optimizer"""
    learning_rate: float = option(1e-3, "highest rate of AdamW; configs of the 775M model set 1e-5", low=0)
    warmup: float = option(0.1, "share of max_steps with a rising rate", low=0, high=1)
    min_lr_ratio: float = option(0.1, "the cosine ends at this share of the peak", low=0, high=1)
    weight_decay: float = option(0.0, "of AdamW", low=0)
    muon_lr: float = option(0.0, "above 0: matrices inside the blocks get Muon, at this highest rate", low=0)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 = no clipping", low=0)

    def check(cfg):
        if cfg.muon_lr and cfg.shard:
            raise UserError("--muon_lr needs whole matrices, and --shard splits them: use one of them")


def schedule(kind, start, end, progress):
    """Return the value of a constant, linear or cosine schedule at `progress` in [0,1]."""
    if kind == "constant":
        return start
    share = progress if kind == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


def learning_rate(cfg, step, peak):
    """Warm up linearly over n steps, from 1/n of the peak to the peak, then follow a cosine down."""
    n = max(1, round(cfg.warmup * cfg.max_steps))
    if step < n:
        return peak * (step + 1) / n
    progress = (step - n) / max(1, cfg.max_steps - n)
    return peak * schedule("cosine", 1, cfg.min_lr_ratio, progress)


class Stop:
    """Note Ctrl-C or SIGTERM: `name` is then the name of the signal. A second signal ends the process."""

    def __init__(self):
        self.name = ""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if parallel.RANK == 0:
            tqdm.write(f"{self.name}: stopping after this step. A second signal ends the run at once.")


# ---- the run -----------------------------------------------------------------------------------------------
class Run:
    """The plumbing that training loops share. It computes no rewards and no losses. A loop looks like this:

        for step in run.steps():
            ...; run.phase("sample")                 # logs the seconds since the phase before, as t_sample
            loss.backward(); run.optimizer_step(step)
            run.log(step, {"reward": ...}, stats)    # also evaluates and saves when it is time

    cfg: options with the parts above, and those of the algorithm. saved: a checkpoint to resume from, or
    None. device: of this process. evaluate: a function (model, evaluation of the base or None) -> evaluation,
    an object with `results`, a dict of numbers, and `images`. picture: a function (path, [(heading, images),
    ...]) that writes an image file. made_from: {name: path} of the files of weights behind the run, which
    must stay what they are.
    """

    def __init__(self, cfg, saved, policy, reference, device, evaluate, picture, made_from={}):
        self.cfg, self.device, self.policy, self.reference = cfg, device, policy, reference
        self._evaluate, self._picture = evaluate, picture
        policy.eval()                          # no dropout: the loss must see the distribution that sampled
        policy.recompute = cfg.recompute
        self.made_from = {name: files.fingerprint(path) for name, path in made_from.items()}
        if saved:
            files.check_made_from(saved, made_from, self.file("ckpt.pt"))
            files.load_weights(policy, saved["model"], self.file("ckpt.pt"))
        if cfg.shard:
            parallel.shard(policy)
            parallel.shard(reference)
        matrices = muon.hidden_matrices(policy) if cfg.muon_lr else []
        inside = {id(p) for p in matrices}
        self.for_adamw = [p for p in policy.parameters() if id(p) not in inside]
        self.optimizers = {"optimizer": torch.optim.AdamW(         # {entry of the checkpoint: optimizer}
            self.for_adamw, cfg.learning_rate, betas=(.9, .95), weight_decay=cfg.weight_decay,
            fused=device.type == "cuda")} | ({"muon": muon.Muon(matrices, cfg.muon_lr)} if matrices else {})
        random.seed(cfg.seed)
        torch.manual_seed(cfg.seed)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)
        self.start, self.skipped = 0, 0             # skipped: steps in a row whose gradient was not finite
        self.whole = False                          # is the policy as it was after the last line of the log?
        self.memory = saved.get("memory", []) if saved else []      # a loop's data, saved with the policy
        if saved:
            self._resume(saved)
        self.done, self.stop, self.after = self.start, Stop(), None
        self.first = parallel.RANK == 0             # the process that writes and prints
        self.evaluates = self.first or cfg.shard    # every process helps to gather a sharded policy
        if self.first:
            self.lock = claim(cfg.out_dir)          # held until the process ends
            with open(self.file("config.py"), "w", encoding="utf-8") as file:
                file.write(config.show(cfg) + "\n")
        if self.evaluates:
            if not saved:
                self._save(0)
            self.before = self._assess(reference, 0)       # of the base, to compare with
        if self.first:
            self.metrics = files.Log(self.file("metrics.jsonl"), self.start)
            self.evaluations = files.Log(self.file("evaluations.jsonl"), self.start + 1)
            if not self.evaluations.lines:
                self.evaluations.write({"step": 0} | self.before.results)

    def file(self, name):
        return os.path.join(self.cfg.out_dir, name)

    def rows(self, total):
        """The rows of this process among `total` samples of a step -> indices, total / world size of them.
        If the total does not divide evenly, the first processes have one more."""
        return torch.arange(total, device=self.device).tensor_split(parallel.SIZE)[parallel.RANK]

    # ---- what a loop calls
    def steps(self):
        """Yield the numbers of steps until max_steps, stop_after, a signal, or too many bad steps."""
        cfg = self.cfg
        self.end = min(cfg.max_steps, self.start + (cfg.stop_after or cfg.max_steps))
        self.bar = tqdm(range(self.start, self.end), initial=self.start, total=cfg.max_steps,
                        disable=not self.first, dynamic_ncols=True, bar_format=BAR,
                        desc=f"{cfg.algorithm}, {cfg.divergence}")
        for step in self.bar:
            self.times, self.clock = {}, self._now()
            self.rng, self.whole = files.rng_state(self.generator), True
            yield step
            if self.stopping:
                break

    @contextlib.contextmanager
    def rescue(self):
        """Save the run if the body raises an exception in mid-step, and let the exception go on.

        The checkpoint is the run after its last whole step, unless the policy has changed since.
        """
        try:
            yield
        except Exception:
            # The other processes of a sharded policy do not come to help with saving it.
            if self.first and not self.cfg.shard and self.whole:
                self._save(self.done, self.rng)
                print(f"saved {self.file('ckpt.pt')} after step {self.done}; continue with "
                      f"`{resume_command(self.cfg)}`")
            raise

    def phase(self, name):
        """Note the seconds since the phase before, as t_NAME in the log."""
        now = self._now()
        self.times[f"t_{name}"], self.clock = round(now - self.clock, 4), now

    def optimizer_step(self, step):
        """Step on the gradients of all processes, clipped. The step is skipped if they are not finite."""
        parallel.add_gradients(self.policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.cfg.grad_clip or math.inf)
        norm = parallel.whole(norm)
        for name, optimizer in self.optimizers.items():
            peak = self.cfg.muon_lr if name == "muon" else self.cfg.learning_rate
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.cfg, step, peak)
            if norm.isfinite():
                self.whole = False                  # until the step has its line in the log
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if norm.isfinite() else self.skipped + 1
        self.grad_norm = norm.item()

    def log(self, step, line, stats):
        """Write a line of metrics.jsonl, and evaluate and save when it is time.

        line: values that are equal on all processes. stats: scalars of this process,
        which are summed over the processes. For names with max_, the largest value is kept.
        """
        # If any process was asked to stop, all processes stop: `combine` keeps the largest value.
        asked = torch.tensor(float(bool(self.stop.name)), device=self.device)
        stats = parallel.combine(stats | {"max_stop": asked})
        self.stopping = stats.pop("max_stop") > 0 or self.skipped == MAX_SKIPPED
        line = {"step": step, **line, **stats, "grad_norm": self.grad_norm,
                "learning_rate": self.optimizers["optimizer"].param_groups[0]["lr"]}
        if self.skipped:                            # say what was not finite
            line["skipped"] = "gradient" if math.isfinite(line.get("reward", 0)) else "reward"
        shown = SHOWN | ({"outside_share": "out"} if self.cfg.inner_epochs > 1 else {})     # else it is 0
        self.bar.set_postfix({short: f"{line[name]:.2f}" for name, short in shown.items() if name in line})
        self.done = step + 1
        due = self.done == self.cfg.max_steps or self.done % self.cfg.eval_interval == 0
        self.phase("log")
        if self.first:
            self.metrics.write(line | self.times)
            if step == self.start and self.device.type == "cuda":
                tqdm.write(f"peak memory of the first step: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
        self.rng, self.whole = files.rng_state(self.generator), True
        if due and self.evaluates:
            self._evaluate_policy()
        if self.evaluates and (due or self.stopping or self.done == self.end):
            self._save(self.done)

    def finish(self):
        """End the run -> True on rank 0 if it reached max_steps. Raises Fault for a signal or bad steps."""
        if self.start == self.end and self.evaluates:       # resumed at the very end
            self._evaluate_policy()
        parallel.stop()
        if not self.first:
            return False
        where = f"saved {self.file('ckpt.pt')} after step {self.done} of {self.cfg.max_steps}"
        bad = [line["skipped"] for line in self.metrics.lines if "skipped" in line]
        if bad:
            text = f"{len(bad)} of {self.done} steps were skipped, because their {bad[-1]} was not finite"
            if len(bad) == self.done or self.skipped == MAX_SKIPPED:
                raise Fault(f"{text}, the last {self.skipped} in a row; {where}")
            print(f"warning: {text}")
        if self.done == self.cfg.max_steps:
            return True
        print(f"{where}; continue with `{resume_command(self.cfg)}`")
        if self.stop.name:
            raise Fault(f"stopped by {self.stop.name}")
        return False

    # ---- inside
    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()           # GPU kernels run asynchronously: wait for them first
        return time.perf_counter()

    def _assess(self, model, step):
        """Evaluate a model, and write an image of its samples. The evaluation has its own random stream."""
        with parallel.gathered(self.policy, self.reference):
            found = self._evaluate(model, None if model is self.reference else self.before)
        if self.first:
            self._picture(self.file(f"samples_{step:05d}.png"), [(f"step {step}", found.images)])
        return found

    def _evaluate_policy(self):
        self.after = self._assess(self.policy, self.done)
        if self.first and self.evaluations.lines[-1]["step"] < self.done:
            self.evaluations.write({"step": self.done} | self.after.results)

    def _save(self, step, rng=None):
        state = {"model": parallel.whole(self.policy.state_dict()), "step": step,
                 "config": dataclasses.asdict(self.cfg), "made_from": self.made_from,
                 "rng": rng or files.rng_state(self.generator)}
        state |= {"memory": self.memory} if self.memory else {}
        state |= {name: parallel.whole(o.state_dict()) for name, o in self.optimizers.items()}
        path = self.file("ckpt.pt")
        try:
            if self.first:
                files.save(state, path, self.cfg.keep)
        except OSError as error:
            self.whole = False                      # `rescue` need not try again
            rest = "the one before remains" if os.path.exists(path) else "there is none before"
            raise Fault(f"could not write {path} ({error.strerror}); {rest}: make room, then continue with "
                        f"`{resume_command(self.cfg)}`") from None

    def _resume(self, saved):
        self.start = saved["step"]
        try:
            for name, optimizer in self.optimizers.items():
                # Muon's state is never split, because it is refused with --shard.
                optimizer.load_state_dict(parallel.split_state(saved[name], self.for_adamw))
            files.set_rng_state(saved["rng"], self.generator)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.file('ckpt.pt')} is no checkpoint of this version: "
                            f"{' '.join(str(error).split())[:200]}") from None
