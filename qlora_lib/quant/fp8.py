"""Weights in E4M3 or E5M2, 8 bits, a scale a row: w ~ level * scale.

Micikevicius et al. 2022 (arXiv 2209.05433). A row's scale brings its absmax to the largest level;
in compressed-tensors it is the strategy "channel" of weights in 8 bits and floats.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.finite import is_finite
from .float_weights import FloatSpec
from .grid import PackedWeight, check_tensor, row_slices
from .minifloat import code_values, minifloat, quantize_fp8


@dataclass(frozen=True)
class FP8Spec(FloatSpec):
    """How a weight matrix is put on the values of a float of 8 bits."""

    format: str = "e4m3"  # "e4m3": finer steps; "e5m2": a wider range within a row

    bits = 8  # a constant, not a field

    def __post_init__(self):
        if self.format not in ("e4m3", "e5m2"):
            raise ValueError(f"format={self.format!r} must be one of e4m3, e5m2")

    @property
    def element(self) -> str:
        """The float's name in minifloat.py."""
        return self.format

    def groups(self, in_features: int) -> int:
        """Blocks in a row: one."""
        return 1

    def fit(self, w: Tensor, largest: float | None = None) -> dict[str, Tensor]:
        """`scale` of an FP8Tensor for the weight (out, in). largest: of no effect, there is no
        tensor scale."""
        return {"scale": quantize_fp8(w, self.format)[1]}

    def scales(self, scale: Tensor) -> Tensor:
        """fp32 (out, 1): what the levels of each row are multiplied by."""
        return scale

    def assemble(self, codes: Tensor, scale: Tensor) -> "FP8Tensor":
        """The FP8Tensor of codes, uint8 (out, in), and what `fit` gave."""
        return FP8Tensor(codes, scale, codes.shape, self)


@dataclass
class FP8Tensor(PackedWeight):
    """A weight matrix in E4M3 or E5M2.

    codes  uint8 (out, in), the bytes of torch.float8_e4m3fn or torch.float8_e5m2
    scale  fp32 (out, 1)
    shape  (out_features, in_features)
    """

    codes: Tensor
    scale: Tensor
    shape: torch.Size
    spec: FP8Spec

    def check(self) -> None:
        """Raises ValueError unless all tensors are as described above, and all weights finite."""
        (out, n), form = self.shape, minifloat(self.spec.format)
        check_tensor("codes", self.codes, (out, n), torch.uint8)
        check_tensor("scale", self.scale, (out, 1), torch.float32)
        if self.codes.is_meta:
            return
        if (self.scale <= 0).any() or not is_finite(self.scale * form.largest):
            raise ValueError("scale makes no finite weights, or is not positive")
        used = torch.bincount(self.codes.flatten().int(), minlength=256) > 0
        if not code_values(self.spec.format, self.codes.device)[used].isfinite().all():
            raise ValueError(f"codes hold NaN or Inf of {self.spec.format}")

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows in order, each with its dense weights (rows, in) in `dtype`."""
        values = code_values(self.spec.format, self.codes.device)
        for rows in row_slices(self.shape, self.codes.device):
            codes = self.codes[rows]
            w = values.index_select(0, codes.flatten().int()).view(codes.shape)
            yield rows, w.mul_(self.scale[rows]).to(dtype)
