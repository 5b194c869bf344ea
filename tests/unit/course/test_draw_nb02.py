"""The pictures of notebook 02: what their controls change, and what they state."""
import pytest
import torch

from course.nb02 import draw
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

WEIGHT = torch.tensor([1.4, 1.3])


# --- two weights ---------------------------------------------------------------------------

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


@pytest.mark.parametrize("first", ["weight 0", "weight 1"])
def test_one_ellipse_touches_the_line_where_the_arrow_ends(first):
    ax = axes_of(draw.draw_two_weights, correlation=0.83, first=first, weight=WEIGHT)
    h = 6 * torch.tensor([[1.0, 0.83], [0.83, 1.0]])
    moved = draw.two_weights(WEIGHT, h, int(first[-1]))["moved"]
    levels = ax.collections[1].levels  # after the gray ones
    assert levels == pytest.approx([float(draw.quadratic(moved - WEIGHT, h))])


def test_two_weights_by_hand():
    h = torch.tensor([[6.0, 5.0], [5.0, 6.0]])
    first = draw.two_weights(WEIGHT, h, 0)
    assert torch.allclose(first["moved"], torch.tensor([1.0, 1.3 + 5 / 6 * 0.4]))
    assert first["gptq"].tolist() == [1, 2] and first["rtn"].tolist() == [1, 1]
    assert draw.two_weights(WEIGHT, h, 1)["gptq"].tolist() == [2, 1]
    # Without correlation nothing moves.
    assert draw.two_weights(WEIGHT, torch.eye(2), 0)["moved"].tolist() == pytest.approx([1.0, 1.3])


# --- the loop, orders ---------------------------------------------------------------------

def test_controls_of_columns():
    weight = torch.linspace(-1, 1, 32).view(4, 8)
    history = torch.stack([weight + 0.01 * k for k in range(9)])
    losses = {"rtn": torch.arange(9.0), "gptq": torch.arange(9.0) / 2}
    check_controls(draw.draw_columns, {"columns_done": [0, 4, 8]}, history=history, weight=weight,
                   grid=weight.round(), losses=losses, axes=(2, 1))


def test_controls_of_orders():
    results = {(spread, bits): {"left to right": (0.4 + spread / 10, 0.4),
                                "largest first": (bits / 5, 0.5)}
               for spread in (0.0, 1.0) for bits in (2, 4)}
    check_controls(draw.draw_orders, {"spread": [0.0, 1.0], "bits": [2, 4]}, results=results)


# --- a whole model ------------------------------------------------------------------------

def test_the_ratios_of_layers_are_a_row_a_block_and_a_column_a_kind():
    ratios = {f"model.layers.{i}.mlp.{kind}_proj": 0.1 * i + 0.01 * k
              for i in range(2) for k, kind in enumerate(("gate", "up", "down"))}
    ax = axes_of(draw.draw_layer_ratios, ratios=ratios)
    assert [t.get_text() for t in ax.texts] == ["0.00", "0.01", "0.02", "0.10", "0.11", "0.12"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["gate", "up", "down"]


def test_losses_are_a_line_for_rows_and_open_squares_for_groups_with_intervals():
    added = {(b, None, m): (b / 10, 0.01 * b) for b in (2, 3, 4) for m in ("rtn", "gptq")}
    added |= {(2, 64, m): (0.1, 0.02) for m in ("rtn", "gptq")}
    ax = axes_of(draw.draw_losses, added=added)
    found = {bars.get_label(): bars.lines for bars in ax.containers}
    (line, _, (bars,)) = found["GPTQ a row"]
    assert (line.get_linestyle(), line.get_fillstyle()) == ("-", "full")
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([b / 10 - 0.01 * b, b / 10 + 0.01 * b]) for b in (2, 3, 4)]
    (line, _, (bars,)) = found["RTN in groups of 64"]
    assert (line.get_linestyle(), line.get_fillstyle()) == ("None", "none")
