"""NF4 by its definition; test_bitsandbytes.py compares the bytes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant import grid, nf4
from qlora_lib.quant.nf4 import (
    NESTED_BLOCK,
    NF4_LEVELS,
    NF4Spec,
    dequantize_8bit,
    dynamic_map,
    nf4_codes,
    nf4_levels,
    quantize_8bit,
    quantize_nf4,
)
from tests.support.tensors import PROPERTY, default_dtype, normal, relative

LEVELS = torch.tensor(NF4_LEVELS)


def nf4_formula() -> torch.Tensor:
    """The 16 levels from quantiles of N(0, 1); fp64 (16,), ascending.

    Eight quantiles for the positive half, seven for the negative one and an exact 0,
    divided by the largest. `offset`, the outermost probability, is the mean of 1 - 1/30
    and 1 - 1/32: half a bin away from 1 for 15 and for 16 bins.
    """
    offset = 1 - (1 / 30 + 1 / 32) / 2  # 0.9677083
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    return levels / levels.max()


def test_the_formula_gives_the_published_table():
    assert (nf4_formula() - torch.tensor(NF4_LEVELS, dtype=torch.float64)).abs().max() < 2e-7
    assert len(set(NF4_LEVELS)) == 16 and sorted(NF4_LEVELS) == list(NF4_LEVELS)
    assert NF4_LEVELS[7] == 0 and NF4_LEVELS[0] == -1 and NF4_LEVELS[15] == 1


def test_dynamic_map_has_the_documented_shape():
    levels = dynamic_map()
    assert levels.shape == (256,) and levels.unique().numel() == 256
    assert torch.equal(levels, levels.sort().values)
    assert levels.max() == 1 and (levels == 0).sum() == 1
    # symmetric, but for the 1.0 that has no -1.0
    without = levels[(levels != 0) & (levels != 1)]
    assert torch.equal(without, -without.flip(0))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_what_the_paper_describes(signed):
    """Exponents 0 to -6, each with half as many fractions as the one before it, even between 0.1
    and 1; unsigned, the sign's bit makes it twice as many."""
    levels = {0.0, 1.0}
    for exponent in range(7):
        count = (64 if signed else 128) >> exponent
        for i in range(count):
            level = 10.0**-exponent * (0.1 + 0.9 * (i + 0.5) / count)
            levels |= {level, -level} if signed else {level}
    want = torch.tensor(sorted(levels), dtype=torch.float64)
    got = dynamic_map(signed)
    assert got.dtype == torch.float32 and got.shape == (256,)
    assert ((got.double() - want).abs() <= 1e-6 * want.abs()).all()
    assert signed is bool((dynamic_map() == got).all())  # signed is the usual one


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 600])
def test_eight_bits_hold_the_nearest_level_of_a_block_of_256(n, signed):
    flat, levels = normal(n) * 10.0 ** torch.linspace(-2, 2, n), dynamic_map(signed)
    flat = flat if signed else flat.abs()
    codes, absmax = quantize_8bit(flat, levels)
    assert (codes.dtype, codes.shape, absmax.dtype) == (torch.uint8, (n,), torch.float32)
    blocks = flat.split(256)
    assert absmax.tolist() == [float(b.abs().max()) for b in blocks]
    decoded = dequantize_8bit(codes, absmax, levels)
    for block, got, most in zip(blocks, decoded.split(256), absmax):
        nearest = (block[:, None] - levels * most).abs().amin(1)
        assert ((block - got).abs() <= nearest + 1e-6 * most).all()


@PROPERTY
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 40),
    block_size=st.sampled_from([4, 16, 64]),
    double_quant=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_each_weight_gets_its_nearest_level(out, inner, block_size, double_quant, seed):
    """Any shape, odd ones and blocks across rows too, against a search over all levels."""
    w = normal(out, inner, seed=seed, std=0.02)
    q = quantize_nf4(w, block_size, double_quant)
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (-(-w.numel() // 2),)
    codes = nf4_codes(q)
    assert codes.shape == w.shape
    for start in range(0, w.numel(), block_size):
        block = w.flatten()[start : start + block_size]
        distance = (block[:, None] / block.abs().max() - LEVELS).abs()  # (block, 16)
        chosen = distance.gather(1, codes.flatten()[start : start + block_size, None].long())
        assert (chosen[:, 0] <= distance.amin(1) + 1e-7).all()


@PROPERTY
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 40),
    block_size=st.sampled_from([4, 16, 64]),
    seed=st.integers(0, 10**6),
)
def test_dequantize_is_level_times_absmax(out, inner, block_size, seed):
    w = normal(out, inner, seed=seed)
    q = quantize_nf4(w, block_size, double_quant=False)
    d, codes = q.dequantize(), nf4_codes(q)
    absmax = torch.stack([b.abs().max() for b in w.flatten().split(block_size)])
    assert torch.equal(q.absmax, absmax)
    scales = absmax.repeat_interleave(block_size)[: w.numel()].view(w.shape)
    assert torch.equal(d, LEVELS[codes.long()] * scales)
    # the largest weight of each block is kept exactly
    assert torch.equal(d.abs() == w.abs(), (w.abs() == scales) | (d.abs() == w.abs()))
    assert (d.abs() == scales).sum() >= absmax.numel()


@pytest.mark.parametrize("shape", [(130, 33), (300, 7), (129, 64), (200, 1), (65, 100)])
@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_pieces_it_is_the_same(monkeypatch, shape, block_size, dtype):
    """Pieces begin in the middle of no byte and of no block, wherever the rows do."""
    q = quantize_nf4(normal(*shape), block_size)
    scales = q.block_scales().repeat_interleave(block_size)[: q.shape.numel()].view(shape)
    monkeypatch.setattr(grid, "PIECE", 1)
    pieces = [*q.pieces(dtype)]
    assert all(w.shape == (rows.stop - rows.start, shape[1]) for rows, w in pieces)
    want = (LEVELS[nf4_codes(q).long()] * scales).to(dtype)
    assert q.dequantize(dtype).dtype == dtype and torch.equal(q.dequantize(dtype), want)
    if block_size == 1:
        assert len(pieces) == -(-shape[0] // 64)


def test_the_first_weight_is_in_the_high_nibble_and_a_missing_one_is_zero():
    q = quantize_nf4(torch.tensor([[1.0, -1.0, 0.0, 1.0]]), 4)
    assert q.codes.tolist() == [0xF0, 0x7F]
    assert quantize_nf4(torch.tensor([[1.0, -1.0, 0.5]]), 4).codes[1] % 16 == 7


def test_the_usual_blocks():
    assert NF4Spec() == NF4Spec(64, True) == quantize_nf4(normal(2, 64)).spec
    assert NF4Spec.bits == 4 and NF4Spec(1).block_size == 1
    assert torch.equal(nf4_levels(), LEVELS) and nf4_levels().dtype == torch.float32
    q = quantize_nf4(normal(2, 64).requires_grad_())
    assert not any(t.requires_grad for t in (q.absmax, q.offset, q.nested_absmax))


def test_zeros_are_exact():
    w = normal(8, 64)
    w[2] = 0  # whole blocks of zeros: absmax 0
    w[:, 5] = 0
    d = quantize_nf4(w, 16, double_quant=False).dequantize()
    assert torch.isfinite(d).all() and (d[2] == 0).all() and (d[:, 5] == 0).all()
    assert (quantize_nf4(torch.zeros(4, 64)).dequantize() == 0).all()
    # under double quantization a zero weight is zero still: its level is 0
    assert (quantize_nf4(w, 16).dequantize()[:, 5] == 0).all()


def test_constant_rows():
    for value in (0.3, -0.3, 1e-6, 1e4):
        d = quantize_nf4(torch.full((4, 64), value)).dequantize()
        assert (d - value).abs().max() <= 1e-6 * abs(value)


def test_tiny_weights_keep_their_relative_error():
    """The absmax is fp32 and has no floor."""
    for std in (1.0, 1e-4, 1e-6, 1e-20):
        w = normal(32, 64, std=std)
        assert relative(quantize_nf4(w).dequantize().double(), w.double()) < 0.1


def test_double_quantization_takes_the_mean_off_first():
    w = normal(64, 512, std=0.02)  # 512 blocks: two nested ones
    q, single = quantize_nf4(w), quantize_nf4(w, double_quant=False)
    assert q.absmax.dtype == torch.uint8 and q.nested_absmax.shape == (512 // NESTED_BLOCK,)
    assert q.offset == single.absmax.mean()
    centred = (single.absmax - q.offset).view(-1, NESTED_BLOCK)
    assert torch.equal(q.nested_absmax, centred.abs().amax(1))
    # decoded scales: off by at most half the widest gap of the map, times the nested absmax
    gap = dynamic_map().diff().max() / 2
    error = (q.block_scales() - single.absmax).view(-1, NESTED_BLOCK).abs()
    assert (error <= gap * q.nested_absmax[:, None] * 1.001).all()
    assert relative(q.block_scales(), single.absmax) < 2e-3
    assert torch.equal(q.codes, single.codes)  # the weights' own codes do not see it


def test_last_nested_block_may_be_short():
    w = normal(67, 64 * 5)  # 335 blocks = 256 + 79
    q = quantize_nf4(w)
    assert q.nested_absmax.shape == (2,) and q.absmax.shape == (335,)
    single = quantize_nf4(w, double_quant=False).absmax
    assert relative(q.block_scales(), single) < 5e-3


def test_bits_per_weight():
    w = normal(1024, 1024, std=0.02)
    q = quantize_nf4(w)
    # 4 + 8/64 + 32/(64 * 256), and one fp32 offset a matrix
    assert q.nbytes == w.numel() // 2 + 16384 + 4 * 64 + 4
    assert abs(q.bits_per_weight - 4.127) < 1e-4
    assert quantize_nf4(w, double_quant=False).bits_per_weight == 4.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    w = normal(8, 64).to(dtype)
    q = quantize_nf4(w)
    assert torch.equal(q.codes, quantize_nf4(w.float()).codes)
    assert torch.equal(q.dequantize(dtype), q.dequantize().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_bit(dtype):
    """Levels are fp32, and made once: what the default was at that time would stay."""
    w = normal(8, 64)
    want = quantize_nf4(w)
    dense = want.dequantize()
    tables = nf4._level_pairs, nf4._nested_levels
    try:
        for table in tables:
            table.cache_clear()
        with default_dtype(dtype):
            got = quantize_nf4(w)
            assert got.dequantize().dtype == dynamic_map().dtype == torch.float32
        assert torch.equal(got.codes, want.codes) and torch.equal(got.absmax, want.absmax)
        assert torch.equal(got.dequantize(), dense)  # from the tables made above
    finally:
        for table in tables:
            table.cache_clear()


def test_on_normal_weights_it_beats_the_uniform_grid_of_its_size():
    """Relative error on N(0, 1), blocks of 64: 0.092 for NF4, 0.107 for 15 even levels."""
    w = normal(256, 256)
    blocks = w.view(-1, 64)
    step = blocks.abs().amax(1, keepdim=True) / 7
    uniform = ((blocks / step).round() * step).view_as(w)
    assert abs(relative(quantize_nf4(w).dequantize(), w) - 0.092) < 0.002
    assert relative(quantize_nf4(w).dequantize(), w) < 0.9 * relative(uniform, w)


def test_bad_input_is_named():
    w = normal(4, 64)
    w[0, 0] = float("nan")
    w[1, 1] = float("inf")
    with pytest.raises(ValueError, match="2 NaN or Inf"):
        quantize_nf4(w)
    with pytest.raises(ValueError, match="block_size=0 must be positive"):
        NF4Spec(0)
    with pytest.raises(ValueError, match=r"floating-point matrix.*\(64,\)"):
        quantize_nf4(torch.zeros(64))


@pytest.mark.parametrize("size", [3e37, 1e38])
def test_weights_near_the_end_of_fp32_are_stored_finite_or_refused(size):
    """The mean of their absmax overflows in fp32."""
    w = (normal(8, 64).clamp(-3, 3) * size).clamp(-3.4e38, 3.4e38)
    with pytest.raises(ValueError, match="overflow fp32.*double_quant=False"):
        quantize_nf4(w, 32)
    assert quantize_nf4(w, 32, double_quant=False).dequantize().isfinite().all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_parts_that_do_not_fit_or_mean_nothing_are_named(double_quant):
    good = quantize_nf4(normal(4, 64), 32, double_quant)
    good.check()
    bad = {"codes": [good.codes[:-1], good.codes.int()], "absmax": [good.absmax[:-1]]}
    if double_quant:
        nan = torch.full_like(good.nested_absmax, float("nan"))
        bad |= {"nested_absmax": [None, nan, good.nested_absmax[:0]],
                "offset": [None, torch.tensor(float("inf")), torch.ones(1)]}  # fmt: skip
    else:
        bad["absmax"] += [-good.absmax, good.absmax * float("inf"), good.absmax.to(torch.uint8)]
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                replace(good, **{name: value}).check()


@pytest.mark.parametrize("given", [{"block_size": 0}, {"block_size": 64.0}, {"block_size": "64"},
                                   {"block_size": True}, {"double_quant": 1}])  # fmt: skip
def test_settings_that_mean_nothing_are_named(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        NF4Spec(**given)
