"""Every option of a training run, with its default and its comment, and what must not be asked for together.

    python train.py --help                      prints these lines
    python train.py configs/tiny_js.py          a config changes some, --key=value on the command line others

The defaults are those of the tiny world with JS. How files and command line are read, config.py says.
"""
from dataclasses import dataclass
from typing import Literal

from common import config
import reward
from common.config import UserError

BEST_OF = 8                             # the best of so many is what a run is held against (evaluate.py)


@dataclass(frozen=True)
class Config:
    # ---- files
    out_dir: str = "out/tiny_js"       # the run's folder; a used one is refused
    world: Literal["tiny", "llamagen", "janus"] = "tiny"  # whose models, captions and rewards: tiny.py ...
    init_from: str = "assets/tiny_base.pt"  # tiny: all models, made by pretrain.py; or a run
    algorithm: Literal["grpo", "vapi"] = "grpo"  # what is sampled and descended: grpo.py or vapi.py
    resume: bool = False               # go on with the run in out_dir, with its own options
    keep: int = 0                      # how many earlier checkpoints to keep beside ckpt.pt, as ckpt_STEP.pt
    # ---- files of world = "llamagen" or "janus", in the folder `weights`; fetched if they are not there
    weights: str = "weights"           # the folder
    gpt_ckpt: str = "t2i_XL_stage1_256.pt"  # policy and reference; janus: a folder with tokenizer and all
    vq_ckpt: str = "vq_ds16_t2i.pt"    # tokenizer
    t5: str = "flan-t5-xl"             # encoder of the captions
    n_head: int = 0                    # attention heads of gpt_ckpt; 0 = by the table of released sizes
    block_size: int = 0                # image tokens of gpt_ckpt; 0 = by its name: _256, _384 or _512 pixels
    prompts: str = "assets/prompts.txt"  # captions to train on: .txt, .json, .jsonl, .csv or .tsv
    antialias: bool = True             # of HPS's resize to 224 pixels; False = as torchvision before 0.17
    # ---- machine
    seed: int = 0                      # of prompts and samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of products; weights: fp32, or float64
    # ---- length
    max_steps: int = 120               # gradient-step batches; also fixes the schedules
    stop_after: int = 0                # save and leave after so many steps of a sitting; 0 = run to max_steps
    eval_interval: int = 60            # steps between evaluations, sample pictures and checkpoints
    eval_prompts: int = 3              # fixed prompts: tiny, of each category; llamagen, in all
    eval_draws: int = 96               # pictures of each, a multiple of 8; tiny, at least 64
    # ---- rollout
    prompts_per_step: int = 8          # captions a step
    group_size: int = 8                # G, pictures a caption
    sample_batch: int = 0              # pictures a process draws at once, at most; 0 = all; memory only
    temperature: float = 1.0           # of rollout, loss and reference alike, > 0
    cfg_scale: float = 1.0             # likewise; 1 = no guidance, which also halves the cost
    uncond_grad: bool = True           # with cfg_scale > 1: does the unconditional branch get a gradient?
    score_cfg: float = 0.0             # cfg_scale of the loss; 0 = the rollout's; 1: see janus.py, point 5
    top_k: int = 0                     # must stay 0: truncation belongs to sample.py
    top_p: float = 1.0                 # must stay 1, likewise
    # ---- reward
    reward: str = "judge"              # what grpo trains on; a weighted sum is "judge:1,reader:0.5"
    heldout_reward: str = "reader"     # what is only reported (for vapi, both are)
    # ---- algorithm = "vapi": learn from pictures
    data: str = ""                     # full size: a folder of pictures, or a list of them (data.py)
    wrong_captions: float = 0.2        # tiny: share of pictures with another's caption, as the base had it
    mse_weight: float = 1.0            # of the squared error in the distance to the picture
    perceptual_weight: float = 1.0     # of the perceptual distance, likewise; both 0: no policy term
    context_noise: float = 0.5         # xi, share of the tokens of the context that are random ones
    prior_weight: float = 0.1          # of the cross-entropy to the picture's own tokens (beta in the paper)
    prior_dropout: bool = False        # cross-entropy with dropout, at the price of another forward pass
    # ---- loss
    divergence: Literal["js", "forward_kl", "reverse_kl", "none"] = "js"  # to the reference (divergences.py)
    estimator: Literal["sampled", "unbiased", "exact"] = "sampled"  # "sampled" is the paper's
    beta: float = 0.4                  # strength; js needs 4 times as much as a KL for the same pull
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"  # beta to beta_end over max_steps
    beta_end: float = 0.0              # used by linear and cosine
    clip_eps: float = 0.2              # ratio is clipped to 1 +- this; binds from the second inner epoch on
    critical_tokens: bool = False      # average the loss over picked tokens only (critical.py)
    dynamic_weight: bool = False       # weight the advantage along the sequence (critical.py)
    inner_epochs: int = 1              # gradient steps on each batch of samples
    micro_batch: int = 64              # sequences a forward pass; changes memory, not the result
    chunk: int = 0                     # positions whose logits exist at once; 0 = all; memory, not the result
    shard: bool = False                # with torchrun: each process holds a share of weights (parallel.py)
    recompute: bool = False            # keep no activations inside layers; memory for time, not the result
    # ---- optimiser
    learning_rate: float = 1e-3        # peak of AdamW; the 775M model takes 1e-5
    warmup: float = 0.1                # share of max_steps with a rising rate
    min_lr_ratio: float = 0.1          # the cosine ends at this share of the peak
    weight_decay: float = 0.0          # of AdamW
    lora_rank: int = 0                 # > 0 trains adapters of this rank, not the weights (lora.py); not tiny
    grad_clip: float = 1.0             # largest norm of the gradient; 0 = no clipping


def check(cfg):
    """Refuses what types cannot: values out of range, and options that would train another policy than is
    sampled."""
    if cfg.top_k != 0 or cfg.top_p != 1:
        raise UserError("top_k and top_p cut the sampler's distribution, but the loss is that of the whole "
                        "one, so the samples would not be the policy's: leave them at 0 and 1 here, and "
                        "use them in sample.py")
    if cfg.shard and cfg.lora_rank:
        raise UserError("shard cuts up weights that lora_rank shares between policy and reference: take one")
    if 0 < cfg.score_cfg < 1:
        raise UserError(f"score_cfg must be at least 1, or 0, the rollout's, not {cfg.score_cfg}")
    least = dict(seed=0, max_steps=1, stop_after=0, eval_interval=1, eval_prompts=1, eval_draws=8, keep=0,
                 n_head=0, block_size=0, prompts_per_step=1, group_size=2, sample_batch=0, cfg_scale=1,
                 score_cfg=0, beta=0, beta_end=0, clip_eps=0, inner_epochs=1, micro_batch=1, chunk=0,
                 learning_rate=0, warmup=0, min_lr_ratio=0, weight_decay=0, grad_clip=0, lora_rank=0,
                 wrong_captions=0, mse_weight=0, perceptual_weight=0, context_noise=0, prior_weight=0)
    config.at_least(cfg, **least)
    config.named(cfg, out_dir="", init_from="", weights="", gpt_ckpt="", vq_ckpt="", t5="", prompts="")
    if cfg.temperature <= 0:
        raise UserError(f"temperature must be above 0, not {cfg.temperature}")
    for name in ("warmup", "min_lr_ratio", "wrong_captions", "context_noise"):
        if getattr(cfg, name) > 1:
            raise UserError(f"{name} is a share, at most 1, not {getattr(cfg, name)}")
    if cfg.algorithm == "vapi":
        usual = Config()
        for name in ("cfg_scale", "score_cfg", "critical_tokens", "dynamic_weight", "chunk", "sample_batch"):
            if getattr(cfg, name) != getattr(usual, name):
                raise UserError(f"{name} means nothing to vapi (its samples come from one pass, without "
                                f"guidance): leave it at {getattr(usual, name)}")
    if cfg.eval_draws % BEST_OF:
        raise UserError(f"eval_draws must be a multiple of {BEST_OF}, not {cfg.eval_draws}")
    if cfg.dynamic_weight and cfg.chunk:
        raise UserError("dynamic_weight needs all tokens of a sequence at once: leave chunk at 0")
    if set(reward.parse(cfg.heldout_reward, cfg.world)) & set(reward.parse(cfg.reward, cfg.world)):
        raise UserError(f"heldout_reward {cfg.heldout_reward!r} must not be trained on as well: "
                        f"reward is {cfg.reward!r}")
