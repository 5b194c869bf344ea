"""The pictures of notebook 08: what their controls change, and what they state."""

import pytest
import torch
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
SAMPLES = {0.2: ["5", "5", "5", "4"], 1.0: ["4", "5", "5", None]}
CURVES = {"greedy": {1: (0.1, 0.75)}} | {
    m: {k: (0.1 * k * (1 + i % 2), 0.7 + 0.02 * k + 0.01 * i) for k in KS}
    for i, m in enumerate(METHODS[1:])}
COUNTS = {k: {m: (700 + 20 * i + k, 1000) for i, m in enumerate(METHODS)} for k in KS}


def test_controls_of_next_token():
    check_controls(draw.draw_next_token, {"temperature": [0.2, 1.0, 2.0], "top_p": [0.5, 1.0]},
                   logits=LOGITS, tokens=TOKENS)


def test_controls_of_temperature():
    check_controls(draw.draw_temperature, {"temperature": [0.2, 1.0]}, curves=BY_TEMPERATURE,
                   greedy=(0.77, 99.0), ks=KS)


def test_controls_of_votes():
    check_controls(draw.draw_votes, {"temperature": [0.2, 1.0]}, samples=SAMPLES, gold="4",
                   greedy="5")


def test_controls_of_compute():
    check_controls(draw.draw_compute, {"k": KS}, curves=CURVES, counts=COUNTS, axes=(1, 2))


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
        assert "0.00" in texts if top_p == 1 else texts.count("cut") == len(TOKENS) - 1


def test_votes_are_counted_and_the_right_answer_is_green():
    ax = Figure().subplots()
    draw.draw_votes(ax, temperature=1.0, samples=SAMPLES, gold="4", greedy="5")
    assert [bar.get_width() for bar in ax.patches] == [2, 1, 1]
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert labels == ["5 (greedy)", "4", "none"]
    green = [to_hex(bar.get_facecolor()) == draw.BEST.lower() for bar in ax.patches]
    assert green == [False, True, False]


def test_the_histograms_are_shares_of_their_own_kind():
    ax = Figure().subplots()
    draw.draw_scores(ax, scores=[0.01, 0.02, 0.99, 1.0], right=[False, False, True, True])
    right, wrong = ax.patches
    assert right.get_data().values[-1] == wrong.get_data().values[0] == 100


def test_the_axis_says_what_k_samples_cost():
    ax = Figure().subplots()
    draw.draw_temperature(ax, 0.2, curves=BY_TEMPERATURE, greedy=(0.77, 99.0), ks=KS)
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert labels == ["1\n100", "2\n200", "4\n400", "8\n800"]
    assert ax.get_legend().get_texts()[0].get_text() == "greedy, 99 tokens"


def test_the_point_at_k_lies_on_its_curve_and_its_price_beside_its_name():
    axes = Figure().subplots(1, 2)
    draw.draw_compute(axes, k=4, curves=CURVES, counts=COUNTS)
    points = [line.get_xydata()[0].tolist() for line in axes[0].lines
              if line.get_marker() == "o"]
    assert points == [pytest.approx([x, 100 * y]) for x, y in
                      (CURVES[m][4] for m in METHODS[1:])]
    assert torch.tensor([t.get_position()[1] for t in axes[1].texts]).tolist() == [0, 1, 2, 3, 4, 5]
    names = [t.get_text() for t in axes[1].get_yticklabels()]
    assert names[:3] == ["greedy, 1×", "majority, 4×", "likelihood, 8×"]
