"""The pictures of notebook 08: what their controls change, and what they state."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from course.nb08 import draw
from experiments.samples import METHODS
from tests.support.controls import check_controls
from tests.support.tensors import normal

pytestmark = pytest.mark.usefixtures("quick_pictures")

LOGITS = normal(40, std=2)
TOKENS = [chr(97 + i) for i in range(8)]
KS = [1, 2, 4, 8]
BY_TEMPERATURE = {t: {"best": [0.6 + 0.05 * i for i in range(4)],
                      "majority": [0.8 - t / 4 + 0.02 * i for i in range(4)],
                      "tokens": [100 * k for k in KS]} for t in (0.2, 1.0)}
BELOW = {0.2: (0.02, -0.01, 0.05), 1.0: (-0.15, -0.2, -0.1)}
COSTS = {"greedy": {1: 0.1}} | {
    m: {k: 0.1 * k * (1 + i % 2) for k in KS} for i, m in enumerate(METHODS[1:])}
COUNTS = {m: {k: (700 + 20 * i + 9 * k, 1000) for k in COSTS[m]} for i, m in enumerate(METHODS)}
GAPS = {k: {m: (0.01 * i + k / 100, 0.01 * i + k / 100 - 0.02, 0.01 * i + k / 100 + 0.03)
            for i, m in enumerate(METHODS[1:])} for k in KS}
BINS = [{"n": 9, "says": 0.2, "right": 0.5, "low": 0.3, "high": 0.6},
        {"n": 9, "says": 0.9, "right": 0.7, "low": 0.6, "high": 0.8}]


def test_controls_of_next_token():
    check_controls(draw.draw_next_token, {"temperature": [0.2, 1.0, 2.0], "top_p": [0.5, 1.0]},
                   logits=LOGITS, tokens=TOKENS)


def test_controls_of_temperature():
    check_controls(draw.draw_temperature, {"temperature": [0.2, 1.0]}, curves=BY_TEMPERATURE,
                   greedy=(0.77, 99.0), ks=KS, gaps=BELOW, axes=(1, 2))


def test_controls_of_compute():
    check_controls(draw.draw_compute, {"k": KS}, costs=COSTS, counts=COUNTS, gaps=GAPS,
                   axes=(1, 2))


def test_bars_of_tokens_that_are_cut_are_grey_and_say_so():
    ax = Figure().subplots()
    draw.draw_next_token(ax, temperature=1.0, top_p=0.5, logits=LOGITS, tokens=TOKENS)
    heights = [bar.get_height() for bar in ax.patches]
    texts = [t.get_text() for t in ax.texts]
    assert sum(heights) == pytest.approx(1) and texts.count("cut") == heights.count(0) > 0
    gray = [to_hex(bar.get_facecolor()) == draw.MUTED.lower() for bar in ax.patches]
    assert gray == [h == 0 for h in heights]


def test_without_top_p_every_token_is_possible_even_where_fp32_has_0():
    for top_p, possible in ((1.0, "40"), (0.9, "1")):
        ax = Figure().subplots()
        draw.draw_next_token(ax, temperature=0.01, top_p=top_p, logits=LOGITS, tokens=TOKENS)
        assert ax.get_title().startswith(f"{possible} tokens possible")
        texts = [t.get_text() for t in ax.texts]
        assert "<0.01" in texts if top_p == 1 else texts.count("cut") == len(TOKENS) - 1


def test_the_axis_says_what_k_samples_cost():
    axes = Figure().subplots(1, 2)
    draw.draw_temperature(axes, 0.2, curves=BY_TEMPERATURE, greedy=(0.77, 99.0), ks=KS, gaps=BELOW)
    labels = [t.get_text() for t in axes[0].get_xticklabels()]
    assert labels == ["1\n100", "2\n200", "4\n400", "8\n800"]
    assert axes[0].get_legend().get_texts()[0].get_text() == "greedy, 99 tokens"


def ends_of(ax, upright):
    """(low, point, high) of each error bar, along its own axis."""
    found = []
    for bar in ax.containers:
        (point,) = bar.lines[0].get_xydata()
        (segment,) = bar.lines[2][0].get_segments()
        along = 1 if upright else 0
        found.append((segment[0][along], point[along], segment[1][along]))
    return found


def test_differences_from_greedy_stand_with_their_intervals_at_every_temperature():
    axes = Figure().subplots(1, 2)
    draw.draw_temperature(axes, 1.0, curves=BY_TEMPERATURE, greedy=(0.77, 99.0), ks=KS, gaps=BELOW)
    assert ends_of(axes[1], True) == [pytest.approx((-1, 2, 5)), pytest.approx((-20, -15, -10))]
    assert axes[1].get_title().endswith("-15.0")


def test_the_point_at_k_lies_on_its_curve_and_its_price_beside_its_name():
    axes = Figure().subplots(1, 2)
    draw.draw_compute(axes, k=4, costs=COSTS, counts=COUNTS, gaps=GAPS)
    points = [bar.lines[0].get_xydata()[0].tolist() for bar in axes[0].containers]
    assert points == [pytest.approx([COSTS[m][k], 100 * COUNTS[m][k][0] / COUNTS[m][k][1]])
                      for m, k in zip(METHODS, (1, 4, 4, 4, 4, 4))]
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == [
        draw.METHODS[m][0] for m in METHODS]
    assert ends_of(axes[1], False)[0] == pytest.approx((2, 4, 7))
    names = [t.get_text() for t in axes[1].get_yticklabels()]
    assert names[:2] == ["majority, 4×", "likelihood, 8×"]


def test_an_honest_score_lies_on_the_diagonal():
    ax = Figure().subplots()
    draw.draw_reliability(ax, {"all": BINS, "chosen": BINS})
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [100, 100]]
    for bar in ax.containers:
        assert bar.lines[0].get_ydata().tolist() == pytest.approx([50, 70])
        low, high = zip(*(s[:, 1] for s in bar.lines[2][0].get_segments()))
        assert low == pytest.approx((30, 60)) and high == pytest.approx((60, 80))
