"""Scales fitted to known codes: least squares itself, and what it promises."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora_lib.quant import refit
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantizedTensor, QuantSpec, assemble, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.refit import refit_scales
from tests.support.slow_gptq import damped, objective
from tests.support.tensors import ar1, bf16_autocast, normal, relative

OUT, IN, SIZE = 24, 96, 16


def inputs(seed=1, tokens=600, features=IN) -> Tensor:
    """Correlated, their columns of different sizes, fp64 (tokens, in)."""
    x = ar1(tokens, features, seed=seed) * normal(features, seed=2, std=0.7).exp()
    return x.double()


def moment(x: Tensor) -> Tensor:
    hessian = Hessian(x.shape[1], dtype=torch.float64)
    hessian.update(x)
    return hessian.matrix


def rounded(bits=3, static=True, symmetric=False) -> tuple[Tensor, QuantizedTensor, Tensor]:
    """A weight (OUT, IN), GPTQ's rounding of it, and the matrix of its Hessian, all fp64."""
    w, h = normal(OUT, IN, seed=3, std=0.02, dtype=torch.float64), moment(inputs())
    spec = QuantSpec(bits, SIZE, symmetric)
    return w, gptq_quantize(w, h, spec, GPTQOptions(static_groups=static)), h


def group_of(quantized: QuantizedTensor) -> Tensor:
    return torch.arange(IN) // SIZE if quantized.g_idx is None else quantized.g_idx.long()


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_equals_least_squares_over_the_tokens(static):
    """Each row's scales by torch.linalg.lstsq: the damping is one more token a column, whose
    input is sqrt(damping) there. Half a step of fp16 is 2^-11 of a value."""
    x = inputs()
    w, quantized, h = rounded(static=static)
    got = refit_scales(w, quantized, h, 0.05).scale.double()
    damping = 0.05 * h.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    seen = torch.cat([x / len(x) ** 0.5, damping.sqrt()])  # (tokens + in, in)
    groups = group_of(quantized)
    whole = quantized.unpacked(slice(None)).double() - quantized.zero_point[:, groups]
    for row in range(OUT):
        parts = torch.stack([seen @ (whole[row] * (groups == g)) for g in range(IN // SIZE)], 1)
        want = torch.linalg.lstsq(parts, (seen @ w[row]).unsqueeze(1)).solution.flatten()
        assert (want > 0).all()
        assert ((got[row] - want).abs() <= 2**-11 * want + 1e-12).all()


@pytest.mark.long
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.sampled_from([2, 3, 4, 8]), st.booleans(), st.booleans(), st.sampled_from([0.001, 0.1]))
def test_only_scales_change_and_no_row_gets_worse(bits, static, symmetric, damping):
    w, quantized, h = rounded(bits, static, symmetric)
    found = refit_scales(w, quantized, h, damping)
    for name in ("codes", "zero_point", "g_idx", "shape", "spec"):
        assert getattr(found, name) is getattr(quantized, name)
    assert found.scale.dtype == torch.float16 and (found.scale > 0).all()
    errors = [w - q.dequantize(torch.float64) for q in (quantized, found)]
    before, after = ((e @ damped(h, damping) * e).sum(1) for e in errors)  # (out,)
    assert (after <= before * (1 + 1e-9)).all()
    assert after.sum() < before.sum()


def test_wrong_scales_are_found_again():
    """A weight that lies on its grid, handed over with scales that are off by up to a half."""
    spec, groups = QuantSpec(4, SIZE), IN // SIZE
    codes = torch.randint(0, 16, (OUT, IN), generator=torch.Generator().manual_seed(0))
    zero = torch.full((OUT, groups), 7)
    right = (0.01 + normal(OUT, groups, seed=4).abs()).half().double()
    weight = assemble(codes, right, zero, None, spec).dequantize(torch.float64)
    wrong = right * (1 + torch.linspace(-0.5, 0.5, groups))
    found = refit_scales(weight, assemble(codes, wrong, zero, None, spec), moment(inputs()))
    assert torch.equal(found.scale.double(), right)


def test_a_group_of_zeros_keeps_its_scale():
    w, _, h = rounded()
    w[:, :SIZE] = 0
    w[3] = 0
    quantized = quantize_rtn(w, QuantSpec(3, SIZE))
    found = refit_scales(w, quantized, h)
    assert torch.equal(found.scale[:, 0], quantized.scale[:, 0])
    assert torch.equal(found.scale[3], quantized.scale[3])
    assert (found.scale[:3, 1:] != quantized.scale[:3, 1:]).any()


def test_a_scale_that_would_be_negative_stays():
    """Inputs of two groups nearly alike; the codes of the second have the wrong sign."""
    w = torch.tensor([[1.0, 1.0, 0.9, 0.9]], dtype=torch.float64)
    x = normal(200, 2, dtype=torch.float64)
    h = moment(torch.cat([x, x + 0.01 * normal(200, 2, seed=5, dtype=torch.float64)], 1))
    codes, zero = torch.tensor([[3, 3, 0, 0]]), torch.tensor([[1, 2]])
    quantized = assemble(codes, torch.tensor([[0.5, 0.4]]), zero, None, QuantSpec(2, 2))
    found = refit_scales(w, quantized, h, 0.0)
    assert found.scale[0, 1] == quantized.scale[0, 1] and (found.scale > 0).all()


def test_rows_go_through_memory_a_few_at_a_time(monkeypatch):
    w, quantized, h = rounded()
    at_once = refit_scales(w, quantized, h)
    monkeypatch.setattr(refit, "ROWS", 7)  # does not divide 24
    few = refit_scales(w, quantized, h).scale
    torch.testing.assert_close(few, at_once.scale, rtol=2**-10, atol=0)  # a step of fp16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_held_out_error_falls_much_after_rounding_to_nearest(bits):
    seen, held = inputs(tokens=8192, features=256).split(4096)
    w = normal(256, 256, seed=3, std=0.02, dtype=torch.float64)
    nearest = quantize_rtn(w, QuantSpec(bits, 64))
    found = refit_scales(w, nearest, moment(seen))
    error = [relative(held @ q.dequantize(torch.float64).T, held @ w.T) for q in (nearest, found)]
    print(f"{bits} bits: {error[1] / error[0]:.3f} of the error")
    assert error[1] < 0.95 * error[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gptq_s_option_keeps_the_codes_and_lowers_the_objective(dtype):
    w, _, h = rounded()
    w, h, spec = w.to(dtype), h.to(dtype), QuantSpec(2, SIZE)
    plain, found = (
        gptq_quantize(w, h, spec, GPTQOptions(refit_scales=on)) for on in (False, True)
    )
    assert torch.equal(plain.codes, found.codes)
    assert torch.equal(found.scale, refit_scales(w, plain, h).scale)
    losses = [objective(w, q.dequantize(dtype), damped(h, 0.01)) for q in (plain, found)]
    assert losses[1] < 0.98 * losses[0]


def test_with_match_dense_the_scales_aim_at_the_dense_target_too():
    x = inputs()
    hessian = Hessian(IN, dtype=torch.float64)
    hessian.update(x, x + 0.3 * inputs(seed=9))
    w = normal(OUT, IN, seed=3, std=0.02, dtype=torch.float64)
    spec = QuantSpec(3, SIZE)
    plain = gptq_quantize(w, hessian, spec, GPTQOptions(match_dense=True))
    found = gptq_quantize(w, hessian, spec, GPTQOptions(match_dense=True, refit_scales=True))
    target = dense_target(w, hessian, 0.01)
    assert torch.equal(found.scale, refit_scales(target, plain, hessian.matrix).scale)


def test_another_shape_is_refused():
    w, quantized, h = rounded()
    with pytest.raises(ValueError, match=r"quantized is \(24, 96\), weight \(12, 96\)"):
        refit_scales(w[:12], quantized, h)
    with pytest.raises(ValueError, match=r"h \(95, 95\)"):
        refit_scales(w, quantized, h[1:, 1:])


def test_groups_of_different_sizes_are_refused():
    w, quantized, h = rounded(static=False)
    assert quantized.g_idx is not None
    g_idx = quantized.g_idx.clone()
    g_idx[g_idx == 0] = 1
    with pytest.raises(ValueError, match=f"groups of {SIZE} input features each are expected"):
        refit_scales(w, replace(quantized, g_idx=g_idx), h)


def test_a_trained_weight_and_autocast_change_nothing():
    w, quantized, h = rounded()
    w, h = w.float(), h.float()
    with bf16_autocast():
        got = refit_scales(w.clone().requires_grad_(), quantized, h)
    assert torch.equal(got.scale, refit_scales(w, quantized, h).scale)
    assert not got.scale.requires_grad
