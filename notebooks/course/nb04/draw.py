"""What notebook 04 draws: the memory ledger, memory over a step, label masks, training."""
from collections.abc import Sequence

import numpy as np
from matplotlib.patches import Patch, Rectangle

from ..kit.picture import COLORS, PARTS, plain_ticks, smoothed

CARDS = (8, 24, 80)  # GiB of common GPUs
GIB = 2**30 / 1e9  # in GB
TOKEN_COLORS = {"prompt": "#E3E3E3", "learned": "#8CCFB9", "wrong": "#F2A97E", "pad": "#FFFFFF"}
MASKS = ("right", "padding counts", "every eos masked", "prompt counts")


def draw_ledger(ax, method: str, batch: int, tokens: int, checkpointing: bool,
                ledgers: dict[tuple, dict[str, int]]) -> None:
    """GB by part on a log scale, and their total beside the memory of common GPUs; the numbers
    stand in a column at the right.

    Dots: on a log scale the length of a bar says nothing.
    ledgers: {(method, batch, tokens, checkpointing): {part: bytes}}.
    """
    parts = ledgers[method, batch, tokens, checkpointing]
    sizes = {part: n / 1e9 for part, n in parts.items()} | {"total": sum(parts.values()) / 1e9}
    for y, (part, size) in enumerate(sizes.items()):
        said = f"{size:,.2f}" if size < 100 else f"{size:,.0f}"
        if size > 0:
            ax.plot(size, y, "o", markersize=9, color=PARTS.get(part, COLORS["fp"]))
        ax.text(0.99, y, said if size > 0 else "none", va="center", ha="right", fontsize=10,
                transform=ax.get_yaxis_transform(),
                color=COLORS["fp"] if size > 0 else COLORS["muted"],
                fontweight="bold" if part == "total" else None)
    for size in CARDS:
        ax.axvline(size * GIB, color=COLORS["muted"], linestyle=":", linewidth=1.5, zorder=0)
        ax.text(size * GIB, -0.8, f"{size}", ha="center", fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    ax.text(5, -0.8, "GPUs of GiB", ha="right", fontsize=10)
    ax.text(0.99, -0.8, "GB", ha="right", fontsize=10, transform=ax.get_yaxis_transform())
    ax.set(xscale="log", xlim=(0.05, 60_000), ylim=(len(sizes) - 0.4, -1.2), xlabel="GB",
           yticks=range(len(sizes)), yticklabels=list(sizes))
    plain_ticks(ax, [0.1, 1, 10, 100, 1000])


def draw_step(ax, weights: str, checkpointing: bool, batch: int,
              traces: dict[tuple, tuple[Sequence[int], int]]) -> None:
    """MB alive during a training step, operation by operation, on the scale of the highest.

    traces: {(weights, checkpointing, batch): (bytes alive after each operation, of which the
    first `forward` belong to the forward pass)}.
    """
    top = max(max(trace) for trace, _ in traces.values()) / 1e6
    trace, forward = traces[weights, checkpointing, batch]
    alive = np.asarray(trace) / 1e6
    x = np.linspace(0, 1, len(alive))
    ax.fill_between(x, alive, color=PARTS["activations"], alpha=0.3, linewidth=0)
    ax.plot(x, alive, color=PARTS["activations"])
    ax.axvline(forward / len(alive), color="black", linestyle=":", linewidth=1.3)
    ax.text(forward / len(alive), top * 1.16, "forward | backward", ha="center", fontsize=10)
    peak = int(alive.argmax())
    ax.plot(x[peak], alive[peak], "o", color=COLORS["qlora"])
    ax.text(x[peak], alive[peak] + top * 0.03, f"{alive[peak]:.1f} MB", ha="center",
            fontsize=11, fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    ax.set(xlim=(0, 1), ylim=(0, top * 1.25), xlabel="operations of one training step",
           ylabel="MB alive", xticks=[])


def draw_tokens(ax, example: int, mask: str, rows: list[list[tuple[str, str]]],
                width: float = 44) -> None:
    """One padded row of a batch, a cell a token, colored by what its label does.

    rows: for each example its tokens as (text, kind), kind prompt, target, eos or pad.
    mask: one of MASKS, the right labels or a typical mistake. width: of a line, in cells of
    a token with a single character.
    """
    height = max(_lay_out(row, width)[-1][1] for row in rows) + 1
    wrong = 0
    for (x, y, wide), (text, kind) in zip(_lay_out(rows[example], width), rows[example]):
        color = _token_color(kind, mask)
        wrong += color == "wrong"
        ax.add_patch(Rectangle((x + 0.06, y + 0.08), wide - 0.12, 0.84, linewidth=0.7,
                               facecolor=TOKEN_COLORS[color], edgecolor="#B5B5B5"))
        ax.text(x + wide / 2, y + 0.5, text, ha="center", va="center", fontsize=8,
                family="monospace", color=COLORS["muted"] if kind == "pad" else "black")
    ax.set(xlim=(0, width), ylim=(height + 0.1, -0.1), xticks=[], yticks=[])
    ax.set_title("all labels right" if mask == "right" else f"{mask}: {wrong} wrong labels")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    names = {"prompt": "prompt, -100", "learned": "learned", "pad": "padding, -100",
             "wrong": "wrong label"}
    ax.legend(handles=[Patch(facecolor=TOKEN_COLORS[k], edgecolor=COLORS["muted"], label=v)
                       for k, v in names.items()],
              loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=4, fontsize=10,
              handlelength=1.2, columnspacing=1.2)


def _lay_out(row: list[tuple[str, str]], width: float) -> list[tuple[float, int, float]]:
    """(x, line, width) of each token's cell; a line is full at `width`."""
    cells, x, line = [], 0.0, 0
    for text, _ in row:
        wide = 0.4 + 0.6 * max(1, len(text))
        if x + wide > width:
            x, line = 0.0, line + 1
        cells.append((x, line, wide))
        x += wide
    return cells


def _token_color(kind: str, mask: str) -> str:
    mistaken = {"padding counts": "pad", "every eos masked": "eos", "prompt counts": "prompt"}
    if kind == mistaken.get(mask):
        return "wrong"
    return {"prompt": "prompt", "pad": "pad"}.get(kind, "learned")


def draw_history(ax, losses: Sequence[float], dev: Sequence[tuple[int, float]],
                 window: int = 5, bottom: float = 0) -> None:
    """Training loss, each the mean of the last `window` steps, and dev loss where measured; the
    axis of losses begins at `bottom`."""
    ax.plot(range(1, len(losses) + 1), smoothed(losses, window), color=COLORS["qlora"],
            label=f"train, mean of {window} steps")
    if dev:
        steps, values = zip(*dev)
        ax.plot(steps, values, "o--", color=COLORS["fp"], label="dev")
        ax.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), (0, 10),
                    textcoords="offset points", ha="right", fontsize=11)
    ax.set(xlabel="step", ylabel="loss a learned token", ylim=(bottom, None),
           xlim=(0, len(losses) + 1))
    ax.legend(fontsize=11)
