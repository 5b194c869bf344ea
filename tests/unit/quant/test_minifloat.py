"""Floats of 4 and 8 bits: by their definition, by a search over all values, and as torch casts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant.minifloat import (
    MINIFLOATS,
    decode_float,
    encode_float,
    float_levels,
    quantize_fp8,
)
from tests.support.tensors import PROPERTY, normal

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
NAMES = st.sampled_from(["e2m1", "e4m3", "e5m2"])


def by_definition(code: int, name: str) -> float:
    """(-1)^sign 2^(e - bias) (1 + m / 2^M), or 2^(1 - bias) m / 2^M where e is 0."""
    exponent, mantissa = (int(n) for n in (name[1], name[3]))
    bias = 2 ** (exponent - 1) - 1
    sign = -1 if code >> exponent + mantissa else 1
    e, m = code >> mantissa & 2**exponent - 1, code & 2**mantissa - 1
    if name == "e4m3" and (e, m) == (15, 7) or name == "e5m2" and e == 31 and m:
        return math.nan
    if name == "e5m2" and e == 31:
        return sign * math.inf
    part = m / 2**mantissa
    return sign * (2.0 ** (e - bias) * (1 + part) if e else 2.0 ** (1 - bias) * part)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_code_stands_for_its_definition_s_value(name):
    codes = torch.arange(2 ** MINIFLOATS[name].bits, dtype=torch.uint8)
    want = torch.tensor([by_definition(code, name) for code in codes.tolist()])
    got = decode_float(codes, name)
    assert got.dtype == torch.float32 and torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))
    known = ~want.isnan()
    assert torch.equal(got.signbit()[known], want.signbit()[known])  # -0 too
    levels = float_levels(name)
    assert torch.equal(levels, want[want.isfinite()]) and len(levels) == {4: 16, 8: 256}[
        MINIFLOATS[name].bits
    ] - {"e2m1": 0, "e4m3": 2, "e5m2": 8}[name]
    assert levels.max() == MINIFLOATS[name].largest


def test_the_levels_of_e2m1():
    assert float_levels("e2m1").tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert float_levels("e2m1").tolist()[9:] == [-0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_come_back(name, dtype):
    levels = float_levels(name).to(dtype)  # which hold them all exactly
    codes = encode_float(levels, name)
    assert codes.dtype == torch.uint8 and len(codes.unique()) == len(levels)
    assert torch.equal(decode_float(codes, name), levels.float())


@PROPERTY
@given(NAMES, st.floats(allow_nan=False, width=32))
def test_it_is_the_nearest_value_the_even_code_of_two_and_the_largest_beyond(name, x):
    """Against a search over all levels, in float64, which holds distances of fp32 exactly enough
    to tell the nearer one; distances beyond 2^53 of a step are equal only where x saturates."""
    levels = [v for v in float_levels(name).tolist() if math.copysign(1, v) == math.copysign(1, x)]
    code = int(encode_float(torch.tensor([x]), name))
    got = float(decode_float(torch.tensor([code], dtype=torch.uint8), name))
    assert math.copysign(1, got) == math.copysign(1, x)
    if abs(x) >= MINIFLOATS[name].largest:
        assert abs(got) == MINIFLOATS[name].largest
        return
    distance = sorted((abs(level - x), level) for level in levels)
    assert abs(got - x) == distance[0][0]
    if distance[0][0] == distance[1][0]:
        assert code % 2 == 0


@pytest.mark.parametrize("name", MINIFLOATS)
def test_halfway_it_is_the_even_code(name):
    levels = float_levels(name)
    levels = levels[: len(levels) // 2].double()  # ascending from 0
    codes = encode_float((levels[1:] + levels[:-1]) / 2, name)
    want = torch.arange(len(levels) - 1)
    assert torch.equal(codes.int(), want + want % 2)


@pytest.mark.parametrize("name", TORCH)
def test_eight_bits_are_those_that_torch_casts_to(name):
    largest = MINIFLOATS[name].largest
    x = normal(20000) * 10.0 ** torch.linspace(-10, 6, 20000)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-45, -1e-45])]).clamp(-largest, largest)
    assert torch.equal(encode_float(x, name), x.to(TORCH[name]).view(torch.uint8))


def test_infinity_saturates_and_zero_keeps_its_sign():
    x = torch.tensor([torch.inf, -torch.inf, 1e30, 0.0, -0.0, -1e-30])
    assert encode_float(x, "e2m1").tolist() == [7, 15, 7, 0, 8, 8]
    assert encode_float(x, "e4m3").tolist() == [0x7E, 0xFE, 0x7E, 0, 0x80, 0x80]


@pytest.mark.parametrize("call, message", [
    (lambda: encode_float(torch.tensor([1.0, torch.nan]), "e4m3"), "x holds NaN"),
    (lambda: encode_float(torch.tensor([1]), "e4m3"), "must be floating point"),
    (lambda: encode_float(torch.ones(1), "e3m2"), "'e3m2' must be one of e2m1, e4m3, e5m2"),
    (lambda: decode_float(torch.tensor([0, 16], dtype=torch.uint8), "e2m1"), "uint8 below 16"),
    (lambda: decode_float(torch.tensor([1]), "e4m3"), "uint8 below 256, got torch.int64"),
    (lambda: float_levels("fp8"), "'fp8' must be one of"),
    (lambda: quantize_fp8(torch.ones(2, 2), "e2m1"), "takes e4m3 or e5m2, not 'e2m1'"),
    (lambda: quantize_fp8(torch.tensor([torch.inf])), "NaN or Inf"),
])  # fmt: skip
def test_what_has_no_code_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dim", [-1, 0, None])
def test_fp8_spans_each_row_or_all(name, dim):
    x = normal(6, 40) * 10.0 ** torch.arange(-3, 3).unsqueeze(1)
    x[2] = 0
    codes, scale = quantize_fp8(x, name, dim)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.dtype == torch.float32
    assert scale.shape == {-1: (6, 1), 0: (1, 40), None: ()}[dim]
    assert dim != -1 or scale[2] == 1 and torch.equal(quantize_fp8(x, name)[1], scale)
    decoded = decode_float(codes, name) * scale
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    # The largest keeps its place; others err by half a step: 2^-(M + 1) of themselves, or half the
    # smallest step of all where they are subnormal.
    form = MINIFLOATS[name]
    assert torch.allclose(decoded.abs().amax(), most.max(), rtol=1e-6)
    step = 2.0 ** (form.least - form.mantissa) * scale
    room = torch.maximum(x.abs() * 2.0**-form.mantissa, step.expand_as(x)) / 2
    assert ((decoded - x).abs() <= room * (1 + 1e-5)).all()
    assert (decoded[2] == 0).all()
