"""Codes in the order of tensor cores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lib.layers.fragments import BLOCK, Fragments, fragments, span
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support.tensors import PROPERTY, normal
from tests.support.triton_cases import packed


@settings(PROPERTY, max_examples=12)
@given(st.integers(1, 150), st.integers(1, 5), st.sampled_from([32, 64, 96, None]))
def test_fragments_hold_the_same_weight(out, groups, group):
    q = packed(out, groups * (group or 31), group)
    held = fragments(q)
    assert torch.equal(held.dequantize(), q.dequantize())
    assert torch.equal(held.in_order().codes, q.codes) and type(held.in_order()) is type(q)
    rows = slice(out // 2, out)
    assert torch.equal(held.unpacked(rows), q.unpacked(rows))


def test_a_word_has_the_codes_that_the_table_names():
    q = packed(70, 192, 64)
    codes, held = q.unpacked(slice(0, 70)), fragments(q)
    assert held.codes.shape == (2, 3, 512) and held.codes.dtype == torch.int32
    for row in (0, 9, 31, 63, 64, 69):
        for k in (0, 1, 2, 5, 17, 63, 64, 191):
            tile, a, b, g = row // 64, row // 16 % 4, row // 8 % 2, row % 8
            block, w, c, t, d = k // 64, k // 16 % 4, k // 8 % 2, k // 2 % 4, k % 2
            word = int(held.codes[tile, block, ((a * 8 + g) * 4 + t) * 4 + w])
            assert word >> 16 * d + 4 * (2 * c + b) & 15 == codes[row, k]


def test_a_grid_is_one_word_and_rows_that_are_not_there_have_scale_0():
    q = packed(70, 128, 32)
    grids = fragments(q).op_grids  # (tiles, groups, 64)
    assert grids.shape == (2, 4, BLOCK)
    scale, zero = grids.view(torch.float16).view(2, 4, BLOCK, 2).unbind(-1)
    assert torch.equal(scale.transpose(1, 2).reshape(-1, 4)[:70], q.scale)
    assert torch.equal(-128 - zero.transpose(1, 2).reshape(-1, 4)[:70].float(),
                       q.zero_point.float())  # fmt: skip
    assert not scale[1, :, 6:].any()
    more = fragments(packed(3, 96, 32)).op_grids  # 3 groups, and one of what is added
    assert more.shape == (1, 4, BLOCK) and more[0, 2, :3].all() and not more[0, 3].any()


def test_spans_lie_in_one_group():
    assert [span(packed(2, n, g)) for n, g in ((256, 128), (384, 192), (192, 64), (192, 96))] == [
        128, 64, 64, 32]  # fmt: skip
    assert span(packed(2, 100, None)) == 128 and span(packed(2, 27, None)) == 64
    assert span(packed(2, 72, 36)) is None


@pytest.mark.parametrize("weight", [
    lambda: packed(8, 64, 32, bits=3), lambda: packed(8, 64, 32, bits=8),
    lambda: packed(8, 72, 36), lambda: packed(8, 48, 16), lambda: quantize_nf4(normal(8, 64)),
    lambda: Fragments(**vars(fragments(packed(8, 64, 32)))),
], ids=["3 bits", "8 bits", "groups of 36", "groups of 16", "nf4", "fragments"])  # fmt: skip
def test_what_cannot_be_put_in_this_order(weight):
    assert fragments(weight()) is None


def test_scales_that_are_trained_or_in_another_dtype_stay():
    q = quantize_rtn(normal(8, 64), QuantSpec(4, 32, clip_search=False))
    q.scale = q.scale.float()
    assert fragments(q) is None
