"""Weights in E2M1, 4 bits, whose blocks share a scale: MXFP4 and NVFP4.

    MXFP4   w ~ level * 2**(scale - 127)       32 weights a block, scale: E8M0, an exponent alone
    NVFP4   w ~ level * scale / tensor_scale   16 weights a block, scale: E4M3, and an fp32 for all

(MXFP4: OCP Microscaling Formats 1.0, section 6.3, and Rouhani et al. 2023, arXiv 2310.10537; NVFP4:
NVIDIA 2025, arXiv 2509.25149.) Bytes are those of compressed-tensors 0.20 (nvfp4 and mxfp4
compressors, mxfp_utils, fp4_utils): tests/interop/test_compressed_tensors.py compares them. Two of
its choices differ from the papers'. MXFP4's exponent is rounded up where a block's largest weight
would else reach 7 on a grid that ends at 6, OCP's never. NVFP4's tensor_scale divides; NVIDIA's own
files hold its inverse. Left out: a search for better scales than those of a block's absmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..base.finite import is_finite
from .float_weights import FloatSpec
from .grid import PackedWeight, check_range, check_tensor, row_slices
from .minifloat import code_values, decode_float, minifloat, nearest_codes
from .packing import pack, unpack

BLOCK_SIZES = {"mxfp4": 32, "nvfp4": 16}
LARGEST = minifloat("e2m1").largest  # 6
LARGEST_SCALE = {"mxfp4": 252, "nvfp4": 126}  # bytes: 6 * 2**125 is finite; 127 is a NaN of E4M3
EMPTY = 0x20  # 0.125 in E4M3, which compressed-tensors writes for scales that round to 0


@dataclass(frozen=True)
class FP4Spec(FloatSpec):
    """How a weight matrix is put on the values of E2M1."""

    format: str = "nvfp4"  # "mxfp4": exponents as scales; "nvfp4": smaller blocks, finer scales

    bits = 4  # constants, not fields
    element = "e2m1"

    def __post_init__(self):
        if self.format not in BLOCK_SIZES:
            known = ", ".join(BLOCK_SIZES)
            raise ValueError(f"format={self.format!r} must be one of {known}")

    @property
    def block_size(self) -> int:
        """Consecutive input features that share a scale."""
        return BLOCK_SIZES[self.format]

    def groups(self, in_features: int) -> int:
        """Blocks in a row. Raises ValueError when block_size does not divide it."""
        if in_features % self.block_size:
            raise ValueError(f"{self.format} has blocks of {self.block_size}, which do not divide "
                             f"in_features={in_features}; leave this layer dense")  # fmt: skip
        return in_features // self.block_size

    def fit(self, w: Tensor, largest: float | None = None) -> dict[str, Tensor | None]:
        """`scale` and `tensor_scale` of an FP4Tensor for the weight (out, in), from the absmax of
        each block. largest: the absmax of all weights that shall have this tensor_scale; None: of
        this one. Raises ValueError for weights whose nearest levels overflow fp32."""
        blocks = w.unflatten(1, (self.groups(w.shape[1]), -1))  # (out, blocks, size)
        absmax, whole = blocks.abs().amax(-1).float(), None  # (out, blocks)
        if self.format == "mxfp4":
            fraction, exponent = torch.frexp(absmax)  # fraction in [0.5, 1)
            # The block's largest weight in [4, 8), or [3.5, 7) where it would else be 7 and more.
            exponent += (fraction >= 0.875).int()
            scale = torch.where(absmax > 0, exponent - 3 + 127, 0).clamp_(0, 255).to(torch.uint8)
        else:
            # The largest block scale becomes E4M3's largest value.
            most = absmax.amax() if largest is None else absmax.new_tensor(largest)
            whole = minifloat("e4m3").largest * LARGEST / most
            whole = torch.where(whole.isfinite(), whole, 1)  # no weight is far from 0
            scale = nearest_codes(absmax / LARGEST * whole, "e4m3")
            scale = torch.where(scale > 0, scale, EMPTY)
        fitted = {"scale": scale, "tensor_scale": whole}
        if scale.numel() and not self._holds(**fitted):
            raise ValueError(f"weights up to {float(absmax.max()):.3g} overflow fp32 in "
                             f"{self.format}; rescale the layer")  # fmt: skip
        return fitted

    def _holds(self, scale: Tensor, tensor_scale: Tensor | None) -> bool:
        """Whether the largest level with each scale is finite."""
        top = int(scale.max()) <= LARGEST_SCALE[self.format]
        return top and is_finite(LARGEST * self.scales(scale, tensor_scale))

    def scales(self, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """fp32 (out, blocks): what the levels of each block are multiplied by."""
        if self.format == "nvfp4":
            return decode_float(scale, "e4m3") / tensor_scale
        powers = _powers(scale.device)
        return powers.index_select(0, scale.flatten().int()).view(scale.shape)

    def assemble(self, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> "FP4Tensor":
        """The FP4Tensor of codes, uint8 (out, in), and what `fit` gave."""
        return FP4Tensor(pack(codes, 4), scale, tensor_scale, codes.shape, self)


@dataclass
class FP4Tensor(PackedWeight):
    """A weight matrix in MXFP4 or NVFP4, packed.

    codes         uint8 (out, in / 2), the first weight in the low nibble
    scale         uint8 (out, blocks): E8M0 (MXFP4) or E4M3 (NVFP4), as bytes
    tensor_scale  fp32 (), by which the scales are divided; None for MXFP4
    shape         (out_features, in_features)
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    shape: torch.Size
    spec: FP4Spec

    def check(self) -> None:
        """Raises ValueError unless all tensors are as described above, and all weights finite."""
        (out, n), spec = self.shape, self.spec
        check_tensor("scale", self.scale, (out, spec.groups(n)), torch.uint8)
        check_tensor("codes", self.codes, (out, n // 2), torch.uint8)
        check_range("scale", self.scale, LARGEST_SCALE[spec.format])
        if spec.format == "mxfp4":
            if self.tensor_scale is not None:
                raise ValueError("tensor_scale is NVFP4's; MXFP4 has none")
            return
        check_tensor("tensor_scale", self.tensor_scale, (), torch.float32)
        if self.tensor_scale.is_meta:
            return
        if self.tensor_scale <= 0 or not is_finite(LARGEST * self.block_scales()):
            raise ValueError(f"tensor_scale={float(self.tensor_scale)} makes no finite weights")

    def block_scales(self) -> Tensor:
        """fp32 (out, blocks): what the levels of each block are multiplied by."""
        return self.spec.scales(self.scale, self.tensor_scale)

    def unpacked(self, rows: slice) -> Tensor:
        """uint8 (rows, in): the codes of some rows."""
        codes = self.codes[rows]
        return unpack(codes, 4, (len(codes), self.shape[1]))

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows in order, each with its dense weights (rows, in) in `dtype`."""
        pairs, scales = _level_pairs(self.codes.device), self.block_scales()
        for rows in row_slices(self.shape, self.codes.device):
            packed = self.codes[rows]
            # index_select: pairs[...] would copy its indices to int64. No name keeps them alive.
            values = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
            w = values.view(len(packed), scales.shape[1], -1)  # (rows, blocks, size)
            yield rows, w.mul_(scales[rows].unsqueeze(-1)).flatten(1).to(dtype)


# Made once a device: a layer is decoded at each use, and a copy to a GPU would wait for it.
@cache
def _level_pairs(device: torch.device) -> Tensor:
    """int64 (256,): the two fp32 levels that each byte stands for, as one 64-bit word."""
    levels = code_values("e2m1", device)
    return torch.stack([levels.repeat(16), levels.repeat_interleave(16)], 1).view(torch.int64)[:, 0]


@cache
def _powers(device: torch.device) -> Tensor:
    """fp32 (256,): what the bytes of E8M0 stand for; the last is NaN."""
    powers = 2.0 ** (torch.arange(256, device=device, dtype=torch.float64) - 127)
    powers[255] = torch.nan
    return powers.float()


def quantize_fp4(
    weight: Tensor, spec: FP4Spec = FP4Spec(), largest: float | None = None
) -> FP4Tensor:
    """Each weight of a matrix (out_features, in_features) rounded to the closest value of its
    block, ties to the even code. largest: as for FP4Spec.fit. Raises ValueError for NaN or Inf,
    in_features that blocks do not divide, and weights that overflow fp32 so."""
    return spec.quantize(weight, largest)
