"""The pictures of notebook 02: what their controls change, and what they state."""
import itertools

import pytest
import torch

from course.nb02 import draw
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

WEIGHT = torch.tensor([1.4, 1.3])
WAYS = list(itertools.product([-0.6, 0.0, 0.6, 0.9], [1.0, 2.0], ["weight 0", "weight 1"]))


# --- two weights, and the cells of their lattice ------------------------------------------

def test_controls_of_two_weights():
    check_controls(draw.draw_two_weights, {"correlation": [0.83, -0.8, 0.0],
                                           "first": ["weight 0", "weight 1"]}, weight=WEIGHT)


@pytest.mark.parametrize("index", [0, 1])
def test_moved_is_the_least_loss_on_the_line(index):
    h = torch.tensor([[6.0, 5.0], [5.0, 6.0]])
    moved = draw.two_weights(WEIGHT, h, index)["moved"]
    around = moved.repeat(101, 1)  # the rounded weight stays, the other is tried
    around[:, 1 - index] += torch.linspace(-1, 1, 101)
    losses = draw.quadratic(around - WEIGHT, h)
    assert moved[index] == WEIGHT[index].round()
    assert losses.argmin() == 50


def test_two_weights_by_hand():
    h = torch.tensor([[6.0, 5.0], [5.0, 6.0]])
    first = draw.two_weights(WEIGHT, h, 0)
    assert torch.allclose(first["moved"], torch.tensor([1.0, 1.3 + 5 / 6 * 0.4]))
    assert first["gptq"].tolist() == [1, 2] and first["rtn"].tolist() == [1, 1]
    assert draw.two_weights(WEIGHT, h, 1)["gptq"].tolist() == [2, 1]
    # Without correlation nothing moves.
    assert draw.two_weights(WEIGHT, torch.eye(2), 0)["moved"].tolist() == pytest.approx([1.0, 1.3])


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
    measured = float(draw.quadratic(weights - chosen, h).mean())
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


# --- the loop, damping, orders ------------------------------------------------------------

def test_controls_of_columns():
    weight = torch.linspace(-1, 1, 32).view(4, 8)
    history = torch.stack([weight + 0.01 * k for k in range(9)])
    losses = {"rtn": torch.arange(9.0), "gptq": torch.arange(9.0) / 2}
    check_controls(draw.draw_columns, {"columns_done": [0, 4, 8]}, history=history, weight=weight,
                   grid=weight.round(), losses=losses, axes=(2, 1))


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
              for layer in ("q_proj", "down_proj") for n in (4, 96)}
    check_controls(draw.draw_foretold, {"layer": ["q_proj", "down_proj"], "questions": [4, 96]},
                   curves=curves, dampings=[0.01, 0.1])


def test_controls_of_orders():
    results = {(spread, bits): {"left to right": (0.4 + spread / 10, 0.4),
                                "new groups": (bits / 5, None)}
               for spread in (0.0, 1.0) for bits in (2, 4)}
    check_controls(draw.draw_orders, {"spread": [0.0, 1.0], "bits": [2, 4]}, results=results)


def test_losses_are_a_line_for_rows_and_open_squares_for_groups():
    losses = {(b, None, m): b / 10 for b in (2, 3, 4) for m in ("rtn", "gptq")}
    losses |= {(2, 64, m): 0.1 for m in ("rtn", "gptq")}
    lines = axes_of(draw.draw_losses, losses=losses, dense=0.05).get_lines()
    found = {line.get_label(): (line.get_linestyle(), line.get_fillstyle(), len(line.get_xdata()))
             for line in lines}
    assert found["GPTQ a row"] == ("-", "full", 3)
    assert found["RTN in groups of 64"] == ("None", "none", 1)
