"""NF4: 4-bit codes whose 16 values follow a normal distribution, and double quantization.

Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3. Layout and bytes are those
of bitsandbytes, so that its checkpoints and ours are the same bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .grid import check_weight, joined, row_slices
from .packing import pack, unpack

# The published values, to the bit; `nf4_formula` derives them to 2e-7.
# fmt: off
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
NESTED_BLOCK = 256  # values that share an absmax in 8 bits, as under double quantization


@dataclass(frozen=True)
class NF4Spec:
    """How a weight matrix is put on the NF4 levels."""

    block_size: int = 64  # consecutive weights (row-major) that share an absmax
    double_quant: bool = True  # store the absmax values themselves in 8 bits

    bits = 4  # a constant, not a field: there is no NF3

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be positive")


def nf4_formula() -> Tensor:
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


def nf4_levels(device: torch.device | None = None) -> Tensor:
    """The 16 published levels; fp32 (16,), ascending, whatever torch's default dtype is."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def dynamic_map(signed: bool = True) -> Tensor:
    """The 8-bit "dynamic exponent" map of bitsandbytes; fp32 (256,), ascending.

    One sign bit, a run of zeros that is the decimal exponent (0 to -6), and the bits
    that are left as a linear fraction: the smaller the value, the fewer bits are left.
    Unsigned, the sign's bit goes to the fraction.
    (Dettmers et al. 2022, arXiv 2110.02861, section 2.1)
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2
        magnitude = (10.0 ** (exponent - 6)) * fractions
        values += magnitude.tolist() + ((-magnitude).tolist() if signed else [])
    return torch.tensor(values, dtype=torch.float32).sort().values


def quantize_8bit(flat: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 (n,) -> uint8 codes (n,) of the 256 levels, and fp32 absmax (ceil(n / 256),).

    Each block of 256 is divided by its absmax; the nearest level is taken."""
    blocks = _blocks(flat, NESTED_BLOCK)  # (blocks, 256)
    absmax = blocks.abs().amax(1)  # (blocks,)
    # A block of zeros has absmax 0; dividing by 1 sends it to the level 0, exactly.
    unit = blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)
    return _nearest(unit, levels).flatten()[: flat.numel()].to(torch.uint8), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """What `quantize_8bit` made, as fp32 (n,)."""
    values = _blocks(levels[codes.int()], NESTED_BLOCK) * absmax.unsqueeze(1)  # (blocks, 256)
    return values.flatten()[: codes.numel()]


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest of the ascending levels: which midpoints lie below x."""
    return torch.bucketize(x, (levels[:-1] + levels[1:]) / 2)


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(n,) -> (ceil(n / size), size), the last block filled with zeros; a view where it fits."""
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
class NF4Tensor:
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

    def block_scales(self) -> Tensor:
        """fp32 (blocks,): the absmax of each block, as decoded."""
        if self.nested_absmax is None:
            return self.absmax
        levels = _nested_levels(self.absmax.device)
        return dequantize_8bit(self.absmax, self.nested_absmax, levels) + self.offset

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The dense weight in `dtype`, some rows at a time: which, and their values (rows, in)."""
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

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weights (out, in) in `dtype`."""
        return joined(self.pieces(dtype), self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, absmax values and their own scales together."""
        parts = [self.codes, self.absmax, self.nested_absmax, self.offset]
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()


def quantize_nf4(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Blockwise NF4: divide each block by its absmax, take the nearest level.

    weight: floating point (out_features, in_features). Blocks run over the flattened
    matrix, across rows where block_size does not divide in_features. Raises ValueError
    for NaN or Inf.
    """
    spec = NF4Spec(block_size, double_quant)
    check_weight(weight)
    blocks = _blocks(weight.detach().float().flatten(), block_size)  # (blocks, block_size)
    absmax = blocks.abs().amax(1)  # (blocks,)
    # A block of zeros has absmax 0; dividing by 1 sends it to the level 0, exactly.
    unit = blocks / torch.where(absmax > 0, absmax, 1).unsqueeze(1)
    codes = _nearest(unit, nf4_levels(weight.device)).flatten()
    codes = torch.nn.functional.pad(codes[: weight.numel()], (0, weight.numel() % 2), value=7)
    packed = pack(codes.view(-1, 2).flip(1).flatten(), 4)  # flip: high nibble first
    if not double_quant:
        return NF4Tensor(packed, absmax, None, None, weight.shape, spec)
    # absmax values are positive and much alike; their mean taken off, they spread around 0.
    offset = absmax.mean()
    codes8, nested = quantize_8bit(absmax - offset, dynamic_map().to(weight.device))
    return NF4Tensor(packed, codes8, nested, offset, weight.shape, spec)


def nf4_codes(quantized: NF4Tensor) -> Tensor:
    """uint8 (out, in): the code, 0 to 15, of each weight."""
    n = quantized.shape.numel()
    nibbles = unpack(quantized.codes, 4, (2 * quantized.codes.numel(),))
    return nibbles.view(-1, 2).flip(1).flatten()[:n].view(quantized.shape)
