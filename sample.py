"""Pictures for your own captions.

    python sample.py --ckpt=out/tiny_js --prompt="a red circle left of a blue square"
    python sample.py --prompt="three blue crosses; a circle and a square" --temperature=0.8

Here, unlike in training, the distribution may be cut (top_k, top_p), cooled, or guided: nothing is learned
from it. A frame is green where the exact reader finds what the caption says, red where not; captions
outside the world's grammar, but of its words, get no frame.
"""
import os
from dataclasses import dataclass
from typing import Literal

import checkpoint
import config
import evaluate
import pictures
import reward
import shapes
from config import UserError


@dataclass(frozen=True)
class Config:
    ckpt: str = "assets/tiny_base.pt"  # a run's folder, a checkpoint, or a base
    prompt: str = "a red circle left of a blue square"  # captions, with ; between them
    out: str = "out/sample.png"        # where the picture goes
    n: int = 8                         # pictures a caption
    seed: int = 0                      # of the samples
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, then mps, then cpu
    # ---- distribution
    temperature: float = 1.0           # 0 is greedy: the likeliest code each time, so n equal pictures
    cfg_scale: float = 1.0             # classifier-free guidance; 1 is none
    top_k: int = 0                     # only the k likeliest codes; 0 is all
    top_p: float = 1.0                 # only the fewest codes with this much probability; 1 is all


def main(argv):
    cfg, _ = config.load(Config, argv)
    if cfg.n < 1 or cfg.temperature < 0 or cfg.cfg_scale < 1 or cfg.top_k < 0 or not 0 < cfg.top_p <= 1:
        raise UserError("out of range: n >= 1, temperature >= 0, cfg_scale >= 1, top_k >= 0, 0 < top_p <= 1")
    device = config.pick_device(cfg.device)
    policy, vqgan, _, _ = checkpoint.load_models(config.locate(cfg.ckpt), device)
    captions = [c.strip() for c in cfg.prompt.split(";")]
    _, images = evaluate.draw(policy, vqgan, captions, cfg.n, seed=cfg.seed, temperature=cfg.temperature,
                              cfg_scale=cfg.cfg_scale, top_k=cfg.top_k, top_p=cfg.top_p)
    rows = [(c, [group], [reward.reader(group, [c] * cfg.n)] if c in shapes.CAPTIONS else None)
            for c, group in zip(captions, images.split(cfg.n))]
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    pictures.grid(rows, cfg.out)
    for caption, _, scores in rows:
        print(f"{caption}: "
              + (f"{scores[0].mean():.0%} right" if scores else "not of the grammar, so not judged"))
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    config.run(main)
