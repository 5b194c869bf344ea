"""What notebook 11 draws: the best direction of an adapter, what each rank leaves, starts compared,
codes that move.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kit.picture import COLORS, PLAIN

FP, LORA, QLORA, MUTED = (COLORS[k] for k in ("fp", "lora", "qlora", "muted"))
BASES = {"RTN": COLORS["rtn"], "GPTQ": COLORS["gptq"]}
STARTS = {"zero": FP, "loftq": PLAIN[3], "pissa": PLAIN[4], "svd": PLAIN[1], "qera": PLAIN[2],
          "cloq": PLAIN[0]}  # an init, a color


def input_moments(correlation: float, input_1: float) -> Tensor:
    """H (2, 2) of two inputs, the first of size 1."""
    return torch.tensor([[1.0, correlation * input_1], [correlation * input_1, input_1**2]])


def left_along(lost: Tensor, h: Tensor, angles: Tensor) -> Tensor:
    """The share of the loss that is left by the best B, for A = (cos, sin) of each angle.

    With A = a the best B is D H a / (a H a), which takes |D H a|^2 / (a H a) off tr(D H D^T).
    """
    a = torch.stack([angles.cos(), angles.sin()])  # (2, angles)
    taken = (lost @ h @ a).square().sum(0) / ((h @ a) * a).sum(0)
    return 1 - taken / ((lost @ h) * lost).sum()


def draw_directions(axes, correlation: float, input_1: float, lost: Tensor) -> None:
    """Left the inputs and the two best directions of A, right what is left over A's angle; axes
    (2,). lost: D (2, 2)."""
    h, even = input_moments(correlation, input_1), torch.eye(2)
    angles = torch.linspace(-90, 90, 361)
    values = {"H = I": left_along(lost, even, angles.deg2rad()),
              "this H": left_along(lost, h, angles.deg2rad())}
    least = {name: int(v.argmin()) for name, v in values.items()}
    ax, turn = axes[0], torch.linspace(0, 2 * math.pi, 100)
    ellipse = torch.linalg.cholesky(h) @ torch.stack([turn.cos(), turn.sin()])  # (2, 100)
    ax.fill(*ellipse, color=MUTED, alpha=0.25)
    for (name, index), color in zip(least.items(), (MUTED, LORA)):
        x, y = (3.2 * f(angles[index].deg2rad()) for f in (torch.cos, torch.sin))
        ax.plot([-x, x], [-y, y], color=color, label=f"A, {name}")
    ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xlabel="input 0", ylabel="input 1", aspect="equal")
    ax.legend(loc="upper left", fontsize=10)
    ax = axes[1]
    for (name, v), color in zip(values.items(), (MUTED, LORA)):
        ax.plot(angles, v, color=color, label=f"loss with {name}")
    known, index = values["this H"], least["this H"]
    there = known[least["H = I"]]
    ax.plot(angles[least["H = I"]], there, "o", color=MUTED, markersize=9)
    ax.plot(angles[index], known[index], "o", color=LORA, markersize=9)
    ax.set(xlim=(-90, 90), ylim=(0, 1.4), xticks=[-90, -45, 0, 45, 90], xlabel="angle of A",
           yticks=[0, 0.5, 1], ylabel="share of the loss left",
           title=f"left: {there:.2f} with D's A, {known[index]:.2f} with D R's")
    ax.legend(loc="upper left", fontsize=10)


def draw_left(ax, layer: str, base: str, bits: int, curves: dict, ranks: Sequence[int]) -> None:
    """The share of the loss that is left over the rank, for the three starts.

    curves: {(layer, base, bits): {"svd", "qera", "cloq", "foretold": a share for each rank}}, all
    but the last on held-out tokens.
    """
    found, places = curves[layer, base, bits], range(len(ranks))
    for name in ("svd", "qera", "cloq"):
        ax.plot(places, found[name], "o-", color=STARTS[name], label=f"{name}, held-out")
    ax.plot(places, found["foretold"], "--", color=FP, linewidth=1.6, label="cloq, foretold")
    ax.set(ylim=(0, 1.05), xticks=places, xticklabels=ranks, xlabel="rank",
           ylabel="share of the loss left",
           title=f"{layer}, {base}: loss {found['loss']:.3f} of RTN's")
    ax.legend(loc="lower left", fontsize=10)


def draw_questions(axes, lines: dict, counts: Sequence[int]) -> None:
    """What is left over the number of calibration questions, on them and held-out; axes (2,), one
    a rank. lines: {rank: {label: (shares, "--" or "-", start)}}."""
    for ax, (rank, found) in zip(axes, lines.items()):
        for label, (shares, style, start) in found.items():
            ax.plot(range(len(counts)), shares, style, marker="o", color=STARTS[start], label=label)
        ax.set(ylim=(0, 1.05), xticks=range(len(counts)), xticklabels=counts, title=f"rank {rank}",
               xlabel="calibration questions")
    axes[0].set_ylabel("share of the loss left")
    axes[-1].legend(loc="lower right", fontsize=10)


def draw_starts(axes, base: str, rank: int, start: str, rows: dict, words: str,
                limits: tuple) -> None:
    """A row a start, the chosen one in its color: left how far the model has moved before any
    training, right a score before (a ring) and after (a dot a seed); axes (2,).

    rows: {(base, rank): {start: (KL in 1/1000 nat, score before, a score for each seed)}}; None
    and no score where nothing was measured. words, limits: of the score's axis.
    """
    found, (left, right) = rows[base, rank], axes
    for k, (name, (kl, before, after)) in enumerate(found.items()):
        color, front = (STARTS[name], 3) if name == start else (MUTED, 2)
        left.plot(kl, k, "o", color=color, markersize=9, zorder=front)
        if after:
            right.plot(after, [k] * len(after), "o", color=color, markersize=5, zorder=front)
            right.plot([sum(after) / len(after)] * 2, [k - 0.3, k + 0.3], color=color, zorder=front)
        if before is not None:
            right.plot(before, k, "o", color=color, markerfacecolor="white", markersize=9,
                       zorder=front)
    kl, before, after = found[start]
    told = [] if before is None else [f"{before:.3g} before"]
    told += [f"{sum(after) / len(after):.3g} after training"] if after else ["not trained"]
    left.axvline(found["zero"][0], color=FP, linewidth=1, linestyle=":")
    left.set(xscale="log", xlim=(0.05, 30), xlabel="KL in 1/1000 nat, before training",
             yticks=range(len(found)), yticklabels=list(found), xticks=[0.1, 1, 10],
             xticklabels=["0.1", "1", "10"], title=f"{start}: KL {kl:.2f}")
    right.set(xlim=limits, xlabel=words, yticks=range(len(found)), yticklabels=[""] * len(found),
              title=", ".join(told))
    for ax in axes:
        ax.set_ylim(len(found) - 0.4, -0.6)


def draw_codes(axes, update: float, bits: int, weights: Tensor, change: Tensor) -> None:
    """Left the weights on a grid, where an update would take them and where they land; right what
    rounding takes of updates of all sizes; axes (2,).

    update: its size in steps of the grid; weights (n,) in [0, 1] of the grid's range; change (n,),
    of mean square 1.
    """
    top = 2**bits - 1
    codes = (weights * top).round()
    wanted = codes + update * change
    new = wanted.round().clamp(0, top)
    ax, places = axes[0], torch.arange(len(codes)).float()
    for level in range(top + 1):
        ax.axhline(level, color="#E0E0E0", linewidth=1, zorder=0)
    ax.vlines(places, torch.minimum(codes, wanted), torch.maximum(codes, wanted), color=LORA,
              linewidth=3, label="update", zorder=3)
    ax.plot(places, codes, "o", color=MUTED, markersize=7, label="code")
    ax.plot(places, new, "s", color=QLORA, markersize=4, label="merged", zorder=4)
    ax.grid(False)
    ax.set(ylim=(-0.15 * top, 1.35 * top), xlabel="weight", ylabel="code", xticks=[],
           title=f"{int((new != codes).sum())} of {len(codes)} codes move")
    ax.legend(loc="upper center", fontsize=10, ncols=3, columnspacing=0.8, handletextpad=0.3)
    ax, sizes = axes[1], torch.logspace(-1.3, 1.0, 60)
    ax.plot(sizes, [lost_share(codes, size * change, top) for size in sizes], color=QLORA)
    here = lost_share(codes, update * change, top)
    ax.plot(update, here, "o", color=QLORA, markersize=10)
    ax.set(xscale="log", xlim=(0.05, 10), ylim=(0, 1.3), xticks=[0.1, 1, 10],
           xticklabels=["0.1", "1", "10"], xlabel="update, in steps", ylabel="share lost",
           title=f"rounding takes {here:.0%}")


def lost_share(codes: Tensor, change: Tensor, top: int) -> float:
    """|what the codes (n,) did not follow| / |change (n,)|."""
    new = (codes + change).round().clamp(0, top)
    return float((codes + change - new).norm() / change.norm())
