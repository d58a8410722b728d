"""Image files of a run: a grid of samples under their prompts, and the curves of metrics.jsonl."""
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SCALE = 3                                  # a small image is enlarged by this factor
PAD, LINE = 4, 15                          # pixels: between two images, and the height of a line of text


def to_pil(image):
    """Convert an image [3,H,W] in [-1,1] to a Pillow image, rounded and clipped as in LlamaGen's sampler."""
    return Image.fromarray((127.5 * image.float() + 128).clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def grid(rows, path, headings=()):
    """Save one PNG with a row of images for each prompt.

    rows: (prompt, groups, rewards) for each row. groups is a list of images [N,3,H,W] in [-1,1], which stand
    side by side, each group under its heading. rewards is a list of [N], one per group, or None. Every image
    has a frame, green where its reward is above 1/2 and red elsewhere. Without rewards there are no frames.
    """
    font = ImageFont.load_default()
    side = rows[0][1][0].shape[-1] * (SCALE if rows[0][1][0].shape[-1] <= 64 else 1) + PAD
    widths = [len(group) * side + 3 * PAD for group in rows[0][1]]
    top = LINE if headings else 0
    canvas = Image.new("RGB", (sum(widths), top + len(rows) * (side + LINE)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, heading in enumerate(headings):
        draw.text((sum(widths[:i]) + PAD, 1), heading, "black", font)
    for r, (prompt, groups, rewards) in enumerate(rows):
        y = top + r * (side + LINE)
        draw.text((PAD, y), prompt, "black", font)
        for i, group in enumerate(groups):
            for j, image in enumerate(group):
                x = sum(widths[:i]) + j * side + PAD
                canvas.paste(to_pil(image).resize((side - PAD,) * 2, Image.NEAREST), (x, y + LINE - 1))
                if rewards is not None:
                    color = (30, 160, 60) if rewards[i][j] > .5 else (210, 50, 50)
                    draw.rectangle((x - 1, y + LINE - 2, x + side - PAD, y + LINE + side - PAD - 1),
                                   outline=color)
    canvas.save(path)


def pyplot():
    """Return matplotlib.pyplot with the Agg backend, which needs no screen.

    matplotlib is imported here, on first use, because importing it takes half a second.
    """
    os.environ["MPLBACKEND"] = "Agg"         # a bad value there would end the import, and so the run
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def curves(lines, path, evaluations=(), trained="reward", fifth="entropy"):
    """Save a PNG of eight small charts. docs/running.md says what each chart means.

    lines: metrics.jsonl as a list of dicts, one per step. evaluations: a list of dicts, one per evaluation on
    the fixed prompts. Dots in the first two charts show their values for the keys `trained` and
    heldout_reward. fifth: what the fifth chart shows. A flow policy has no token entropy, so there it is
    outside_share.
    """
    plt = pyplot()
    titles = {"entropy": "token entropy, nat", "outside_share": "share of ratios outside the clip"}
    charts = [("reward", ["reward"]), ("held-out reward", ["heldout_reward"]),
              ("diversity in a group", ["diversity"]),
              ("KL(policy || reference), nat per action", ["kl_reverse"]), (titles[fifth], [fifth]),
              ("groups without spread", ["zero_spread"]), ("gradient norm", ["grad_norm"]),
              ("seconds a step", ["t_sample", "t_reward", "t_update"])]
    charts = [(title, [k for k in keys if k in lines[0]]) for title, keys in charts]
    charts = charts[:2] + [(title, keys) for title, keys in charts[2:] if keys]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5), layout="constrained")
    for axis, (title, keys) in zip(axes.flat, charts):
        axis.set_title(title, fontsize=9)
        for key in keys:
            y = np.array([line[key] for line in lines], float)
            smooth = len(y) > 20
            (faint,) = axis.plot([line["step"] for line in lines], y, lw=.7, alpha=.35 if smooth else 1,
                                 label=None if smooth else key)
            if smooth:                           # the mean over about a tenth of the run
                k = max(2, len(y) // 10)
                mean = np.convolve(y, np.ones(k) / k, "valid")
                axis.plot(np.arange(len(mean)) + (k - 1) / 2, mean, color=faint.get_color(), label=key)
        if len(keys) > 1:
            axis.legend(fontsize=7, frameon=False)
    for axis in axes[1]:
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(charts):]:
        axis.axis("off")
    if evaluations:                              # these lack the noise that a step's own prompts bring
        for axis, key in ((axes[0, 0], trained), (axes[0, 1], "heldout_reward")):
            axis.plot([e["step"] for e in evaluations], [e[key] for e in evaluations], "k.",
                      label="evaluation")
            axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
