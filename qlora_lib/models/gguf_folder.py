"""A folder that export_gguf wrote, read again: packed layers with the codes that it holds."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..base.folders import HASHES, check_folder
from ..lora.inject import add_adapters
from ..lora.layer import LoRAConfig
from ..quant.gguf_blocks import BYTES, dense_blocks, from_blocks
from .gguf_layout import layout
from .packed_model import empty_model, load_packed
from .settings import plain_errors

BASE, ADAPTER = "base.gguf", "adapter.gguf"


def needs_gguf(what: str, *others: str) -> None:
    """Raise ImportError, with the packages to install, where gguf or `others` are missing."""
    if missing := [name for name in ("gguf", *others) if find_spec(name) is None]:
        names = " and ".join(missing)
        raise ImportError(f"{what} takes {names}: python -m pip install {' '.join(missing)}")


def is_gguf_folder(path: Path | str) -> bool:
    """Whether export_gguf wrote this folder, be it damaged since."""
    beside = (Path(path) / name for name in ("config.json", HASHES))
    return (Path(path) / BASE).is_file() and any(file.is_file() for file in beside)


def load_gguf_folder(folder: Path | str, device=None, compute_dtype: str = "auto"):
    """(model in eval mode, tokenizer) of the base in a folder of export_gguf: layers in blocks are
    packed, in groups of 32, and no dense copy of them is made; those that lie on no grid of ours
    (rounded to Q4_1 elsewhere) are dense. Raises ValueError for what is damaged or was changed."""
    folder = Path(folder)
    check_folder(folder)
    needs_gguf("to read GGUF")
    bare, _, _ = empty_model(folder, "cpu")
    lay = layout(bare.config, type(bare).__name__)
    stored, _ = read_gguf(folder / BASE)
    state, packed = {}, {}
    for name, wanted in bare.state_dict().items():
        kind, tensor = stored.pop(lay.name(name), (None, None))
        if tensor is None:  # tied, which filling the model sees
            continue
        path = name.rpartition(".")[0]
        tensor = lay.rows(path, tensor, back=True) if tensor.dim() else tensor
        if kind in BYTES:
            if quantized := from_blocks(kind, tensor):
                packed[path] = quantized
            else:
                tensor = dense_blocks(kind, tensor)
        else:
            tensor = tensor.float() - lay.offset(name) if lay.offset(name) else tensor
        state[name] = tensor
    stored.pop("rope_freqs.weight", None)  # follows from the config
    if stored:
        raise ValueError(f"{folder / BASE} holds {sorted(stored)[:3]}, which the model of "
                         "config.json has not")  # fmt: skip

    def make(path: str, tensors: dict[str, Tensor], shape: torch.Size):
        if packed[path].shape != shape:
            raise ValueError(f"{folder / BASE}: {path} is {tuple(packed[path].shape)}, the model "
                             f"of config.json has {tuple(shape)}")  # fmt: skip
        return packed.pop(path)

    return load_packed(folder, state, list(packed), make, device, compute_dtype)


def read_gguf_adapter(model, path: Path | str) -> list[str]:
    """Put the adapter of a file that export_gguf wrote beside its base, on the base as load_model
    reads it; returns the paths of the layers. Raises ValueError for another file."""
    stored, fields = read_gguf(Path(path))
    lay, factors = layout(model.config, type(model).__name__), {}
    for name, _ in list(model.named_modules()):
        pair = [stored.pop(f"{lay.name(f'{name}.weight')}.lora_{part}", None) for part in "ab"]
        if None not in pair:
            factors[name] = [tensor for _, tensor in pair]
    if stored or not factors or "adapter.lora.alpha" not in fields:
        raise ValueError(f"{path} is no adapter of this model: it holds {sorted(stored)[:3]}")
    alpha = fields["adapter.lora.alpha"]
    configs = {name: LoRAConfig(rank=len(a), alpha=alpha) for name, (a, _) in factors.items()}
    for name, layer in add_adapters(model, configs, "default").items():
        a, b = factors[name]
        layer.put("default", configs[name], a.clone(), lay.rows(name, b, back=True).clone())
    return list(configs)


def read_gguf(path: Path) -> tuple[dict[str, tuple[str, Tensor]], dict]:
    """({name: (kind, tensor)}, {key: value}) of a GGUF file; blocks as uint8 (out, bytes). Raises
    ValueError for a damaged file, and for kinds that are not read here."""
    from gguf import GGUFReader

    with plain_errors(str(path)):  # the reader raises whatever a damaged file leads to
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        found = {t.name: (t.tensor_type.name, t.data) for t in reader.tensors}
    tensors = {}
    for name, (kind, data) in found.items():
        if kind not in ("F32", "F16", "BF16", *BYTES):
            raise ValueError(f"{path}: {name} is {kind}, which is not read here")
        tensor = torch.from_numpy(data.copy())
        tensors[name] = kind, tensor.view(torch.bfloat16) if kind == "BF16" else tensor
    return tensors, fields
