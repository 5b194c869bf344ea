"""Adapters on disk, in PEFT's layout: safetensors and JSON, a folder an adapter."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .checkpoint import atomic_folder, read_json, read_tensors
from .lora import LoRAConfig, add_adapters, base_fingerprint, lora_layers
from .peft_config import describe, read_config
from .results import ROOT

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one adapter in PEFT's layout: adapter_model.safetensors, adapter_config.json.

    dtype: of the stored A and B; bfloat16 halves the file, and is read back as fp32. Ranks
    and alphas that differ by layer are written as PEFT's rank_pattern and alpha_pattern.
    Raises ValueError when the model has no adapter of that name, when its layers differ in
    dropout or use_rslora, for which PEFT has one value, and when the folder holds other files.
    """
    layers = {n: m for n, m in lora_layers(model).items() if adapter in m.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    state = {}
    for path, layer in layers.items():
        key = f"base_model.model.{path}"
        state[f"{key}.lora_A.weight"] = layer.lora_A[adapter].detach().to("cpu", dtype).contiguous()
        state[f"{key}.lora_B.weight"] = layer.lora_B[adapter].detach().to("cpu", dtype).contiguous()
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _portable(getattr(model.config, "_name_or_path", "")),
        **describe(model, {path: layer.configs[adapter] for path, layer in layers.items()}),
    }
    with atomic_folder(folder, ADAPTER_CONFIG) as scratch:
        metadata = {"format": "pt", "base": base_fingerprint(model)}
        save_file(state, scratch / ADAPTER, metadata=metadata)
        (scratch / ADAPTER_CONFIG).write_text(json.dumps(described, indent=1) + "\n")


def _portable(name: str) -> str:
    """A model's name; a folder of this repository as seen from its root."""
    path = Path(name)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else name


def _adapter_base(folder: Path) -> str | None:
    """Fingerprint of the base that an adapter was trained on; None if it names none."""
    with safe_open(folder / ADAPTER, "pt") as file:
        return (file.metadata() or {}).get("base")


def find_adapter(model: nn.Module, *folders: Path | str) -> Path:
    """The first of the folders with an adapter that was trained on this model's base.

    Raises FileNotFoundError, saying what each folder holds, when none fits.
    """
    wanted, found = base_fingerprint(model), []
    for folder in map(Path, folders):
        try:
            base = _adapter_base(folder)
        except (OSError, SafetensorError):
            base = "no readable adapter"
        if base == wanted:
            return folder
        found.append(f"{folder}: {base}")
    raise FileNotFoundError(
        f"no adapter was trained on this base, {wanted} ({'; '.join(found)}); train one with "
        "`python -m qlora_lib finetune`"
    )


def load_adapter(model: nn.Module, folder: Path | str, adapter: str = "default") -> list[str]:
    """Read an adapter in PEFT's layout and put it on the model, frozen.

    One that was saved here names its base by a hash, and another base is refused. One that
    PEFT saved has no such mark: then ranks and shapes are all that is checked, and beside
    other weights of the same shapes it loads and gives nonsense.
    Returns the paths of the adapted layers. Raises FileNotFoundError for a missing file,
    ValueError for a corrupt file, an adapter for another base, rank or shape, and settings
    that this package does not have (peft_config.py).
    """
    folder = Path(folder)
    described, state = read_json(folder / ADAPTER_CONFIG), read_tensors(folder / ADAPTER)
    base, own = _adapter_base(folder), base_fingerprint(model)
    if base is not None and base != own:
        raise ValueError(
            f"load the model that was trained ({base}; this one is {own}), or train an adapter "
            f"for this one: the adapter in {folder} was trained on another base model"
        )
    configs = read_config(folder / ADAPTER_CONFIG, described, model)
    wanted = {path: _pair(folder, state, model, path, c) for path, c in configs.items()}
    _drop_copies_of_the_base(folder, state, model)
    if state:
        raise ValueError(
            f"{folder} holds tensors for layers this model lacks, or that its config does not "
            f"choose: {list(state)[:3]}; is this the adapter's base?"
        )
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = add_adapters(model, configs, adapter)
    for path, layer in layers.items():
        layer.lora_A[adapter].data.copy_(wanted[path][0])
        layer.lora_B[adapter].data.copy_(wanted[path][1])
    for name, p in model.named_parameters():  # loading trains nothing and freezes nothing
        p.requires_grad_(before.get(name, False))
    return list(layers)


def _drop_copies_of_the_base(folder: Path, state: dict, model: nn.Module) -> None:
    """PEFT stores embeddings and head whole when one of them is adapted; they must be ours."""
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        path = path.removesuffix(".base")  # a layer that has an adapter already
        for key in (f"base_model.model.{path}{kind}.weight" for kind in ("", ".base_layer")):
            theirs = state.pop(key, None)
            if theirs is not None and not torch.equal(
                theirs.to(module.weight), module.weight.detach()
            ):
                raise ValueError(
                    f"{folder}: {key} is not the weight of this model; load the base that the "
                    "adapter was trained on (with its vocabulary, if that was enlarged)"
                )


def _pair(folder: Path, state: dict, model: nn.Module, path: str, config: LoRAConfig):
    """A (rank, in) and B (out, rank) of one layer, taken out of `state`."""
    layer, pair = model.get_submodule(path), []
    for part, shape in (
        ("lora_A", (config.rank, layer.in_features)),
        ("lora_B", (layer.out_features, config.rank)),
    ):
        key = f"base_model.model.{path}.{part}.weight"
        tensor = state.pop(key, None)
        if tensor is None or tuple(tensor.shape) != shape:
            got = "nothing" if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"{folder}: {key} should be {shape}, found {got}; the rank is r={config.rank} of "
                f"{ADAPTER_CONFIG}, the other size is this model's: is it the adapter's base?"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(
                f"{folder}: {key} ({tensor.dtype}) holds NaN, Inf or no floating-point numbers; "
                "the training diverged, or the file is broken: save the adapter again"
            )
        pair.append(tensor)
    return pair
