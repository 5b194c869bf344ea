"""The pictures of notebook 06: what their controls change, and what they state."""

import pytest
from matplotlib.figure import Figure
from transformers import LlamaConfig

from course.nb06 import draw
from course.nb06.exercises import roofline
from qlora_lib.generation.kv_cache import CacheSpec, cache_bytes
from tests.support.controls import check_controls
from tests.support.tensors import normal

pytestmark = pytest.mark.usefixtures("quick_pictures")

ROOFS = {"flops": 1e11, "bandwidth": 1e10}
SMALL = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
TILES = {"out": 200, "tokens": 40, "n": 256}


def test_controls_of_roofs():
    check_controls(draw.draw_roofline, {"tokens": [1, 64, 4096], "bits": [4, 16]}, **ROOFS)


def test_controls_of_pointers():
    check_controls(draw.draw_pointers, {"program": [0, 2], "start": [0, 4]})


def test_a_program_s_bytes_are_numbered_by_their_offset_and_what_lies_outside_is_hatched():
    ax = Figure().subplots()
    draw.draw_pointers(ax, 2, 4)
    mine = {int(t.get_text()) for t in ax.texts if t.get_color() == "black"}
    assert mine == {row * 8 + at for row in range(8, 12) for at in range(4, 8)}
    assert sum(bool(p.get_hatch()) for p in ax.patches) == 2 * 4  # rows 10 and 11 are not there


def test_a_measured_product_stands_where_it_was_measured():
    ax = Figure().subplots()
    draw.draw_roofline(ax, 1, 4, **ROOFS, shape=(100, 1000), measured={(1, 32): 1e-3})
    (x, y), = next(line for line in ax.lines if line.get_marker() == "x").get_xydata().tolist()
    assert y == pytest.approx(2e5 / 1e-3 / 1e9) and x == pytest.approx(2e5 / (4e5 + 4 * 1100))


def test_what_is_expected_is_a_ring_and_what_was_measured_a_cross():
    rows = [{"shape": [100, 1000], "tokens": t, "microseconds": 10.0 * t} for t in (1, 8)]
    seen = [{"shape": [100, 1000], "tokens": 1, "milliseconds": {"rtn": 0.05}}]
    ax = Figure().subplots()
    draw.draw_expected(ax, rows, 1e13, 1e12, "a GPU", measured=seen)
    rings = [line for line in ax.lines if line.get_marker() == "o"]
    (cross,) = (line for line in ax.lines if line.get_marker() == "x")
    assert [ring.get_markerfacecolor() for ring in rings] == ["none"] * 2
    for line, tokens, seconds in [*zip(rings, (1, 8), (1e-5, 8e-5)), (cross, 1, 5e-5)]:
        (x, y), = line.get_xydata()
        work, moved = draw.product_cost(tokens, 100, 1000, 4)
        assert x == pytest.approx(work / moved) and y == pytest.approx(work / seconds / 1e12)
    assert [t.get_text() for t in ax.get_legend().texts] == ["PREDICTED", "measured"]
    ax = Figure().subplots()
    draw.draw_expected(ax, rows, 1e13, 1e12, "a GPU")
    assert [t.get_text() for t in ax.get_legend().texts] == ["PREDICTED"]


def test_controls_of_tiles():
    check_controls(draw.draw_tiles, {"block_out": [16, 128], "block_tokens": [16, 64]},
                   axes=(1, 2), **TILES)


def test_controls_of_caches():
    check_controls(draw.draw_cache, {"method": ["16 bits", "2 bits"], "context": [512, 4096],
                                     "batch": [1, 16]}, config=SMALL, weights=3.6e9)


@pytest.mark.parametrize("tokens, by", [(1, "memory"), (4096, "arithmetic")])
def test_the_roofline_says_what_binds_and_how_long_it_takes(tokens, by):
    ax = Figure().subplots()
    draw.draw_roofline(ax, tokens, 4, **ROOFS, shape=(100, 1000))
    seconds = roofline(tokens, 100, 1000, 4, 1e11, 1e10)
    assert ax.get_title() == f"bound by {by}: {draw._time(seconds)}"
    # 4 bits, the last point: the rate that is attained in this time
    x, y = ax.lines[-1].get_xydata()[0]
    work, moved = draw.product_cost(tokens, 100, 1000, 4)
    assert x == pytest.approx(work / moved) and y == pytest.approx(work / seconds / 1e9)


def test_tiles_are_counted():
    counts = draw.tile_counts(200, 40, 256, 128, 16)
    assert counts["programs"] == 2 * 3
    assert counts["weight"] == 3 * 200 * 256 / 2 and counts["inputs"] == 2 * 40 * 256 * 2
    assert counts["waste"] == pytest.approx(1 - 200 * 40 / (256 * 48))
    assert draw.tile_counts(256, 64, 8, 128, 64)["waste"] == 0
    axes = Figure().subplots(1, 2)
    draw.draw_tiles(axes, 128, 16, **TILES)
    assert axes[0].get_title() == "6 programs, 35% masked"


def test_the_cache_s_point_its_lines_and_its_words_are_the_library_s_numbers():
    ax = Figure().subplots()
    draw.draw_cache(ax, "4 bits", 4096, 2, SMALL, 1e9)
    held = cache_bytes(SMALL, 4096, CacheSpec(4), 2) / 1e9
    *lines, level, point = ax.lines
    assert point.get_xydata().tolist() == [[4096, held]]
    assert ax.get_title() == f"4 bits, 2 x 4,096 tokens: {held:.2f} GB"
    assert list(level.get_ydata()) == [1, 1] and level.get_label() == "packed weights,\n1.0 GB"
    assert [line.get_label() for line in lines] == list(draw.METHODS)
    assert ax.get_xlim()[0] == min(lines[0].get_xdata()) == 64  # left of where lines bend
    for line, (spec, _) in zip(lines, draw.METHODS.values()):
        for tokens, found in line.get_xydata():
            assert found == cache_bytes(SMALL, int(tokens), spec, 2) / 1e9


def test_keys_and_recorded_times_are_drawn():
    axes = Figure().subplots(1, 2)
    draw.draw_channels(axes, normal(20, 16), normal(20, 16, seed=1))
    assert axes[0].get_title().startswith("keys")
    rows = [{"shape": [8, 8], "tokens": t, "milliseconds": {"bf16": 4.0 * t, "rtn": 2.0}}
            for t in (16, 1)]
    ax = Figure().subplots()
    draw.draw_recorded(ax, rows, "bf16", "rtn", "a GPU, 2026-01-01")
    assert ax.lines[0].get_xydata().tolist() == [[1, 2], [16, 32]]
