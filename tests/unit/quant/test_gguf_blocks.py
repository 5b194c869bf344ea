"""Blocks of GGUF, byte by byte: the gguf package's own where it rounds, our codes where we did."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qlora_lib.quant.gguf_blocks import (
    BLOCK,
    BYTES,
    dense_blocks,
    from_blocks,
    pack_blocks,
    to_blocks,
    unpack_blocks,
)
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian

gguf = pytest.importorskip("gguf")
KINDS = ["Q4_0", "Q4_1", "Q8_0"]
WEIGHTS = arrays.arrays(np.float32, (4, 2 * BLOCK), elements=st.floats(-100, 100, width=16))


def theirs(kind: str, weight: np.ndarray) -> np.ndarray:
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


def weight(seed: int = 0, rows: int = 8, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def nearest(kind: str, weight: np.ndarray) -> torch.Tensor:
    """llama.cpp's round to nearest, as its documents say it: d from the largest weight (Q4_0:
    with its sign, at code 0), or from the range (Q4_1), codes rounded half up."""
    w = torch.from_numpy(weight).unflatten(1, (-1, BLOCK))
    most = w.gather(-1, w.abs().max(-1, keepdim=True).indices)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    d = {"Q4_0": most / -8, "Q4_1": (high - low) / 15, "Q8_0": most.abs() / 127}[kind]
    each = torch.where(d == 0, 0, 1 / d)
    if kind == "Q4_0":
        codes = (w * each + 8.5).trunc().clamp(0, 15)
    elif kind == "Q4_1":
        codes = ((w - low) * each + 0.5).trunc().clamp(0, 15)
    else:
        scaled = w * each
        codes = scaled.sign() * (scaled.abs() + 0.5).floor()
    heads = [d.squeeze(-1), low.squeeze(-1)][: 1 + (kind == "Q4_1")]
    return pack_blocks(kind, codes.to(torch.int16), *heads).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@given(weight=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_round_to_nearest_has_the_bytes_of_gguf_s_quantizer(kind, weight):
    weight = weight + 0  # without -0, which may be the least of several zeros
    assert np.array_equal(nearest(kind, weight).numpy(), theirs(kind, weight))


@pytest.mark.parametrize("kind", KINDS)
@given(weight=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_its_blocks_are_read_as_it_reads_them(kind, weight):
    blocks = torch.from_numpy(theirs(kind, weight))
    dense = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(dense_blocks(kind, blocks).numpy(), dense)
    grid = from_blocks(kind, blocks)
    if kind == "Q4_1":
        assert grid is None or grid.zero_point.max() <= 15  # its offset is rarely on our grid
    else:
        grid.check()
        assert np.array_equal(grid.dequantize().numpy(), dense)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_unpacking_is_the_inverse_of_packing(kind, data):
    blocks = data.draw(arrays.arrays(np.uint8, (3, BYTES[kind])))
    codes, *fp16s = unpack_blocks(kind, torch.from_numpy(blocks))
    assert np.array_equal(pack_blocks(kind, codes, *fp16s).numpy(), blocks)


@pytest.mark.parametrize("symmetric, kind", [(True, "Q4_0"), (False, "Q4_1")])
def test_gptq_s_codes_go_over_as_they_are(symmetric, kind):
    hessian = Hessian(64)
    hessian.update(weight(1, 300, 64))
    packed = gptq_quantize(weight(2, 16, 64), hessian, QuantSpec(4, 32, symmetric), GPTQOptions())
    got, blocks = to_blocks(packed)
    assert got == kind
    codes, d, *m = unpack_blocks(kind, blocks.unflatten(1, (-1, BYTES[kind])))
    assert torch.equal(codes.flatten(1), packed.unpacked(slice(None)))
    assert torch.equal(d, packed.scale)
    back = from_blocks(kind, blocks)
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(back, name), getattr(packed, name))
    if symmetric:
        dense = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.Q4_0)
        assert np.array_equal(dense, packed.dequantize().numpy())
    else:  # m is rounded to 11 bits, and zero_point is at most 15
        offset = packed.scale.float() * packed.zero_point.float()
        assert ((m[0].float() + offset).abs() <= offset * 2**-11).all()


@pytest.mark.parametrize("spec", [QuantSpec(8, 64, True), QuantSpec(8, None, True),
                                  QuantSpec(4, 128, True), QuantSpec(4, None), QuantSpec(4, 96)],
                         ids=str)  # fmt: skip
def test_larger_groups_are_several_blocks_of_one_scale(spec):
    packed = quantize_rtn(weight(columns=192 if spec.group_size == 96 else 256), spec)
    kind, blocks = to_blocks(packed)
    assert kind == {True: f"Q{spec.bits}_0", False: "Q4_1"}[spec.symmetric]
    back = from_blocks(kind, blocks)
    assert torch.equal(back.codes, packed.codes)
    assert torch.equal(back.dequantize(), packed.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_fit_into_q4_0_with_the_very_weights(bits, symmetric):
    packed = quantize_rtn(weight(), QuantSpec(bits, 64, symmetric))
    kind, blocks = to_blocks(packed)
    assert kind == "Q4_0"
    assert torch.equal(dense_blocks(kind, blocks), packed.dequantize())


def test_what_no_block_holds():
    assert to_blocks(quantize_rtn(weight() + 5, QuantSpec(8, 64))) is None  # zero_point 0
    assert to_blocks(quantize_rtn(weight(), QuantSpec(4, 16))) is None
    hessian = Hessian(64)
    hessian.update(weight(1, 300, 64))
    shuffled = GPTQOptions(static_groups=False)
    packed = gptq_quantize(weight(2, 16, 64), hessian, QuantSpec(4, 32, True), shuffled)
    assert packed.g_idx is not None and to_blocks(packed) is None
    large = quantize_rtn(torch.full((1, 32), -60000.0), QuantSpec(4, 32))
    large.scale.fill_(60000.0)  # m would be infinite
    assert to_blocks(large) is None


def test_bad_blocks_are_refused():
    codes, d = torch.zeros(2, 32, dtype=torch.int16), torch.ones(2)
    with pytest.raises(ValueError, match="Q4_0 takes 32 codes from 0 to 15, got 32 from 0 to 16"):
        pack_blocks("Q4_0", torch.where(torch.arange(32) == 3, 16, codes), d)
    with pytest.raises(ValueError, match="got 31 from"):
        pack_blocks("Q8_0", codes[:, :31], d)
    with pytest.raises(ValueError, match="begins with 2 fp16, got 1"):
        pack_blocks("Q4_1", codes, d)
