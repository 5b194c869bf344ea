"""The pictures of notebook 01: what their controls change, and what they state."""
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from course.nb01 import draw
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.nf4 import NF4_LEVELS
from qlora_lib.quant.packing import pack
from tests.support.controls import check_controls

pytestmark = pytest.mark.usefixtures("quick_pictures")

WEIGHT = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
LEVELS = torch.tensor(NF4_LEVELS)


def relative_error(w):
    return float((w - WEIGHT).norm() / WEIGHT.norm())


def test_controls_of_granularity():
    errors, costs = {}, {}
    for bits in (2, 4):
        for size in (None, 32):
            for symmetric in (False, True):
                q = quantize_rtn(WEIGHT, QuantSpec(bits, size, symmetric, False))
                errors[bits, size, symmetric] = relative_error(q.dequantize())
                costs[bits, size, symmetric] = q.bits_per_weight
    check_controls(draw.draw_granularity,
                   {"bits": [2, 4], "group_size": [None, 32],
                    "symmetric": [False, True]},
                   errors=errors, costs=costs)


def test_controls_of_clipping():
    ratios = [1 - i / 10 for i in range(8)]
    errors = {bits: [0.01 * bits + (r - 0.7) ** 2 for r in ratios] for bits in (2, 8)}
    check_controls(draw.draw_clipping,
                   {"bits": [2, 8], "clip_ratio": [0.3, 1.0]},
                   row=WEIGHT[0], ratios=ratios, errors=errors, axes=(2, 1))


def test_controls_of_bit_layout():
    check_controls(draw.draw_bit_layout,
                   {"bits": [2, 3, 4, 8], "order": ["low bits first", "high bits first"]},
                   codes=torch.arange(24) * 5 % 8)


def test_controls_of_nf4_int4():
    sizes = [16, 64]
    curves = {name: {method: [(size, 4 + k / size, 0.07 + 0.01 * i + shift)
                              for i, size in enumerate(sizes)]
                     for k, method in enumerate(draw.CURVES, 4)}
              for name, shift in (("normal", 0), ("heavy", 0.02))}
    units = {(name, size): (WEIGHT.view(-1, size) / size).clamp(-1, 1).flatten()
             for name in curves for size in sizes}
    check_controls(draw.draw_nf4_int4,
                   {"block_size": sizes, "against": ["block size", "bits a weight"],
                    "weights": ["normal", "heavy"]},
                   units=units, curves=curves, levels=LEVELS, axes=(2, 1),
                   rescaled_by=("against", "weights"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_drawn_low_bits_first_are_those_of_pack(bits):
    codes = torch.tensor([1, 6, 5, 2, 7, 0, 3, 4] * 3)
    ax = Figure().subplots()
    draw.draw_bit_layout(ax, bits=bits, order="low bits first", codes=codes)
    said = [int(m[1]) for t in ax.texts if (m := re.match(r"byte \d = (\d+)", t.get_text()))]
    assert said == pack(codes[: -(-24 // bits)] % 2**bits, bits)[:3].tolist()


@pytest.mark.parametrize("bits, order, straddling", [
    (3, "low bits first", {2, 5}), (3, "high bits first", {2, 5}),
    (2, "low bits first", set()), (4, "high bits first", set()), (8, "low bits first", set())])
def test_codes_that_straddle_bytes_are_orange(bits, order, straddling):
    ax = Figure().subplots()
    draw.draw_bit_layout(ax, bits=bits, order=order, codes=torch.arange(24))
    orange = [p for p in ax.patches if p.get_facecolor()[:3] == pytest.approx((0.902, 0.624, 0),
                                                                             abs=0.01)]
    assert len(orange) == bits * len(straddling)
    twice = [t.get_text().split("\n")[0] for t in ax.texts if t.get_text().startswith("q")]
    assert {int(n[1:]) for n in twice if twice.count(n) == 2} == straddling


def test_the_clipping_curve_names_its_optimum():
    axes = Figure().subplots(2)
    draw.draw_clipping(axes, bits=4, clip_ratio=1.0, row=WEIGHT[0], ratios=[1.0, 0.8, 0.6],
                       errors={4: [0.2, 0.1, 0.3]})
    assert axes[1].get_title() == "here 0.2000, best 0.1000 at 0.80"


def test_the_staircase_is_flat_outside_its_range_and_within_half_a_step_inside():
    axes = Figure().subplots(1, 2)
    draw.draw_staircase(axes, low=-1.0, high=2.0, scale=0.2, zero_point=5, max_code=15)
    w, error = (torch.as_tensor(a) for a in axes[1].lines[0].get_data())
    assert error[(w >= -1) & (w <= 2)].abs().max() <= 0.1 + 1e-5
    assert error.abs().max() > 0.5


def test_nf4_s_levels_stand_below_its_probabilities_on_the_curve():
    axes = Figure().subplots(1, 2)
    positive, negative = torch.linspace(0.968, 0.5, 9), 1 - torch.linspace(0.968, 0.5, 8)
    draw.draw_nf4(axes, positive, negative, {"the 64 weights": WEIGHT[0], "NF4": LEVELS})
    ends = torch.cat([torch.tensor(np.array(c.get_segments()))[:, 1]
                      for c in axes[0].collections[1::2]])
    assert torch.allclose(torch.special.ndtr(ends[:, 0]), ends[:, 1].double().to(ends.dtype),
                          atol=1e-5)
    levels = (ends[:, 0] / ends[:, 0].max()).unique(sorted=True)
    assert torch.allclose(levels[(levels.diff(prepend=levels[:1] - 1) > 1e-4)], LEVELS.to(
        levels.dtype), atol=2e-3)
    assert [t.get_text() for t in axes[1].get_yticklabels()] == ["the 64 weights", "NF4"]
