"""Packed weights made dense in one launch each: for many tokens, which cuBLAS then multiplies.

A weight costs two bytes to write beside half a byte or one to read, so these kernels wait for
memory whatever they compute: they load a weight's scale and zero for each weight, and serve any
groups, in order or not.
"""

import torch
from torch import Tensor

from ..quant.grid import QuantizedTensor
from ..quant.nf4 import NF4Tensor, nf4_levels
from .fragments import Fragments
from .triton_language import tl, triton
from .triton_product import ONES, decoded, half

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, BYTES = 8, 128  # of a program's tile
FLAT = 1024  # bytes of a program where rows don't matter


@triton.jit
def _grids(
    codes, scale, zero, g_idx, w, out, n, row_bytes, groups, GROUP: tl.constexpr,
    BITS: tl.constexpr, INDEXED: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """codes (out, row_bytes) of 4 or 8 bits -> w (out, n) = scale (code - zero)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :]
    q = tl.load(codes + row * row_bytes + at, mask=(row < out) & (at < row_bytes), other=0)
    WIDE: tl.constexpr = BYTES * 8 // BITS
    if BITS == 4:  # (ROWS, BYTES) -> (ROWS, WIDE): the low nibble first
        q = tl.reshape(tl.join(q & 15, q >> 4), (ROWS, WIDE))
    k = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    if INDEXED:
        group = tl.load(g_idx + k, mask=k < n, other=0)
    else:
        group = k // GROUP
    there = (row < out) & (k < n)
    s = tl.load(scale + row * groups + group, mask=there, other=0.0).to(tl.float32)
    z = tl.load(zero + row * groups + group, mask=there, other=0).to(tl.float32)
    tl.store(w + row.to(tl.int64) * n + k, s * (q.to(tl.float32) - z), mask=there)


@triton.jit
def _nf4(codes, levels, absmax, w, count, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """codes, two of `count` in a byte, the high nibble first -> w (count,) = level absmax."""
    at = tl.program_id(0).to(tl.int64) * FLAT + tl.arange(0, FLAT)
    packed = tl.load(codes + at, mask=2 * at < count, other=0)
    q = tl.reshape(tl.join(packed >> 4, packed & 15), (2 * FLAT,))
    i = tl.program_id(0).to(tl.int64) * (2 * FLAT) + tl.arange(0, 2 * FLAT)
    scale = tl.load(absmax + i // BLOCK, mask=i < count, other=0.0)
    tl.store(w + i, tl.load(levels + q) * scale, mask=i < count)


@triton.jit
def _fragments(codes, grids, w, ones, out, n, groups, GROUP: tl.constexpr):
    """codes and grids as in Fragments -> w (out, n), a block of 64 x 64 a program."""
    tile, block = tl.program_id(0), tl.program_id(1)
    words = tl.load(codes + (tile * tl.num_programs(1) + block) * 512 + tl.arange(0, 512))
    q = decoded(words, ones, tl.float16, 1, 4).to(tl.float32)  # 128 + q
    row, k = tl.arange(0, 64)[:, None], block * 64 + tl.arange(0, 64)[None, :]
    there = (tile * 64 + row < out) & (k < n)
    grid = tl.load(grids + (tile * groups + k // GROUP) * 64 + row, mask=there, other=0)
    value = half(grid) * (q + half(grid >> 16))  # the sum is exact
    tl.store(w + (tile * 64 + row).to(tl.int64) * n + k, value, mask=there)


def serves(weight, dtype: torch.dtype) -> bool:
    """Whether `dense` makes this weight dense in `dtype`: not 2 and 3 bits, and not fp64."""
    grids = isinstance(weight, QuantizedTensor) and weight.spec.bits in (4, 8)
    ours = type(weight) in (QuantizedTensor, Fragments, NF4Tensor)
    return ours and (grids or isinstance(weight, NF4Tensor)) and dtype in DTYPES


def dense(weight: QuantizedTensor | NF4Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, where `serves` says so: to the bit what `dequantize` makes
    of it."""
    out, n = weight.shape
    device = weight.codes.device
    w = torch.empty(out, n, dtype=dtype, device=device)
    with torch.cuda.device_of(w):
        if isinstance(weight, NF4Tensor):
            _nf4[(triton.cdiv(w.numel(), 2 * FLAT),)](
                weight.codes, _levels(device), weight.block_scales(), w, w.numel(),
                BLOCK=weight.spec.block_size, FLAT=FLAT,
            )  # fmt: skip
            return w
        groups = weight.scale.shape[1]
        size = -(-n // groups)
        if isinstance(weight, Fragments):
            _fragments[weight.codes.shape[:2]](
                weight.codes, weight.op_grids, w, ONES[torch.float16], out, n,
                weight.op_grids.shape[1],
                GROUP=size if groups > 1 else weight.codes.shape[1] * 64,
            )  # fmt: skip
            return w
        bits, indexed = weight.spec.bits, weight.g_idx is not None
        _grids[triton.cdiv(out, ROWS), triton.cdiv(n, BYTES * 8 // bits)](
            weight.codes, weight.scale, weight.zero_point, weight.g_idx if indexed else w, w,
            out, n, weight.codes.shape[1], groups, GROUP=size, BITS=bits, INDEXED=indexed,
            ROWS=ROWS, BYTES=BYTES,
        )  # fmt: skip
    return w


_LEVELS: dict[torch.device, Tensor] = {}


def _levels(device: torch.device) -> Tensor:
    if device not in _LEVELS:
        _LEVELS[device] = nf4_levels(device)
    return _LEVELS[device]
