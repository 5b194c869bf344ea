"""What notebook 02 draws of GPTQ's geometry: the cells of three ways to round two weights.

The outputs of all whole-number weights form a lattice, and the loss of rounded weights is their
squared distance in it. Each way of rounding cuts the plane into cells of one shape, a cell a
lattice point: the outputs that are sent there.
"""
import itertools

import torch
from matplotlib.collections import PolyCollection
from matplotlib.patches import Polygon
from torch import Tensor

from .draw_gptq import quadratic, two_weights
from .plots import COLORS

NAMES = {"rtn": "RTN", "gptq": "GPTQ", "best": "best point"}
SHADES = {"rtn": COLORS["rtn"], "gptq": COLORS["gptq"], "best": COLORS["other"]}
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
    for ax, (name, label) in zip(axes, NAMES.items()):
        color = SHADES[name]
        corners = (shapes[name] + points.unsqueeze(1)).numpy()  # (points, k, 2)
        ax.add_collection(PolyCollection(corners, facecolor="none", edgecolor=color, lw=1.2))
        ax.add_patch(Polygon(shapes[name] + chosen[name] @ s, facecolor=color, alpha=0.45))
        for number, vector in enumerate(s):
            ax.annotate("", xy=vector.tolist(), xytext=(0, 0),
                        arrowprops={"arrowstyle": "->", "color": COLORS["muted"], "linewidth": 2})
            away = vector + 0.25 * torch.nn.functional.normalize(vector - s[1 - number], dim=0)
            ax.text(*away.tolist(), f"$b_{number}$", ha="center", va="center", fontsize=11,
                    bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.7})
        ax.scatter(*points.T, s=16, color=COLORS["fp"], zorder=3)
        ax.scatter(*star, s=110, marker="*", color=COLORS["fp"], zorder=4)
        loss = quadratic(chosen[name] - weight, h)
        ax.set(xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), xticks=[], yticks=[], aspect="equal",
               title=f"{label}: loss {loss:.2f},\nmean over a cell {mean_loss(shapes[name]):.3f}")
        ax.grid(False)
        ax.spines[:].set_visible(False)
