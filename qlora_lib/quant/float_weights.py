"""What the formats of floats share: blocks of weights on the levels of one small float, times a
scale. A format is a spec (FP4Spec, FP8Spec) that says

    element                the float, by its name in minifloat.py
    groups(in_features)    blocks in a row
    fit(w, largest)        its scales for a weight, as the packed tensor's fields
    scales(**fitted)       what the levels of each block are multiplied by, fp32 (out, blocks)
    assemble(codes, **fitted)  the packed weight
"""

import torch
from torch import Tensor

from .grid import as_float, check_weight
from .minifloat import code_values, nearest_codes


class FloatSpec:
    """How a weight matrix is put on the levels of a float format."""

    element: str

    def encode(self, w: Tensor, scales: Tensor) -> Tensor:
        """uint8 as w: the codes of the nearest levels, ties to the even code. Scales broadcast."""
        return nearest_codes((w / scales).add_(0.0), self.element)  # + 0: no code for -0

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """fp32 (n,): what codes (n,) stand for, with scales (n,)."""
        return code_values(self.element, codes.device).index_select(0, codes.int()).mul_(scales)

    @torch.no_grad()
    def quantize(self, weight: Tensor, largest: float | None = None):
        """The weight (out_features, in_features) rounded to the closest level of each block."""
        check_weight(weight)
        w = as_float(weight.detach())
        fitted = self.fit(w, largest)
        scales = self.scales(**fitted).unsqueeze(-1)  # (out, blocks, 1)
        codes = self.encode(w.unflatten(1, (scales.shape[1], -1)), scales)  # (out, blocks, size)
        return self.assemble(codes.flatten(1), **fitted)
