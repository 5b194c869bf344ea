"""NF4: 4-bit codes whose 16 values follow a normal distribution, and double quantization.

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3.

Beside bitsandbytes 0.50.2 (functional.py and backends/default/ops.py, 2,442 lines without the
kernels in C++; here 170): levels, packed bytes, absmax, nested absmax and decoded values are
the same to the bit. The 8-bit codes of double quantization are the nearest here, where its
search on a CPU may miss by 3e-5 of the range. Left out: FP4, other dtypes than uint8.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..base.finite import check_finite, is_finite
from .grid import PackedWeight, check_flags, check_tensor, check_weight, check_whole, row_slices
from .packing import pack, unpack

# The published values, to the bit: quantiles of N(0, 1) over the largest, which tests derive.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256  # values that share an absmax in 8 bits, as under double quantization


@dataclass(frozen=True)
class NF4Spec:
    """How a weight matrix is put on the NF4 levels."""

    block_size: int = 64  # consecutive weights (row-major) that share an absmax
    double_quant: bool = True  # store the absmax values themselves in 8 bits

    bits = 4  # a constant, not a field: there is no NF3

    def __post_init__(self):
        check_whole("block_size", self.block_size)
        check_flags(self, "double_quant")


def nf4_levels(device: torch.device | None = None) -> Tensor:
    """The 16 published levels; fp32 (16,), ascending."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def dynamic_map(signed: bool = True) -> Tensor:
    """The 8-bit "dynamic exponent" map (Dettmers et al. 2022, arXiv 2110.02861, section 2.1); fp32
    (256,), ascending: one sign bit (unsigned: one more for the fraction), a run of zeros that is
    the decimal exponent (0 to -6), and the bits that are left as a linear fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2
        magnitude = (10.0 ** (exponent - 6)) * fractions
        values += magnitude.tolist() + ((-magnitude).tolist() if signed else [])
    return torch.tensor(values, dtype=torch.float32).sort().values


def quantize_8bit(flat: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes (n,) of the nearest of 256 levels, and the fp32 absmax (ceil(n / 256),) by which
    each block of 256 values (n,) was divided."""
    codes, absmax = _encode(flat, NESTED_BLOCK, levels)
    return codes.to(torch.uint8), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """The fp32 values (n,) that the codes of `quantize_8bit` stand for."""
    values = _blocks(levels[codes.int()], NESTED_BLOCK) * absmax.unsqueeze(1)  # (blocks, 256)
    return values.flatten()[: codes.numel()]


def _encode(flat: Tensor, size: int, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Index (n,) of the ascending level nearest to each value over its block's absmax (blocks,)."""
    blocks = _blocks(flat, size)  # (blocks, size)
    absmax = blocks.abs().amax(1)  # (blocks,)
    # A block of zeros has absmax 0; dividing by 1 sends it to the level 0, exactly.
    unit = blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)
    # The number of midpoints between levels that lie below a value.
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2)  # (blocks, size)
    return codes.flatten()[: flat.numel()], absmax


def _blocks(flat: Tensor, size: int) -> Tensor:
    """The values (n,) as blocks (ceil(n / size), size), the last one filled up with zeros."""
    missing = -flat.numel() % size
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, size)


# Made once a device: a layer is decoded at each use, and a copy to a GPU would wait for it.
@cache
def _nested_levels(device: torch.device) -> Tensor:
    return dynamic_map().to(device)


@cache
def _level_pairs(device: torch.device) -> Tensor:
    """int64 (256,): the two fp32 levels that each byte stands for, as one 64-bit word."""
    levels = nf4_levels(device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2)
    return pairs.view(torch.int64).flatten()


@dataclass
class NF4Tensor(PackedWeight):
    """A weight matrix in NF4, packed.

    codes          uint8 (ceil(out * in / 2),), row-major, the first weight in the high nibble
    absmax         fp32 (blocks,), or uint8 codes (blocks,) of the dynamic map
    nested_absmax  fp32 (ceil(blocks / 256),), or None without double quantization
    offset         fp32 (), mean of the absmax values, or None
    shape          (out_features, in_features)
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    spec: NF4Spec

    def check(self) -> None:
        """Raises ValueError unless all tensors are as described above, and each block's absmax,
        as decoded, is finite."""
        n = self.shape.numel()
        blocks, nested = -(-n // self.spec.block_size), self.spec.double_quant
        check_tensor("codes", self.codes, (-(-n // 2),), torch.uint8)
        check_tensor("absmax", self.absmax, (blocks,), torch.uint8 if nested else torch.float32)
        if nested:
            outer = (-(-blocks // NESTED_BLOCK),)
            check_tensor("nested_absmax", self.nested_absmax, outer, torch.float32)
            check_tensor("offset", self.offset, (), torch.float32)
            check_finite([("absmax", self.block_scales())], "a packed weight")
        elif not self.absmax.is_meta and (self.absmax < 0).any():
            raise ValueError("absmax is negative")

    def block_scales(self) -> Tensor:
        """fp32 (blocks,): the absmax of each block, as decoded."""
        if self.nested_absmax is None:
            return self.absmax
        levels = _nested_levels(self.absmax.device)
        return dequantize_8bit(self.absmax, self.nested_absmax, levels) + self.offset

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows in order, each with its dense weights (rows, in) in `dtype`."""
        n, block, device = self.shape[1], self.spec.block_size, self.codes.device
        pairs, scales = _level_pairs(device), self.block_scales()
        # Rows that begin where a block and a byte begin.
        unit = math.lcm(2, block) // math.gcd(math.lcm(2, block), n)
        for rows in row_slices(self.shape, device, unit):
            first, count = rows.start * n, (rows.stop - rows.start) * n
            packed = self.codes[first // 2 : (first + count + 1) // 2]
            # index_select: pairs[...] would copy its indices to int64. No name keeps them alive.
            values = pairs.index_select(0, packed.int()).view(torch.float32)[:count]  # row-major
            part = scales[first // block : -(-(first + count) // block)]
            w = _blocks(values, block).mul_(part.unsqueeze(1))
            yield rows, w.flatten()[:count].view(-1, n).to(dtype)


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """The weight (out_features, in_features) in NF4; blocks run over the flattened matrix, across
    rows where block_size does not divide in_features. Raises ValueError for NaN or Inf, and for
    weights so large that their absmax can't be stored in 8 bits."""
    spec = NF4Spec(block_size, double_quant)
    check_weight(weight)
    flat, levels = weight.detach().float().flatten(), nf4_levels(weight.device)
    codes, absmax = _encode(flat, block_size, levels)
    codes = torch.nn.functional.pad(codes, (0, weight.numel() % 2), value=7)
    packed = pack(codes.view(-1, 2).flip(1).flatten(), 4)  # flip: high nibble first
    if not double_quant:
        return NF4Tensor(packed, absmax, None, None, weight.shape, spec)
    # absmax values are positive and much alike; their mean taken off, they spread around 0.
    offset = absmax.mean()
    codes8, nested = quantize_8bit(absmax - offset, dynamic_map().to(weight.device))
    quantized = NF4Tensor(packed, codes8, nested, offset, weight.shape, spec)
    if not is_finite(quantized.block_scales()):
        raise ValueError(f"weights up to {float(absmax.max()):.3g} overflow fp32 when their absmax "
                         "is quantized; rescale the layer, or use double_quant=False")  # fmt: skip
    return quantized


def nf4_codes(quantized: NF4Tensor) -> Tensor:
    """uint8 (out, in): the code, 0 to 15, of each weight."""
    n = quantized.shape.numel()
    nibbles = unpack(quantized.codes, 4, (2 * quantized.codes.numel(),))
    return nibbles.view(-1, 2).flip(1).flatten()[:n].view(quantized.shape)
