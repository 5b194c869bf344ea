"""Checkpoints of quantized models in a format of our own, and what reads any checkpoint.

A folder holds the weights as safetensors, config and tokenizer as transformers writes them, and
quantization.json, which says how each packed layer is to be read. Adapters have files of their
own (lora/files.py).
"""

import copy
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.devices import resolve_device, resolve_dtype
from ..base.files import FORMAT, check_format, open_tensors, read_json, write_json_atomic
from ..base.finite import check_finite
from ..base.folders import atomic_folder, check_folder
from ..layers.linear import Quantized, QuantizedLinear, check_scales_are_frozen
from ..lora.layer import lora_layers, named
from ..lora.targets import replace_module
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.nf4 import NF4Spec, NF4Tensor
from .conv1d import linear_from_conv1d
from .quantize import quantized_layers, stored_tensors
from .settings import plain_errors, read_config, read_tokenizer

WEIGHTS, QUANTIZATION = "model.safetensors", "quantization.json"
INDEX = f"{WEIGHTS}.index.json"  # of weights in shards: which file holds which tensor
# By what quantization.json calls them: the weight, its spec, the tensors that it may lack
KINDS = {
    "grid": (QuantizedTensor, QuantSpec, ("g_idx",)),
    "nf4": (NF4Tensor, NF4Spec, ("nested_absmax", "offset")),
}
Maker = Callable[[str, dict[str, Tensor], torch.Size], Quantized]  # see put_packed
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it, though it follows from the config


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the base alone, under the names it has without adapters; tied
    weights once, under the name that tie_weights gives to the others. Raises ValueError, naming
    the tensor, for NaN and Inf, which no file shall hold."""
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
        raise ValueError(
            f"{len(merged)} layers, {merged[0]} first, hold both their base and a merged copy: to "
            "save the base, call unmerge_lora; to save the other, merge with unload=True"
        )
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("no layer is quantized; call quantize_model, or use save_pretrained")
    check_scales_are_frozen(layers)
    state = base_state(model)
    with atomic_folder(folder, QUANTIZATION) as scratch:
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        describe(model, tokenizer, {n: m.spec for n, m in layers.items()}, state, scratch, beside)


def describe(
    model, tokenizer, specs: dict[str, QuantSpec | NF4Spec], names: Iterable[str], folder: Path,
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
        _untie(config)
    config.update(changes)
    config.save_pretrained(folder)
    # As it was read: save_pretrained refuses a temperature without do_sample, which many have.
    file = folder / "generation_config.json"
    model.generation_config.to_json_file(file, keys_to_pop=["compile_config"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def spec_as_json(spec: QuantSpec | NF4Spec) -> dict:
    """Return a spec as quantization.json holds it."""
    kind = next(kind for kind, (_, make, _) in KINDS.items() if type(spec) is make)
    return {"kind": kind, **asdict(spec)}


def weight_map(folder: Path) -> dict[str, str]:
    """Return the name of the file that holds each tensor, by the tensor's name: those of the index,
    or model.safetensors, or the only one there is, which old GPTQ checkpoints call otherwise.
    Raises FileNotFoundError for missing and ValueError for damaged ones."""
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{folder / INDEX} has no weight_map; get the folder again")
        for name in {str(name): name for name in where.values()}.values():
            _check_name(folder, name)
        return where
    path, found = folder / WEIGHTS, sorted(folder.glob("*.safetensors"))
    if not path.is_file() and len(found) > 1:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} files of weights ({found[0].name}, ...), but no {INDEX} "
            "that says what is where; get that too, or leave the one file that is meant"
        )
    path = path if path.is_file() or not found else found[0]
    _check_name(folder, path.name)
    with open_tensors(path) as file:
        return dict.fromkeys(file.keys(), path.name)


def _check_name(folder: Path, name) -> None:
    """Raise ValueError for a file of weights that lies elsewhere: a name from a file that is no
    plain name, or a link out of the folder, but for those that the hub's cache is made of."""
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"{folder / INDEX} names {name!r:.80}, which is no file in this folder")
    inside = folder.resolve()
    inside = inside.parents[1] if inside.parent.name == "snapshots" else inside
    if not (folder / name).resolve().is_relative_to(inside):
        raise ValueError(f"{folder / name} is a link out of this folder; put the file itself there")


def stored_shapes(files) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in these files by name, from their headers alone."""
    found = {}
    for path in files:
        with open_tensors(path) as file:
            found |= {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
    return found


def read_weights(folder: Path, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a folder by name, those of `names` or all: views of the files, not yet
    in memory. Raises what `weight_map` raises, and ValueError for a file that lacks some."""
    where, state = weight_map(folder), {}
    wanted = [n for n in where if names is None or n in names]
    for name in sorted({where[n] for n in wanted}):
        with open_tensors(folder / name) as file:
            state |= {n: file.get_tensor(n) for n in file.keys() if names is None or n in names}
    if lost := [n for n in wanted if n not in state]:
        raise ValueError(f"{folder / where[lost[0]]} lacks {lost[0]}, which {INDEX} says it holds")
    return state


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


def put_packed(model, paths: Iterable[str], state: dict[str, Tensor], make: Maker) -> None:
    """Replace the linears at these paths by packed ones, whose tensors are taken out of `state`.

    make(path, tensors, shape) returns the weight (out, in) in a layer's tensors, which it gets by
    what follows its path, without the bias. Raises ValueError for a path that is no linear layer.
    """
    modules = dict(model.named_modules())
    for path in paths:
        linear = modules.get(path)
        if not isinstance(linear, nn.Linear):
            found = f"no {path}" if linear is None else f"{type(linear).__name__} there"
            raise ValueError(f"{path} is quantized, but the model of config.json has {found}")
        names = [n for n in state if n.startswith(f"{path}.")]
        tensors = {n.removeprefix(f"{path}."): state.pop(n) for n in names}
        bias, shape = tensors.pop("bias", None), (linear.out_features, linear.in_features)
        weight = make(path, tensors, torch.Size(shape))
        with named(path):
            layer = QuantizedLinear(weight, bias)
        replace_module(model, path, layer)


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


def empty_model(folder: Path, device=None, compute_dtype: str = "auto", **changes):
    """Return (model without storage, dtype, device) by a folder's config.json with `changes`."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = resolve_device(device)
    dtype = resolve_dtype(compute_dtype, device)
    config = read_config(folder, **changes)
    config.dtype = dtype  # transformers 5.0 leaves it as it was stored
    if hasattr(config, "quantization_config"):  # of the file, not of the model made from it
        del config.quantization_config
    with torch.device("meta"), plain_errors(f"the config of {folder}"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if (file := folder / "generation_config.json").is_file():
        with plain_errors(file):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    linear_from_conv1d(model)
    return model, dtype, device


def load_packed(
    folder: Path, state: dict[str, Tensor], paths: Iterable[str], make: Maker, device, dtype: str
):
    """Return (model, tokenizer or None) of a folder whose tensors are in `state`; the dense model
    never exists. paths, make: as for put_packed."""
    model, dtype, device = empty_model(folder, device, dtype)
    put_packed(model, paths, state, make)
    has_one = (folder / "tokenizer_config.json").is_file()
    tokenizer = read_tokenizer(folder) if has_one else None
    return fill(model, paths, state, folder, dtype, device), tokenizer


def fill(model: nn.Module, packed, state: dict[str, Tensor], folder: Path, dtype, device):
    """Put the dense tensors of `state` into a model whose `packed` paths hold theirs already, and
    return it, frozen and in eval mode. Weights that config.json ties become one, unless the folder
    holds two. Raises ValueError for tensors that are missing, unexpected, misshapen or hold NaN or
    Inf in the dtype that is computed in."""
    keep_own_weights(model, state, packed)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{folder}: weights and config.json do not fit: {text:.300}") from None
    inside = tuple(f"{path}." for path in packed)
    missing = [n for n in missing if not n.startswith(inside) and n not in tied_weights(model)]
    unexpected = [n for n in unexpected if not is_derived(model, n)]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, not expected {unexpected[:3]}")
    model.tie_weights(recompute_mapping=False)
    check_finite(stored_tensors(model), folder)
    materialize_buffers(model)
    return model.requires_grad_(False).to(device).eval()


def tied_weights(model) -> dict[str, str]:
    """Return which weights are one by the config: {name: the other's name}."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def keep_own_weights(model, stored: dict[str, Tensor], packed: Container[str] = ()) -> None:
    """Untie, in model and config, weights that config.json ties although `stored` holds two that
    differ or the layer is `packed`. Transformers reads such a folder so, too."""
    for name, source in list(tied_weights(model).items()):
        differ = name.rpartition(".")[0] in packed
        if name in stored and source in stored:
            a, b = stored[name], stored[source]
            differ = a.dtype != b.dtype or not torch.equal(a, b)
        if differ:
            del model.all_tied_weights_keys[name]
            _untie(model.config)


def _untie(config) -> None:
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def is_derived(model, name: str) -> bool:
    """Return whether a stored tensor can be left out, as the model makes it from its config."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return DERIVED in name or any(re.search(pattern, name) for pattern in ignored)


def materialize_buffers(module: nn.Module, device="cpu", owner=None) -> bool:
    """Give storage and values to buffers that no checkpoint holds (rotary frequencies), and return
    whether there were any. owner: the model of transformers that the module is a part of, which
    knows their values."""
    owner = module if hasattr(module, "_init_weights") else owner
    buffers = module._buffers
    empty = [n for n in module._non_persistent_buffers_set if getattr(buffers[n], "is_meta", False)]
    for tensor in [*module.parameters(False), *module.buffers(False)]:
        tensor._is_hf_initialized = True  # transformers then leaves its values alone
    for name in empty:
        buffers[name] = torch.empty_like(buffers[name], device=device)
    inside = [materialize_buffers(child, device, owner) for child in module.children()]
    if found := bool(empty) or any(inside):
        owner._init_weights(module)
    return found
