"""What notebook 02 draws: two weights and their lattice, the loop, damping, orders, models.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from matplotlib.collections import PolyCollection
from matplotlib.patches import Polygon, Rectangle
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
    axis = torch.linspace(-0.3, 3.3, 121)
    plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)  # (121, 121, 2)
    loss = quadratic(plane - weight, h)
    ax.contour(axis, axis, loss, levels=[0.3, 1, 2.5, 5, 9, 15], colors=MUTED, linewidths=1)
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


# The outputs of all whole-number weights form a lattice, and the loss of rounded weights is their
# squared distance in it. Each way of rounding cuts the plane into cells of one shape, a cell a
# lattice point: the outputs that are sent there.
WAYS = {"rtn": ("RTN", RTN), "gptq": ("GPTQ", GPTQ), "best": ("best point", OTHER)}
AROUND = torch.tensor(list(itertools.product(range(-4, 5), repeat=2))).float()  # (81, 2)
VIEW = 2.4  # what is drawn: coordinates from -VIEW to VIEW


def basis(h: Tensor) -> Tensor:
    """H's symmetric square root S (2, 2): w S are coordinates in which |w S|^2 = w H w^T."""
    values, vectors = torch.linalg.eigh(h)
    return vectors * values.sqrt() @ vectors.t()


def choices(weight: Tensor, h: Tensor, first: int) -> dict[str, Tensor]:
    """The whole numbers (2,) that each way picks for weight (2,), `first` rounded first."""
    best = quadratic(weight - weight.round() - AROUND, h).argmin()
    rounded = two_weights(weight, h, first)
    return {"rtn": rounded["rtn"], "gptq": rounded["gptq"], "best": weight.round() + AROUND[best]}


def cells(h: Tensor, first: int) -> dict[str, Tensor]:
    """Corners (k, 2) of the cell around 0 of each way, in the coordinates of `basis`.

    RTN: both weights within half a step, a parallelogram. GPTQ: the weight that is rounded
    last moves along its own basis vector, the first one in steps at right angles to it (what
    the other cannot imitate): a rectangle. Best: all that is closer to 0 than to any other point.
    """
    s, last = basis(h), 1 - first
    along = s[last]
    across = s[first] - (s[first] @ along) / (along @ along) * along
    signs = torch.tensor([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]) / 2  # (4, 2)
    box = 10 * signs
    for point in AROUND[AROUND.abs().sum(1) > 0] @ s:
        box = _clip(box, point)
    return {"rtn": signs @ s, "gptq": signs @ torch.stack([across, along]), "best": box}


def _clip(polygon: Tensor, point: Tensor) -> Tensor:
    """The part of a polygon (k, 2) that is closer to 0 than to the point (2,)."""
    beyond = polygon @ point - point @ point / 2  # > 0: closer to the point
    kept = []
    for a, b, da, db in zip(polygon, polygon.roll(-1, 0), beyond, beyond.roll(-1)):
        if da <= 0:
            kept.append(a)
        if (da < 0 < db) or (db < 0 < da):
            kept.append(a + (b - a) * da / (da - db))
    return torch.stack(kept)


def in_view(s: Tensor) -> Tensor:
    """The lattice points (points, 2) of the basis s (2, 2) whose cells reach into the picture."""
    reach = VIEW + s.norm(dim=1).sum() / 2  # half a cell's diagonal at most
    most = int(2**0.5 * reach / torch.linalg.svdvals(s)[-1]) + 1
    numbers = torch.cartesian_prod(*2 * [torch.arange(-most, most + 1)]).to(s)
    points = numbers @ s
    return points[(points.abs() <= reach).all(1)]


def mean_loss(polygon: Tensor) -> float:
    """Mean squared distance from 0 over a polygon (k, 2) that is convex around 0."""
    p, q = polygon, polygon.roll(-1, 0)
    areas = (p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).abs() / 2  # of the triangles 0, p, q
    moments = areas * ((p * p).sum(1) + (q * q).sum(1) + (p * q).sum(1)) / 6
    return float(moments.sum() / areas.sum())


def draw_cells(axes, correlation: float, input_1: float, first: str, weight: Tensor) -> None:
    """The cells of RTN, of GPTQ and of the best point around the lattice; axes (3,).

    input_1: size of input 1, input 0 being 1; first: "weight 0" or "weight 1"; weight: (2,),
    the star, whose cell is filled in each panel.
    """
    h = torch.tensor([[1.0, correlation * input_1], [correlation * input_1, input_1**2]])
    s, index = basis(h), int(first[-1])
    shapes, chosen, star = cells(h, index), choices(weight, h, index), weight @ basis(h)
    points = in_view(s)  # (points, 2)
    for ax, (name, (label, color)) in zip(axes, WAYS.items()):
        corners = (shapes[name] + points.unsqueeze(1)).numpy()  # (points, k, 2)
        ax.add_collection(PolyCollection(corners, facecolor="none", edgecolor=color, lw=1.2))
        ax.add_patch(Polygon(shapes[name] + chosen[name] @ s, facecolor=color, alpha=0.45))
        for number, vector in enumerate(s):
            ax.annotate("", xy=vector.tolist(), xytext=(0, 0),
                        arrowprops={"arrowstyle": "->", "color": MUTED, "linewidth": 2})
            away = vector + 0.25 * torch.nn.functional.normalize(vector - s[1 - number], dim=0)
            ax.text(*away.tolist(), f"$b_{number}$", ha="center", va="center", fontsize=11,
                    bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.7})
        ax.scatter(*points.T, s=16, color=FP, zorder=3)
        ax.scatter(*star, s=110, marker="*", color=FP, zorder=4)
        loss = quadratic(chosen[name] - weight, h)
        ax.set(xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), xticks=[], yticks=[], aspect="equal",
               title=f"{label}: loss {loss:.2f},\nmean over a cell {mean_loss(shapes[name]):.3f}")
        ax.grid(False)
        ax.spines[:].set_visible(False)


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


def draw_hessians(axes, hessians: dict[str, Tensor]) -> None:
    """Matrices (in, in) side by side on one scale of colors; axes (len(hessians),)."""
    top = max(float(h.abs().max()) for h in hessians.values())
    for ax, (title, h) in zip(axes, hessians.items()):
        matrix(ax, h, title=title, limits=(-top, top), fmt=".1f")


def draw_damping(axes, tokens: int, damp_percent: float, dead_column: bool, results: dict,
                 spectra: dict) -> None:
    """Top the spectrum of the damped Hessian, below the error over all dampings.

    results: {(tokens, damp_percent, dead_column): (error on the calibration tokens, on
    held-out ones) or None where the Cholesky factorization fails}, relative to RTN's
    held-out error; spectra: {(tokens, dead_column): (eigenvalues in descending order, mean
    of the diagonal)}.
    """
    values, mean = spectra[tokens, dead_column]
    ax, n = axes[0], len(values)
    floor = 1e-6
    ax.plot(range(1, n + 1), (values / mean).clamp(min=floor), color=MUTED, label="H")
    ax.plot(range(1, n + 1), (values / mean + damp_percent).clamp(min=floor), color=GPTQ,
            label="H, damped")
    ax.set(yscale="log", ylim=(floor, 50), xlim=(0, n + 1), xlabel="eigenvalue number",
           ylabel="relative size")
    ax.legend(loc="lower left", fontsize=10)
    ax = axes[1]
    dampings = sorted({damp for _, damp, _ in results})
    positions = {damp: k for k, damp in enumerate(dampings)}
    chosen = {d: results[tokens, d, dead_column] for d in dampings}
    worked = [d for d in dampings if chosen[d]]
    for k, (label, style) in enumerate((("calibration", "--"), ("held-out", "-"))):
        ax.plot([positions[d] for d in worked], [chosen[d][k] for d in worked],
                style, marker="o", markersize=4, color=GPTQ, label=label, linewidth=1.6)
    ax.axhline(1, color=RTN, linewidth=1.6)
    ax.text(len(dampings) - 0.7, 1.03, "RTN", color=RTN, ha="right")
    ax.axvline(positions[damp_percent], color=MUTED, linestyle=":")
    if chosen[damp_percent]:
        ax.plot(positions[damp_percent], chosen[damp_percent][1], "o", color=GPTQ, markersize=11)
        title = f"held-out error {chosen[damp_percent][1]:.2f} of RTN's"
    else:
        title = "not positive definite"
    ax.set(ylim=(0, 1.6), xlim=(-0.4, len(dampings) - 0.6), xlabel="damp_percent",
           ylabel="error / RTN's", title=title, xticks=range(len(dampings)),
           xticklabels=["0" if not d else f"1e{math.log10(d):.0f}" for d in dampings])
    ax.legend(loc="upper center", ncols=2, fontsize=10)


def draw_foretold(ax, layer: str, questions: int, curves: dict, dampings: Sequence[float]) -> None:
    """Loss over damping, foretold by a line and measured by dots, each over its least value.

    curves: {(layer, questions): (foretold, measured)}, each a loss for each of `dampings`.
    """
    foretold, measured = ([v / min(values) for v in values] for values in curves[layer, questions])
    places = range(len(dampings))
    ax.plot(places, foretold, color=GPTQ, label="foretold from halves")
    ax.plot(places, measured, "o", color=FP, label="measured, held-out")
    where = [dampings[values.index(min(values))] for values in (foretold, measured)]
    ax.set(ylim=(0.9, 2.7), xlim=(-0.4, len(dampings) - 0.6), xlabel="damp_percent",
           ylabel="loss / least loss", xticks=places,
           xticklabels=[f"{d:g}".lstrip("0") for d in dampings],
           title=f"least: {where[0]:g} foretold, {where[1]:g} measured")
    ax.legend(loc="upper center", fontsize=10)


def draw_orders(ax, spread: float, bits: int, results: dict) -> None:
    """A bar for each order of the columns, and what U alone predicted.

    results: {(spread, bits): {order: (held-out error relative to RTN's, predicted or None)}}.
    """
    rows = results[spread, bits]
    for k, (name, (error, predicted)) in enumerate(rows.items()):
        ax.barh(k, error, color=GPTQ, height=0.6)
        ax.text(0.02, k, f"{error:.2f}", va="center", color="white")
        if predicted:
            ax.plot([predicted] * 2, [k - 0.38, k + 0.38], color=FP, linewidth=2.5)
    ax.plot([], [], color=FP, linewidth=2.5, label="predicted from U alone")
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


def draw_layer_errors(axes, reports: dict[str, dict[str, float]]) -> None:
    """Output error of each layer: blocks down, kinds of layer across; axes (len(reports),).

    reports: {title: {path of the layer: relative output error}}.
    """
    top = max(max(r.values()) for r in reports.values())
    for ax, (title, errors) in zip(axes, reports.items()):
        kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in errors))
        rows = torch.tensor(list(errors.values())).view(-1, len(kinds))  # (blocks, kinds)
        matrix(ax, rows, title=title, limits=(0, top), fmt=".3f")
        ax.set_xticks(range(len(kinds)), [k.removesuffix("_proj") for k in kinds])
        ax.set_yticks(range(len(rows)), [f"block {i}" for i in range(len(rows))])
        ax.tick_params(length=0)


def draw_losses(ax, losses: dict[tuple[int, int | None, str], float], dense: float) -> None:
    """Held-out loss over bits: a line for one grid a row, squares for groups.

    losses: {(bits, group_size or None for a row, "rtn" or "gptq"): loss}; dense: the loss
    before quantizing.
    """
    for size in dict.fromkeys(s for _, s, _ in losses):
        style, label = ("s", f" in groups of {size}") if size else ("o-", " a row")
        for name in ("rtn", "gptq"):
            line = sorted((b, v) for (b, s, m), v in losses.items() if (s, m) == (size, name))
            ax.plot([b for b, _ in line], [v for _, v in line], style, color=COLORS[name],
                    fillstyle="none" if size else "full", label=name.upper() + label)
    ax.axhline(dense, color=FP, linewidth=1.4, linestyle="--", label="dense")
    ax.set(xlabel="bits", xticks=sorted({b for b, _, _ in losses}), ylabel="held-out loss")
    ax.invert_xaxis()
    ax.legend()
