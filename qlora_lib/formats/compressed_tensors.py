"""Checkpoints in the layout of compressed-tensors: what transformers and vLLM read floats from.

A folder is a complete model: config.json, whose "quantization_config" says how to read the
weights; safetensors with quantized layers in the layout of compressed_layout.py; tokenizer.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..base.files import read_json
from ..base.folders import check_folder
from ..layers.linear import QuantizedLinear
from ..lora.layer import named
from ..layers.shared_input import fused
from ..models.packed_model import load_packed
from ..models.stored_weights import read_weights
from ..quant.fp4 import BLOCK_SIZES, FP4Spec
from ..quant.fp8 import FP8Spec
from ..quant.grid import QuantSpec
from ..quant.recipe import Spec
from .compressed_layout import FORMATS, GRIDS, from_compressed, to_compressed
from .packed_folder import exportable, write_folder

# A copy of the quantization_config. Only these exports have it, so an export over another model's
# folder is refused.
MARKER = "compressed_tensors.json"
METHOD = "compressed-tensors"


def export_compressed(
    model: nn.Module,
    folder: Path | str,
    tokenizer=None,
    max_shard_size: int | str = "5GB",
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model with QuantizedLinear layers, all of one spec, as a checkpoint of compressed-
    tensors, complete in its folder: "nvfp4-pack-quantized" or "mxfp4-pack-quantized" (FP4Spec),
    "float-quantized" (FP8Spec in e4m3), "pack-quantized" (symmetric QuantSpec).

    The weights are the same to the bit. Weights above max_shard_size (bytes, or "5GB") are split
    into files. Layers that are not quantized keep their dtype, though config.json names bf16 for
    FP4, the one dtype in which transformers computes with it. Warns where NVFP4 layers that vLLM
    makes one have tensor scales of their own. Raises ValueError, naming the layer, for adapters and
    what the format can't hold (compressed_layout.py), and for a folder with other files.
    """
    layers = _exportable(model)
    described = _describe(model, layers)
    tensors = {path: to_compressed(path, layer.quantized) for path, layer in layers.items()}
    # compressed-tensors decodes FP4 in bf16 alone, and multiplies nothing else by it.
    fp4 = any(isinstance(layer.spec, FP4Spec) for layer in layers.values())
    dtype = torch.bfloat16 if fp4 else next(model.parameters()).dtype
    write_folder(
        model, folder, tensors, described, MARKER, dtype, tokenizer, max_shard_size, beside
    )
    _warn_of_fused(layers)


def _exportable(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers by path; ValueError for what the format can't hold."""
    layers = exportable(model, "such a checkpoint")
    first, spec = next((path, layer.spec) for path, layer in layers.items())
    with torch.device("meta"):
        theirs = dict(type(model)(model.config).named_modules())  # the layers of readers
    for path, layer in layers.items():
        if type(theirs.get(path)) is not nn.Linear:  # GPT-2's, which were turned
            raise ValueError(f"{path} is a {type(theirs.get(path)).__name__} in transformers, and "
                             "compressed-tensors packs nn.Linear alone")
        form = getattr(layer.spec, "format", None)
        if form not in FORMATS and not isinstance(layer.spec, QuantSpec):
            raise ValueError(f"{path} is {layer.spec}, which is not written so here: quantize the "
                             "dense model with an FP4Spec, FP8Spec() or QuantSpec")  # fmt: skip
        if _arguments(layer.spec) != _arguments(spec):
            raise ValueError(f"one checkpoint has one spec: {first} {spec}, {path} {layer.spec}")
    return layers


def _arguments(spec: Spec) -> dict:
    """Return what quantization_config says of the weights."""
    if isinstance(spec, FP4Spec):
        nvidia = spec.format == "nvfp4"
        said = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": spec.block_size}
        said["strategy"] = "tensor_group" if nvidia else "group"
        said["scale_dtype"] = str(torch.float8_e4m3fn if nvidia else torch.uint8)
    elif isinstance(spec, FP8Spec):
        said = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
        said["strategy"] = "channel"
    else:
        said = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric}
        said["group_size"] = spec.group_size
        said["strategy"] = "group" if spec.group_size else "channel"
    return said | {"dynamic": False}


def _describe(model: nn.Module, layers: dict[str, QuantizedLinear]) -> dict:
    """Return the quantization_config."""
    spec = next(iter(layers.values())).spec
    linears = (path for path, m in model.named_modules() if isinstance(m, nn.Linear))
    weights = _arguments(spec)
    if getattr(spec, "clip_search", False):
        weights["observer"] = "mse"  # llm-compressor's name for clip search
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": METHOD,
        "format": GRIDS if isinstance(spec, QuantSpec) else FORMATS[spec.format],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": group | {"input_activations": None, "output_activations": None}
        },
        "ignore": sorted(linears),  # by name: linears that are dense
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _warn_of_fused(layers: dict[str, QuantizedLinear]) -> None:
    """Warn of layers that vLLM makes one, with the largest of their tensor scales for all."""
    for group in fused(layers):
        parts = [layers[path] for path in group]
        scales = {float(part.tensor_scale) for part in parts if part.spec == FP4Spec("nvfp4")}
        if len(scales) > 1:
            warnings.warn(
                f"{group[0]} and the layers that vLLM computes with it have tensor scales of their "
                "own, as after a merge: vLLM takes one for all, and answers worse. Quantize the "
                "merged dense model instead; transformers reads each its own",
                stacklevel=3,
            )
            return


def import_compressed(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read a checkpoint of compressed-tensors with weights in NVFP4, MXFP4, FP8 (a scale a row) or
    on integer grids, one file or sharded, into QuantizedLinear layers: (model in eval mode,
    tokenizer, or None when the folder has none).

    Raises FileNotFoundError for missing files and ValueError, naming the file or tensor, for
    corrupt, incomplete and unsupported ones, such as quantized activations.
    """
    folder = Path(folder)
    check_folder(folder)
    spec = _read_config(folder / "config.json")
    state = read_weights(folder)
    paths = [n.removesuffix(".weight_scale") for n in state if n.endswith(".weight_scale")]
    if not paths:
        raise ValueError(f"{folder} holds no weight_scale; is it a checkpoint of {METHOD}?")
    make = partial(from_compressed, spec=spec)
    return load_packed(folder, state, paths, make, device, compute_dtype)


def _read_config(file: Path) -> Spec:
    """Return the spec of the weights."""
    described = read_json(file).get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method != METHOD:
        raise ValueError(f"{file}: quantization_config is {method or described!r}, not {METHOD!r}")
    form, groups = described.get("format"), described.get("config_groups")
    if form not in (*FORMATS.values(), GRIDS):
        known = ", ".join((*FORMATS.values(), GRIDS))
        raise ValueError(f"{file}: format={form!r} is not one of {known}")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ValueError(f"{file}: config_groups must be one group with settings of weights")
    for name in ("input_activations", "output_activations"):
        if group.get(name) is not None:
            raise ValueError(f"{file}: {name} are quantized too, which is not done here")
    if described.get("kv_cache_scheme") is not None:
        raise ValueError(f"{file}: kv_cache_scheme is not read here")
    weights = group["weights"]
    with named(str(file)):
        if form == GRIDS:
            size = weights.get("group_size")
            size = None if size in (None, -1) else size
            spec = QuantSpec(weights.get("num_bits"), size, weights.get("symmetric", True),
                             clip_search=weights.get("observer") == "mse")
        else:
            name = next(name for name, said in FORMATS.items() if said == form)
            spec = FP4Spec(name) if name in BLOCK_SIZES else FP8Spec(name)
        wanted = _arguments(spec)
        for name in ("num_bits", "type", "symmetric", "strategy", "group_size"):
            got = weights.get(name, wanted[name])
            if got != wanted[name] and (name, got) != ("group_size", -1):
                raise ValueError(f"weights have {name}={got!r}, {form} {wanted[name]!r}")
        if weights.get("actorder") == "group":
            raise ValueError("actorder='group' is not read here")
    return spec
