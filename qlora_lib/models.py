"""Whole models: dtypes, quantizing layer by layer."""

import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import decoder_blocks
from .gptq import GPTQOptions, Hessian, gptq_quantize, output_error
from .grid import QuantSpec, quantize_rtn
from .linear import Quantized, QuantizedLinear
from .lora import LoRALinear, find_linears, lora_layers, replace_module
from .nf4 import NF4Spec, quantize_nf4

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(compute_dtype: str, device: torch.device | str | None = None) -> torch.dtype:
    """The dtype to compute in.

    "auto" is bf16 where the device has it natively (emulated bf16 is slower than fp32),
    else fp16 on a GPU, else fp32. Raises ValueError for any other name.
    """
    if compute_dtype in DTYPES:
        return DTYPES[compute_dtype]
    if compute_dtype != "auto":
        raise ValueError(f"compute_dtype={compute_dtype!r} must be auto, bf16, fp16 or fp32")
    kind = torch.device(device or default_device()).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """bf16, fp16 or fp32."""
    return next(name for name, d in DTYPES.items() if d == dtype)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Every QuantizedLinear by the path of the layer it stands for."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {n.removesuffix(".base").removesuffix(".merged"): m for n, m in found.items()}


@dataclass
class LayerReport:
    """One quantized layer. Sizes in bytes; output_error relative, on the calibration inputs."""

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
    out.
    target_modules: as for find_linears; "all" are the linears of the decoder blocks.
    Raises ValueError for a method that does not fit the spec, targets that match
    nothing, a model with adapters or one that is quantized already.
    """
    check_method(method, spec, calibration)
    targets = find_linears(model, target_modules)
    for path, layer in targets.items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{path} is a {type(layer).__name__}; quantize a dense model without adapters "
                "(merge_lora or dequantize_model first)"
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
        report = _quantize_blocks(model, calibration, targets, swap, method)
    model.train(was_training)
    return report


def token_mask(batch: dict[str, Tensor]) -> Tensor:
    """bool (batch, seq), False for padding; a batch without attention_mask has none.

    Raises ValueError for a batch without input_ids, or with a mask of another shape.
    """
    if "input_ids" not in batch:
        raise ValueError(f"a batch holds {sorted(batch)}, but needs input_ids (batch, seq)")
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} for input_ids {tuple(ids.shape)}")
    return mask.bool()


class _Stop(Exception):
    """Ends a forward pass at the layer that was waited for."""


def first_block_inputs(model: nn.Module, block: nn.Module, batches) -> list[tuple[tuple, dict]]:
    """What a block, mostly the first, is called with, for each batch: (args, kwargs)."""
    calls = []

    def catch(module, args, kwargs):
        calls.append((args, kwargs))
        raise _Stop

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    device = next(model.parameters()).device
    try:
        for batch in batches:
            with suppress(_Stop):
                model(**{k: v.to(device) for k, v in batch.items()}, use_cache=False)
    finally:
        handle.remove()
    return calls


@contextmanager
def watch_inputs(layers: dict[str, nn.Module], see):
    """Call see(path, input) whenever one of the layers runs."""
    handles = [
        layer.register_forward_pre_hook(lambda module, args, path=path: see(path, args[0]))
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared_inputs(block: nn.Module, layers: dict[str, nn.Module], call) -> list[list[str]]:
    """The layers of a block in the order of their calls, those with one input together."""
    stages: list[list[str]] = []
    last = None

    def see(path, x):
        nonlocal last
        if x is last:
            stages[-1].append(path)
        else:
            stages.append([path])
        last = x

    with watch_inputs(layers, see):
        block(*call[0], **call[1])
    return stages


def quantize_block(
    block: nn.Module, layers: dict[str, nn.Module], calls, masks, swap
) -> list[LayerReport]:
    """Call swap(path, hessian) for each layer of a block, in the order of their calls.

    calls: (args, kwargs) of the block for each batch; masks: bool (batch, seq), real tokens.
    """
    report = []
    for stage in _shared_inputs(block, layers, calls[0]) if layers else []:
        first = {stage[0]: layers[stage[0]]}
        device = first[stage[0]].weight.device
        hessian = Hessian(first[stage[0]].in_features, device)  # one for the whole stage
        for (args, kwargs), mask in zip(calls, masks):

            def see(path, x, mask=mask):
                hessian.update(x[mask])
                raise _Stop  # what comes after this layer is not needed

            with watch_inputs(first, see), suppress(_Stop):
                block(*args, **kwargs)
        report += [swap(path, hessian) for path in stage]
    return report


def next_call(block: nn.Module, call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """What the next block is called with, once this one has run."""
    args, kwargs = call
    out = block(*args, **kwargs)
    return (out[0] if isinstance(out, tuple) else out, *args[1:]), kwargs


def block_settings(model: nn.Module, blocks, batches, calls) -> list[list[dict]]:
    """The keyword arguments of each block, for each batch; `calls` are those of the first.

    All blocks get the same ones, but in models with several kinds of layers (Gemma 3: a
    sliding window or all of the context), whose masks and rotary angles differ.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(blocks)
    settings = {kinds[0]: [kwargs for _, kwargs in calls]}
    for block, kind in zip(blocks, kinds):
        if kind not in settings:
            settings[kind] = [kw for _, kw in first_block_inputs(model, block, batches)]
    return [settings[kind] for kind in kinds]


def _quantize_blocks(model, batches, targets, swap, method) -> list[LayerReport]:
    path_of_blocks, blocks = decoder_blocks(model)
    outside = [path for path in targets if not path.startswith(f"{path_of_blocks}.")]
    if outside:
        raise ValueError(f"{outside} lie outside the decoder blocks; quantize them with 'rtn'")
    device = next(model.parameters()).device
    masks = [token_mask(b).to(device) for b in batches]  # (batch, seq)
    calls, report = first_block_inputs(model, blocks[0], batches), []
    settings = block_settings(model, blocks, batches, calls)
    for i, block in enumerate(tqdm(blocks, desc=f"{method}, blocks", disable=None)):
        layers = {p: m for p, m in targets.items() if p.startswith(f"{path_of_blocks}.{i}.")}
        calls = [(args, kwargs) for (args, _), kwargs in zip(calls, settings[i])]
        report += quantize_block(block, layers, calls, masks, swap)
        for n, call in enumerate(calls):  # the next block sees quantized outputs
            calls[n] = next_call(block, call)
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
