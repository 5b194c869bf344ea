"""GGUF files for llama.cpp, Ollama and LM Studio, in a folder that also load_model reads.

    base.gguf      the model, its quantized layers in blocks of 32 (quant/gguf_blocks.py)
    adapter.gguf   the active adapter, where there is one
    config.json, tokenizer.json, ...   as transformers writes them: base.gguf says less
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.folders import atomic_folder
from ..layers.blocks import decoder_blocks
from ..layers.linear import QuantizedLinear, check_scales_are_frozen
from ..lora.layer import LoRALinear, lora_layers
from ..lora.merge import merge_lora
from ..lora.targets import find_linears
from ..models.checkpoint import base_state, save_settings
from ..models.gguf_folder import ADAPTER, BASE, needs_gguf
from ..models.gguf_layout import Layout, layout, rope_factors, ropes
from ..models.quantize import quantized_layers
from ..models.settings import head_dim
from ..quant.gguf_blocks import BLOCK, FP16S, dense_blocks, to_blocks
from ..quant.grid import QuantizedTensor
from .gguf_vocabulary import add_vocabulary

INSTEAD = "Q8_0"  # for a grid that no kind of block holds: the most exact one


@dataclass
class BlockRow:
    """One layer in blocks. lost: |W stored - W| / |W|, 0 where the codes went over as they are."""

    name: str
    kind: str
    lost: float


def export_gguf(
    model: nn.Module, folder: Path | str, tokenizer, merge: str | None = None,
    linears: str | None = None, beside: Callable[[Path], None] | None = None,
) -> list[BlockRow]:  # fmt: skip
    """Write a model as GGUF, complete in its folder; returns a row a quantized layer.

    An active adapter is written beside the base; merge ("rtn" or "dense"): merge_lora it first, in
    place. linears: "Q4_0", "Q4_1" or "Q8_0", to which dense layers of the decoder blocks are
    rounded by the gguf package, as llama.cpp does; None: they stay dense. beside(folder) may add
    files before the folder takes its place. Raises ImportError without the package gguf, and
    ValueError, by name, for what llama.cpp has not: architectures, tokenizers, rope, DoRA.
    """
    needs_gguf("to write GGUF")
    if linears not in (None, *FP16S):
        raise ValueError(f"linears={linears!r} must be None or one of {', '.join(FP16S)}")
    lay = layout(model.config, type(model).__name__)
    if merge:
        merge_lora(model, merge, unload=True)
    adapted = _adapted(model)
    with atomic_folder(folder, BASE) as scratch:
        rows = _write_base(model, tokenizer, lay, linears, scratch / BASE)
        if adapted:
            _write_adapter(adapted, lay, scratch / ADAPTER)
        save_settings(model, tokenizer, base_state(model), scratch)
        if beside:
            beside(scratch)
    return rows


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers whose active adapter is written, by path."""
    found = {path: layer for path, layer in lora_layers(model).items() if layer.active}
    inside = f"{decoder_blocks(model)[0]}."
    for path, layer in found.items():
        if layer.merged is not None:
            raise ValueError(f"{path} holds both its base and a merged copy; unmerge_lora, or "
                             "merge with unload=True")  # fmt: skip
        if layer.configs[layer.active].use_dora:
            raise ValueError(f"{path}: llama.cpp has no DoRA; merge the adapter (merge='rtn')")
        if not path.startswith(inside):
            raise ValueError(f"{path} lies outside the decoder blocks, where llama.cpp takes no "
                             "adapter here; merge it")  # fmt: skip
    return found


def _write_base(model, tokenizer, lay: Layout, linears, path: Path) -> list[BlockRow]:
    from gguf import GGUFWriter

    writer, rows = GGUFWriter(path, lay.arch), []
    _add_settings(writer, model.config)
    add_vocabulary(writer, tokenizer, model.config.vocab_size)
    layers = quantized_layers(model)
    check_scales_are_frozen(layers)
    if (factors := rope_factors(model.config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    dense_linears = find_linears(model, "all") if linears else ()
    for name, tensor in base_state(model).items():
        owner, _, part = name.rpartition(".")
        if owner in layers and part != "bias":
            continue
        kind = linears if owner in dense_linears and part == "weight" else None
        if kind:
            kind, data, lost = _rounded(owner, kind, tensor.float())
            rows.append(BlockRow(owner, kind, lost))
        _add(writer, lay, name, data if kind else tensor, kind)
    for owner, layer in layers.items():
        kind, blocks, lost = _blocks(owner, layer)
        rows.append(BlockRow(owner, kind, lost))
        _add(writer, lay, f"{owner}.weight", blocks, kind)
    _write(writer)
    return rows


def _blocks(path: str, layer: QuantizedLinear) -> tuple[str, Tensor, float]:
    """A packed layer's kind, its blocks, and what they lost."""
    packed = layer.quantized
    held = to_blocks(packed) if isinstance(packed, QuantizedTensor) else None
    if held is None:
        return _rounded(path, INSTEAD, packed.dequantize())
    kind, blocks = held
    if kind != "Q4_1":
        return kind, blocks.cpu(), 0.0
    return kind, blocks.cpu(), _lost(dense_blocks(kind, blocks), packed.dequantize())


def _rounded(path: str, kind: str, weight: Tensor) -> tuple[str, Tensor, float]:
    """A dense weight in blocks, by the gguf package's own rounding, and what that lost."""
    from gguf import GGMLQuantizationType, quants

    if weight.shape[1] % BLOCK:
        raise ValueError(f"{path} has {weight.shape[1]} inputs, no multiple of a block's {BLOCK}; "
                         "leave this layer dense")  # fmt: skip
    weight = weight.cpu()
    blocks = torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType[kind]))
    return kind, blocks, _lost(dense_blocks(kind, blocks), weight)


def _lost(stored: Tensor, weight: Tensor) -> float:
    return float((stored - weight).norm() / weight.norm().clamp(min=1e-30))


def _add(writer, lay: Layout, name: str, tensor: Tensor, kind: str | None = None) -> None:
    """Add a tensor under llama.cpp's name, rows in its order; kind: of blocks, None: dense."""
    from gguf import GGMLQuantizationType, quants

    there = lay.name(name)
    if there is None:
        raise ValueError(f"llama.cpp's {lay.arch} has no tensor {name}")
    if kind is None:
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(tensor.dtype, "F32")
        kind = kind if tensor.dim() > 1 else "F32"  # llama.cpp adds and multiplies by these in fp32
        tensor = tensor.float() + lay.offset(name)
    data = lay.rows(name.rpartition(".")[0], tensor).numpy()
    raw = GGMLQuantizationType[kind]
    data = quants.quantize(data, raw) if kind == "BF16" else data
    data = data.astype("float16") if kind == "F16" else data
    writer.add_tensor(there, data, raw_dtype=raw)


def _add_settings(writer, config) -> None:
    width, rope = head_dim(config), ropes(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope.get("", rope.get("full_attention"))["rope_theta"])
    if "sliding_attention" in rope:
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)


def _write_adapter(adapted: dict[str, LoRALinear], lay: Layout, path: Path) -> None:
    """Write A and B of each layer's active adapter; llama.cpp scales all by alpha / rank."""
    from gguf import GGUFType, GGUFWriter, Keys

    writer, alpha = GGUFWriter(path, lay.arch), None
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    for owner, layer in adapted.items():
        config, a, b = (part[layer.active] for part in (layer.configs, layer.lora_A, layer.lora_B))
        own = config.scaling * config.rank  # its alpha, as llama.cpp means it
        if alpha is None:
            writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha := own)
        there = f"{lay.name(f'{owner}.weight')}.lora_"
        b = lay.rows(owner, b.detach().cpu() * (own / alpha))
        writer.add_tensor(f"{there}a", a.detach().cpu().numpy())
        writer.add_tensor(f"{there}b", b.numpy())
    _write(writer)


def _write(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
