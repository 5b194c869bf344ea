"""The safetensors of a folder: which file holds which tensor, their shapes, the tensors."""

from collections.abc import Container
from pathlib import Path

from torch import Tensor

from ..base.files import open_tensors, read_json

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of weights in shards: which file holds which tensor


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
        raise FileNotFoundError(f"{folder} holds {len(found)} files of weights ({found[0].name}, "
                                f"...), but no {INDEX}; get that too, or leave one file alone")
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
