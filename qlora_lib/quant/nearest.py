"""Rounding to nearest, on the kind of levels that a spec names."""

from torch import Tensor

from .grid import QuantizedTensor, QuantSpec, quantize_rtn
from .nf4 import NF4Spec, NF4Tensor, quantize_nf4


def quantize_nearest(weight: Tensor, spec: QuantSpec | NF4Spec) -> QuantizedTensor | NF4Tensor:
    """The weight (out, in) on integer grids or on NF4's levels, each value at the nearest one."""
    if isinstance(spec, NF4Spec):
        return quantize_nf4(weight, spec.block_size, spec.double_quant)
    return quantize_rtn(weight, spec)
