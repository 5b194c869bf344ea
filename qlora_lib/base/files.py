"""Files written whole or not at all, and read with an error that names them.

Only safetensors and JSON, never pickle. A folder is written beside its place and renamed, so
that a killed run leaves no half checkpoint.
"""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


def check_place(folder: Path | str, marker: str) -> None:
    """Raises what writing a checkpoint to `folder` would raise: ValueError when it holds files
    but not `marker`, the file that each checkpoint of the kind has, as to replace it would delete
    what is there; OSError when nothing can be written beside it.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / marker).exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files; give a folder of its own")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder.parent):
        pass


@contextmanager
def atomic_folder(folder: Path | str, marker: str, keep: bool = False):
    """A scratch folder beside `folder` that takes its place when the block succeeds.

    keep: a block that fails leaves its scratch folder, and the next one finds it.
    Raises what check_place raises.
    """
    folder = Path(folder)
    check_place(folder, marker)
    scratch = folder.with_name(folder.name + (".unfinished" if keep else ".part"))
    if not keep:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=keep)
    try:
        yield scratch
    except BaseException:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        scratch.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def open_tensors(path: Path):
    """A safetensors file to read from; ValueError when it is truncated or corrupt."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); save it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; errors as those of open_tensors."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_json(path: Path) -> dict:
    """A JSON file; ValueError, with its name, when it is not valid JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


@contextmanager
def whole_file(path: Path | str):
    """A scratch path beside `path`, to be written within the block; then it takes its place.

    A reader, or a kill at any moment, meets the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all.

    Raises ValueError for NaN and Inf, which JSON does not know.
    """
    text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
