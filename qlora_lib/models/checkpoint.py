"""Checkpoints: quantized models in a format of our own; adapters are in adapters.py.

Only safetensors and JSON are read or written, never pickle. Each folder is written
beside its place and renamed, so that a killed run leaves no half checkpoint."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.devices import default_device, resolve_dtype
from ..base.files import atomic_folder, read_json, read_tensors
from ..layers.linear import QuantizedLinear
from ..lora.layer import lora_layers
from ..lora.targets import replace_module
from ..lora.variants import check_scales_are_frozen
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.nf4 import NF4Spec, NF4Tensor
from .conv1d import linear_from_conv1d
from .quantize import quantized_layers

FORMAT = 1  # raised when the layout changes; older readers then refuse the file
WEIGHTS, QUANTIZATION = "model.safetensors", "quantization.json"
INDEX = f"{WEIGHTS}.index.json"  # of weights in shards: which file holds which tensor


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a transformers folder, in one safetensors file or in shards with an index.

    Raises FileNotFoundError and ValueError, naming the file, as read_tensors does.
    """
    if not (folder / INDEX).is_file():
        return read_tensors(folder / WEIGHTS)
    state = {}
    for name in sorted(set(read_json(folder / INDEX).get("weight_map", {}).values())):
        state |= read_tensors(folder / name)
    return state


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of the base alone, under the names it has without adapters."""
    adapted = lora_layers(model)
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner:
            if not name.startswith(f"{owner}.base."):
                continue
            name = f"{owner}.{name.removeprefix(f'{owner}.base.')}"
        if tensor.data_ptr() in seen and tensor.numel():
            continue  # tied weights are stored once; tie_weights restores them
        seen.add(tensor.data_ptr())
        state[name] = tensor.detach().contiguous().cpu()
    return state


def save_quantized(model: nn.Module, tokenizer, folder: Path | str) -> None:
    """Write a model with quantized layers: safetensors, config, tokenizer, specs.

    Adapters are left out (save_adapter keeps them). Raises ValueError when no layer is
    quantized, when an adapter is merged but the base still kept, and when the folder holds
    other files.
    """
    merged = [path for path, layer in lora_layers(model).items() if layer.merged is not None]
    if merged:
        raise ValueError(
            f"{len(merged)} layers, {merged[0]} first, hold both their base and a merged copy; "
            "to save the base, call unmerge_lora; to save the merged model, merge with "
            "unload=True"
        )
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model, or use save_pretrained")
    check_scales_are_frozen(layers)
    with atomic_folder(folder, QUANTIZATION) as scratch:
        save_file(base_state(model), scratch / WEIGHTS, metadata={"format": "pt"})
        describe(model, tokenizer, {n: m.spec for n, m in layers.items()}, scratch)


def describe(model, tokenizer, specs: dict[str, QuantSpec | NF4Spec], folder: Path) -> None:
    """Write all that stands beside the weights: specs by layer, config, tokenizer."""
    layers = {path: spec_as_json(spec) for path, spec in specs.items()}
    text = json.dumps({"format": FORMAT, "layers": layers}, indent=1)
    (folder / QUANTIZATION).write_text(text + "\n", encoding="utf-8")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def spec_as_json(spec: QuantSpec | NF4Spec) -> dict:
    """A spec as quantization.json holds it."""
    return {"kind": {QuantSpec: "grid", NF4Spec: "nf4"}[type(spec)], **asdict(spec)}


def load_quantized(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read what save_quantized or quantize_checkpoint wrote: (model in eval mode, tokenizer).

    The dense model never exists: it is built without storage and the packed tensors
    are put in. Raises FileNotFoundError for missing files, ValueError for a corrupt or
    newer checkpoint or one that lacks tensors.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    described = read_json(folder / QUANTIZATION)
    if described.get("format", 0) > FORMAT:
        raise ValueError(f"{folder} has format {described['format']}, newer than {FORMAT}; upgrade")
    state = read_weights(folder)
    model, dtype, device = empty_model(folder, device, compute_dtype)
    put_packed(model, described["layers"], state)
    model = fill(model, described["layers"], state, folder, dtype, device)
    return model, AutoTokenizer.from_pretrained(folder)


def put_packed(model: nn.Module, layers: dict[str, dict], state: dict[str, Tensor]) -> None:
    """Replace the linears at these paths by packed ones, whose tensors are taken out of `state`.

    layers: specs by path, as in quantization.json. Raises ValueError for tensors that do not
    make a layer.
    """
    for path, spec in layers.items():
        tensors = {n.removeprefix(f"{path}."): n for n in state if n.startswith(f"{path}.")}
        tensors = {short: state.pop(full) for short, full in tensors.items()}
        linear = model.get_submodule(path)
        shape = torch.Size((linear.out_features, linear.in_features))
        replace_module(model, path, _quantized_layer(path, tensors, dict(spec), shape))


def empty_model(folder: Path, device=None, compute_dtype: str = "auto", **changes):
    """The model that config.json describes, without storage: (model, dtype, device).

    changes: entries of the config that are to be others.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    device = torch.device(device or default_device())
    dtype = resolve_dtype(compute_dtype, device)
    config = AutoConfig.from_pretrained(folder, **changes)
    if hasattr(config, "quantization_config"):  # of the file, not of the model made from it
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    linear_from_conv1d(model)
    return model, dtype, device


def fill(model: nn.Module, packed, state: dict[str, Tensor], folder: Path, dtype, device):
    """Put the dense tensors of `state` into a model whose `packed` paths hold theirs already.

    Returns the model, frozen and in eval mode. Raises ValueError for missing and
    unexpected tensors.
    """
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    inside = tuple(f"{path}." for path in packed)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [n for n in missing if not n.startswith(inside) and n not in tied]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, not expected {unexpected[:3]}")
    model.tie_weights()
    materialize_buffers(model)
    model.requires_grad_(False)
    return model.to(device).eval()


def _quantized_layer(path: str, tensors: dict, spec: dict, shape: torch.Size) -> QuantizedLinear:
    kind, bias = spec.pop("kind"), tensors.pop("bias", None)
    names = {"grid": ("g_idx",), "nf4": ("nested_absmax", "offset")}[kind]
    tensors = {**dict.fromkeys(names), **tensors}
    make, make_spec = {"grid": (QuantizedTensor, QuantSpec), "nf4": (NF4Tensor, NF4Spec)}[kind]
    try:
        quantized = make(**tensors, shape=shape, spec=make_spec(**spec))
        # On the meta device this costs nothing, and shapes that do not fit each other show.
        on_meta = {n: None if t is None else t.to("meta") for n, t in tensors.items()}
        make(**on_meta, shape=shape, spec=quantized.spec).dequantize()
        return QuantizedLinear(quantized, bias)
    except (TypeError, ValueError, RuntimeError) as error:
        names = sorted(tensors)
        raise ValueError(f"{path}: tensors {names} do not make a layer ({error})") from None


def materialize_buffers(model: nn.Module, device="cpu") -> None:
    """Give storage and values to buffers that no checkpoint holds (rotary frequencies)."""
    for module in model.modules():
        empty = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if empty:
            for parameter in module.parameters(recurse=False):  # Gemma's embeddings have both
                parameter._is_hf_initialized = True  # transformers then leaves its values alone
            model._init_weights(module)
