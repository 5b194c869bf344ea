"""Safetensors and JSON, written whole or not at all, and read with an error that names the file."""

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
    """Raise what writing a checkpoint to `folder` would raise: ValueError for a mount point, and
    for files, but no `marker` of a checkpoint; OSError when nothing can be written beside it."""
    given, folder = folder, Path(folder).resolve()  # a link may lead to another disk
    if folder.exists() and not (folder / marker).exists() and any(folder.iterdir()):
        raise ValueError(f"{given} holds other files; give a folder of its own")
    if folder.is_mount():
        raise ValueError(f"{given} is a mount point, which can't be renamed; give a folder in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder.parent):
        pass


@contextmanager
def _system_errors(path: Path):
    """Raise OSError for a full disk and the like, where libraries in Rust raise other kinds."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if "(os error " not in str(error):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


@contextmanager
def atomic_folder(folder: Path | str, marker: str, keep: bool = False):
    """Yield a scratch folder beside `folder` (a link's target) that takes its place when the block
    succeeds. keep: a block that fails leaves its scratch folder, and the next one finds it. Raises
    what check_place raises."""
    check_place(folder, marker)
    folder = Path(folder).resolve()
    scratch = folder.with_name(folder.name + (".unfinished" if keep else ".part"))
    if not keep:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=keep)
    old = folder.with_name(folder.name + ".old")
    try:
        with _system_errors(folder):
            yield scratch
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def open_tensors(path: Path):
    """Yield an open safetensors file; ValueError when it is truncated or corrupt."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); save it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file by name; errors as those of open_tensors."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_json(path: Path) -> dict:
    """Return what a JSON file holds; ValueError, with its name, when it is not valid JSON."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None


@contextmanager
def whole_file(path: Path | str):
    """Yield a scratch path beside `path` (a link's target); when the block succeeds, the file takes
    its place: there is the old file or the new one, never half of one."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _system_errors(path):
            yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all; ValueError for NaN and Inf."""
    text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
