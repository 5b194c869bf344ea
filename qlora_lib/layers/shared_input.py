"""Layers that read the same input: q, k, v of an attention, gate and up of an MLP.

Servers compute them as one, and so does `linear.decoding_layout` on a GPU: a kernel of a few
microseconds takes about as long again to begin and to end, and one launch for q, k and v makes
that up once.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from .fragments import BLOCK, Fragments
from .kernels import matmul

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused(paths: Iterable[str]) -> list[list[str]]:
    """Return which of these layers are computed as one: the groups of two and more."""
    groups = {}
    for path in paths:
        parent, _, own = path.rpartition(".")
        if names := next((names for names in FUSED if own in names), None):
            groups.setdefault((parent, names), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


class SharedInput:
    """The product of several QuantizedLinear layers, whose codes are views of one weight meanwhile:
    made at the call of the first of them, and handed out to the others as they are called with the
    same tensor. Where one of them is not (it reads something else, or is merged), each multiplies
    for itself from then on."""

    def __init__(self, layers: list):
        held = [layer.held for layer in layers]
        tiles, self.outs = [len(w.codes) for w in held], [w.shape[0] for w in held]
        self.rows = [BLOCK * count for count in tiles]
        codes, grids = torch.cat([w.codes for w in held]), torch.cat([w.op_grids for w in held])
        shape = torch.Size((sum(self.rows), held[0].shape[1]))
        # Kernels take a scale and zero_point from op_grids, and here only their shape.
        scale, zero = (t.new_empty(shape[0], t.shape[1], device="meta")
                       for t in (held[0].scale, held[0].zero_point))  # fmt: skip
        self.weight = replace(held[0], codes=codes, op_grids=grids, scale=scale, zero_point=zero,
                              shape=shape)  # fmt: skip
        self.layers, self.made, self.wasted = layers, (None, None, {}), False
        for layer, own, grid in zip(layers, codes.split(tiles), grids.split(tiles)):
            layer.codes, layer.op_grids, layer.shared = own, grid, self

    def product(self, layer, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """x (..., in) @ W^T -> (..., out) of one of the layers, a view; None where it must multiply
        for itself."""
        if self.wasted:
            return None
        # An inference tensor counts no changes in place; no model changes one between two layers.
        key = (dtype, None if x.is_inference() else x._version)
        known, at, parts = self.made
        if known is not x or at != key or layer not in parts:
            if parts:
                self.made, self.wasted = (None, None, {}), True
                return None
            y = matmul(x, self.weight, dtype).split(self.rows, -1)
            parts = {each: part[..., :out] for each, part, out in zip(self.layers, y, self.outs)}
            self.made = x, key, parts
        part = parts.pop(layer)
        if not parts:
            self.made = None, None, {}
        return part


@torch.inference_mode(False)  # buffers must not become inference tensors
def share_inputs(layers: dict) -> None:
    """Let those of these layers, by path, that read the same input be multiplied at once, where
    they hold Fragments of the same groups on one device."""
    for paths in fused(layers):
        group = [layers[path] for path in paths]
        kinds = {(layer.in_features, tuple(layer.scale.shape[1:]), layer.codes.device)
                 for layer in group if type(layer.held) is Fragments}  # fmt: skip
        if len(kinds) == 1 and all(type(layer.held) is Fragments for layer in group):
            SharedInput(group)
