"""The pictures of notebook 09: what their controls change, and what they state."""
import itertools

import pytest
import torch

from course.nb02.draw import quadratic
from course.nb09 import draw
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

WAYS = list(itertools.product([-0.6, 0.0, 0.6, 0.9], [1.0, 2.0], ["weight 0", "weight 1"]))


# --- damping ------------------------------------------------------------------------------

def damping_data(dampings):
    keys = itertools.product([64, 2048], dampings, [False, True])
    results = {(tokens, damp, dead): (0.3, 0.5 + tokens / 1e4 + dead / 10) if damp else None
               for tokens, damp, dead in keys}
    spectra = {(tokens, dead): (torch.linspace(2, -1e-8 * dead, 16), torch.tensor(1.0))
               for tokens in (64, 2048) for dead in (False, True)}
    return {"results": results, "spectra": spectra}


def test_controls_of_damping():
    dampings = [0.01, 1.0, 0.0]
    check_controls(draw.draw_damping, {"tokens": [64, 2048], "damp_percent": dampings,
                                       "dead_column": [False, True]},
                   **damping_data(dampings), axes=(2, 1))


def test_a_damping_that_fails_is_said():
    titles = [axes_of(draw.draw_damping, (2,), tokens=64, damp_percent=damp, dead_column=False,
                      **damping_data([0.0, 0.01]))[1].get_title() for damp in (0.0, 0.01)]
    assert titles == ["not positive definite", "held-out error 0.51 of RTN's"]


def test_controls_of_foretold():
    curves = {(layer, n): ([2.0, 1 + len(layer) / 10], [3.0, n])
              for layer in ("q_proj", "o_proj", "up_proj", "down_proj") for n in (4, 96)}
    check_controls(draw.draw_foretold, {"questions": [4, 96]}, curves=curves,
                   dampings=[0.01, 0.1], axes=(2, 2))


# --- the cells of the lattice -------------------------------------------------------------

def hessian(correlation, size):
    return torch.tensor([[1.0, correlation * size], [correlation * size, size**2]])


def inside(polygon, point):
    """Whether a convex polygon (k, 2), corners in turn, holds each point (..., 2)."""
    point = point.unsqueeze(-2)  # (..., 1, 2)
    a, b = polygon - point, polygon.roll(-1, 0) - point
    cross = a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]
    return (cross > -1e-6).all(-1) | (cross < 1e-6).all(-1)  # two corners may coincide


def area(polygon):
    p, q = polygon, polygon.roll(-1, 0)
    return float((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum().abs() / 2)


@pytest.mark.parametrize("correlation, size, first", WAYS)
def test_every_weight_lies_in_the_cell_of_its_choice(correlation, size, first):
    h, first = hessian(correlation, size), int(first[-1])
    s, shapes = draw.basis(h), draw.cells(h, first)
    for weight in torch.rand(25, 2, generator=torch.Generator().manual_seed(0)):
        for name, choice in draw.choices(weight, h, first).items():
            assert inside(shapes[name] + choice @ s, weight @ s), name


@pytest.mark.parametrize("correlation, size, first", WAYS)
def test_cells_are_equally_large_and_the_best_one_is_the_roundest(correlation, size, first):
    h = hessian(correlation, size)
    shapes = draw.cells(h, int(first[-1]))
    for polygon in shapes.values():  # a cell a lattice point, without gaps
        assert area(polygon) == pytest.approx(float(h.det().sqrt()), rel=1e-3)
    losses = {name: draw.mean_loss(polygon) for name, polygon in shapes.items()}
    assert losses["best"] <= losses["gptq"] + 1e-5 and losses["gptq"] <= losses["rtn"] + 1e-5
    assert losses["rtn"] == pytest.approx(float(h.trace()) / 12, rel=1e-3)


def test_the_mean_loss_is_that_of_many_weights():
    h = hessian(0.6, 2.0)
    weights = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([draw.choices(w, h, 0)["gptq"] for w in weights])
    measured = float(quadratic(weights - chosen, h).mean())
    assert measured == pytest.approx(draw.mean_loss(draw.cells(h, 0)["gptq"]), rel=0.05)  # sampling


@pytest.mark.parametrize("correlation, size", [(0.9, 0.5), (-0.6, 0.5), (0.0, 2.0)])
def test_the_cells_cover_the_picture(correlation, size):
    h = hessian(correlation, size)
    s, points = draw.basis(h), draw.in_view(draw.basis(h))
    edge = torch.linspace(-draw.VIEW, draw.VIEW, 9)
    places = torch.cartesian_prod(edge, edge).unsqueeze(1) - points  # (81, points, 2)
    for polygon in draw.cells(h, 0).values():
        assert inside(polygon, places).any(1).all()
    assert len(points) < 2 * (2 * draw.VIEW + s.norm(dim=1).sum()) ** 2 / h.det().sqrt()


def test_controls_of_cells():
    check_controls(draw.draw_cells, {"correlation": [0.6, -0.6], "input_1": [2.0, 1.0],
                                     "first": ["weight 0", "weight 1"]},
                   weight=torch.tensor([0.4, 0.3]), axes=(1, 3))


# --- weighed columns, options -------------------------------------------------------------

def test_ratios_are_a_line_a_width():
    ax = axes_of(draw.draw_ratios, ratios={4: {0.0: 1.0, 2.0: 0.5}, 2: {0.0: 0.9, 2.0: 0.4}})
    lines = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert lines["4 bits"] == [1.0, 0.5] and lines["2 bits"] == [0.9, 0.4]


def test_options_are_a_row_each_and_the_first_is_marked():
    rows = {"GPTQ": (38.7, 5.5), "weighed": (37.3, 5.2)}
    left, right = axes_of(draw.draw_options, (2,), rows=rows, titles=("wiki", "solutions"))
    assert [t.get_text() for t in left.texts] == ["38.70", "37.30"]
    assert [t.get_text() for t in right.texts] == ["5.50", "5.20"]
    assert [t.get_text() for t in left.get_yticklabels()] == list(rows)
    for ax, first in ((left, 38.7), (right, 5.5)):
        assert list(ax.get_lines()[-1].get_xdata()) == [first, first]
        low, high = ax.get_xlim()
        assert low < min(ax.get_lines()[0].get_xdata()) < high
