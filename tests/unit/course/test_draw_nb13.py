"""The pictures of notebook 13: what their controls change, and what they state."""

import pytest

from course.nb13 import draw
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

SIZES = [8, 64, 256]
ERRORS = {"round to nearest": dict.fromkeys(SIZES, 20.0), "faulty": dict(zip(SIZES, (24, 22, 11))),
          "mended": dict.fromkeys(SIZES, 11.0)}  # fmt: skip


def test_controls_of_blocks():
    check_controls(draw.draw_blocks, {"block": SIZES}, errors=ERRORS)


def test_controls_of_shares():
    check_controls(draw.draw_shares, {"short": [1, 8, 32]}, long=32)


def test_the_title_states_the_errors_of_the_block_size():
    ax = axes_of(draw.draw_blocks, block=64, errors=ERRORS)
    assert ax.get_title() == "round to nearest 20.0%, faulty 22.0%, mended 11.0%"


@pytest.mark.parametrize("short, said", [(32, "the same"), (4, "8 times"), (1, "32 times")])
def test_what_a_token_of_the_shorter_counts(short, said):
    ax = axes_of(draw.draw_shares, short=short, long=32)
    assert said in ax.get_title()
    mean_of_means, alike = (line.get_ydata() for line in ax.get_lines())
    assert short * mean_of_means[0] + 32 * mean_of_means[1] == pytest.approx(100)
    assert alike[0] == alike[1] == pytest.approx(100 / (short + 32))


@pytest.mark.parametrize("short, label", [(1, "the only token"), (4, "one of the 4 tokens")])
def test_which_token_of_the_shorter_one(short, label):
    ax = axes_of(draw.draw_shares, short=short, long=32)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [label, "one of the 32 tokens"]
