"""Checkpoints of quantized models in a format of our own, and what reads any checkpoint.

A folder holds the weights as safetensors, config and tokenizer as transformers writes them, and
quantization.json, which says how each packed layer is to be read. Adapters have files of their
own (lora/files.py). Only safetensors and JSON are read or written, never pickle. Each folder is
written beside its place and renamed, so that a killed run leaves no half checkpoint.
"""

import copy
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.devices import default_device, resolve_dtype
from ..base.files import atomic_folder, open_tensors, read_json, write_json_atomic
from ..layers.linear import Quantized, QuantizedLinear, check_scales_are_frozen
from ..lora.layer import lora_layers
from ..lora.targets import replace_module
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.nf4 import NF4Spec, NF4Tensor
from .conv1d import linear_from_conv1d
from .quantize import quantized_layers

FORMAT = 1  # raised when the layout changes; older readers then refuse the file
WEIGHTS, QUANTIZATION = "model.safetensors", "quantization.json"
INDEX = f"{WEIGHTS}.index.json"  # of weights in shards: which file holds which tensor
# By what quantization.json calls them: the weight, its spec, the tensors that it may lack
KINDS = {
    "grid": (QuantizedTensor, QuantSpec, ("g_idx",)),
    "nf4": (NF4Tensor, NF4Spec, ("nested_absmax", "offset")),
}
Maker = Callable[[str, dict[str, Tensor], torch.Size], Quantized]  # see put_packed
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it, though it follows from the config


# --- writing ----------------------------------------------------------------------------------


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict of the base alone, under the names it has without adapters.

    Tied weights are in it once; tie_weights restores them.
    """
    adapted = lora_layers(model)
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        owner = next((path for path in adapted if name.startswith(f"{path}.")), None)
        if owner:
            if not name.startswith(f"{owner}.base."):
                continue
            name = f"{owner}.{name.removeprefix(f'{owner}.base.')}"
        if tensor.data_ptr() in seen and tensor.numel():
            continue
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
    state = base_state(model)
    with atomic_folder(folder, QUANTIZATION) as scratch:
        save_file(state, scratch / WEIGHTS, metadata={"format": "pt"})
        describe(model, tokenizer, {n: m.spec for n, m in layers.items()}, state, scratch)


def describe(
    model, tokenizer, specs: dict[str, QuantSpec | NF4Spec], names: Iterable[str], folder: Path
) -> None:
    """Write all that stands beside the weights: specs by layer, config, tokenizer.

    names: of the stored tensors, as for `config_of`.
    """
    layers = {path: spec_as_json(spec) for path, spec in specs.items()}
    write_json_atomic(folder / QUANTIZATION, {"format": FORMAT, "layers": layers})
    config_of(model, names).save_pretrained(folder)
    save_generation_config(model, folder)
    tokenizer.save_pretrained(folder)


def config_of(model, names: Iterable[str]):
    """Return a copy of the model's config, to be written beside tensors of these names.

    A head that is stored is not tied to the embeddings, whatever the model once was: merging an
    adapter into it, or quantizing it, made weights of its own.
    """
    config, head = copy.deepcopy(model.config), model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), None)
    if any(n.rpartition(".")[0] == path and not n.endswith(".bias") for n in names):
        _untie(config)
    return config


def save_generation_config(model, folder: Path) -> None:
    """Write generation_config.json as it was read.

    Its save_pretrained would refuse what many published models hold, such as a temperature
    without do_sample, and after hours of quantizing.
    """
    path = folder / "generation_config.json"
    model.generation_config.to_json_file(path, keys_to_pop=["compile_config"])


def spec_as_json(spec: QuantSpec | NF4Spec) -> dict:
    """Return a spec as quantization.json holds it."""
    kind = next(kind for kind, (_, make, _) in KINDS.items() if type(spec) is make)
    return {"kind": kind, **asdict(spec)}


# --- reading ----------------------------------------------------------------------------------


def weight_map(folder: Path) -> dict[str, str]:
    """Return which safetensors file of a folder holds which tensor, by the tensors' names.

    The files are those of the index or, without one, model.safetensors; where there is neither,
    the only one there is, which old GPTQ checkpoints call otherwise. Raises FileNotFoundError
    and ValueError, naming the file, for missing and damaged ones.
    """
    if (folder / INDEX).is_file():
        return read_json(folder / INDEX).get("weight_map", {})
    path, found = folder / WEIGHTS, sorted(folder.glob("*.safetensors"))
    if not path.is_file() and found:
        path = found[0]
    if path.name != WEIGHTS and len(found) > 1:
        raise FileNotFoundError(
            f"{folder} holds {len(found)} files of weights ({found[0].name}, ...), but no {INDEX} "
            "that says what is where; get that too, or leave the one file that is meant"
        )
    with open_tensors(path) as file:
        return dict.fromkeys(file.keys(), path.name)


def read_weights(folder: Path, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Return the tensors of a transformers folder by name, those of `names` or all.

    They are on the CPU, as stored: views of the files, not yet in memory. Raises what
    `weight_map` raises.
    """
    state, files = {}, weight_map(folder).items()
    for name in sorted({file for n, file in files if names is None or n in names}):
        with open_tensors(folder / name) as file:
            wanted = [n for n in file.keys() if names is None or n in names]
            state |= {n: file.get_tensor(n) for n in wanted}
    return state


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
    put_packed(model, described["layers"], state, our_tensor(described["layers"]))
    model = fill(model, described["layers"], state, folder, dtype, device)
    return model, AutoTokenizer.from_pretrained(folder)


def tokenizer_of(folder: Path):
    """Return the tokenizer of a folder that another tool wrote, or None when it has none."""
    from transformers import AutoTokenizer

    has_one = (folder / "tokenizer_config.json").is_file()
    return AutoTokenizer.from_pretrained(folder) if has_one else None


def put_packed(
    model: nn.Module, paths: Iterable[str], state: dict[str, Tensor], make: Maker
) -> None:
    """Replace the linears at these paths by packed ones, whose tensors are taken out of `state`.

    make(path, tensors, shape) returns the weight (out, in) that a layer's tensors, by what follows
    its path, hold; the bias is not among them. Raises ValueError for a path that is no linear
    layer, and what `make` raises.
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
        replace_module(model, path, QuantizedLinear(weight, bias))


def our_tensor(layers: dict[str, dict]) -> Maker:
    """Return `put_packed`'s make for our own format; layers: as in quantization.json."""

    def make(path: str, tensors: dict[str, Tensor], shape: torch.Size) -> Quantized:
        spec = dict(layers[path])
        make_tensor, make_spec, optional = KINDS[spec.pop("kind")]
        tensors = {**dict.fromkeys(optional), **tensors}
        try:
            quantized = make_tensor(**tensors, shape=shape, spec=make_spec(**spec))
            # On the meta device this costs nothing, and shapes that do not fit each other show.
            on_meta = {n: None if t is None else t.to("meta") for n, t in tensors.items()}
            make_tensor(**on_meta, shape=shape, spec=quantized.spec).dequantize()
        except (TypeError, ValueError, RuntimeError) as error:
            names = sorted(tensors)
            raise ValueError(f"{path}: tensors {names} do not make a layer ({error})") from None
        return quantized

    return make


def empty_model(folder: Path, device=None, compute_dtype: str = "auto", **changes):
    """Build the model that config.json describes, without storage: (model, dtype, device).

    changes: entries of the config that are to be others.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    device = torch.device(device or default_device())
    dtype = resolve_dtype(compute_dtype, device)
    config = AutoConfig.from_pretrained(folder, **changes)
    config.dtype = dtype  # transformers 5.0 leaves it as it was stored
    if hasattr(config, "quantization_config"):  # of the file, not of the model made from it
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    linear_from_conv1d(model)
    return model, dtype, device


def fill(model: nn.Module, packed, state: dict[str, Tensor], folder: Path, dtype, device):
    """Put the dense tensors of `state` into a model whose `packed` paths hold theirs already.

    Returns the model, frozen and in eval mode. Weights that config.json ties become one, but
    where the folder holds another for each. Raises ValueError for missing and unexpected
    tensors, and for those of another shape.
    """
    keep_own_weights(model, state, packed)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: {error}; weights and config.json do not fit") from None
    inside = tuple(f"{path}." for path in packed)
    missing = [n for n in missing if not n.startswith(inside) and n not in tied_weights(model)]
    unexpected = [n for n in unexpected if not is_derived(model, n)]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, not expected {unexpected[:3]}")
    model.tie_weights(recompute_mapping=False)
    materialize_buffers(model)
    model.requires_grad_(False)
    return model.to(device).eval()


def tied_weights(model) -> dict[str, str]:
    """Return which weights are one by the config: {name: name of the weight that it shares}."""
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


def materialize_buffers(module: nn.Module, device="cpu", owner=None) -> None:
    """Give storage and values to buffers that no checkpoint holds (rotary frequencies).

    owner: the model of transformers that the module is a part of, which knows its values.
    """
    owner = module if hasattr(module, "_init_weights") else owner
    empty = {n: b for n, b in module._buffers.items() if b is not None and b.is_meta}
    for name, buffer in empty.items():
        module._buffers[name] = torch.empty_like(buffer, device=device)
    if empty:
        for parameter in module.parameters(recurse=False):  # Gemma's embeddings have both
            parameter._is_hf_initialized = True  # transformers then leaves its values alone
        owner._init_weights(module)
    for child in module.children():
        materialize_buffers(child, device, owner)
