"""What notebook 02 draws: over the whole grid of each slider, and what the pictures claim."""
import itertools
from fractions import Fraction

import pytest
import torch

from course.kit.picture import render
from course.nb02 import draw as d

pytestmark = pytest.mark.usefixtures("quick_pictures")

WEIGHT = torch.tensor([1.4, 1.3])
DAMPS = [0.0, 0.01, 1.0]


def distinct(draw, settings, **more):
    """Draw every setting; how many of the pictures differ."""
    return len({render(draw, [s], size=(4, 4), **more) for s in settings})


def grid(**controls):
    return [dict(zip(controls, values)) for values in itertools.product(*controls.values())]


def test_two_weights_over_its_grid():
    settings = [s | {"weight": WEIGHT} for s in grid(
        correlation=[-0.8, -0.4, 0.0, 0.4, 0.83], first=["weight 0", "weight 1"])]
    assert distinct(d.draw_two_weights, settings) == len(settings)


@pytest.mark.parametrize("index", [0, 1])
def test_moved_is_the_least_loss_on_the_line(index):
    h = torch.tensor([[6.0, 5.0], [5.0, 6.0]])
    moved = d.two_weights(WEIGHT, h, index)["moved"]
    around = moved.repeat(101, 1)  # the rounded weight stays, the other is tried
    around[:, 1 - index] += torch.linspace(-1, 1, 101)
    losses = d.quadratic(around - WEIGHT, h)
    assert moved[index] == WEIGHT[index].round()
    assert losses.argmin() == 50


def test_two_weights_by_hand():
    h = torch.tensor([[6.0, 5.0], [5.0, 6.0]])
    first = d.two_weights(WEIGHT, h, 0)
    assert torch.allclose(first["moved"], torch.tensor([1.0, 1.3 + 5 / 6 * 0.4]))
    assert first["gptq"].tolist() == [1, 2] and first["rtn"].tolist() == [1, 1]
    assert d.two_weights(WEIGHT, h, 1)["gptq"].tolist() == [2, 1]
    # Without correlation nothing moves.
    assert d.two_weights(WEIGHT, torch.eye(2), 0)["moved"].tolist() == pytest.approx([1.0, 1.3])


def test_elimination_draws_every_step():
    steps = [[[Fraction(1, i + j + 1) for j in range(n)] for i in range(n)] for n in (4, 3, 2, 1)]
    assert distinct(d.draw_elimination, [{"steps": steps}], axes=(1, 4)) == 1


def test_columns_over_its_grid():
    weight = torch.linspace(-1, 1, 32).view(4, 8)
    history = torch.stack([weight + 0.01 * k for k in range(9)])
    losses = {"rtn": torch.arange(9.0), "gptq": torch.arange(9.0) / 2}
    settings = [{"columns_done": k, "history": history, "weight": weight, "grid": weight.round(),
                 "losses": losses} for k in range(9)]
    assert distinct(d.draw_columns, settings, axes=(2, 1)) == 9


def test_damping_over_its_grid_with_failures():
    controls = grid(tokens=[64, 2048], damp_percent=DAMPS, dead_column=[False, True])
    results = {(s["tokens"], s["damp_percent"], s["dead_column"]):
               None if s["damp_percent"] == 0 else (0.3, 0.5 + s["tokens"] / 1e4)
               for s in controls}
    spectra = {(t, dead): (torch.linspace(2, -1e-8 * dead, 16), torch.tensor(1.0))
               for t in (64, 2048) for dead in (False, True)}
    settings = [s | {"results": results, "spectra": spectra} for s in controls]
    # dead_column hardly shows in these made-up spectra; the other two controls must.
    assert distinct(d.draw_damping, settings, axes=(2, 1)) >= 6


def test_foretold_over_its_grid():
    controls = grid(layer=["q_proj", "down_proj"], questions=[4, 96])
    curves = {(s["layer"], s["questions"]): ([2.0, 1 + len(s["layer"]) / 10], [3.0, s["questions"]])
              for s in controls}
    settings = [s | {"curves": curves, "dampings": [0.01, 0.1]} for s in controls]
    assert distinct(d.draw_foretold, settings) == len(settings)


def test_orders_over_its_grid():
    controls = grid(spread=[0.0, 1.0], bits=[2, 4])
    results = {(s["spread"], s["bits"]):
               {"left to right": (0.4 + s["spread"] / 10, 0.4), "new groups": (s["bits"] / 5, None)}
               for s in controls}
    settings = [s | {"results": results} for s in controls]
    assert distinct(d.draw_orders, settings) == len(settings)


def test_figures_without_controls():
    hessians = {"a": torch.eye(8), "b": -torch.eye(8)}
    points = {b: {"rtn": (0.1 / b, 0.1), "gptq": (0.2 / b, 0.05)} for b in (4, 3, 2)}
    kinds = ("q_proj", "k_proj", "down_proj")
    report = {f"model.layers.{i}.x.{k}": 0.1 for i in range(2) for k in kinds}
    losses = {(b, s, m): 2.0 + 1 / b for b in (4, 3, 2) for s in (None, 64)
              for m in ("rtn", "gptq")}
    for draw, axes, values in (
            (d.draw_hessians, (1, 2), {"hessians": hessians}),
            (d.draw_plane, (1, 1), {"points": points}),
            (d.draw_layer_errors, (2, 1), {"reports": {"RTN": report, "GPTQ": report}}),
            (d.draw_losses, (1, 2), {"losses": losses, "dense": 2.0})):
        assert len(set(render(draw, [values], size=(7, 4), axes=axes))) > 2
