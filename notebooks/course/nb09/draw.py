"""What notebook 09 draws: damping, the lattice of outputs and its cells, weighed columns, options.

Pure functions of their arguments (see `course/kit/picture.py`), with fixed axes so that the
settings of a slider compare.
"""
import itertools
import math
from collections.abc import Sequence

import torch
from matplotlib.collections import PolyCollection
from matplotlib.patches import Polygon
from torch import Tensor

from ..kit.picture import COLORS, PLAIN
from ..nb02.draw import quadratic, two_weights

FP, RTN, GPTQ, MUTED, OTHER = (COLORS[k] for k in ("fp", "rtn", "gptq", "muted", "other"))


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


def draw_foretold(axes, questions: int, curves: dict, dampings: Sequence[float]) -> None:
    """Loss over damping, foretold by a line and measured by dots, each over its least value; a
    panel a layer, axes (layers,).

    curves: {(layer, questions): (foretold, measured)}, each a loss for each of `dampings`.
    """
    layers = list(dict.fromkeys(layer for layer, _ in curves))
    places = range(len(dampings))
    for ax, layer in zip(axes.flat, layers):
        foretold, measured = ([v / min(values) for v in values]
                              for values in curves[layer, questions])
        ax.plot(places, foretold, color=GPTQ, label="foretold from halves")
        ax.plot(places, measured, "o", color=FP, label="measured, held-out")
        where = [dampings[values.index(min(values))] for values in (foretold, measured)]
        ax.set(ylim=(0.95, 2.3), xlim=(-0.4, len(dampings) - 0.6), xticks=places,
               xticklabels=[f"{d:g}".lstrip("0") for d in dampings],
               title=f"{layer}: least {where[0]:g}, {where[1]:g}")
    for ax in axes[-1]:
        ax.set_xlabel("damp_percent")
    for ax in axes[:, 0]:
        ax.set_ylabel("loss / least loss")
    axes.flat[0].legend(loc="upper center", fontsize=10)


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
               xlabel=f"{label}: loss {loss:.2f},\nmean over a cell {mean_loss(shapes[name]):.3f}")
        ax.grid(False)
        ax.spines[:].set_visible(False)


def draw_ratios(ax, ratios: dict[int, dict[float, float]]) -> None:
    """Error with weighed columns over that without, along the spread of the channels.

    ratios: {bits: {spread: ratio}}.
    """
    for (bits, row), color in zip(ratios.items(), PLAIN):
        ax.plot(list(row), list(row.values()), "o-", color=color, label=f"{bits} bits")
    ax.axhline(1, color=MUTED, linewidth=1.4)
    ax.set(ylim=(0, 1.1), xlabel="spread of the channels", ylabel="weighed / not weighed")
    ax.legend(loc="lower left")


def draw_options(axes, rows: dict[str, tuple[float, float]], titles: Sequence[str]) -> None:
    """Perplexities, a dot a row; a dashed line at the first row. axes (2,), one a text.

    rows: {label: (perplexity of the first text, of the second)}.
    """
    for column, (ax, title) in enumerate(zip(axes, titles)):
        values = [row[column] for row in rows.values()]
        for k, value in enumerate(values):
            ax.plot(value, k, "o", color=GPTQ, markersize=8)
            ax.annotate(f"{value:.2f}", (value, k), xytext=(8, 0), textcoords="offset points",
                        va="center", fontsize=10,
                        bbox={"boxstyle": "round,pad=0.1", "color": "white"})
        ax.axvline(values[0], color=MUTED, linestyle="--", linewidth=1.4)
        room = 0.15 * (max(values) - min(values))
        ax.set(yticks=range(len(rows)), yticklabels=list(rows) if column == 0 else [],
               ylim=(len(rows) - 0.5, -0.5), xlim=(min(values) - room, max(values) + 3 * room),
               title=title, xlabel="perplexity")
