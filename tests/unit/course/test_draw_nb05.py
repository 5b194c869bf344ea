"""The pictures of notebook 05: what their controls change, and what they state."""
import math

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from course.nb05 import draw
from qlora_lib.base.statistics import wilson
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

LONG = ["<s>", "Q", "u", "est", "ion", ":", "␣", "2", "+", "3", "?", "⏎", "Ans", "wer", ":", "⏎"]
SHORT = LONG[:5] + LONG[9:]
PADS = ["pad"] * (len(LONG) - len(SHORT))
ROWS = {"left": [PADS + SHORT, LONG], "right": [SHORT + PADS, LONG]}
WRITTEN = {"left": [list("12345678"), list("abcdefgh")], "right": [list("????????"), list("abc")]}
WIDTHS = {(b, size): {"gptq": (100 * b + k, 1000), "rtn": (90 * b + k, 1000)}
          for b in (8, 4, 3, 2) for k, size in enumerate(("a row", "64 weights"))}
PAIRS = {key: {"gptq": 40 - key[0], "rtn": 8 + len(key[1]), "p": 0.01 / key[0]} for key in WIDTHS}


def test_controls_of_padding():
    check_controls(draw.draw_padding, {"side": ["left", "right"], "new_tokens": [0, 4, 8]},
                   rows=ROWS, generated=WRITTEN)


def test_controls_of_interval():
    check_controls(draw.draw_interval,
                   {"n": [20, 200, 1319], "accuracy": [0.0, 0.35, 0.95]},
                   axes=(1, 2))


def test_controls_of_claim():
    check_controls(draw.draw_claim, {"points_better": [1, 3, 10], "accuracy": [0.15, 0.85]})


def test_controls_of_widths():
    check_controls(draw.draw_widths, {"bits": [8, 2],
                                      "one_scale_for": ["a row", "64 weights"]},
                   rows=WIDTHS, pairs=PAIRS, full=(950, 1000), axes=(1, 2))


@pytest.mark.parametrize("side, frames", [("left", [False, False]), ("right", [True, False])])
def test_a_row_that_ends_in_padding_is_framed_as_bad(side, frames):
    ax = Figure().subplots()
    draw.draw_padding(ax, side=side, new_tokens=8, rows=ROWS, generated=WRITTEN)
    thick = [p for p in ax.patches if p.get_linewidth() == 3]
    assert [to_hex(p.get_edgecolor()) == draw.BAD.lower() for p in thick] == frames


def test_the_interval_names_wilson_and_the_n_for_two_points():
    axes = Figure().subplots(1, 2)
    draw.draw_interval(axes, n=200, accuracy=0.35)
    low, high = wilson(70, 200)
    assert f"Wilson: {100 * low:.1f} to {100 * high:.1f}" in [t.get_text() for t in axes[0].texts]
    enough = int(axes[1].get_title().rpartition(" ")[2].replace(",", ""))
    ends = [wilson(round(0.35 * n), n) for n in (enough, enough - 40)]
    assert ends[0][1] - ends[0][0] < 0.0401 and ends[1][1] - ends[1][0] > 0.04


@pytest.mark.parametrize("p, n", [(0.0, 20), (0.35, 200), (0.73, 1319)])
def test_half_width_is_half_of_wilsons_interval(p, n):
    correct = round(p * n)
    low, high = wilson(correct, n)
    assert draw.half_width(correct / n, n) == pytest.approx((high - low) / 2)


def test_as_many_questions_as_a_claim_needs_find_it_four_times_out_of_five():
    p, d = 0.35, 0.05
    n = draw.questions_unpaired(p, d)
    error = math.sqrt((p * (1 - p) + (p + d) * (1 - p - d)) / n)
    assert (d / error - draw.Z) == pytest.approx(draw.POWER)

    share = 0.2
    n = draw.questions_paired(share, d)
    # discordant differences: mean d, variance share - d^2 under the claim, share without it
    assert math.sqrt(n) * d == pytest.approx(
        draw.Z * math.sqrt(share) + draw.POWER * math.sqrt(share - d * d))


@pytest.mark.parametrize("p, points, most", [(0.85, 10, 20), (0.85, 1, 29), (0.35, 2, 50)])
def test_the_curve_ends_where_two_models_differ_most(p, points, most):
    ax = Figure().subplots()
    draw.draw_claim(ax, points_better=points, accuracy=p)
    curve, square = ax.lines[1:3]
    assert curve.get_xdata()[[0, -1]] == pytest.approx([points, most])
    worse, better = p * 1000, (p + points / 100) * 1000  # as many questions as each has right
    both = max(0, worse + better - 1000)  # at least
    share = (worse + better - 2 * both) / 10
    assert min(50, share) == pytest.approx(most)
    own, theirs = p * (1 - p - points / 100), (p + points / 100) * (1 - p)
    assert square.get_xdata()[0] == pytest.approx(100 * (own + theirs))
    assert square.get_ydata()[0] == pytest.approx(
        draw.questions_unpaired(p, points / 100), rel=0.05)


def test_independent_models_gain_little_from_sharing_their_questions():
    p, d = 0.35, 0.02
    share = p * (1 - p - d) + (p + d) * (1 - p)
    assert draw.questions_paired(share, d) == pytest.approx(
        draw.questions_unpaired(p, d), rel=0.01)


def test_accuracies_of_0_and_1_have_intervals():
    both = {"strict": (0, 1000), "flexible": (1000, 1000)}
    ax = axes_of(draw.draw_rows, rows={"base": both, "LoRA": both})
    ends = [bars.get_segments()[0][:, 0] for c in ax.containers for bars in c.lines[2]]
    for found, correct in zip(ends, (0, 1000, 0, 1000), strict=True):
        assert found == pytest.approx([100 * x for x in wilson(correct, 1000)])
