"""Adapters on disk, in PEFT's layout: safetensors and JSON, a folder an adapter."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.files import open_tensors, read_json
from ..base.folders import atomic_folder
from ..base.paths import ROOT
from .fingerprint import base_fingerprint, residual_fingerprint
from .inject import add_adapters
from .layer import LoRAConfig, LoRALinear, layers_with
from .peft_config import describe, read_config

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, in the file


def save_adapter(
    model: nn.Module, folder: Path | str, adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write one adapter in PEFT's layout: adapter_model.safetensors, adapter_config.json.

    dtype: of the stored tensors; they are read back as fp32. PiSSA over a dense base is written
    as what it learned, B A - (B A at step 0): plain LoRA of rank 2 r for the original model. Over
    a quantized base, LoftQ and PiSSA fit that base alone, which the file names by a hash.
    Raises ValueError for an unknown adapter, layers that differ in what PEFT has one value for,
    PiSSA's difference in 16 bits, and a folder that holds other files.
    """
    layers = layers_with(model, adapter)
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    residual = {path: m for path, m in layers.items() if m.residual_of == adapter}
    packed = {path: m for path, m in residual.items() if m.start is None}
    if dtype != torch.float32 and len(packed) < len(residual):
        raise ValueError(f"dtype={dtype}: what PiSSA learned is a small difference of two large "
                         "products, which 16 bits would lose; save it as float32")  # fmt: skip
    state, configs, metadata = {}, {}, {"format": "pt", "base": base_fingerprint(model)}
    for path, layer in layers.items():
        key = f"base_model.model.{path}"
        configs[path], b, a = _update(layer, adapter)
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if adapter in layer.magnitude:
            state[f"{key}.{MAGNITUDE}"] = layer.magnitude[adapter].detach()
    state = {name: t.cpu().to(dtype).contiguous() for name, t in state.items()}
    if packed:
        metadata["init"] = next(iter(packed.values())).configs[adapter].init
        metadata["residual base"] = residual_fingerprint(packed)
    name = getattr(model.config, "_name_or_path", "")
    if Path(name).is_relative_to(ROOT):  # a folder of this repository as seen from its root
        name = Path(name).relative_to(ROOT).as_posix()
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name}
    text = json.dumps(described | describe(model, configs), indent=1) + "\n"
    with atomic_folder(folder, ADAPTER_CONFIG) as scratch:
        save_file(state, scratch / ADAPTER, metadata=metadata)
        (scratch / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _update(layer: LoRALinear, adapter: str) -> tuple[LoRAConfig, Tensor, Tensor]:
    """Configuration, B and A of what an adapter adds to the original weight."""
    config, b, a = layer.configs[adapter], layer.lora_B[adapter], layer.lora_A[adapter]
    b, a = b.detach(), a.detach()
    if layer.residual_of != adapter or layer.start is None:
        return config, b, a
    b0, a0 = layer.start  # W = residual + scaling * B0 A0, hence B A - B0 A0 on top of W
    # Twice the rank; alpha so that the scaling stays.
    alpha = config.alpha * (math.sqrt(2) if config.use_rslora else 2)
    config = replace(config, rank=2 * config.rank, alpha=alpha, init="kaiming")
    return config, torch.cat([b.cpu(), -b0], dim=1), torch.cat([a.cpu(), a0], dim=0)


def find_adapter(model: nn.Module, *folders: Path | str) -> Path:
    """The first of the folders with an adapter that was trained on this model's base. Raises
    FileNotFoundError, saying what each folder holds, when none fits."""
    wanted, found = base_fingerprint(model), []
    for folder in map(Path, folders):
        try:
            with open_tensors(folder / ADAPTER) as file:
                base = (file.metadata() or {}).get("base")
        except (OSError, ValueError):
            base = "no readable adapter"
        if base == wanted:
            return folder
        found.append(f"{folder}: {base}")
    raise FileNotFoundError(f"no adapter was trained on this base, {wanted} ({'; '.join(found)}); "
                            "train one with `python -m qlora_lib finetune`")  # fmt: skip


def load_adapter(model: nn.Module, folder: Path | str, adapter: str = "default") -> list[str]:
    """Put an adapter in PEFT's layout on the model, frozen; returns the paths of its layers.

    One that was saved here names its base by a hash; of one that PEFT saved, ranks and shapes
    are all that is checked. Raises FileNotFoundError for a missing file, ValueError for a corrupt
    one, another base, rank or shape, and settings that this package does not have.
    """
    folder = Path(folder)
    described = read_json(folder / ADAPTER_CONFIG)
    with open_tensors(folder / ADAPTER) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        marks = file.metadata() or {}
    base, own = marks.get("base"), base_fingerprint(model)
    if base is not None and base != own:
        raise ValueError(f"load the model that was trained ({base}; this one is {own}), or train "
                         f"an adapter for this one: the adapter in {folder} was trained on "
                         "another base model")  # fmt: skip
    configs = read_config(folder / ADAPTER_CONFIG, described, model)
    residual = marks.get("residual base")
    own = residual and residual_fingerprint({path: model.get_submodule(path) for path in configs})
    if own != residual:
        raise ValueError(f"{folder}: init={marks.get('init')!r} made this adapter together with "
                         f"its quantized base ({residual}; this model's is {own}); load the base "
                         "that was saved beside it (load_quantized)")  # fmt: skip
    wanted = {path: _tensors(folder, state, model, path, c) for path, c in configs.items()}
    _drop_copies_of_the_base(folder, state, model)
    if state:
        raise ValueError(f"{folder} holds tensors for layers this model lacks, or that its config "
                         f"does not choose: {list(state)[:3]}; is this its base?")  # fmt: skip
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = add_adapters(model, configs, adapter)
    for path, layer in layers.items():
        for parameter, tensor in zip(layer.parameters_of(adapter), wanted[path], strict=True):
            parameter.data.copy_(tensor)
        layer.residual_of = adapter if residual is not None else layer.residual_of
    for name, p in model.named_parameters():  # loading trains nothing and freezes nothing
        p.requires_grad_(before.get(name, False))
    return list(layers)


def _drop_copies_of_the_base(folder: Path, state: dict, model: nn.Module) -> None:
    """PEFT stores embeddings and head whole when one of them is adapted; they must be ours."""
    for name, weight in model.named_parameters(remove_duplicate=False):
        path = name.removesuffix(".weight").removesuffix(".base")  # it may have an adapter already
        for key in (f"base_model.model.{path}{kind}.weight" for kind in ("", ".base_layer")):
            theirs = state.pop(key, None)
            if theirs is not None and not torch.equal(theirs.to(weight), weight):
                raise ValueError(f"{folder}: {key} is not the weight of this model; load the base "
                                 "that was trained (with its vocabulary, if enlarged)")  # fmt: skip


def _tensors(folder: Path, state: dict, model: nn.Module, path: str, config: LoRAConfig):
    """A (rank, in), B (out, rank) and DoRA's magnitude (out,) of a layer, taken out of `state`."""
    layer, tensors, rank = model.get_submodule(path), [], config.rank
    out, n = layer.out_features, layer.in_features
    wanted = {"lora_A.weight": (rank, n), "lora_B.weight": (out, rank)}
    wanted |= {MAGNITUDE: (out,)} if config.use_dora else {}
    for part, shape in wanted.items():
        key = f"base_model.model.{path}.{part}"
        tensor = state.pop(key, None)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(f"{folder}: {key} should be {shape}, found {got}; r={rank} is that of "
                             f"{ADAPTER_CONFIG}, the other size this model's: is it the "
                             "adapter's base?")  # fmt: skip
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{folder}: {key} ({tensor.dtype}) holds NaN, Inf or "
                             "no floating-point numbers; the training diverged, or the file is "
                             "broken")  # fmt: skip
        tensors.append(tensor)
    return tensors
