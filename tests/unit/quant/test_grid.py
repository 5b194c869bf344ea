"""Affine grids, round to nearest, clip search and the integer product."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant import grid
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import (
    CLIP_NORM,
    CLIP_RATIOS,
    QuantSpec,
    _grid_of_range,
    encode,
    fit_grid,
    quant_matmul,
    quantize_activations,
    quantize_rtn,
    row_slices,
)
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.packing import BITS, unpack
from tests.support.tensors import PROPERTY, ar1, normal, relative

plain = dict(clip_search=False)
LONG = pytest.mark.long


def steps(q) -> torch.Tensor:
    """The step of each weight's own group, (out, in)."""
    return q.scale.float().repeat_interleave(q.shape[1] // q.scale.shape[1], dim=1)


def half_step(bits: int) -> float:
    """Largest error in steps. The stored scale is up to 2**-11 smaller than the exact one,
    so that the end of the range lies up to max_code * 2**-11 steps outside the grid."""
    return 0.5 + (2**bits - 1) * 2**-11 + 1e-3


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([8, 16, None]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    std=st.sampled_from([1e-3, 0.02, 1.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_error_is_at_most_half_a_step(bits, group_size, symmetric, shift, std, seed):
    w = (normal(5, 48, seed=seed) + shift) * std
    q = quantize_rtn(w, QuantSpec(bits, group_size, symmetric, **plain))
    assert q.dequantize().shape == (5, 48)
    assert ((q.dequantize() - w).abs() / steps(q)).max() <= half_step(bits)


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([4, 12, None]),
    symmetric=st.booleans(),
    clip_search=st.booleans(),
    shift=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 10**6),
)
def test_zeros_stay_zero(bits, group_size, symmetric, clip_search, shift, seed):
    w = normal(4, 24, seed=seed) + shift
    w[:, ::3] = 0
    d = quantize_rtn(w, QuantSpec(bits, group_size, symmetric, clip_search)).dequantize()
    assert torch.equal(d[:, ::3], torch.zeros(4, 8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.37, -0.37, 1e-5, 300.0])
def test_constant_rows(bits, symmetric, value):
    """A range of no width is widened to 0: not decoded as 0, not divided by 0."""
    q = quantize_rtn(torch.full((3, 16), value), QuantSpec(bits, 8, symmetric))
    step = 2**-11 if not symmetric else 1 / (2 ** (bits - 1) - 0.5) / 2 + 2**-10
    assert torch.isfinite(q.dequantize()).all()
    assert (q.dequantize() - value).abs().max() <= abs(value) * step + (2**-25) * 2**bits


def test_all_positive_rows_use_the_whole_grid():
    w = normal(8, 64).abs() + 1
    q = quantize_rtn(w, QuantSpec(4, 16, **plain))
    assert (q.zero_point == 0).all()
    codes = unpack(q.codes, 4, q.shape).unflatten(1, (4, 16))
    assert (codes.amax(-1) == 15).all()
    q = quantize_rtn(-w, QuantSpec(4, 16, **plain))
    assert (q.zero_point == 15).all()


@pytest.mark.parametrize("shape", [(5, 64), (64, 5), (1, 64), (96, 32)])
@pytest.mark.parametrize("group_size", [None, 1])
def test_scales_belong_to_rows_not_to_columns(shape, group_size):
    """Rows of very different size; a scale broadcast over columns would ruin the small ones."""
    w = normal(*shape) * 10.0 ** torch.linspace(-3, 3, shape[0])[:, None]
    d = quantize_rtn(w, QuantSpec(8, group_size, **plain)).dequantize()
    assert ((d - w).norm(dim=1) / w.norm(dim=1)).max() < 0.02


def test_each_group_has_its_own_scale():
    w = normal(4, 64)
    w[:, 0] *= 1000  # an outlier spoils its own group only
    d = quantize_rtn(w, QuantSpec(4, 16)).dequantize()
    assert relative(d[:, 16:], w[:, 16:]) < 0.12
    assert relative(quantize_rtn(w, QuantSpec(4, None)).dequantize()[:, 16:], w[:, 16:]) > 0.9


@pytest.mark.parametrize("std, bits, bound", [(1e-4, 8, 0.02), (2e-3, 4, 0.12), (1e-6, 4, 0.15)])
def test_tiny_weights_keep_their_relative_error(std, bits, bound):
    """No absolute floor on the scale. At 1e-6 the fp16 scale is subnormal: a few bits left."""
    w = normal(16, 64, std=std)
    assert relative(quantize_rtn(w, QuantSpec(bits, 16)).dequantize(), w) < bound


def test_subnormal_scales_are_not_rounded_down_into_clipping():
    # Range 1.4 units of 2**-24 a step: rounded down to 1 unit, the ends would be cut off.
    w = torch.linspace(0, 255 * 1.4 * 2.0**-24, 256).unsqueeze(0)
    q = quantize_rtn(w, QuantSpec(8, None, **plain))
    assert q.scale.item() == 2 * 2.0**-24  # the next one up, and no further
    assert ((q.dequantize() - w).abs() / steps(q)).max() <= 0.501


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    clip_search=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_codes_are_those_of_the_stored_scale(bits, symmetric, clip_search, seed):
    """Encoding again with the stored fp16 grid gives the stored codes: from the weights,
    and from the dequantized weights."""
    w = normal(3, 32, seed=seed, std=0.02)
    spec = QuantSpec(bits, 8, symmetric, clip_search)
    q = quantize_rtn(w, spec)
    assert (q.scale.dtype, q.zero_point.dtype) == (torch.float16, torch.uint8)
    codes = unpack(q.codes, bits, q.shape).float()
    scale, zero = q.scale.float().unsqueeze(-1), q.zero_point.float().unsqueeze(-1)
    for dense in (w, q.dequantize()):
        again = encode(dense.unflatten(1, (4, 8)), scale, zero, spec.max_code).flatten(1)
        assert torch.equal(again, codes)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grids_have_their_zero_in_the_middle(bits):
    q = quantize_rtn(normal(4, 32), QuantSpec(bits, 8, symmetric=True))
    assert (q.zero_point == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_clip_search_is_never_worse_in_its_own_norm(bits, symmetric):
    w = normal(64, 32)

    def error(clip_search):
        scale, zero = fit_grid(w, QuantSpec(bits, None, symmetric, clip_search))
        q = encode(w, scale[:, None], zero[:, None], 2**bits - 1)
        return ((q - zero[:, None]) * scale[:, None] - w).abs().pow(CLIP_NORM).sum(-1)  # (rows,)

    assert (error(True) <= error(False)).all()
    if bits <= 3:  # few levels: cutting the tails pays
        assert error(True).sum() < 0.9 * error(False).sum()


def every_ratio(w, spec, importance=None):
    """The search without its shortcuts: each group on each of the grids."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    grids = [_grid_of_range(low * r, high * r, spec) for r in CLIP_RATIOS.tolist()]
    scale, zero = (torch.stack(parts) for parts in zip(*grids))  # (ratios, groups)
    q = encode(w, scale[..., None], zero[..., None], spec.max_code)  # (ratios, groups, size)
    errors = ((q - zero[..., None]) * scale[..., None] - w).abs().pow(CLIP_NORM)
    # The first of equals, as in the search.
    errors = errors if importance is None else errors * importance
    best = errors.sum(-1).argmin(0, keepdim=True)  # (1, groups)
    return scale.gather(0, best)[0], zero.gather(0, best)[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [pytest.param(1, marks=LONG), pytest.param(3, marks=LONG), 16])
def test_groups_that_leave_the_search_early_had_their_best_grid(bits, symmetric, size):
    w = normal(160, size) * normal(160, 1, seed=1).exp() * 0.02
    w[:40] = w[:40] ** 3  # heavy tails
    w[40:60], w[60:80] = w[40:60].abs(), -w[60:80].abs()
    w[80:90], w[90:100], w[100:110] = 0, 0.3, w[100:110] * 1e-6  # subnormal scales
    w, spec = w.double(), QuantSpec(bits, None, symmetric)
    columns = normal(size, seed=2, std=2.0).exp().double()  # some a thousand times as important
    for importance in (None, columns, columns * 0):
        got, want = fit_grid(w, spec, importance), every_ratio(w, spec, importance)
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_each_group_has_its_own_importance():
    """(out, groups, size): groups of a row, and the rows of several pieces of the search."""
    w, importance = normal(40, 3, 8).double(), normal(3, 8, seed=1).exp().double()
    spec = QuantSpec(2, 8)
    got = fit_grid(w, spec, importance)
    for g in range(3):
        for all_, alone in zip(got, fit_grid(w[:, g], spec, importance[g]), strict=True):
            assert torch.equal(all_[:, g], alone)
    assert not torch.equal(got[0], fit_grid(w, spec)[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_doubled_weights_double_the_scale_only(bits, symmetric):
    """A power of two is exact in fp16 too, so that the codes stay the same."""
    w = normal(6, 32, std=0.05)
    a, b = (quantize_rtn(v, QuantSpec(bits, 16, symmetric)) for v in (w, 2 * w))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.zero_point, b.zero_point)
    assert torch.equal(2 * a.scale.float(), b.scale.float())


@pytest.mark.parametrize("bits", BITS)
def test_permuted_rows_and_whole_groups_permute_the_result(bits):
    w = normal(6, 32)
    spec = QuantSpec(bits, 8)
    rows, groups = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 3, 1])
    moved = w[rows].unflatten(1, (4, 8))[:, groups].flatten(1)
    want = quantize_rtn(w, spec).dequantize()[rows].unflatten(1, (4, 8))[:, groups].flatten(1)
    assert torch.equal(quantize_rtn(moved, spec).dequantize(), want)


def by_hand(group: list[float], spec: QuantSpec) -> tuple[float, int, list[int]]:
    """Scale, zero-point and codes of one group, in Python's floats."""
    low, high, top = min(0, *group), max(0, *group), 2**spec.bits - 1
    if spec.symmetric:
        low, high = min(low, -high), max(-low, high)
    scale = float(torch.tensor((high - low) / top, dtype=torch.float64).half()) or 1.0
    zero = 2 ** (spec.bits - 1) if spec.symmetric else min(top, max(0, round(-low / scale)))
    return scale, zero, [min(top, max(0, round(w / scale + zero))) for w in group]


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([1, 4, 12, None]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 10**6),
)
def test_without_a_search_the_grid_spans_the_group_and_zero(
    bits, group_size, symmetric, shift, seed
):
    w = normal(3, 12, seed=seed, dtype=torch.float64) + shift
    w[0, :4] = 0
    spec = QuantSpec(bits, group_size, symmetric, **plain)
    q = quantize_rtn(w, spec)
    got = q.scale.flatten().tolist(), q.zero_point.flatten().tolist(), q.unpacked(slice(None))
    scales, zeros, codes = zip(*(by_hand(g.tolist(), spec) for g in w.view(q.scale.numel(), -1)))
    assert got[0] == list(scales) and got[1] == list(zeros)
    assert got[2].flatten().tolist() == sum(codes, [])


def test_the_usual_grid_and_search():
    """Groups of 64 at 4 bits; GPTQModel's search: 2.4 as exponent, ranges of 1.00 to 0.26."""
    assert QuantSpec() == QuantSpec(4, 64, False, True) and CLIP_NORM == 2.4
    assert CLIP_RATIOS[0] == 1 and CLIP_RATIOS.diff().allclose(torch.tensor(-1 / 80))
    assert 0.26 < CLIP_RATIOS[-1] < 0.27 and CLIP_RATIOS.dtype == torch.float32


def test_grids_are_fitted_in_the_dtype_of_the_weight():
    for dtype in (torch.float32, torch.float64):
        for clip_search in (False, True):
            fitted = fit_grid(normal(5, 8, dtype=dtype), QuantSpec(3, 8, clip_search=clip_search))
            assert [t.dtype for t in fitted] == [dtype, dtype] and fitted[0].shape == (5,)


@PROPERTY
@given(
    out=st.integers(0, 700),
    in_features=st.integers(0, 9),
    unit=st.sampled_from([1, 3, 32, 80]),
    piece=st.sampled_from([1, 500, 2000]),
)
def test_rows_go_in_order_a_few_at_a_time_in_whole_units(out, in_features, unit, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "PIECE", piece)
        slices = row_slices(torch.Size([out, in_features]), torch.device("cpu"), unit)
        whole = row_slices(torch.Size([out, in_features]), torch.device("meta"), unit)
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(out))
    least = math.lcm(unit, 64)
    for s in slices[:-1]:
        assert (s.stop - s.start) % least == 0
        width = max(1, in_features)
        assert piece - width < (s.stop - s.start) * width < piece + least * width
    assert whole == [slice(0, out)] and (slices[:-1] or slices == whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_in_pieces_it_is_the_same(monkeypatch, dtype):
    w, importance = normal(200, 48), normal(48, seed=1).exp().view(4, 12)
    spec, h = QuantSpec(3, 12), Hessian(48)
    h.update(ar1(200, 48, seed=3))

    def results():
        for options in (GPTQOptions(), GPTQOptions(static_groups=False)):
            yield gptq_quantize(w, h, spec, options).dequantize(dtype)
        yield quantize_rtn(w, spec).dequantize(dtype)
        yield torch.stack(fit_grid(w.view(200, 4, 12), spec, importance))

    at_once = [*results()]
    monkeypatch.setattr(grid, "PIECE", 64 * 48)
    monkeypatch.setattr(grid, "SEARCH_AT_ONCE", (7 * 48, 0))
    assert all(torch.equal(*pair) for pair in zip(results(), at_once, strict=True))


def test_sizes_add_up():
    w = normal(32, 128)
    q = quantize_rtn(w, QuantSpec(4, 64))
    assert q.codes.numel() * 2 == w.numel()
    assert q.nbytes == 32 * 64 + 32 * 2 * 2 + 32 * 2  # codes, fp16 scales, uint8 zero-points
    assert q.bits_per_weight == 4 + (16 + 8) / 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_rounds_once_to_the_dtype_asked_for(dtype):
    q = quantize_rtn(normal(8, 32), QuantSpec(3, 8))
    d = q.dequantize(dtype)
    assert d.dtype == dtype
    # (q - z) * scale has at most 8 + 11 significant bits: exact in fp32
    assert torch.equal(d, q.dequantize(torch.float64).to(dtype))


def test_half_precision_weights_are_quantized_as_their_fp32_values():
    w = normal(8, 32).bfloat16()
    a, b = (quantize_rtn(v, QuantSpec(4, 8)) for v in (w, w.float()))
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)


def shuffled(bits: int, symmetric: bool = False):
    """A tensor whose groups are scattered over the columns (act-order, dynamic groups)."""
    h = Hessian(48)
    h.update(ar1(200, 48, seed=3) * normal(48, seed=6).exp())
    options = GPTQOptions(desc_act=True, static_groups=False)
    q = gptq_quantize(normal(20, 48, seed=4), h, QuantSpec(bits, 12, symmetric), options)
    assert q.g_idx.dtype == torch.int32 and not torch.equal(q.g_idx, q.g_idx.sort().values)
    return q


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [12, None, "shuffled"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integer_product_equals_the_product_of_the_dequantized(bits, group_size, symmetric):
    """The integer sums are exact, so only the fp32 sums over groups round: a few ulp of the
    sum of absolute terms, which bounds them even where the terms cancel."""
    if group_size == "shuffled":
        q = shuffled(bits, symmetric)
    else:
        q = quantize_rtn(normal(20, 48, seed=4), QuantSpec(bits, group_size, symmetric))
    x = normal(2, 7, 48, seed=5) + 0.5  # not centred: the corrections matter
    a, scale, zero = quantize_activations(x.reshape(-1, 48))
    xq = scale.double() * (a - zero).double()  # (14, 48)
    w = q.dequantize(torch.float64)
    got = quant_matmul(x, q)
    assert got.shape == (2, 7, 20) and got.dtype == torch.float32
    bound = 8 * torch.finfo(torch.float32).eps * (xq.abs() @ w.abs().t())
    assert ((got.reshape(-1, 20) - xq @ w.t()).abs() <= bound).all()
    assert relative(got, x @ w.float().t()) < 0.02  # 8-bit activations are that good


def test_groups_of_different_sizes_are_refused():
    """Integer products take a group's features together, as many in each."""
    q = replace(quantize_rtn(normal(4, 8), QuantSpec(4, 4)), g_idx=torch.tensor([0, 1] * 4))
    quant_matmul(normal(2, 8), q)
    for g_idx in ([0, 1, 0, 1, 1, 1, 0, 1], [0] * 8, [0, 0, 0, 0, 1, 1, 1, 2]):
        with pytest.raises(ValueError, match="2 groups of 4 input features each are expected"):
            quant_matmul(normal(2, 8), replace(q, g_idx=torch.tensor(g_idx)))


def test_each_token_has_its_own_activation_grid():
    x = torch.stack([normal(32), 1000 * normal(32, seed=1), torch.zeros(32)])
    a, scale, zero = quantize_activations(x)
    assert a.dtype == torch.int32 and a.min() >= 0 and a.max() <= 255
    assert ((scale * (a - zero) - x).abs() <= 0.51 * scale).all()
    assert torch.equal((scale * (a - zero))[2], x[2])
    assert a[:2].amin(1).tolist() == [0, 0] and a[:2].amax(1).tolist() == [255, 255]
    # One that has no zero between its ends is spanned from zero.
    a, scale, zero = quantize_activations(torch.tensor([[0.5, 1.0], [-1.0, -0.5]]))
    assert zero.tolist() == [[0], [255]] and (scale * 255 - 1).abs().max() < 1e-6
    assert a[0, 1] == 255 and a[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_of_any_dtype_and_a_single_token(dtype):
    x, q = normal(32).to(dtype), quantize_rtn(normal(6, 32), QuantSpec(4, 8))
    a, scale, zero = quantize_activations(x[None])
    assert (a.dtype, scale.dtype, zero.dtype) == (torch.int32, torch.float32, torch.int32)
    assert (a.shape, scale.shape, zero.shape) == ((1, 32), (1, 1), (1, 1))
    got = quant_matmul(x, q)
    assert got.shape == (6,) and torch.equal(got, quant_matmul(x.float()[None], q)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused(bad):
    w = normal(4, 8)
    w[1, 2] = w[3, 3] = bad
    with pytest.raises(ValueError, match="2 NaN or Inf"):
        quantize_rtn(w, QuantSpec(4, 8))
    with pytest.raises(ValueError, match="activations hold NaN or Inf"):
        quant_matmul(w, quantize_rtn(normal(4, 8), QuantSpec(4, 8)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_are_refused_where_a_scale_is_beyond_fp16(bits, symmetric, sign):
    """A scale is one step of the grid, not the span of the weights."""
    spec = QuantSpec(bits, None, symmetric)
    most = torch.finfo(torch.float16).max * (2**bits - 1)  # what the grid can span
    one_sided = sign * torch.tensor([[0.0, most / 4, most / (2 if symmetric else 1)]])
    w = 0.99 * one_sided
    q = quantize_rtn(w, spec)
    assert q.scale.isfinite().all() and relative(q.dequantize(), w) < 2 / 2**bits
    with pytest.raises(ValueError, match=f"an fp16 scale can hold in {2**bits - 1} steps"):
        quantize_rtn(1.01 * one_sided, spec)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="group_size=24 does not divide in_features=64"):
        quantize_rtn(normal(4, 64), QuantSpec(4, 24))
    with pytest.raises(ValueError, match=r"bits=5 is not supported; choose one of \(2, 3, 4, 8\)"):
        QuantSpec(5)
    for size in (0, -64):
        with pytest.raises(ValueError, match=f"group_size={size} must be positive"):
            QuantSpec(4, size)
    for w in (torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4), torch.zeros(2, 4, 8)):
        with pytest.raises(ValueError, match="floating-point matrix"):
            quantize_rtn(w, QuantSpec(4, None))
    with pytest.raises(ValueError, match="span 2e\\+06, more than an fp16 scale"):
        quantize_rtn(torch.tensor([[-1e6, 1e6]]), QuantSpec(4, None))
    with pytest.raises(ValueError, match="x has 7 features, the weight takes 8"):
        quant_matmul(normal(2, 7), quantize_rtn(normal(4, 8), QuantSpec(4, 8)))


@pytest.mark.parametrize("given", [
    {"bits": 4.0}, {"bits": "4"}, {"bits": True}, {"group_size": 64.0}, {"group_size": "64"},
    {"group_size": True}, {"symmetric": "no"}, {"symmetric": 1}, {"clip_search": None},
])  # fmt: skip
def test_settings_that_mean_nothing_are_named(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        QuantSpec(**given)


def test_parts_that_do_not_fit_or_mean_nothing_are_named():
    good = replace(quantize_rtn(normal(4, 64), QuantSpec(4, 16)),
                   g_idx=torch.arange(64, dtype=torch.int32) % 4)  # fmt: skip
    good.check()
    nan, far = torch.full_like(good.scale, float("nan")), good.g_idx.clone()
    far[7] = 4
    bad = {
        "codes": [good.codes[:, :-1], good.codes.int()],
        "scale": [good.scale[:, :-1], nan, good.scale.int(), nan.fill_(float("-inf")), None],
        "zero_point": [good.zero_point + 16, good.zero_point[:2], good.zero_point.int(), None],
        "g_idx": [far, -far, good.g_idx.long(), good.g_idx[:-1]],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                replace(good, **{name: value}).check()
