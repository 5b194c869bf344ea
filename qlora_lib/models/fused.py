"""The tensor scale of NVFP4 that layers share which servers compute as one.

vLLM stacks the weights of q, k, v and of gate, up, and has one scale for the stack (it takes the
largest that it finds). So they are quantized with one, from the largest weight of all, as
llm-compressor does.
"""

from torch import nn

from ..layers.shared_input import fused
from ..quant.fp4 import FP4Spec


def shared_largest(layers: dict[str, nn.Linear], spec) -> dict[str, float]:
    """Return the absmax of all weights that share a tensor scale, for each layer that shares one;
    {} for specs without tensor scales."""
    if spec != FP4Spec("nvfp4"):
        return {}
    largest = {}
    for group in fused(layers):
        most = max(float(layers[path].weight.detach().abs().max()) for path in group)
        largest |= dict.fromkeys(group, most)
    return largest
