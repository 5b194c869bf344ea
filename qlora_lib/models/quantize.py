"""A whole model quantized, layer by layer, and back to dense."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.progress import Progress
from ..layers.blocks import decoder_blocks
from ..layers.linear import QuantizedLinear
from ..lora.layer import LoRALinear, lora_layers
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions, output_error
from ..quant.grid import QuantSpec
from ..quant.hessian import Hessian
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from .batches import check_tokens
from .calibrate import BlockCalls, quantize_block


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return every QuantizedLinear by the path of the layer that it stands for."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {n.removesuffix(".base").removesuffix(".merged"): m for n, m in found.items()}


@dataclass
class LayerReport:
    """One quantized layer. Sizes in bytes; output_error relative to what the dense weight gives
    on the same calibration inputs."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    output_error: float | None  # None without calibration
    seconds: float


def quantize_layer(
    path: str, layer: nn.Linear, recipe: Recipe, hessian: Hessian | None
) -> tuple[QuantizedLinear, LayerReport]:
    """One layer, quantized, and its row of the report; errors name its path."""
    began, weight = time.perf_counter(), layer.weight.detach()
    try:
        quantized = recipe.quantize(weight, hessian)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    error = None
    if hessian is not None:
        error = output_error(weight, quantized.dequantize(), hessian)
    new, seconds = QuantizedLinear.from_linear(layer, quantized), time.perf_counter() - began
    sizes = (weight.nbytes, quantized.nbytes, quantized.bits_per_weight)
    return new, LayerReport(path, tuple(weight.shape), *sizes, error, seconds)


def check_calibration(recipe: Recipe, calibration) -> None:
    """Raises ValueError for GPTQ without calibration."""
    if recipe.method == "gptq" and not calibration:
        raise ValueError("method='gptq' needs calibration batches; pass some, or use 'rtn'")


def quantize_model(
    model: nn.Module,
    calibration: list[dict[str, Tensor]] | None,
    spec: QuantSpec | NF4Spec,
    method: str = "gptq",
    options: GPTQOptions = GPTQOptions(),
    target_modules="all",
) -> list[LayerReport]:
    """Quantize the target layers in place, block by block from the first to the last.

    calibration: batches of input_ids and attention_mask, each (batch, seq); without a mask
    every token counts. Required by "gptq", optional for the others, which then report no
    output error. Each layer is calibrated on its own inputs as the layers before it,
    already quantized, produce them; layers that share an input (q, k, v; gate, up) are done
    together, so that o_proj sees the attention of the quantized q, k and v. Padding is left
    out. With options.match_dense the dense model's activations go along, from a copy of each
    block, and every layer aims at its outputs there (quant/dense_target.py).
    target_modules: as for find_linears; "all" are the linears of the decoder blocks.
    Returns a row a layer. Raises ValueError for a method that does not fit the spec, options
    that the method does not have, targets that match nothing, a token that the model does not
    have, a model with adapters or one that is quantized already.
    """
    return apply_recipe(model, Recipe.of(spec, method, options, target_modules), calibration)


def apply_recipe(
    model: nn.Module, recipe: Recipe, calibration: list[dict[str, Tensor]] | None = None
) -> list[LayerReport]:
    """What quantize_model does, for a recipe; its rows and errors."""
    check_calibration(recipe, calibration)
    if calibration:
        found = (int(b["input_ids"].max()) for b in calibration if "input_ids" in b)
        check_tokens(model, found)
    targets = find_linears(model, recipe.targets)
    for path, layer in targets.items():
        if not isinstance(layer, nn.Linear):
            found = f"{path} is a {type(layer).__name__}; "
            if isinstance(layer, QuantizedLinear):
                found += f"the model is quantized already ({layer.spec}): use it (method none), or "
            raise ValueError(
                f"{found}quantize a dense model without adapters (merge_lora or dequantize_model "
                "first)"
            )

    progress = Progress(f"quantizing with {recipe.method}", len(targets), "layers")

    def swap(path: str, hessian: Hessian | None) -> LayerReport:
        layer, row = quantize_layer(path, targets[path], recipe, hessian)
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
    return report


def _quantize_blocks(model, batches, targets, swap, recipe: Recipe) -> list[LayerReport]:
    path_of_blocks, blocks = decoder_blocks(model)
    outside = [path for path in targets if not path.startswith(f"{path_of_blocks}.")]
    if outside:
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
    """Replace each QuantizedLinear by a dense nn.Linear with its dequantized weight.

    Adapters stay. Returns the paths. The dense layers take the model's own dtype.
    """
    dtype, done = next(model.parameters()).dtype, []
    adapted = lora_layers(model)
    for path, layer in quantized_layers(model).items():
        if path in adapted:
            holder: LoRALinear = adapted[path]
            if isinstance(holder.merged, QuantizedLinear):
                holder.merged = holder.merged.to_linear(dtype)
            if isinstance(holder.base, QuantizedLinear):
                holder.base = holder.base.to_linear(dtype)
        else:
            replace_module(model, path, layer.to_linear(dtype))
        done.append(path)
    return done
