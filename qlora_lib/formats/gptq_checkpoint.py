"""Checkpoints in the GPTQ format: what transformers, GPTQModel and vLLM read and write.

A folder is a complete model: config.json, whose "quantization_config" says how to read the
weights; safetensors with quantized layers in the layout of gptq_layout.py; tokenizer; settings.
"""

import re
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path

from torch import nn

from ..base.files import read_json
from ..base.folders import check_folder
from ..layers.blocks import decoder_blocks
from ..layers.linear import QuantizedLinear
from ..lora.layer import named
from ..models.packed_model import load_packed
from ..models.stored_weights import read_weights
from ..quant.grid import CLIP_NORM, QuantSpec
from ..quant.packing import BITS
from .gptq_layout import FORMATS, from_gptq, to_gptq
from .packed_folder import exportable, write_folder

# A copy of the quantization_config, which older readers want. Only GPTQ checkpoints have it,
# so an export over another model's folder is refused.
MARKER = "quantize_config.json"


def export_gptq(
    model: nn.Module,
    folder: Path | str,
    checkpoint_format: str = "gptq_v2",
    tokenizer=None,
    max_shard_size: int | str = "5GB",
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a model with QuantizedLinear layers as a GPTQ checkpoint, complete in its folder.

    checkpoint_format: "gptq_v2", or "gptq" for readers that know v1 alone; the weights are the
    same to the bit. Weights above max_shard_size (bytes, or "5GB") are split into files. Layers
    that are not quantized keep their dtype. Raises ValueError, naming the layer, for adapters and
    what the format can't hold (gptq_layout.py), and for a folder with other files.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(f"checkpoint_format={checkpoint_format!r} must be one of {FORMATS}")
    layers = _exportable(model)
    described = _describe(model, layers, checkpoint_format)
    v1 = checkpoint_format == "gptq"
    tensors = {path: to_gptq(path, layer.quantized, v1=v1) for path, layer in layers.items()}
    dtype = next(model.parameters()).dtype
    write_folder(
        model, folder, tensors, described, MARKER, dtype, tokenizer, max_shard_size, beside
    )


def _exportable(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers by path; ValueError for what the format can't hold."""
    layers = exportable(model, "a GPTQ checkpoint")
    first, spec = next((path, layer.spec) for path, layer in layers.items())
    grid = attrgetter("bits", "group_size", "symmetric")
    for path, layer in layers.items():
        if not isinstance(layer.spec, QuantSpec):
            kind = getattr(layer.spec, "format", "nf4").upper()
            raise ValueError(f"{path} is {kind}, and GPTQ checkpoints hold integer grids: quantize "
                             "the dense model with a QuantSpec, or save_quantized this one")
        if grid(layer.spec) != grid(spec):
            raise ValueError(f"one checkpoint has one spec: {first} {spec}, {path} {layer.spec}")
    return layers


def _describe(model: nn.Module, layers: dict[str, QuantizedLinear], checkpoint_format: str) -> dict:
    """Return the quantization_config; ValueError when it can't say which layers are quantized."""
    from .. import __version__

    spec = next(iter(layers.values())).spec
    described = {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "sym": spec.symmetric,
        # True costs speed: readers then gather the inputs by g_idx. Act-order with static
        # groups leaves g_idx in order and does not need it.
        "desc_act": any(layer.g_idx is not None for layer in layers.values()),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"qlora_lib:{__version__}"],
            "mse": CLIP_NORM if spec.clip_search else 0.0,  # GPTQModel's name for clip search
        },
    }
    prefix, blocks = decoder_blocks(model)
    suffixes = {}  # in order, each once
    for path in layers:
        match = re.fullmatch(rf"{re.escape(prefix)}\.\d+\.(.+)", path)
        if not match:
            raise ValueError(f"{path} lies outside the decoder blocks {prefix}; leave it dense")
        suffixes[match[1]] = None
    dense = {  # what stands behind a block's number, and one of these paths
        name: f"{prefix}.{i}.{name}"
        for i, block in enumerate(blocks)
        for name, m in block.named_modules() if isinstance(m, nn.Linear)
    }  # fmt: skip
    for suffix in filter(dense.get, suffixes):
        raise ValueError(f"{dense[suffix]} is dense, in other blocks it is quantized")
    if dense:  # the two ways of readers to say that not all layers of a block are packed
        described["modules_in_block_to_quantize"] = [list(suffixes)]
        described["dynamic"] = {rf"-:.*\.{re.escape(name)}$": {} for name in sorted(dense)}
    return described


def import_gptq(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read a GPTQ checkpoint, v1 or v2, one file or sharded, into QuantizedLinear layers: (model
    in eval mode, tokenizer, or None when the folder has none).

    Old ones, with settings in quantize_config.json alone and weights of any name, are read too.
    Raises FileNotFoundError for missing files and ValueError, naming the file or tensor, for
    corrupt, incomplete and unsupported ones, and v1 zero-points that overflowed.
    """
    folder = Path(folder)
    check_folder(folder)
    spec, v1 = _read_config(folder)
    state = read_weights(folder)
    paths = [n.removesuffix(".qweight") for n in state if n.endswith(".qweight")]
    if not paths:
        raise ValueError(f"{folder} holds no qweight; is it a GPTQ checkpoint?")
    make = partial(from_gptq, spec=spec, v1=v1)
    return load_packed(folder, state, paths, make, device, compute_dtype)


def _read_config(folder: Path) -> tuple[QuantSpec, bool]:
    """Return the spec, and whether zero-points are stored minus 1."""
    file = folder / "config.json"
    described = read_json(file).get("quantization_config")
    if described is None and (folder / MARKER).is_file():  # AutoGPTQ wrote no other
        file = folder / MARKER
        described = {"quant_method": "gptq"} | read_json(file)
    method = described.get("quant_method") if isinstance(described, dict) else None
    if method != "gptq":
        raise ValueError(f"{file}: quantization_config is {method or described!r}, not 'gptq'")
    # AutoGPTQ's name and GPTQModel's; files older than either are v1.
    version = described.get("checkpoint_format") or described.get("format") or "gptq"
    if version not in FORMATS:
        raise ValueError(f"{file}: checkpoint_format={version!r} is not one of {FORMATS}")
    if described.get("bits") not in BITS:
        raise ValueError(f"{file}: bits={described.get('bits')!r} is not one of {BITS}")
    if described.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"{file}: pack_dtype={described['pack_dtype']!r} must be 'int32'")
    if own := [name for name in described.get("dynamic") or {} if not str(name).startswith("-:")]:
        raise ValueError(f"{file}: dynamic gives {own[0]!r} settings of its own; quantize alike")
    size, meta = described.get("group_size", -1), described.get("meta")
    clip = meta.get("mse") if isinstance(meta, dict) else None
    size = None if size == -1 else size
    searched = isinstance(clip, (int, float)) and clip > 0
    with named(str(file)):
        spec = QuantSpec(described["bits"], size, described.get("sym", True), clip_search=searched)
    return spec, version == "gptq"
