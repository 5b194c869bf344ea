"""Adapters on disk, in PEFT's layout: safetensors and JSON, a folder an adapter."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.files import open_tensors, parse_json, read_json
from ..base.folders import atomic_folder, check_folder
from ..base.paths import ROOT
from .fingerprint import (
    base_fingerprint,
    holds_update,
    linears_fingerprint,
    overlap,
    residual_fingerprint,
)  # fmt: skip
from .inject import add_adapters
from .layer import LoRAConfig, LoRALinear, layers_with
from .peft_config import describe, read_config

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
MAGNITUDE = "lora_magnitude_vector"  # DoRA's, in the file
ABOUT = "qlora_lib"  # in the header: what the adapter was trained on, as JSON


def save_adapter(
    model: nn.Module, folder: Path | str, adapter: str = "default",
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """Write one adapter in PEFT's layout: adapter_model.safetensors, adapter_config.json.

    dtype: of the stored tensors; they are read back as fp32. PiSSA over a dense base is written
    as what it learned, B A - (B A at step 0): plain LoRA of rank 2 r for the original model. Over
    a quantized base, LoftQ and PiSSA fit that base alone. The file names its base by hashes, down
    to its linears. Equal adapters give equal bytes. Raises ValueError for an unknown adapter, one
    with NaN or Inf, layers that differ in what PEFT has one value for, PiSSA's difference in 16
    bits, and a folder that holds other files.
    """
    layers = dict(sorted(layers_with(model, adapter).items()))
    if not layers:
        raise ValueError(f"the model has no adapter {adapter!r} to save")
    residual = {path: m for path, m in layers.items() if m.residual_of == adapter}
    packed = {path: m for path, m in residual.items() if m.start is None}
    if dtype != torch.float32 and len(packed) < len(residual):
        raise ValueError(f"dtype={dtype}: what PiSSA learned is a small difference of two large "
                         "products, which 16 bits would lose; save it as float32")  # fmt: skip
    about = {"base": base_fingerprint(model), "linears": linears_fingerprint(model)}
    state, configs, overlaps = {}, {}, []
    for path, layer in layers.items():
        key = f"base_model.model.{path}"
        configs[path], *factors = _update(layer, adapter)
        b, a = (t.cpu().to(dtype).contiguous() for t in factors)
        state |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if adapter in layer.magnitude:
            magnitude = layer.magnitude[adapter].detach()
            state[f"{key}.{MAGNITUDE}"] = magnitude.cpu().to(dtype).contiguous()
        overlaps.append(overlap(layer.base, *factors, configs[path].scaling))
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} holds NaN or Inf, so adapter {adapter!r} is not saved; the "
                             "training diverged: try a lower lr")  # fmt: skip
    about["overlaps"] = overlaps
    if packed:
        about["init"] = next(iter(packed.values())).configs[adapter].init
        about["residual base"] = residual_fingerprint(packed)
    described = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    described["base_model_name_or_path"] = _base_name(model)
    text = json.dumps(described | describe(model, configs), indent=1) + "\n"
    with atomic_folder(folder, ADAPTER_CONFIG) as scratch:
        # One entry: the order of several would be another one each time.
        save_file(state, scratch / ADAPTER, metadata={ABOUT: json.dumps(about, sort_keys=True)})
        (scratch / ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _base_name(model: nn.Module) -> str:
    """The base's name on the hub, or of its folder: as seen from the repository's root, or alone,
    since paths of this machine mean nothing elsewhere."""
    name = getattr(model.config, "_name_or_path", "")
    if Path(name).is_relative_to(ROOT):
        return Path(name).relative_to(ROOT).as_posix()
    return Path(name).name if Path(name).exists() else name


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
    """The first of the folders with an adapter that load_adapter would put on this model, as far as
    hashes tell. Raises FileNotFoundError, saying what each folder holds, when none fits."""
    own, found = _own_marks(model), []
    for folder in map(Path, folders):
        try:
            check_folder(folder)
            with open_tensors(folder / ADAPTER) as file:
                marks = _marks(folder, file)
        except (OSError, ValueError):
            found.append(f"{folder}: no readable adapter")
            continue
        if marks.get("base") == own["base"] and not _other_linears(marks, own):
            return folder
        found.append(f"{folder}: {marks.get('base')} with {marks.get('linears')}")
    raise FileNotFoundError(f"no adapter was trained on this base, {own['base']} with "
                            f"{own['linears']} ({'; '.join(found)}); train one with "
                            "`python -m qlora_lib finetune`")  # fmt: skip


def _own_marks(model: nn.Module) -> dict[str, str]:
    return {"base": base_fingerprint(model), "linears": linears_fingerprint(model)}


def _marks(folder: Path, file) -> dict:
    """What an open adapter file says of its base; {} where it says nothing, as PEFT's."""
    marks = file.metadata() or {}
    if ABOUT not in marks:
        return marks  # of an older version: its base, without the linears
    marks = parse_json(marks[ABOUT])
    texts = ("base", "linears", "init", "residual base")
    if not isinstance(marks, dict) or not all(isinstance(marks.get(t, ""), str) for t in texts):
        raise ValueError(f"{folder / ADAPTER} does not say what it was trained on; it is damaged")
    return marks


def _other_linears(marks: dict, own: dict) -> bool:
    """Whether linears are of the same kind, both dense or both packed, and differ."""
    theirs, ours = marks.get("linears", own["linears"]), own["linears"]
    return theirs != ours and theirs.split()[0] == ours.split()[0]


def load_adapter(
    model: nn.Module, folder: Path | str, adapter: str = "default", other_base: bool = False
) -> list[str]:
    """Put an adapter in PEFT's layout on the model, frozen; returns the paths of its layers.

    One that was saved here names its base. That base it fits, packed or dense: trained beside 4
    bits, it goes onto the dense weights too, and the other way round; other_base: also onto another
    quantization, or other dense weights, of the same model. Weights into which it was merged are
    always refused. Of an adapter that PEFT saved, ranks and shapes are all that is checked.
    Raises FileNotFoundError for a missing file, ValueError for a corrupt one, another base, rank or
    shape, and settings that this package does not have.
    """
    folder = Path(folder)
    check_folder(folder)
    described = read_json(folder / ADAPTER_CONFIG)
    with open_tensors(folder / ADAPTER) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        marks = _marks(folder, file)
    own = _own_marks(model) if marks.get("base") else {}
    if own and marks["base"] != own["base"]:
        raise ValueError(f"load the model that was trained ({marks['base']}; this one is "
                         f"{own['base']}), or train an adapter for this one: the adapter in "
                         f"{folder} was trained on another base model")  # fmt: skip
    configs = read_config(folder / ADAPTER_CONFIG, described, model)
    residual = marks.get("residual base")
    fits = residual and residual_fingerprint({path: model.get_submodule(path) for path in configs})
    if fits != residual:
        raise ValueError(f"{folder}: init={marks.get('init')!r} made this adapter together with "
                         f"its quantized base ({residual}; this model's is {fits}); load the base "
                         "that was saved beside it (load_quantized)")  # fmt: skip
    if own and not other_base and _other_linears(marks, own):
        raise ValueError(f"the adapter in {folder} was trained beside other linear layers "
                         f"({marks['linears']}; this model's are {own['linears']}): load its own "
                         "base, or say other_base=True if another quantization is meant")
    wanted = {path: _tensors(folder, state, model, path, c) for path, c in configs.items()}
    _drop_copies_of_the_base(folder, state, model)
    if state:
        raise ValueError(f"{folder} holds tensors for layers this model lacks, or that its config "
                         f"does not choose: {list(state)[:3]}; is this its base?")  # fmt: skip
    if own and marks.get("linears", own["linears"]) != own["linears"]:
        _refuse_merged(folder, marks.get("overlaps"), model, configs, wanted)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = add_adapters(model, configs, adapter)
    for path, layer in layers.items():
        for parameter, tensor in zip(layer.parameters_of(adapter), wanted[path], strict=True):
            parameter.data.copy_(tensor)
        layer.residual_of = adapter if residual is not None else layer.residual_of
    for name, p in model.named_parameters():  # loading trains nothing and freezes nothing
        p.requires_grad_(before.get(name, False))
    return list(layers)


def _refuse_merged(folder: Path, overlaps, model: nn.Module, configs: dict, wanted: dict) -> None:
    """Raises ValueError for a model into whose weights this adapter was merged."""
    now = []
    for path, (a, b, *_) in sorted(wanted.items()):
        layer = model.get_submodule(path)
        now.append(overlap(getattr(layer, "base", layer), b, a, configs[path].scaling))
    kinds = (int, float, type(None))
    if not isinstance(overlaps, list) or not all(isinstance(x, kinds) for x in overlaps):
        raise ValueError(f"{folder / ADAPTER} does not say what it was trained on; it is damaged")
    if holds_update(overlaps, now):
        raise ValueError(f"the adapter in {folder} was merged into this model already, and would "
                         "count twice; load the base that it was trained on")  # fmt: skip


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
