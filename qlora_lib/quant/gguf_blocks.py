"""Blocks of 32 weights as GGUF files hold them, to and from a QuantizedTensor.

    Q4_0   fp16 d, 16 bytes           w = d (q - 8)    code i in the low half of byte i,
    Q4_1   fp16 d, fp16 m, 16 bytes   w = d q + m      code i + 16 in its high half
    Q8_0   fp16 d, 32 signed bytes    w = d q

A grid w = scale (q - zero_point) in groups of a multiple of 32 is held without rounding where
q - zero_point lies in -8 to 7 (Q4_0) or -128 to 127 (Q8_0); other grids of 4 bits by Q4_1, whose
m = -scale zero_point is rounded to fp16. The codes stay as they are.
"""

import torch
from torch import Tensor

from .grid import QuantizedTensor, QuantSpec
from .packing import pack

BLOCK = 32  # weights
FP16S = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1}  # before a block's codes
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of a block


def pack_blocks(kind: str, codes: Tensor, *fp16s: Tensor) -> Tensor:
    """Blocks of a kind as bytes, uint8 (..., BYTES[kind]): codes (..., 32), integers from 0 to 15,
    for Q8_0 from -128 to 127; d, and m for Q4_1, each (...). Raises ValueError for codes outside,
    and for another number of fp16s."""
    low, high = (-128, 127) if kind == "Q8_0" else (0, 15)
    if codes.shape[-1] != BLOCK or codes.numel() and (codes.min() < low or codes.max() > high):
        raise ValueError(f"a block of {kind} takes {BLOCK} codes from {low} to {high}, got "
                         f"{codes.shape[-1]} from {int(codes.min())} to {int(codes.max())}")
    if len(fp16s) != FP16S[kind]:
        raise ValueError(f"a block of {kind} begins with {FP16S[kind]} fp16, got {len(fp16s)}")
    head = torch.stack([t.to(torch.float16) for t in fp16s], -1).view(torch.uint8)
    if kind == "Q8_0":
        return torch.cat([head, codes.to(torch.int8).view(torch.uint8)], -1)
    codes = codes.to(torch.uint8)
    return torch.cat([head, codes[..., :16] | codes[..., 16:] << 4], -1)


def unpack_blocks(kind: str, blocks: Tensor) -> tuple[Tensor, ...]:
    """Inverse of pack_blocks: codes (..., 32), uint8 or int8, then each fp16 (...)."""
    head, tail = blocks.split([2 * FP16S[kind], BYTES[kind] - 2 * FP16S[kind]], -1)
    fp16s = head.contiguous().view(torch.float16).unbind(-1)
    if kind == "Q8_0":
        return tail.contiguous().view(torch.int8), *fp16s
    return torch.cat([tail & 15, tail >> 4], -1), *fp16s


def to_blocks(quantized: QuantizedTensor) -> tuple[str, Tensor] | None:
    """(kind, uint8 (out, bytes)) of the kind that holds a grid's codes; None where none does: act-
    order's groups, groups of no multiple of 32, 8 bits whose zero_point lies off the middle."""
    out, in_features = quantized.shape
    groups = quantized.scale.shape[1]
    if quantized.g_idx is not None or in_features // groups % BLOCK:
        return None
    repeat = in_features // groups // BLOCK  # a larger group is several blocks of one scale
    scale = quantized.scale.float().repeat_interleave(repeat, 1)  # (out, blocks)
    zero = quantized.zero_point.short().repeat_interleave(repeat, 1)
    codes = quantized.unpacked(slice(None)).short().unflatten(1, (-1, BLOCK))  # (out, blocks, 32)
    centred = codes - zero.unsqueeze(-1)
    low, high = (int(f()) for f in (centred.min, centred.max))
    if low >= -8 and high <= 7:
        kind, parts = "Q4_0", (centred + 8, scale)
    elif quantized.spec.bits <= 4:
        kind, parts = "Q4_1", (codes, scale, -scale * zero)
        if not torch.isfinite(parts[2].half()).all():
            return None
    elif low >= -128 and high <= 127:
        kind, parts = "Q8_0", (centred, scale)
    else:
        return None
    return kind, pack_blocks(kind, *parts).flatten(1)


def from_blocks(kind: str, blocks: Tensor) -> QuantizedTensor | None:
    """The grid that a matrix in blocks (out, bytes) lies on, in groups of 32; None for blocks of
    Q4_1 whose m is no multiple of d, as llama.cpp's own rounding makes them."""
    codes, scale, *offset = unpack_blocks(kind, blocks.unflatten(1, (-1, BYTES[kind])))
    spec = QuantSpec(4 if kind != "Q8_0" else 8, BLOCK, kind != "Q4_1", clip_search=False)
    zero = torch.full_like(scale, 128 if kind == "Q8_0" else 8)
    if kind == "Q8_0":
        codes = codes.short() + 128
    if offset:
        d, m = scale.float(), offset[0].float()
        zero = torch.where(d == 0, 0, -m / d).round().clamp(0, 15)
        if not torch.equal((-d * zero).half(), offset[0]):  # -0 and 0 are equal
            return None
    shape = torch.Size((len(codes), codes.shape[1] * BLOCK))
    packed = pack(codes.flatten(1).to(torch.uint8), spec.bits)
    zero = zero.to(torch.uint8)
    return QuantizedTensor(packed, scale.contiguous(), zero, None, shape, spec)


def dense_blocks(kind: str, blocks: Tensor) -> Tensor:
    """The weights, fp32 (out, in), of a matrix in blocks (out, bytes)."""
    codes, d, *m = unpack_blocks(kind, blocks.unflatten(1, (-1, BYTES[kind])))
    w = (codes.float() - 8 * (kind == "Q4_0")) * d.float().unsqueeze(-1)
    return (w + m[0].float().unsqueeze(-1) if m else w).flatten(1)
