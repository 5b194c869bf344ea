"""The pictures of notebook 12: what their controls change, and what they state."""
import itertools

import pytest
import torch

from course.nb12 import draw
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from tests.support.controls import axes_of, check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")


def normal(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


# --- number lines -------------------------------------------------------------------------

def test_the_lines_have_the_values_of_their_formats():
    levels = draw.unit_levels()
    assert [len(v) for v in levels.values()] == [15, 16, 15]
    for values in levels.values():
        assert values[0] == -1 and values[-1] == 1 and (values.diff() > 0).all()
    assert (6 * levels["E2M1"]).unique().tolist()[7:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize("most", [0.3, 3.4, 3.6, 6.9, 7.0, 8.0])
def test_scales_are_those_that_the_formats_store(most):
    block = normal(32).clamp(-1, 1) * most
    block[3] = most
    stored = quantize_fp4(block.view(1, 32), FP4Spec("mxfp4"))
    scale = draw.block_scale(block.abs().max(), "E8M0")
    assert scale == 6 * stored.block_scales()
    rounded = draw.rounded_to(block, draw.unit_levels()["E2M1"] * scale)
    ties = (block / scale * 24).frac().abs() < 1e-6  # halfway, where either may be taken
    assert torch.allclose(rounded[~ties], stored.dequantize()[0][~ties])
    fine = draw.block_scale(block.abs().max(), "E4M3")
    assert abs(fine / most - 1) <= 1 / 16


def test_controls_of_lines():
    check_controls(draw.draw_lines, {"outlier": [3.6, 0.0, 3.4, 8.0],
                                     "scale": ["exact", "E8M0", "E4M3"]},
                   weights=normal(32), axes=(1, 2))


def test_the_error_shown_leaves_out_the_outlier():
    _, bars = axes_of(draw.draw_lines, (2,), outlier=8.0, scale="exact", weights=normal(32))
    shown = [float(text.get_text()) for text in bars.texts]
    block = torch.cat([torch.tensor([8.0]), normal(32)[1:]])
    for error, unit in zip(shown, draw.unit_levels().values()):
        off = (draw.rounded_to(block, 8 * unit) - block)[1:]
        assert error == pytest.approx(float(off.square().mean().sqrt()), abs=6e-4)


# --- exponents ----------------------------------------------------------------------------

def test_each_size_has_a_line_and_a_dot_at_its_least_error():
    ax = axes_of(draw.draw_exponents, errors={1: [0.2, 0.3], 64: [0.9, 0.4]}, exponents=[0, 1])
    dots = [line.get_xydata().tolist() for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert dots == [[[0, 0.2]], [[1, 0.4]]]


# --- outliers -----------------------------------------------------------------------------

def tokens_and_costs(sizes, rounding):
    token = normal(64)
    tokens, costs = {}, {}
    for size, repair in itertools.product(sizes, draw.REPAIRS):
        x = token.clone()
        x[3] *= size if repair == "none" else 1.5
        tokens[size, repair] = x
        for name in rounding:
            costs[size, repair, name] = 1e-3 * len(name) * (size if repair == "none" else 2)
    return {"tokens": tokens, "costs": costs}


ROUNDINGS = ["INT4 weights", "INT4 weights, inputs", "INT8 weights, inputs",
             "MXFP4 weights, inputs", "NVFP4 weights, inputs"]


def test_controls_of_outliers():
    check_controls(draw.draw_outliers, {"size": [64, 1], "repair": list(draw.REPAIRS),
                                        "rounding": ROUNDINGS[::-1]},
                   axes=(1, 2), **tokens_and_costs([64, 1], ROUNDINGS))


@pytest.mark.parametrize("rounding, gone", [("INT4 weights, inputs", 63),
                                            ("MXFP4 weights, inputs", 31)])
def test_a_loud_channel_takes_those_that_share_its_scale(rounding, gone):
    token = torch.ones(64)
    token[3] = 1000
    left, _ = axes_of(draw.draw_outliers, (2,), size=64, repair="none", rounding=rounding,
                      tokens={(64, "none"): token},
                      costs={(64, name, rounding): 1.0 for name in draw.REPAIRS})
    assert left.get_title() == f"{gone} of 64 become 0"


def test_weights_alone_leave_the_inputs_as_they_are():
    given = tokens_and_costs([64], ROUNDINGS)
    left, right = axes_of(draw.draw_outliers, (2,), size=64, repair="none",
                          rounding="INT4 weights", **given)
    assert left.get_title() == "inputs are not rounded"
    assert [bar.get_width() for bar in right.patches] == [
        given["costs"][64, name, "INT4 weights"] for name in draw.REPAIRS]


# --- texts to calibrate on ----------------------------------------------------------------

def test_each_text_has_its_means_and_intervals_beside_no_text():
    lost = {(method, text): [(0.01 * k + 0.02 * n, 0.005) for n in range(3)]
            for k, (method, text) in enumerate(itertools.product(("gptq", "awq"), ("task", "own")))}
    axes = axes_of(draw.draw_texts, (2,), lost=lost, counts=[16, 64, 512], none=(0.05, 0.01))
    assert [ax.get_title() for ax in axes] == ["GPTQ", "AWQ"]
    for ax, method in zip(axes, ("gptq", "awq")):
        assert ax.lines[0].get_ydata()[0] == 0.05
        bands = [(p.get_y(), p.get_height()) for p in ax.patches]
        assert bands == [(pytest.approx(0.04), pytest.approx(0.02))]
        drawn = {bars.get_label(): bars for bars in ax.containers}
        for text in ("task", "own"):
            line, _, (bars,) = drawn[text]
            means = [mean for mean, _ in lost[method, text]]
            assert list(line.get_ydata()) == means
            ends = [(low, high) for (_, low), (_, high) in bars.get_segments()]
            assert ends == [pytest.approx((mean - 0.005, mean + 0.005)) for mean in means]
            assert list(line.get_xdata()) == pytest.approx([16, 64, 512], rel=0.1)
