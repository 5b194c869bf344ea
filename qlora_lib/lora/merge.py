"""Merging an adapter into weights: dense, packed again, or those of the original model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers.linear import QuantizedLinear, dense_weight, frozen_linear
from ..quant.gptq import GPTQOptions
from ..quant.hessian import Hessian
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from .fingerprint import base_fingerprint
from .layer import LoRALinear, dense_update, lora_layers, named
from .targets import replace_module


@dataclass
class MergeRow:
    """One merged layer. Errors are relative Frobenius norms, |difference| / |update|."""

    name: str
    update_norm: float  # |scaling * B A| / |W|
    lost: float  # part of the update that rounding took away; about 0 for fp32 weights


@dataclass
class OriginalRow(MergeRow):
    """One layer merged into the original weights."""

    base_gap: float  # |W original - W base| / |update|: what the trained update never saw


def merge_lora(
    model: nn.Module, into: str = "dense", hessians: dict[str, Hessian] | None = None,
    options: GPTQOptions = GPTQOptions(), unload: bool = False,
) -> list[MergeRow]:  # fmt: skip
    """Merge the active adapter of each layer into its weight; returns what each layer lost.

    into: "dense" (a quantized base becomes dense, in the model's dtype), or "rtn" or "gptq":
    quantized again with the base's own spec, by GPTQ (not into NF4) with the layers' Hessians by
    path (`merge_hessians`). The base is kept for `unmerge_lora`, unless `unload`, which leaves
    plain layers. Raises ValueError, and then leaves the model as it was, for an `into` that is
    unknown or does not go with the base, and weights or Hessians that can't be used.
    """
    if into not in ("dense", "rtn", "gptq"):
        raise ValueError(f"into={into!r} must be 'dense', 'rtn' or 'gptq'")
    layers, hessians = active_layers(model), hessians or {}
    for path, layer in layers.items():  # all of them before the first takes its time
        _check_merge(path, layer.base, into, hessians)
    dtype, done = next(model.parameters()).dtype, {}
    for path, layer in layers.items():
        with named(path):
            done[path] = _merge_layer(path, layer, into, dtype, hessians.get(path), options)
    for path, (merged, _) in done.items():  # all or none
        layers[path].merged = merged
        if unload:
            replace_module(model, path, merged)
    return [row for _, row in done.values()]


def active_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have an active adapter, by path; ValueError when there are none."""
    layers = {n: m for n, m in lora_layers(model).items() if m.active in m.configs}
    if not layers:
        raise ValueError("nothing to merge: no layer has an active adapter")
    return layers


def unmerge_lora(model: nn.Module) -> None:
    """Undo merge_lora (without unload): base and adapter apart again, to the bit."""
    for layer in lora_layers(model).values():
        layer.merged = None


def merge_into_original(model: nn.Module, original: nn.Module) -> list[OriginalRow]:
    """Add the active adapters of `model` to the weights of `original`, in place; a row a layer.

    original: the model that `model`'s base was quantized from, dense, without adapters. Its
    weights keep their dtype. After training beside a quantized base this is *another model* than
    the trained one: a part of the update answers to rounding errors that are not here. Of PiSSA
    what it learned is added, as save_adapter writes it. Raises ValueError, before anything is
    changed, for another model, other layers, and an adapter that fits its own base alone.
    """
    layers = active_layers(model)
    if base_fingerprint(model) != base_fingerprint(original):
        raise ValueError("`original` is another model: its embeddings and norms are not those of "
                         "the base; load the checkpoint that it was quantized from")  # fmt: skip
    linears, rows = dict(original.named_modules()), []
    for path, layer in layers.items():
        if layer.residual_of == layer.active and layer.start is None:
            raise ValueError(f"{path}: adapter {layer.active!r} was made together with its "
                             "quantized base (LoftQ, PiSSA), and fits no other; merge it into "
                             "that one, merge_lora(model)")  # fmt: skip
        linear, shape = linears.get(path), (layer.out_features, layer.in_features)
        dense = type(linear) is nn.Linear
        if not dense or tuple(linear.weight.shape) != shape:
            found = tuple(linear.weight.shape) if dense else type(linear).__name__
            raise ValueError(f"{path}: `original` should hold a dense Linear {shape}, found "
                             f"{found}; give the dense model, without adapters")  # fmt: skip
    for path, layer in layers.items():
        linear = linears[path]
        weight = linear.weight.detach().float()
        update, base = (t.to(weight.device) for t in _learned(layer, weight))  # (out, in)
        target = weight + update
        stored = target.to(linear.weight.dtype)
        # A parameter of its own: in place, weights tied to the embeddings would drag them along.
        linear.weight = nn.Parameter(stored, linear.weight.requires_grad)
        gap = (weight - base).norm() / _size(update)
        row = _row(path, update, weight, target - stored.float())
        rows.append(OriginalRow(**vars(row), base_gap=float(gap)))
    return rows


def _check_merge(path: str, base: nn.Module, into: str, hessians: dict) -> None:
    if into != "dense" and not isinstance(base, QuantizedLinear):
        raise ValueError(f"{path} is dense; merge into='dense', then quantize the model")
    if into == "gptq" and isinstance(base.spec, NF4Spec):
        raise ValueError(f"{path} is NF4, which GPTQ does not make; merge into='rtn' or 'dense'")
    if into == "gptq" and path not in hessians:
        raise ValueError(f"into='gptq' needs the Hessian of {path}; pass hessians={{path: H}}")


def _learned(layer: LoRALinear, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What training added to the original weight, and the weight beside which it did: (out, in)."""
    update, base = layer.delta(layer.active, weight), dense_weight(layer.base)
    if layer.residual_of == layer.active:  # PiSSA: W = residual + scaling * B0 A0
        b0, a0 = (t.to(update.device) for t in layer.start)
        first = dense_update(b0, a0, layer.configs[layer.active].scaling)
        update, base = update - first, base + first
    return update, base


def _merge_layer(path, layer, into, dtype, hessian, options) -> tuple[nn.Module, MergeRow]:
    base, update = layer.base, layer.delta(layer.active)
    dense = dense_weight(base)  # (out, in)
    target = dense + update
    if into == "dense":
        dtype = dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        merged = frozen_linear(target.to(dtype), base.bias)
    else:
        recipe = Recipe(base.spec, options if into == "gptq" else None)
        merged = QuantizedLinear(recipe.quantize(target, hessian), base.bias)
    return merged, _row(path, update, dense, target - dense_weight(merged))


def _size(matrix: Tensor) -> Tensor:
    """|matrix|, never 0: an untrained adapter has lost nothing."""
    return matrix.norm().clamp(min=torch.finfo(torch.float32).tiny)


def _row(path: str, update: Tensor, weight: Tensor, missing: Tensor) -> MergeRow:
    share = update.norm() / _size(weight)
    return MergeRow(path, float(share), float(missing.norm() / _size(update)))
