"""Pictures of a run: grids of samples with their captions, the curves of metrics.jsonl, and films.

    python pictures.py out/tiny_none out/tiny_reverse_kl out/tiny_js      writes out/film.gif

shows the samples of several runs side by side while they train, so that one *sees* diversity go. A frame is
an evaluation, so make the runs with, say, --eval_interval=10.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont


SCALE, PAD, LINE = 3, 4, 15                # pixels: of one image pixel, between images, of a line of text
WIDEST = 1624                              # pixels: a film, which is shrunk to that


def to_pil(image):
    """image [3,H,W] in [-1,1], clipped to it -> Pillow image."""
    return Image.fromarray(((image.float().clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())


def grid(rows, path, headings=()):
    """Saves rows of (caption, groups, scores) as one PNG.

    groups: a list of images [N,3,H,W] in [-1,1], drawn side by side, each under its heading; scores: a list
    of [N] to match, or None. A frame is green where the score is above 1/2, else red; without scores there
    is none.
    """
    font = ImageFont.load_default()
    side = rows[0][1][0].shape[-1] * (SCALE if rows[0][1][0].shape[-1] <= 64 else 1) + PAD
    widths = [len(group) * side + 3 * PAD for group in rows[0][1]]
    top = LINE if headings else 0
    canvas = Image.new("RGB", (sum(widths), top + len(rows) * (side + LINE)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, heading in enumerate(headings):
        draw.text((sum(widths[:i]) + PAD, 1), heading, "black", font)
    for r, (caption, groups, scores) in enumerate(rows):
        y = top + r * (side + LINE)
        draw.text((PAD, y), caption, "black", font)
        for i, group in enumerate(groups):
            for j, image in enumerate(group):
                x = sum(widths[:i]) + j * side + PAD
                picture = to_pil(image).resize((side - PAD,) * 2, Image.NEAREST)
                canvas.paste(picture, (x, y + LINE - 1))
                if scores is not None:
                    colour = (30, 160, 60) if scores[i][j] > .5 else (210, 50, 50)
                    draw.rectangle((x - 1, y + LINE - 2, x + side - PAD, y + LINE + side - PAD - 1),
                                   outline=colour)
    canvas.save(path)


def curves(lines, path, evaluations=()):
    """metrics.jsonl as a list of dicts, one a step -> a PNG of eight small charts (README: their meaning)."""
    import matplotlib                            # here, not above: importing it takes half a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    charts = [("reward", ["reward"]), ("held-out reward", ["heldout_reward"]),
              ("diversity in a group", ["diversity"]),
              ("KL(policy || reference), nat per token", ["kl_reverse"]), ("token entropy, nat", ["entropy"]),
              ("groups without spread", ["zero_spread"]), ("gradient norm", ["grad_norm"]),
              ("seconds a step", ["t_sample", "t_reward", "t_update"])]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, charts):
        axis.set_title(title, fontsize=9)
        for key in keys:
            y = np.array([line[key] for line in lines], float)
            long = len(y) > 20
            (faint,) = axis.plot([line["step"] for line in lines], y, lw=.7, alpha=.35 if long else 1,
                                 label=None if long else key)
            if long:                             # mean over about a tenth of the run
                k = max(2, len(y) // 10)
                smooth = np.convolve(y, np.ones(k) / k, "valid")
                axis.plot(np.arange(len(smooth)) + (k - 1) / 2, smooth, color=faint.get_color(), label=key)
        if len(keys) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=8)
    for axis, key in ((axes[0, 0], "reward"), (axes[0, 1], "heldout_reward")):
        if evaluations:                          # the fixed prompts, apart from the noise of a step's own
            known = [e | {"reward": e.get("reconstruction", e["reward"])} for e in evaluations]   # of vapi.py
            axis.plot([e["step"] for e in known], [e[key] for e in known], "k.", label="evaluation")
            axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
