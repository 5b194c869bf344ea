"""The pictures of notebook 05: what their controls change, and what they state."""
import math

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from course.nb05 import draw
from qlora_lib.base.statistics import mcnemar, wilson
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


def test_controls_of_power():
    check_controls(draw.draw_power, {"questions": [200, 1319], "points_better": [2, 10]},
                   accuracy=0.35)


def test_controls_of_widths():
    check_controls(draw.draw_widths, {"bits": [8, 2],
                                      "one_scale_for": ["a row", "64 weights"]},
                   rows=WIDTHS, pairs=PAIRS, full=(950, 1000), axes=(1, 3))


@pytest.mark.parametrize("side, frames", [("left", [False, False]), ("right", [True, False])])
def test_a_row_that_ends_in_padding_is_framed_as_bad(side, frames):
    ax = Figure().subplots()
    draw.draw_padding(ax, side=side, new_tokens=8, rows=ROWS, generated=WRITTEN)
    thick = [p for p in ax.patches if p.get_linewidth() == 3]
    assert [to_hex(p.get_edgecolor()) == draw.BAD.lower() for p in thick] == frames


def test_as_many_questions_as_a_claim_needs_find_it_four_times_out_of_five():
    p, d = 0.35, 0.05
    n = draw.questions_unpaired(p, d)
    error = math.sqrt((p * (1 - p) + (p + d) * (1 - p - d)) / n)
    assert (d / error - draw.Z) == pytest.approx(draw.POWER)
    assert draw.power_unpaired(round(n), p, d) == pytest.approx(0.8, abs=0.001)


def test_up_to_how_many_on_the_smaller_side_a_split_is_significant():
    for tosses, count in enumerate(draw._critical(120)):
        assert count < 0 or mcnemar(count, tosses - count) <= 0.05
        assert tosses < 2 * count + 2 or mcnemar(count + 1, tosses - count - 1) > 0.05


@pytest.mark.parametrize("n, share, d", [(30, 0.4, 0.2), (50, 0.15, 0.15), (40, 0.9, 0.1)])
def test_the_power_is_the_sum_over_all_counts_that_are_significant(n, share, d):
    better, worse = (share + d) / 2, (share - d) / 2
    power = sum(
        math.comb(n, b) * math.comb(n - b, c) * better**b * worse**c * (1 - share) ** (n - b - c)
        for b in range(n + 1) for c in range(n - b + 1) if c < b and mcnemar(b, c) <= 0.05)
    assert draw.power_paired(n, share, d) == pytest.approx(power, abs=1e-9)


def test_the_exact_power_of_two_points_on_gsm8k():
    assert draw.power_paired(1319, 0.067, 0.02) == pytest.approx(0.778, abs=0.0005)
    assert draw.power_paired(1319, 0.02, 0.02) == pytest.approx(1)


def test_accuracies_of_0_and_1_have_intervals():
    both = {"strict": (0, 1000), "flexible": (1000, 1000)}
    ax = axes_of(draw.draw_rows, rows={"base": both, "LoRA": both})
    ends = [bars.get_segments()[0][:, 0] for c in ax.containers for bars in c.lines[2]]
    for found, correct in zip(ends, (0, 1000, 0, 1000), strict=True):
        assert found == pytest.approx([100 * x for x in wilson(correct, 1000)])
