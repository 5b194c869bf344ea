"""Weights in E4M3 and E5M2: by torch's own casts, by GPTQ, and what is refused."""

from dataclasses import replace

import pytest
import torch

from qlora_lib.quant import grid
from qlora_lib.quant.fp8 import FP8Spec, FP8Tensor
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize, output_error
from qlora_lib.quant.hessian import Hessian
from tests.support.tensors import ar1, normal

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
each = pytest.mark.parametrize("form", TORCH)


@each
def test_codes_are_torch_s_of_rows_that_end_at_the_largest_level(form):
    w = normal(16, 40) * 10.0 ** torch.linspace(-30, 30, 16).unsqueeze(1)
    w[3] = 0
    q = FP8Spec(form).quantize(w)
    q.check()
    largest = torch.finfo(TORCH[form]).max
    scale = w.abs().amax(1, True) / largest
    scale[3] = 1
    want = (w / scale).to(TORCH[form])
    assert torch.equal(q.scale, scale) and torch.equal(q.codes, want.view(torch.uint8))
    assert torch.equal(q.dequantize(), want.float() * scale)
    assert q.bits_per_weight == 8 + 32 / 40


@each
def test_the_largest_weights_of_fp32_stay_finite(form):
    w = torch.full((2, 32), torch.finfo(torch.float32).max) * torch.tensor([[1.0], [1 - 2**-24]])
    q = FP8Spec(form).quantize(w)
    q.check()
    assert torch.allclose(q.dequantize(), w, rtol=1e-6)


@each
def test_in_pieces_it_is_the_same(form, monkeypatch):
    q = FP8Spec(form).quantize(normal(130, 40))
    want = q.codes.view(TORCH[form]).float() * q.scale
    monkeypatch.setattr(grid, "PIECE", 1)
    assert [len(w) for _, w in q.pieces(torch.float32)] == [64, 64, 2]
    assert torch.equal(q.dequantize(torch.float16), want.half())


@each
def test_gptq_loses_less_of_the_outputs_and_nothing_else_without_correlation(form):
    x, w, h = ar1(1024, 64), normal(32, 64, seed=1, std=0.02), Hessian(64)
    h.update(x)
    spec = FP8Spec(form)
    rtn, gptq = spec.quantize(w), gptq_quantize(w, h, spec)
    assert isinstance(gptq, FP8Tensor) and torch.equal(gptq.scale, rtn.scale)
    gptq.check()
    assert output_error(w, gptq.dequantize(), h) < 0.7 * output_error(w, rtn.dequantize(), h)
    assert torch.equal(gptq_quantize(w, torch.eye(64), spec).codes, rtn.codes)
    with pytest.raises(ValueError, match="refit_scales=True is for integer grids"):
        gptq_quantize(w, h, spec, GPTQOptions(refit_scales=True))


@pytest.mark.parametrize("changes, message", [
    ({"codes": torch.full((4, 32), 127, dtype=torch.uint8)}, "codes hold NaN or Inf of e4m3"),
    ({"codes": torch.zeros(4, 16, dtype=torch.uint8)}, "codes is"),
    ({"scale": torch.zeros(4, 1)}, "not positive"),
    ({"scale": torch.full((4, 1), 1e38)}, "makes no finite weights"),
    ({"scale": torch.full((4, 1), torch.nan)}, "NaN or Inf"),
    ({"scale": torch.ones(4, 1).half()}, "scale is"),
])  # fmt: skip
def test_tensors_that_mean_nothing_are_refused(changes, message):
    good = FP8Spec().quantize(normal(4, 32))
    good.check()
    with pytest.raises(ValueError, match=message):
        replace(good, **changes).check()


def test_an_infinity_of_e5m2_is_refused_too():
    good = FP8Spec("e5m2").quantize(normal(4, 32))
    good.codes[0, 0] = 124
    with pytest.raises(ValueError, match="codes hold NaN or Inf of e5m2"):
        good.check()


def test_other_formats_and_weights_are_refused():
    assert FP8Spec() == FP8Spec("e4m3") and FP8Spec().bits == 8 and FP8Spec().groups(40) == 1
    assert {FP8Spec("e5m2"): 1}[FP8Spec("e5m2")] == 1  # fit to be a key
    with pytest.raises(ValueError, match="format='e2m1' must be one of e4m3, e5m2"):
        FP8Spec("e2m1")
    with pytest.raises(ValueError, match="NaN or Inf"):
        FP8Spec().quantize(torch.full((2, 2), torch.inf))
