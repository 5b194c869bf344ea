"""Checkpoints: quantized models in a format of our own, adapters in PEFT's.

Only safetensors and JSON are read or written, never pickle. Each folder is written
beside its place and renamed, so that a killed run leaves no half checkpoint.
"""

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, safe_open
from torch import Tensor, nn

from .grid import QuantizedTensor, QuantSpec
from .linear import QuantizedLinear
from .lora import LoRAConfig, find_linears, inject_lora, lora_layers, replace_module
from .models import default_device, quantized_layers, resolve_dtype
from .nf4 import NF4Spec, NF4Tensor

FORMAT = 1  # raised when the layout changes; older readers then refuse the file
WEIGHTS, QUANTIZATION = "model.safetensors", "quantization.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@contextmanager
def atomic_folder(folder: Path | str):
    """A scratch folder beside `folder` that takes its place when the block succeeds."""
    folder = Path(folder)
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ValueError when it is truncated or corrupt."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); save it again") from None


def read_json(path: Path) -> dict:
    """A JSON file; ValueError, with its name, when it is not valid JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the parts of the base that quantization leaves alone: embeddings and norms.

    It names the model whatever its linears are stored in, so that an adapter trained on
    a 4-bit base is recognised on the dense one. Values are hashed as bf16.
    """
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if "norm" in name or "embed" in name:
            digest.update(f"{name}{tuple(p.shape)}".encode())
            bits = p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def _base_state(model: nn.Module) -> dict[str, Tensor]:
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
    quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model, or use save_pretrained")
    kinds = {QuantSpec: "grid", NF4Spec: "nf4"}
    specs = {n: {"kind": kinds[type(m.spec)], **asdict(m.spec)} for n, m in layers.items()}
    with atomic_folder(folder) as scratch:
        save_file(_base_state(model), scratch / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps({"format": FORMAT, "layers": specs}, indent=1)
        (scratch / QUANTIZATION).write_text(text + "\n")
        model.config.save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def load_quantized(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """Read what save_quantized wrote. Returns (model in eval mode, tokenizer).

    The dense model never exists: it is built without storage and the packed tensors
    are put in. Raises FileNotFoundError for missing files, ValueError for a corrupt or
    newer checkpoint or one that lacks tensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    described = read_json(folder / QUANTIZATION)
    if described.get("format", 0) > FORMAT:
        raise ValueError(f"{folder} has format {described['format']}, newer than {FORMAT}; upgrade")
    state = read_tensors(folder / WEIGHTS)
    device = torch.device(device or default_device())
    dtype = resolve_dtype(compute_dtype, device)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    for path, described_spec in described["layers"].items():
        tensors = {n.removeprefix(f"{path}."): n for n in state if n.startswith(f"{path}.")}
        tensors = {short: state.pop(full) for short, full in tensors.items()}
        linear = model.get_submodule(path)
        shape = torch.Size((linear.out_features, linear.in_features))
        layer = _quantized_layer(path, tensors, dict(described_spec), shape)
        replace_module(model, path, layer)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    packed = tuple(f"{path}." for path in described["layers"])
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [n for n in missing if not n.startswith(packed) and n not in tied]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, not expected {unexpected[:3]}")
    model.tie_weights()
    _materialize_buffers(model)
    model.requires_grad_(False)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def _quantized_layer(path: str, tensors: dict, spec: dict, shape: torch.Size) -> QuantizedLinear:
    kind, bias = spec.pop("kind"), tensors.pop("bias", None)
    names = {"grid": ("g_idx",), "nf4": ("nested_absmax", "offset")}[kind]
    tensors = {**dict.fromkeys(names), **tensors}
    make, make_spec = {"grid": (QuantizedTensor, QuantSpec), "nf4": (NF4Tensor, NF4Spec)}[kind]
    try:
        return QuantizedLinear(make(**tensors, shape=shape, spec=make_spec(**spec)), bias)
    except TypeError as error:
        raise ValueError(f"{path}: tensors {sorted(tensors)} do not make a layer ({error})") from None


def _materialize_buffers(model: nn.Module) -> None:
    """Give storage and values to buffers that no checkpoint holds (rotary frequencies)."""
    for module in model.modules():
        if any(b is not None and b.is_meta for b in module._buffers.values()):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)


def save_adapter(model: nn.Module, folder: Path | str, adapter: str = "default") -> None:
    """Write one adapter in PEFT's layout: adapter_model.safetensors, adapter_config.json.

    Raises ValueError when the model has no adapter of that name.
    """
    layers = {n: m for n, m in lora_layers(model).items() if adapter in m.configs}
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    state = {}
    for path, layer in layers.items():
        key = f"base_model.model.{path}"
        state[f"{key}.lora_A.weight"] = layer.lora_A[adapter].detach().contiguous().cpu()
        state[f"{key}.lora_B.weight"] = layer.lora_B[adapter].detach().contiguous().cpu()
    config: LoRAConfig = next(iter(layers.values())).configs[adapter]
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", ""),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "init_lora_weights": True if config.init == "kaiming" else config.init,
        "target_modules": sorted({path.rpartition(".")[2] for path in layers}),
        "bias": "none",
    }
    with atomic_folder(folder) as scratch:
        metadata = {"format": "pt", "base": base_fingerprint(model)}
        save_file(state, scratch / ADAPTER, metadata=metadata)
        (scratch / ADAPTER_CONFIG).write_text(json.dumps(described, indent=1) + "\n")


def load_adapter(model: nn.Module, folder: Path | str, adapter: str = "default") -> list[str]:
    """Read an adapter in PEFT's layout and put it on the model, frozen.

    Returns the paths of the adapted layers. Raises FileNotFoundError for a missing file,
    ValueError for a corrupt file, an adapter for another base or shape, and settings
    that this package does not have.
    """
    folder = Path(folder)
    described, state = read_json(folder / ADAPTER_CONFIG), read_tensors(folder / ADAPTER)
    with safe_open(folder / ADAPTER, "pt") as file:
        base = (file.metadata() or {}).get("base")
    if base is not None and base != base_fingerprint(model):
        raise ValueError(f"the adapter in {folder} was trained on another base model")
    _refuse_unsupported(folder, described)
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


def _refuse_unsupported(folder: Path, described: dict) -> None:
    """ValueError, by name, for PEFT settings that would change the result here."""
    if described.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is a {described.get('peft_type')} adapter; only LORA is read")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias",
                "fan_in_fan_out", "layers_to_transform", "trainable_token_indices"):
        if described.get(key):
            raise ValueError(f"{folder}: {key}={described[key]!r} is not supported")
    if described.get("bias", "none") != "none":
        raise ValueError(f"{folder}: bias={described['bias']!r} is not supported; use 'none'")
