"""MXFP4 and NVFP4 by their definition; test_compressed_tensors.py compares the bytes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant import grid
from qlora_lib.quant.fp4 import FP4Spec, FP4Tensor, quantize_fp4
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize, output_error
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.minifloat import float_levels
from qlora_lib.quant.packing import unpack
from tests.support.tensors import PROPERTY, ar1, normal, relative

MX, NV = FP4Spec("mxfp4"), FP4Spec("nvfp4")
BOTH = pytest.mark.parametrize("spec", [MX, NV], ids=lambda spec: spec.format)
LEVELS = float_levels("e2m1")


def scales_by_definition(q: FP4Tensor) -> torch.Tensor:
    """fp64 (out, blocks), from the bytes alone, E4M3 as torch reads it."""
    if q.spec.format == "mxfp4":
        return 2.0 ** (q.scale.double() - 127)
    return q.scale.view(torch.float8_e4m3fn).double() / q.tensor_scale.double()


@PROPERTY
@given(
    format=st.sampled_from(["mxfp4", "nvfp4"]), out=st.integers(1, 7), units=st.integers(1, 4),
    power=st.integers(-20, 20), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_each_weight_gets_the_nearest_level_of_its_block(format, out, units, power, seed):
    spec = FP4Spec(format)
    w = normal(out, 32 * units, seed=seed) * 10.0**power
    q = quantize_fp4(w, spec)
    q.check()
    assert q.codes.shape == (out, 16 * units) and q.scale.dtype == q.codes.dtype == torch.uint8
    scales = scales_by_definition(q).repeat_interleave(spec.block_size, 1)  # (out, in)
    codes = unpack(q.codes, 4, q.shape)
    values = LEVELS.double()[codes.long()] * scales
    assert torch.allclose(q.dequantize().double(), values, rtol=1e-6, atol=0)
    distance = (w.double() - values).abs()
    every = (w.double().unsqueeze(-1) - LEVELS.double() * scales.unsqueeze(-1)).abs()
    assert (distance <= every.amin(-1) + 1e-6 * scales).all()


@BOTH
def test_scales_are_the_formats_own(spec):
    """NVFP4: the tensor's largest weight is 6 times E4M3's largest. MXFP4: a power of two that
    leaves the block's largest weight in [3.5, 7)."""
    w = normal(64, 128) * 10.0 ** torch.linspace(-3, 0, 64).unsqueeze(1)
    q = quantize_fp4(w, spec)
    absmax = w.unflatten(1, (-1, spec.block_size)).abs().amax(-1)
    if spec == MX:
        assert q.tensor_scale is None
        assert ((absmax / q.block_scales() >= 3.5) & (absmax / q.block_scales() < 7)).all()
    else:
        assert torch.equal(q.tensor_scale, 448 * 6 / w.abs().max()) and int(q.scale.max()) == 0x7E
        want = (absmax / 6 * q.tensor_scale).to(torch.float8_e4m3fn)
        assert torch.equal(q.scale.view(torch.float8_e4m3fn).float(), want.float())
    assert q.bits_per_weight == {MX: 4.25, NV: 4.5 + 32 / w.numel()}[spec]


def test_the_exponent_rounds_up_where_the_largest_weight_would_be_cut():
    w = torch.zeros(4, 32)
    w[:, 3] = torch.tensor([6.99, 7.0, 4.0, 3.49])
    q = quantize_fp4(w, MX)
    assert q.scale.flatten().tolist() == [127, 128, 127, 126]
    assert q.dequantize()[:, 3].tolist() == [6, 8, 4, 3]


@BOTH
def test_zeros_stay_zeros_and_minus_zero_is_none(spec):
    w = normal(4, 64)
    w[1], w[2, :32], w[3] = 0, -0.0, w[3].abs()
    q = quantize_fp4(w, spec)
    assert (q.dequantize()[1] == 0).all() and (unpack(q.codes, 4, q.shape)[2, :32] == 0).all()
    assert (unpack(q.codes, 4, q.shape)[3] < 8).all()
    nothing = quantize_fp4(torch.zeros(2, 32), spec)
    nothing.check()
    assert (nothing.dequantize() == 0).all()


@BOTH
@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-30, 1e30, 5e36])
def test_sizes_at_the_ends_of_fp32(spec, factor):
    q = quantize_fp4(normal(3, 32) * factor, spec)
    q.check()
    assert torch.isfinite(q.dequantize()).all()
    if 1e-38 < factor:
        assert relative(q.dequantize() / factor, normal(3, 32)) < 0.2


@BOTH
def test_the_first_weight_is_in_the_low_nibble(spec):
    w = torch.zeros(1, 32)
    w[0, :3] = torch.tensor([6.0, -0.5, 1.5])
    assert quantize_fp4(w, spec).codes[0, :2].tolist() == [0x97, 0x03]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_in_pieces_it_is_the_same(monkeypatch, spec, dtype):
    q = quantize_fp4(normal(130, 96), spec)
    scales = q.block_scales().repeat_interleave(spec.block_size, 1)
    want = LEVELS[unpack(q.codes, 4, q.shape).long()] * scales
    monkeypatch.setattr(grid, "PIECE", 1)
    pieces = [*q.pieces(dtype)]
    assert [len(w) for _, w in pieces] == [64, 64, 2]
    assert q.dequantize(dtype).dtype == dtype and torch.equal(q.dequantize(dtype), want.to(dtype))


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_as_fp32(spec, dtype):
    w = normal(8, 64).bfloat16()
    assert torch.equal(quantize_fp4(w.to(dtype), spec).codes, quantize_fp4(w.float(), spec).codes)


@pytest.mark.parametrize("weight, message", [
    (normal(4, 40), "do not divide in_features=40"),
    (torch.full((4, 32), torch.nan), "128 NaN or Inf"),
    (torch.ones(4, 32).int(), "floating-point matrix"),
    (torch.full((1, 32), 3.3e38), "overflow fp32 in mxfp4"),
])
def test_weights_that_do_not_fit_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        quantize_fp4(weight, MX)


def test_only_known_formats():
    assert FP4Spec() == NV and (MX.block_size, NV.block_size, NV.bits) == (32, 16, 4)
    with pytest.raises(ValueError, match="format='fp4' must be one of mxfp4, nvfp4"):
        FP4Spec("fp4")


@pytest.mark.parametrize("spec, changes, message", [
    (MX, {"scale": torch.full((4, 2), 255, dtype=torch.uint8)}, "outside 0 to 252"),
    (MX, {"tensor_scale": torch.tensor(1.0)}, "MXFP4 has none"),
    (NV, {"scale": torch.full((4, 4), 127, dtype=torch.uint8)}, "outside 0 to 126"),
    (NV, {"scale": torch.full((4, 4), 130, dtype=torch.uint8)}, "outside 0 to 126"),
    (NV, {"scale": torch.zeros(4, 2, dtype=torch.uint8)}, "scale is"),
    (NV, {"scale": torch.zeros(4, 4)}, "scale is"),
    (NV, {"codes": torch.zeros(4, 64, dtype=torch.uint8)}, "codes is"),
    (NV, {"tensor_scale": None}, "tensor_scale is missing"),
    (NV, {"tensor_scale": torch.tensor(0.0)}, "makes no finite weights"),
    (NV, {"tensor_scale": torch.tensor(-1.0)}, "makes no finite weights"),
    (NV, {"tensor_scale": torch.tensor(1e-38)}, "makes no finite weights"),
    (NV, {"tensor_scale": torch.tensor(torch.nan)}, "NaN or Inf"),
    (NV, {"shape": torch.Size((4, 72))}, "do not divide in_features=72"),
])
def test_tensors_that_mean_nothing_are_refused(spec, changes, message):
    good = quantize_fp4(normal(4, 64), spec)
    good.check()
    with pytest.raises(ValueError, match=message):
        replace(good, **changes).check()


def columns_in_turn(w, h, spec, options) -> torch.Tensor:
    """The paper's update in float64, with the levels as they decode in fp32: each column's error
    goes to all after it."""
    order = torch.argsort(-h.diagonal(), stable=True) if options.desc_act else torch.arange(len(h))
    h = h + options.damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order])).T
    scales = quantize_fp4(w, spec).block_scales().repeat_interleave(spec.block_size, 1)
    w, scales, q = w[:, order].clone(), scales[:, order], torch.empty_like(w)
    for j in range(w.shape[1]):
        levels = (scales[:, j, None] * LEVELS).double()  # (out, 16)
        nearest = (w[:, j, None] - levels).abs().argmin(1)
        q[:, j] = levels.gather(1, nearest[:, None])[:, 0]
        w[:, j + 1 :] -= ((w[:, j] - q[:, j]) / u[j, j])[:, None] * u[j, j + 1 :]
    return q[:, torch.argsort(order)]


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (24, 96) and the matrix of a Hessian whose columns differ in size, fp64."""
    h = Hessian(96, dtype=torch.float64)
    h.update(ar1(600, 96, seed=1) * normal(96, seed=2, std=0.7).exp())
    return normal(24, 96, seed=3, std=0.02, dtype=torch.float64), h.matrix


@BOTH
@pytest.mark.parametrize("desc_act", [True, False], ids=["act-order", "in-order"])
def test_gptq_equals_the_paper_s_update(spec, desc_act):
    w, h = layer()
    for block_size in (1, 7, 32, 128):
        options = GPTQOptions(desc_act, block_size=block_size)
        got = gptq_quantize(w, h, spec, options)
        got.check()
        assert isinstance(got, FP4Tensor) and torch.equal(got.scale, quantize_fp4(w, spec).scale)
        want = columns_in_turn(w, h, spec, options)
        assert (got.dequantize(torch.float64) - want).abs().max() < 1e-10


@BOTH
def test_uncorrelated_inputs_reduce_gptq_to_round_to_nearest(spec):
    w = normal(16, 64)
    w[0], w[1, :32] = 0, -0.0
    q = gptq_quantize(w, torch.eye(64) * 7, spec)
    assert torch.equal(q.codes, quantize_fp4(w, spec).codes)


@BOTH
def test_gptq_loses_less_of_the_outputs(spec):
    x, w, h = ar1(2048, 128), normal(128, 128, seed=1, std=0.02), Hessian(128)
    h.update(x)
    rtn, gptq = (output_error(w, q.dequantize(), h)
                 for q in (quantize_fp4(w, spec), gptq_quantize(w, h, spec)))  # fmt: skip
    print(f"{spec.format}: round to nearest {rtn:.4f}, GPTQ {gptq:.4f}")
    assert gptq < 0.6 * rtn


@BOTH
@pytest.mark.parametrize("name, value", [
    ("weigh_columns", True), ("refit_scales", True), ("static_groups", False),
])
def test_options_of_integer_grids_are_refused(spec, name, value):
    w, h = layer()
    with pytest.raises(ValueError, match=f"{name}={value} is for integer grids"):
        gptq_quantize(w, h, spec, GPTQOptions(**{name: value}))


@BOTH
def test_damping_may_be_chosen_and_the_dense_model_aimed_at(spec):
    x, w = ar1(600, 96), normal(24, 96, seed=3, std=0.02)
    h = Hessian(96, halves=True)
    h.update(x, x + normal(600, 96, seed=5, std=0.1))
    q = gptq_quantize(w, h, spec, GPTQOptions(damp_percent=None, match_dense=True))
    q.check()
    assert output_error(w, q.dequantize(), h) < 0.3


def test_a_tensor_scale_may_be_that_of_more_weights():
    """Blocks beyond the largest weight that was said are cut at E4M3's largest scale."""
    w = normal(8, 64)
    q = quantize_fp4(w, NV, 2 * float(w.abs().max()))
    assert torch.equal(q.tensor_scale, quantize_fp4(2 * w, NV).tensor_scale)
    assert relative(q.dequantize(), w) < 0.15
    assert torch.equal(quantize_fp4(w, MX, 100.0).scale, quantize_fp4(w, MX).scale)
    cut = quantize_fp4(w, NV, 1.0).dequantize()
    assert (cut.abs() <= 1).all() and torch.equal(cut[cut.abs() == 1].sign(), w[cut.abs() == 1].sign())
