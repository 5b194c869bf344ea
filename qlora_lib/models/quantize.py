"""Quantizing a whole model in place, layer by layer, and the way back to dense layers."""

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..layers.blocks import decoder_blocks
from ..layers.linear import Quantized, QuantizedLinear
from ..lora.layer import LoRALinear, lora_layers
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions, gptq_quantize, output_error
from ..quant.grid import QuantSpec, quantize_rtn
from ..quant.hessian import Hessian
from ..quant.nf4 import NF4Spec, quantize_nf4
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


def quantize_weight(
    weight: Tensor,
    spec: QuantSpec | NF4Spec,
    method: str,
    hessian: Hessian | None = None,
    options: GPTQOptions = GPTQOptions(),
) -> Quantized:
    """One weight by "rtn", "nf4" or "gptq" (which needs the Hessian)."""
    if method == "nf4":
        return quantize_nf4(weight, spec.block_size, spec.double_quant)
    if method == "rtn":
        return quantize_rtn(weight, spec)
    return gptq_quantize(weight, hessian, spec, options)


def check_method(method: str, spec: QuantSpec | NF4Spec, calibration) -> None:
    """Raises ValueError for an unknown method, one that does not fit the spec, and for gptq
    without calibration."""
    if method not in ("gptq", "rtn", "nf4"):
        raise ValueError(f"method={method!r} must be 'gptq', 'rtn' or 'nf4'")
    if (method == "nf4") != isinstance(spec, NF4Spec):
        raise ValueError(f"method={method!r} does not go with {spec}")
    if method == "gptq" and not calibration:
        raise ValueError("method='gptq' needs calibration batches; pass some, or use 'rtn'")


def quantize_layer(
    path: str, layer: nn.Linear, spec, method: str, hessian: Hessian | None, options: GPTQOptions
) -> tuple[QuantizedLinear, LayerReport]:
    """One layer and its row of the report; errors name its path."""
    began, weight = time.perf_counter(), layer.weight.detach()
    try:
        quantized = quantize_weight(weight, spec, method, hessian, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    error = None
    if hessian is not None:
        error = output_error(weight, quantized.dequantize(), hessian)
    new, seconds = QuantizedLinear.from_linear(layer, quantized), time.perf_counter() - began
    sizes = (weight.nbytes, quantized.nbytes, quantized.bits_per_weight)
    return new, LayerReport(path, tuple(weight.shape), *sizes, error, seconds)


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
    block, and every layer aims at its outputs there (gptq.dense_target).
    target_modules: as for find_linears; "all" are the linears of the decoder blocks.
    Raises ValueError for a method that does not fit the spec, targets that match
    nothing, a token that the model does not have, a model with adapters or one that is quantized
    already.
    """
    check_method(method, spec, calibration)
    if calibration:
        found = (int(b["input_ids"].max()) for b in calibration if "input_ids" in b)
        check_tokens(model, found)
    targets = find_linears(model, target_modules)
    for path, layer in targets.items():
        if not isinstance(layer, nn.Linear):
            found = f"{path} is a {type(layer).__name__}; "
            if isinstance(layer, QuantizedLinear):
                found += f"the model is quantized already ({layer.spec}): use it (method none), or "
            raise ValueError(
                f"{found}quantize a dense model without adapters (merge_lora or dequantize_model "
                "first)"
            )

    def swap(path: str, hessian: Hessian | None) -> LayerReport:
        layer, row = quantize_layer(path, targets[path], spec, method, hessian, options)
        replace_module(model, path, layer)
        del targets[path]  # the dense weight goes as soon as its layer is done
        return row

    if not calibration:
        return [swap(path, None) for path in tqdm(list(targets), desc=method, disable=None)]
    was_training, report = model.training, []
    model.eval()
    with torch.no_grad():
        used = options if method == "gptq" else GPTQOptions()
        report = _quantize_blocks(model, calibration, targets, swap, method, used)
    model.train(was_training)
    return report


def _quantize_blocks(model, batches, targets, swap, method, options) -> list[LayerReport]:
    path_of_blocks, blocks = decoder_blocks(model)
    outside = [path for path in targets if not path.startswith(f"{path_of_blocks}.")]
    if outside:
        raise ValueError(f"{outside} lie outside the decoder blocks; quantize them with 'rtn'")
    calls = BlockCalls(model, blocks, batches)
    dense_calls = BlockCalls(model, blocks, batches) if options.match_dense else None
    report = []
    for i, block in enumerate(tqdm(blocks, desc=f"{method}, blocks", disable=None)):
        layers = {p: m for p, m in targets.items() if p.startswith(f"{path_of_blocks}.{i}.")}
        dense = (copy.deepcopy(block), dense_calls) if dense_calls else None
        report += quantize_block(i, block, layers, calls, swap, dense, options.needs_halves)
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
