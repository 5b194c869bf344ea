"""A model with packed layers, made from its config and a folder's tensors: the dense one never
exists."""

import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..base.devices import resolve_device, resolve_dtype
from ..base.finite import check_finite
from ..layers.linear import Quantized, QuantizedLinear
from ..lora.layer import named
from ..lora.targets import replace_module
from .conv1d import linear_from_conv1d
from .quantize import stored_tensors
from .settings import plain_errors, read_config, read_tokenizer

Maker = Callable[[str, dict[str, Tensor], torch.Size], Quantized]  # see put_packed
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it, though it follows from the config


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
            untie(model.config)


def untie(config) -> None:
    """Say in a config that head and embeddings are two."""
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
