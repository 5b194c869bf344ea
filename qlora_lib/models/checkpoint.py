"""Checkpoints of quantized models in a format of our own.

A folder holds the weights as safetensors, config and tokenizer as transformers writes them, and
quantization.json, which says how each packed layer is to be read. Adapters have files of their
own (lora/files.py).
"""

import copy
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.files import FORMAT, check_format, read_json, write_json_atomic
from ..base.finite import check_finite
from ..base.folders import atomic_folder, check_folder
from ..layers.hadamard_input import HadamardInput
from ..layers.linear import Quantized, check_scales_are_frozen
from ..lora.layer import lora_layers
from ..quant.fp4 import FP4Spec, FP4Tensor
from ..quant.fp8 import FP8Spec, FP8Tensor
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.nf4 import NF4Spec, NF4Tensor
from ..quant.recipe import Spec
from .packed_model import load_packed, tied_weights, untie
from .quantize import quantized_layers
from .stored_weights import WEIGHTS, read_weights

QUANTIZATION = "quantization.json"
# By what quantization.json calls them: the weight, its spec, the tensors that it may lack
KINDS = {
    "grid": (QuantizedTensor, QuantSpec, ("g_idx",)),
    "nf4": (NF4Tensor, NF4Spec, ("nested_absmax", "offset")),
    "fp4": (FP4Tensor, FP4Spec, ("tensor_scale",)),
    "fp8": (FP8Tensor, FP8Spec, ()),
}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the base alone, under the names it has without adapters; tied
    weights once, under the name that tie_weights gives to the others. Raises ValueError, naming
    the tensor, for NaN and Inf, which no file shall hold, and for a layer rotated online."""
    online = next((n for n, m in model.named_modules() if isinstance(m, HadamardInput)), None)
    if online:
        raise ValueError(f"{online} is rotated online, which no file says; rotate offline to store")
    found, state, seen, tied = {}, {}, set(), tied_weights(model)
    adapted = lora_layers(model)
    for name, tensor in model.state_dict().items():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner is None or name.startswith(f"{owner}.base."):
            found[name.replace(f"{owner}.base.", f"{owner}.")] = tensor
    for name in sorted(found, key=lambda name: name in tied):  # CamemBERT's head comes first
        tensor = found[name]
        if tensor.data_ptr() not in seen or not tensor.numel():
            state[name] = tensor.detach().contiguous().cpu()
        seen.add(tensor.data_ptr())
    check_finite(state.items())
    return state


def save_quantized(
    model: nn.Module, tokenizer, folder: Path | str, beside: dict[str, dict] | None = None
) -> None:
    """Write a model with quantized layers, without adapters: safetensors, config, tokenizer, specs;
    beside: further JSON files that are there whenever the model is, {name: what it holds}.
    Raises ValueError when no layer is quantized, when base and merged copy are both kept, and when
    the folder holds other files."""
    if merged := [path for path, layer in lora_layers(model).items() if layer.merged is not None]:
        raise ValueError(f"{len(merged)} layers, {merged[0]} first, hold both their base and a "
                         "merged copy: unmerge_lora; or merge with unload=True")  # fmt: skip
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model, or use save_pretrained")
    check_scales_are_frozen(layers)
    state = base_state(model)
    with atomic_folder(folder, QUANTIZATION) as scratch:
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        describe(model, tokenizer, {n: m.spec for n, m in layers.items()}, state, scratch, beside)


def describe(
    model, tokenizer, specs: dict[str, Spec], names: Iterable[str], folder: Path,
    beside: dict[str, dict] | None = None,
) -> None:  # fmt: skip
    """Write all that stands beside tensors of these names, with the specs of the packed layers."""
    for name, said in (beside or {}).items():
        write_json_atomic(folder / name, said)
    layers = {path: spec_as_json(spec) for path, spec in specs.items()}
    write_json_atomic(folder / QUANTIZATION, {"format": FORMAT, "layers": layers})
    save_settings(model, tokenizer, names, folder)


def save_settings(model, tokenizer, names: Iterable[str], folder: Path, **changes) -> None:
    """Write config (with `changes`), generation settings and tokenizer beside tensors of these
    names. A head among them is not tied to the embeddings, whatever the model once was."""
    config, head = copy.deepcopy(model.config), model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if any(n.rpartition(".")[0] == path and not n.endswith(".bias") for n in names):
        untie(config)
    config.update(changes)
    config.save_pretrained(folder)
    # As it was read: save_pretrained refuses a temperature without do_sample, which many have.
    file = folder / "generation_config.json"
    model.generation_config.to_json_file(file, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def spec_as_json(spec: Spec) -> dict:
    """Return a spec as quantization.json holds it."""
    kind = next(kind for kind, (_, make, _) in KINDS.items() if type(spec) is make)
    return {"kind": kind, **asdict(spec)}


def load_quantized(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read what save_quantized or quantize_checkpoint wrote: (model in eval mode, tokenizer).
    Raises FileNotFoundError for missing files, ValueError for a corrupt or newer checkpoint or one
    that lacks tensors."""
    folder = Path(folder)
    check_folder(folder)
    described = read_json(folder / QUANTIZATION)
    check_format(folder / QUANTIZATION, described.get("format"))
    layers, state = described.get("layers"), read_weights(folder)
    if not isinstance(layers, dict):
        raise ValueError(f"{folder / QUANTIZATION} describes no layers; save the model again")
    make = partial(our_tensor, layers=layers)
    return load_packed(folder, state, layers, make, device, compute_dtype)


def our_tensor(path: str, tensors: dict[str, Tensor], shape: torch.Size, layers: dict) -> Quantized:
    """Return the weight of a layer of our own format; layers: as in quantization.json."""
    try:
        spec = dict(layers[path])
        make_tensor, make_spec, optional = KINDS[spec.pop("kind")]
        tensors = {**dict.fromkeys(optional), **tensors}
        quantized = make_tensor(**tensors, shape=shape, spec=make_spec(**spec))
        quantized.check()
    except (TypeError, ValueError, KeyError) as error:
        names = sorted(tensors)
        raise ValueError(f"{path}: tensors {names} do not make a layer ({error})") from None
    return quantized
