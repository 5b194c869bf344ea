"""Adapters on disk, in PEFT's layout: safetensors and JSON, a folder an adapter."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .checkpoint import atomic_folder, read_json, read_tensors
from .lora import LoRAConfig, base_fingerprint, find_linears, inject_lora, lora_layers
from .results import ROOT

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    model: nn.Module,
    folder: Path | str,
    adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one adapter in PEFT's layout: adapter_model.safetensors, adapter_config.json.

    dtype: of the stored A and B; bfloat16 halves the file, and is read back as fp32.
    Raises ValueError when the model has no adapter of that name and when the folder holds
    other files.
    """
    layers = {n: m for n, m in lora_layers(model).items() if adapter in m.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    state = {}
    for path, layer in layers.items():
        key = f"base_model.model.{path}"
        state[f"{key}.lora_A.weight"] = layer.lora_A[adapter].detach().to("cpu", dtype).contiguous()
        state[f"{key}.lora_B.weight"] = layer.lora_B[adapter].detach().to("cpu", dtype).contiguous()
    config: LoRAConfig = next(iter(layers.values())).configs[adapter]
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": _portable(getattr(model.config, "_name_or_path", "")),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "bias": "none",
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

    Returns the paths of the adapted layers. Raises FileNotFoundError for a missing file,
    ValueError for a corrupt file, an adapter for another base or shape, and settings
    that this package does not have.
    """
    folder = Path(folder)
    described, state = read_json(folder / ADAPTER_CONFIG), read_tensors(folder / ADAPTER)
    base = _adapter_base(folder)
    if base is not None and base != base_fingerprint(model):
        raise ValueError(f"the adapter in {folder} was trained on another base model")
    _refuse_unsupported(folder / ADAPTER_CONFIG, described)
    config = LoRAConfig(
        rank=described["r"],
        alpha=described["lora_alpha"],
        dropout=described.get("lora_dropout", 0.0),
        init="gaussian" if described.get("init_lora_weights") == "gaussian" else "kaiming",
        use_rslora=described.get("use_rslora", False),
    )
    found = find_linears(model, described["target_modules"])
    wanted = {}
    for path, layer in found.items():
        for part, shape in (
            ("lora_A", (config.rank, layer.in_features)),
            ("lora_B", (layer.out_features, config.rank)),
        ):
            key = f"base_model.model.{path}.{part}.weight"
            if key not in state or tuple(state[key].shape) != shape:
                got = tuple(state[key].shape) if key in state else "nothing"
                raise ValueError(f"{folder}: {key} should be {shape}, found {got}")
            wanted[path, part] = state.pop(key)
    if state:
        raise ValueError(f"{folder} holds tensors for layers this model lacks: {list(state)[:3]}")
    frozen = {n: p.requires_grad for n, p in model.named_parameters()}
    paths = inject_lora(model, described["target_modules"], adapter=adapter, **asdict(config))
    for path, layer in lora_layers(model).items():
        if path in found:
            layer.lora_A[adapter].data.copy_(wanted[path, "lora_A"])
            layer.lora_B[adapter].data.copy_(wanted[path, "lora_B"])
    for name, p in model.named_parameters():  # loading trains nothing and freezes nothing
        p.requires_grad_(frozen.get(name, False))
    return paths


def _refuse_unsupported(path: Path, described: dict) -> None:
    """ValueError, by name, for PEFT settings that would change the result here."""
    if described.get("peft_type") != "LORA":
        raise ValueError(f"{path} is a {described.get('peft_type')} adapter; only LORA is read")
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if key not in described]
    if lacking:
        raise ValueError(f"{path} lacks {lacking}; save the adapter again")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
                "fan_in_fan_out", "layers_to_transform", "trainable_token_indices",
                "layer_replication", "target_parameters", "alora_invocation_tokens",
                "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
                "velora_config"):
        if described.get(key):
            raise ValueError(f"{path}: {key}={described[key]!r} is not supported")
    if described.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={described['bias']!r} is not supported; use 'none'")
    # These move a part of the base into the adapter, which is wrong beside the whole base.
    init = str(described.get("init_lora_weights"))
    if init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} is not supported: it changes the base; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )
