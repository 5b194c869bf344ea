"""Layers that servers compute as one: q, k, v of an attention, gate and up of an MLP.

vLLM stacks their weights and has one NVFP4 tensor scale for the stack (it takes the largest that it
finds). So they are quantized with one, from the largest weight of all, as llm-compressor does.
"""

from collections.abc import Iterable

from torch import nn

from ..quant.fp4 import FP4Spec

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused(paths: Iterable[str]) -> list[list[str]]:
    """Return which of these layers are computed as one: the groups of two and more."""
    groups = {}
    for path in paths:
        parent, _, own = path.rpartition(".")
        if names := next((names for names in FUSED if own in names), None):
            groups.setdefault((parent, names), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


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
