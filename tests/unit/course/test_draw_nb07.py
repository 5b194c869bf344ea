"""The pictures of notebook 07: what their controls change, and what they state."""

import pytest
from matplotlib.figure import Figure

from course.kit.slider import LossPlot
from course.nb07 import draw
from qlora_lib.base.statistics import wilson
from tests.support.controls import check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

RANKS = {r: {"correct": 20 * i + 30, "n": 200, "parameters": 20_480 * r}
         for i, r in enumerate((1, 2, 4, 8))}
GRID = {(a, b): {"sentiment": a * (1 - b / 2), "code": b * (1 - a / 2)}
        for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)}
PATHS = [f"model.layers.{i}.{m}" for i in range(2)
         for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
BUDGETS = {10_000: dict(zip(PATHS, (3, 1))), 40_000: dict(zip(PATHS, (8, 4, 6, 1, 2, 5)))}


def test_controls_of_rank():
    check_controls(draw.draw_rank, {"rank": list(RANKS)}, rows=RANKS, base_bytes=2_000_000,
                   axes=(1, 2))


def test_controls_of_mixture():
    check_controls(draw.draw_mixture, {"first": [0.0, 0.5, 1.0], "second": [0.0, 0.5, 1.0]},
                   grid=GRID, axes=(1, 2))


def test_controls_of_budget():
    check_controls(draw.draw_budget, {"budget": list(BUDGETS)}, ranks=BUDGETS)


def test_controls_of_served():
    check_controls(draw.draw_served, {"adapters": [1, 4, 16]}, counts=[1, 4, 16],
                   base={"16 bits": 7_000_000, "4 bits": 2_000_000}, adapter=160_000)


def test_a_layer_without_a_rank_keeps_its_place():
    ax = Figure().subplots()
    draw.draw_budget(ax, 10_000, BUDGETS)
    assert [bar.get_height() for bar in ax.patches] == [3, 1, 0, 0, 0, 0]
    assert "2 of 6 layers" in ax.get_title()


def test_bytes_served_are_what_the_legend_says():
    ax = Figure().subplots()
    draw.draw_served(ax, 16, {"16 bits": 7_000_000, "4 bits": 2_000_000}, 160_000, [1, 4, 16])
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0].endswith("112.0 MB") and texts[1].endswith("32.0 MB")
    assert texts[2].endswith("4.6 MB")


def test_a_matrix_names_its_tasks():
    ax = Figure().subplots()
    draw.draw_matrix(ax, {"base": {"code": 0.0, "word_problems": 0.5},
                          "code": {"code": 1.0, "word_problems": 0.0}})
    assert [t.get_text() for t in ax.get_xticklabels()] == ["code", "word\nproblems"]
    assert [t.get_text() for t in ax.texts] == ["0", "50", "100", "0"]


def test_a_live_loss_plot_redraws_as_it_is_told():
    plot = LossPlot(every=2)
    pictures = [plot.image.value]
    for step in range(1, 6):
        plot({"step": step, "loss": 2 / step} | ({"dev_loss": 1.0} if step == 5 else {}))
        pictures.append(plot.image.value)
    changed = [a != b for a, b in zip(pictures, pictures[1:])]
    assert changed == [False, True, False, True, True]  # every second step, and a dev loss
    assert plot.losses[-1] == (5, 0.4) and plot.dev == [(5, 1.0)]
    assert len(set(plot.picture())) > 2
    data = plot._repr_mimebundle_()
    assert "every 2 steps" in data["text/plain"]
    with pytest.raises(ValueError, match="at least 1 step"):
        LossPlot(every=0)


def test_a_rank_is_drawn_with_all_intervals_and_its_share_of_the_base():
    left, right = Figure().subplots(1, 2)
    draw.draw_rank((left, right), 4, RANKS, base_bytes=2_000_000)
    ends = [bar.get_segments()[0][:, 1] for c in left.containers for bar in c.lines[2]]
    for found, row in zip(ends, RANKS.values(), strict=True):
        assert found == pytest.approx([100 * x for x in wilson(row["correct"], row["n"])])
    share = 2 * RANKS[4]["parameters"] / 2_000_000
    base, adapter = (patch.get_width() for patch in right.patches)
    assert right.get_xscale() == "linear" and adapter / base == pytest.approx(share)
    assert right.get_title() == f"{share:.1%} of the base's bytes"
