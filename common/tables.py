"""Tables of evaluations, as text: for the terminal and for Markdown files."""
import itertools
import math

import torch

COLUMNS = ["reward", "heldout_reward", "pairwise", "vendi", "token_entropy", "kl_reverse", "kl_forward"]
BRIEF = ["reward", "heldout_reward", "entropy_kept", "reconstruction", "vendi", "kl_reverse"]
TERMINAL = 100                  # characters of a line


def table(rows, more=(), width=math.inf):
    """Turn [(name, results or a list of results)] into the text of a table. more: a world's own columns.

    A cell of several results shows their mean ± standard deviation. A cell without a number shows "-".
    width: show only columns of BRIEF that fit into this many characters, and shorten long names.
    """
    def cell(results, key):
        values = torch.tensor([r.get(key, math.nan) for r in results], dtype=torch.float64)
        if values.isnan().any():
            return "-"
        return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")
    rows = [(name, r if isinstance(r, list) else [r]) for name, r in rows]
    columns = COLUMNS[:2] + list(more) + COLUMNS[2:]
    if width < math.inf:
        columns = [key for key in BRIEF if key in columns]
        rows = [(name if len(name) <= 34 else name[:15] + "..." + name[-16:], r) for name, r in rows]
    body = [["run"] + columns] + [[name] + [cell(r, key) for key in columns] for name, r in rows]
    widths = [max(map(len, column)) for column in zip(*body)]
    fitting = sum(end < width for end in itertools.accumulate(w + 3 for w in widths))
    body.insert(1, ["-" * w for w in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line[:fitting], widths)) + " |"
                     for line in body)


def best_of_n(base):
    """Return the table row of best-of-N, from the base's own results."""
    return {"reward": base["best_of_n_reward"], "heldout_reward": base["best_of_n_heldout_reward"]}
