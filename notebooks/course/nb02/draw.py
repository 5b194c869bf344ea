"""What notebook 02 draws: two weights, the loop, orders of columns, layers, models.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
from collections.abc import Sequence
from fractions import Fraction

import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from ..kit.picture import COLORS, matrix

FP, RTN, GPTQ, MUTED, OTHER = (COLORS[k] for k in ("fp", "rtn", "gptq", "muted", "other"))


def two_weights(weight: Tensor, hessian: Tensor, first: int) -> dict[str, Tensor]:
    """What becomes of two weights on the grid of whole numbers, column `first` rounded first.

    weight (2,), hessian (2, 2) -> "rtn", "moved" (the first is rounded, the other has moved
    to its best place) and "gptq" (both rounded), each (2,).
    """
    other = 1 - first
    moved = weight.clone()
    moved[first] = weight[first].round()
    # d/dw_other of the loss is 0: H_oo (w_o - v_o) + H_of (w_f - v_f) = 0
    moved[other] += hessian[other, first] / hessian[other, other] * (weight - moved)[first]
    return {"rtn": weight.round(), "moved": moved, "gptq": moved.round()}


def quadratic(change: Tensor, hessian: Tensor) -> Tensor:
    """The loss d H d^T of each change d: (..., in) -> (...)."""
    return ((change @ hessian) * change).sum(-1)


def draw_two_weights(ax, correlation: float, first: str, weight: Tensor) -> None:
    """Ellipses of equal loss around two weights, what rounding does, what GPTQ does.

    weight: (2,) within 0..3; correlation of the two inputs, each of size 6 in H;
    first: "weight 0" or "weight 1", the one that is rounded first.
    """
    h = 6 * torch.tensor([[1.0, correlation], [correlation, 1.0]])
    index = int(first[-1])
    points = two_weights(weight, h, index)
    axis = torch.linspace(-0.3, 4.1, 147)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (147, 147, 2)
    loss = quadratic(plane - weight, h)
    ax.contour(axis, axis, loss, levels=[0.3, 1, 2.5, 5, 9, 15], colors=MUTED, linewidths=1)
    # The ellipse on which the arrow ends only touches the dotted line: no point of it is cheaper.
    ax.contour(axis, axis, loss, levels=[float(quadratic(points["moved"] - weight, h))],
               colors=GPTQ, linewidths=1.4)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ax.scatter(*grid.T, s=18, color=FP, zorder=3)
    line = ax.axhline if index else ax.axvline
    line(float(points["moved"][index]), color=GPTQ, linestyle=":", linewidth=1.6)
    ax.annotate("", xy=points["moved"].tolist(), xytext=weight.tolist(),
                arrowprops={"arrowstyle": "->", "color": GPTQ, "linewidth": 2.2})
    ax.annotate("", xy=points["gptq"].tolist(), xytext=points["moved"].tolist(),
                arrowprops={"arrowstyle": "->", "color": GPTQ, "linewidth": 2.2})
    ax.scatter(*weight, s=90, marker="*", color=FP, zorder=4)
    losses = {k: float(quadratic(points[k] - weight, h)) for k in ("rtn", "gptq")}
    for name, size in (("rtn", 260), ("gptq", 110)):
        label = f"{name.upper()}: loss {losses[name]:.1f}"
        ax.scatter(*points[name], s=size, facecolors="none", edgecolors=COLORS[name],
                   linewidths=3, zorder=5, label=label)
    ax.set(xlim=(-0.3, 3.3), ylim=(-0.3, 4.1), xlabel="weight 0", ylabel="weight 1",
           xticks=range(4), yticks=range(4))
    ax.grid(False)
    ax.legend(loc="upper right", fontsize=10, handletextpad=0.2, labelspacing=0.9)


def draw_elimination(axes, steps: Sequence[Sequence[Sequence[Fraction]]]) -> None:
    """The inverse Hessian after each removal of its first row and column, as fractions.

    axes (n,), one for each of the n matrices; a row that has gone is empty.
    """
    size = len(steps[0])
    for k, (ax, step) in enumerate(zip(axes, steps)):
        gone = size - len(step)
        for i in range(size):
            for j in range(size):
                here = i >= gone and j >= gone
                kept = here and i == gone  # the row that the loop reads
                ax.add_patch(Rectangle((j, i), 1, 1, edgecolor="white",
                                       facecolor=OTHER if kept else "#EEEEEE" if here else "white"))
                if here:
                    ax.text(j + 0.5, i + 0.5, str(step[i - gone][j - gone]), ha="center",
                            va="center", fontsize=10)
        ax.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[], aspect="equal",
               title=f"columns {k} to {size - 1}" if k < size - 1 else f"column {k}")
        ax.grid(False)
        ax.spines[:].set_visible(False)


def draw_columns(axes, columns_done: int, history: Tensor, weight: Tensor, grid: Tensor,
                 losses: dict[str, Tensor]) -> None:
    """Top how far each weight is from where it began, below the loss so far.

    history: (in + 1, out, in), the weights after 0, 1, ... columns; grid: the RTN weights
    (out, in); losses: {"rtn" or "gptq": (in + 1,)}.
    """
    done, (out, n) = columns_done, weight.shape
    change = history - weight
    top = float(torch.cat([change.flatten(), (grid - weight).flatten()]).abs().max())
    matrix(axes[0], change[done], limits=(-top, top), title="moved so far")
    if done:
        axes[0].add_patch(Rectangle((-0.5, -0.5), done, out, fill=False, edgecolor=FP,
                                    linewidth=2.5, clip_on=False))
    ax = axes[1]
    for name, color in (("rtn", RTN), ("gptq", GPTQ)):
        ax.plot(range(n + 1), losses[name], color=color, linewidth=1, alpha=0.4)
        ax.plot(range(done + 1), losses[name][:done + 1], "o-", color=color, markersize=5,
                label=f"{name.upper()} {float(losses[name][done]):.2f}")
    ax.set(xlim=(-0.3, n + 0.3), ylim=(0, 1.35 * max(float(v.max()) for v in losses.values())),
           xlabel="columns done", ylabel="loss", xticks=range(n + 1))
    ax.legend(loc="upper left", ncols=2)


def draw_orders(ax, spread: float, bits: int, results: dict) -> None:
    """A bar for each order of the columns, and what H alone predicted.

    results: {(spread, bits): {order: (held-out error relative to RTN's, predicted)}}.
    """
    rows = results[spread, bits]
    for k, (name, (error, predicted)) in enumerate(rows.items()):
        ax.barh(k, error, color=GPTQ, height=0.6)
        ax.text(0.02, k, f"{error:.2f}", va="center", color="white")
        ax.plot([predicted] * 2, [k - 0.38, k + 0.38], color=FP, linewidth=2.5)
    ax.plot([], [], color=FP, linewidth=2.5, label="predicted from H alone")
    ax.axvline(1, color=RTN, linewidth=1.6)
    ax.text(0.99, -0.6, "RTN", color=RTN, ha="right", va="center")
    ax.set(xlim=(0, 1.15), ylim=(len(rows) + 0.6, -0.9), yticks=range(len(rows)),
           yticklabels=list(rows), xlabel="held-out output error / RTN's")
    ax.legend(loc="lower left", fontsize=10)
    ax.grid(axis="y", visible=False)


def draw_plane(ax, points: dict[int, dict[str, tuple[float, float]]]) -> None:
    """From RTN to GPTQ in the plane of weight error and output error.

    points: {bits: {"rtn" or "gptq": (weight error, output error)}}, both relative.
    """
    for bits, pair in points.items():
        ax.annotate("", xy=pair["gptq"], xytext=pair["rtn"], arrowprops={
            "arrowstyle": "->", "color": MUTED, "linewidth": 1.6, "shrinkA": 6, "shrinkB": 6})
        for name in ("rtn", "gptq"):
            ax.plot(*pair[name], "o", color=COLORS[name], markersize=9)
        ax.annotate(f"{bits} bits", pair["rtn"], xytext=(-8, 6), textcoords="offset points",
                    ha="right")
    for name in ("rtn", "gptq"):
        ax.plot([], [], "o", color=COLORS[name], label=name.upper())
    ax.set(xscale="log", yscale="log", xlim=(0.04, 1), ylim=(0.02, 0.7),
           xlabel="weight error |W - Q| / |W|", ylabel="output error, held-out")
    ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    ax.minorticks_off()
    ax.legend(loc="lower right")


def draw_layer_ratios(ax, ratios: dict[str, float]) -> None:
    """GPTQ's output error over RTN's: blocks down, kinds of layer across.

    ratios: {path of the layer: ratio}.
    """
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in ratios))
    rows = torch.tensor(list(ratios.values())).view(-1, len(kinds))  # (blocks, kinds)
    matrix(ax, rows, limits=(0, 1), fmt=".2f", cmap="Blues_r")
    ax.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds])
    ax.set_yticks(range(len(rows)), [f"block {i}" for i in range(len(rows))])
    ax.tick_params(length=0)


def draw_losses(ax, added: dict[tuple[int, int | None, str], tuple[float, float]]) -> None:
    """Loss added to the dense model's over bits, with its 95% interval; squares for groups.

    added: {(bits, group_size or None for a row, "rtn" or "gptq"): (mean, two standard errors)}.
    """
    ways = list(dict.fromkeys((size, method) for _, size, method in added))
    for k, (size, method) in enumerate(ways):
        points = sorted((b, *v) for (b, *way), v in added.items() if tuple(way) == (size, method))
        place = [b + 0.05 * (k - (len(ways) - 1) / 2) for b, _, _ in points]
        ax.errorbar(place, [mean for _, mean, _ in points], [half for *_, half in points],
                    fmt="s" if size else "o-", fillstyle="none" if size else "full",
                    color=COLORS[method], capsize=4, linewidth=1.6,
                    label=method.upper() + (f" in groups of {size}" if size else " a row"))
    ax.axhline(0, color=FP, linewidth=1.4, linestyle="--", label="dense")
    ax.set(xlabel="bits", xticks=sorted({b for b, _, _ in added}), ylabel="loss added")
    ax.invert_xaxis()
    ax.legend(loc="upper left")
