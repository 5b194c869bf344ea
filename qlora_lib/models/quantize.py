"""A whole model quantized, layer by layer, and back to dense."""

import copy
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.finite import check_finite
from ..base.progress import Progress
from ..layers.blocks import decoder_blocks
from ..layers.linear import QuantizedLinear
from ..lora.layer import LoRALinear, named
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions, output_error
from ..quant.hessian import Hessian
from ..quant.recipe import Recipe, Spec
from .batches import Batch, check_tokens, token_mask
from .calibrate import BlockCalls, quantize_block
from .fused import shared_largest


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all that a checkpoint holds of a model, (name, tensor), without copies."""
    derived = {f"{path}.{name}".removeprefix(".") for path, module in model.named_modules()
               for name in module._non_persistent_buffers_set}  # fmt: skip
    yield from model.named_parameters()
    yield from ((n, t) for n, t in model.named_buffers() if n not in derived)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every QuantizedLinear by the path of the layer that it stands for."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {n.removesuffix(".base").removesuffix(".merged"): m for n, m in found.items()}


@dataclass
class LayerReport:
    """One quantized layer; output_error: relative to the dense weight's, on the same inputs."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    output_error: float | None  # None without calibration
    seconds: float


def quantize_layer(
    path: str, layer: nn.Linear, recipe: Recipe, hessian: Hessian | None,
    largest: float | None = None,
):  # fmt: skip
    """Return (QuantizedLinear, its LayerReport) for one layer; errors name its path. largest: as
    for Recipe.quantize."""
    began, weight = time.perf_counter(), layer.weight.detach()
    with named(path):
        quantized = recipe.quantize(weight, hessian, largest)
    error = None if hessian is None else output_error(weight, quantized.dequantize(), hessian)
    new, seconds = QuantizedLinear.from_linear(layer, quantized), time.perf_counter() - began
    sizes = (weight.nbytes, quantized.nbytes, quantized.bits_per_weight)
    return new, LayerReport(path, tuple(weight.shape), *sizes, error, seconds)


def check_calibration(model, recipe: Recipe, calibration) -> None:
    """Raise ValueError for GPTQ without calibration, for what is no list of batches, and for tokens
    that the model lacks."""
    if not isinstance(calibration, (list, tuple, type(None))):  # a generator would be used up
        raise ValueError(f"calibration is a {type(calibration).__name__}, but must be a list of "
                         "batches, {'input_ids': (batch, seq), ...}")  # fmt: skip
    if recipe.method == "gptq" and not calibration:
        raise ValueError("method='gptq' needs calibration batches; pass some, or use 'rtn'")
    for batch in calibration or ():
        token_mask(batch)
        check_tokens(model, map(int, batch["input_ids"].aminmax()))


def check_shared(model, paths: Iterable[str]) -> None:
    """Raise ValueError for a target whose weight is another layer's too, as in Zamba's blocks."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {source: name for name, source in tied.items()}
    for path in paths:
        if other := shared.get(f"{path}.weight"):
            raise ValueError(
                f"{path} shares its weight with {other}, which a packed layer can't; leave it out "
                "of target_modules"
            )


def warn_of_dense(paths: Iterable[str]) -> None:
    """Warn of the target layers at `paths`, which no calibration batch has reached."""
    if paths := list(paths):
        warnings.warn(
            f"{len(paths)} target layers stay dense, because the model never called them on the "
            f"calibration batches: {', '.join(paths[:8])}{', ...' if paths[8:] else ''}. Some "
            "models have layers that they do not use, or read their weights themselves; leave "
            "them out of target_modules, or quantize with 'rtn' or 'nf4'",
            stacklevel=3,
        )


def quantize_model(
    model: nn.Module,
    calibration: list[Batch] | None,
    spec: Spec,
    method: str = "gptq",
    options: GPTQOptions = GPTQOptions(),
    target_modules="all",
) -> list[LayerReport]:
    """Quantize the target layers in place, block by block from the first to the last.

    calibration: batches of input_ids and attention_mask, each (batch, seq); without a mask
    every token counts. Required by "gptq", optional for the others, which then report no
    output error. Each layer is calibrated on its own inputs as the layers before it, already
    quantized, produce them, without padding. options.match_dense: a layer aims at its outputs in
    the dense model (quant/dense_target.py). target_modules: as for find_linears.
    Returns a row a layer, and warns of layers that are never called, which stay dense. Raises
    ValueError for settings that do not fit each other or the model, a model with adapters, with
    NaN or Inf, one that is quantized already, and one that can't be calibrated block by block.
    """
    return apply_recipe(model, Recipe.of(spec, method, options, target_modules), calibration)


def apply_recipe(model, recipe: Recipe, calibration: list[Batch] | None = None) -> list:
    """Do what quantize_model does, by a recipe; its rows and errors."""
    check_calibration(model, recipe, calibration)
    targets = find_linears(model, recipe.targets)
    for path, layer in targets.items():
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"{path} is a QuantizedLinear; the model is quantized already ({layer.spec}): use "
                "it (method none), or quantize a dense model (dequantize_model first)"
            )
        if isinstance(layer, LoRALinear):
            raise ValueError(f"{path} is a LoRALinear; quantize a dense model: merge_lora first")
    check_shared(model, targets)
    check_finite(stored_tensors(model))  # before a layer is replaced
    progress = Progress(f"quantizing with {recipe.method}", len(targets), "layers")
    largest = shared_largest(targets, recipe.spec)

    def swap(path: str, hessian: Hessian | None) -> LayerReport:
        layer, row = quantize_layer(path, targets[path], recipe, hessian, largest.get(path))
        replace_module(model, path, layer)
        del targets[path]  # the dense weight goes as soon as its layer is done
        progress(progress.total - len(targets), path)
        return row

    if not calibration:
        return [swap(path, None) for path in list(targets)]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        report = _quantize_blocks(model, calibration, targets, swap, recipe)
    model.train(was_training)
    warn_of_dense(targets)
    return report


def _quantize_blocks(model, batches, targets, swap, recipe: Recipe) -> list[LayerReport]:
    path_of_blocks, blocks = decoder_blocks(model)
    if outside := [path for path in targets if not path.startswith(f"{path_of_blocks}.")]:
        raise ValueError(f"{outside} lie outside the decoder blocks; quantize them with 'rtn'")
    calls = BlockCalls(model, blocks, batches)
    dense_calls = BlockCalls(model, blocks, batches) if recipe.matches_dense else None
    report = []
    for i, block in enumerate(blocks):
        layers = {p: m for p, m in targets.items() if p.startswith(f"{path_of_blocks}.{i}.")}
        dense = (copy.deepcopy(block), dense_calls) if dense_calls else None
        report += quantize_block(i, block, layers, calls, swap, dense, recipe.needs_halves)
        calls.advance(i, block)  # the next block sees quantized outputs
        if dense:
            dense_calls.advance(i, dense[0])
    return report


def dequantize_model(model: nn.Module) -> list[str]:
    """Replace each QuantizedLinear by a dense nn.Linear with its dequantized weight, in the model's
    own dtype. Adapters stay. Returns the paths."""
    dtype, paths = next(model.parameters()).dtype, list(quantized_layers(model))
    for path, layer in list(model.named_modules()):  # an adapter's layer may hold two of them
        if isinstance(layer, QuantizedLinear):
            replace_module(model, path, layer.to_linear(dtype))
    return paths
