"""The cells that notebook 02 draws are those of the three ways to round."""
import itertools

import pytest
import torch

from course.kit.picture import render
from course.nb02 import draw as d

pytestmark = pytest.mark.usefixtures("quick_pictures")

GRID = list(itertools.product([-0.6, 0.0, 0.6, 0.9], [1.0, 2.0], ["weight 0", "weight 1"]))


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


@pytest.mark.parametrize("correlation, size, first", GRID)
def test_every_weight_lies_in_the_cell_of_its_choice(correlation, size, first):
    h, first = hessian(correlation, size), int(first[-1])
    s, shapes = d.basis(h), d.cells(h, first)
    for weight in torch.rand(25, 2, generator=torch.Generator().manual_seed(0)):
        for name, choice in d.choices(weight, h, first).items():
            assert inside(shapes[name] + choice @ s, weight @ s), name


@pytest.mark.parametrize("correlation, size, first", GRID)
def test_cells_are_equally_large_and_the_best_one_is_the_roundest(correlation, size, first):
    h = hessian(correlation, size)
    shapes = d.cells(h, int(first[-1]))
    for polygon in shapes.values():  # a cell a lattice point, without gaps
        assert area(polygon) == pytest.approx(float(h.det().sqrt()), rel=1e-3)
    losses = {name: d.mean_loss(polygon) for name, polygon in shapes.items()}
    assert losses["best"] <= losses["gptq"] + 1e-5 and losses["gptq"] <= losses["rtn"] + 1e-5
    assert losses["rtn"] == pytest.approx(float(h.trace()) / 12, rel=1e-3)


def test_the_mean_loss_is_that_of_many_weights():
    h = hessian(0.6, 2.0)
    weights = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([d.choices(w, h, 0)["gptq"] for w in weights])
    measured = float(d.quadratic(weights - chosen, h).mean())
    assert measured == pytest.approx(d.mean_loss(d.cells(h, 0)["gptq"]), rel=0.05)  # sampling


@pytest.mark.parametrize("correlation, size", [(0.9, 0.5), (-0.6, 0.5), (0.0, 2.0)])
def test_the_cells_cover_the_picture(correlation, size):
    h = hessian(correlation, size)
    s, points = d.basis(h), d.in_view(d.basis(h))
    edge = torch.linspace(-d.VIEW, d.VIEW, 9)
    places = torch.cartesian_prod(edge, edge).unsqueeze(1) - points  # (81, points, 2)
    for polygon in d.cells(h, 0).values():
        assert inside(polygon, places).any(1).all()
    assert len(points) < 2 * (2 * d.VIEW + s.norm(dim=1).sum()) ** 2 / h.det().sqrt()


def test_cells_over_its_grid():
    weight = torch.tensor([0.4, 0.3])
    drawn = [setting for setting in GRID if setting[0] in (0.0, 0.9)]
    pictures = {render(d.draw_cells, [{"correlation": c, "input_1": size, "first": f,
                                       "weight": weight}], size=(6, 3), axes=(1, 3))
                for c, size, f in drawn}
    assert len(pictures) == len(drawn) - 2  # uncorrelated, all cells are boxes in either order
