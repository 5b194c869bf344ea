"""What GPTQ's checkpoints and those of compressed-tensors share: which layers, and the folder."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.files import write_json_atomic
from ..base.folders import atomic_folder
from ..layers.linear import QuantizedLinear, check_scales_are_frozen
from ..lora.layer import lora_layers
from ..models.checkpoint import base_state, save_settings
from ..models.quantize import quantized_layers


def exportable(model: nn.Module, what: str) -> dict[str, QuantizedLinear]:
    """The quantized layers by path. Raises ValueError for a model with adapters, which `what` can't
    hold, for one without quantized layers, and for scales or codes that are being trained."""
    if adapted := next(iter(lora_layers(model)), None):
        raise ValueError(f"{adapted} has an adapter, which {what} can't hold: "
                         "merge_lora(model, into='rtn', unload=True), or save_adapter apart")
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model first")
    check_scales_are_frozen(layers)
    return layers


def write_folder(
    model: nn.Module, folder: Path | str, layers: dict[str, dict[str, Tensor]], described: dict,
    marker: str, dtype: torch.dtype, tokenizer, max_shard_size: int | str,
    beside: Callable[[Path], None] | None,
) -> None:  # fmt: skip
    """Write a complete model folder, whole or not at all.

    layers: the tensors of each quantized layer, by path and by name. described: the
    quantization_config, of which `marker` is a copy. dtype: as config.json names it. beside: writes
    more into the folder. Raises ValueError for a folder with other files."""
    from huggingface_hub import save_torch_state_dict

    state = {n: t for n, t in base_state(model).items() if n.rpartition(".")[0] not in layers}
    for path, tensors in layers.items():
        if (bias := model.get_submodule(path).bias) is not None:
            tensors = tensors | {"bias": bias.cpu()}
        state |= {f"{path}.{name}": tensor for name, tensor in tensors.items()}
    config = {"architectures": [type(model).__name__], "dtype": dtype}
    metadata = {"format": "pt"}  # transformers asks for this entry of the header
    with atomic_folder(folder, marker) as scratch:
        save_torch_state_dict(state, scratch, max_shard_size=max_shard_size, metadata=metadata)
        save_settings(model, tokenizer, state, scratch, **config, quantization_config=described)
        write_json_atomic(scratch / marker, described)
        if beside:
            beside(scratch)
