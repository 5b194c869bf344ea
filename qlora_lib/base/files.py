"""Safetensors and JSON, written whole or not at all, and read with an error that names the file.

Files of this package that stand alone prove themselves: "sha256" is the hash of all else in them,
and "format" says that it must be there. (A folder proves its files together: folders.py.)
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .hashes import add_tensors, content_hash
from .paths import real_path

if TYPE_CHECKING:  # what writes JSON alone, as each notebook's runner, need not wait for torch
    from torch import Tensor

FORMAT = 1  # of files and folders that prove themselves; readers refuse a newer one
LARGEST_JSON = 256 * 2**20  # bytes; the largest tokenizer.json of today has a tenth of it


@contextmanager
def system_errors(path: Path):
    """Raise OSError for a full disk and the like, where libraries in Rust raise other kinds."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:
        if "(os error " not in str(error):
            raise
        raise OSError(f"{path} could not be written: {error}") from error


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
    """Return what a JSON file holds; ValueError, with its name, where it is no object in JSON, too
    large, nested too deep, or has a key twice."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; is this the right folder?")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, too many for a JSON file")
    text = read_text(path)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {text:.40}, not an object of names and values")
    return found


def read_entry(path: Path, name: str) -> dict:
    """Return an object in the object of a JSON file; raises what read_proved_json raises, and
    ValueError where it is missing or something else."""
    found = read_proved_json(path).get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name!r} is {found!r:.60}, expected dict")
    return found


def read_text(path: Path) -> str:
    """Return a text file's content; ValueError, with its name, where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start:,}); convert it") from None


def parse_json(text: str) -> Any:
    """Return what a text in JSON says. Raises ValueError where it is none, nested too deep, or has
    a key twice, of which a parser would keep the last without a word."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in found if names.count(n) > 1)!r} is there twice")
    return found


def write_proved_json(path: Path | str, obj: dict) -> None:
    """Write `obj` with "format" and "sha256", whole or not at all; read by read_proved_json."""
    obj = json.loads(json.dumps(obj)) | {"format": FORMAT}  # as it will be read: without tuples
    write_json_atomic(path, obj | {"sha256": content_hash(obj)})


def read_proved_json(path: Path) -> dict:
    """Return what write_proved_json was given. A file without "format" and "sha256", as older
    versions wrote, is taken as it is. Raises what read_json raises, and ValueError for a file that
    was changed or is of a newer format."""
    found = read_json(path)
    said = found.pop("sha256", None)
    if said is None and "format" not in found:
        return found
    if said != content_hash(found):
        raise ValueError(f"{path} is not as it was written: it was changed or is damaged")
    check_format(path, found.pop("format", None))
    return found


def check_format(path: Path, version: Any) -> None:
    """Raise ValueError unless `version` is one that this package can read."""
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"{path} has format {version!r}; this version reads up to {FORMAT}: "
                         "upgrade")  # fmt: skip


def write_proved_tensors(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and `about` (in the header, as JSON), whole or not at all, with their hash."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    text = json.dumps(about | {"format": FORMAT})
    header = {"json": text, "sha256": _tensors_hash(tensors, text)}
    with whole_file(path) as part:
        save_file(tensors, part, header)


def read_proved_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Return (tensors by name, `about`) as write_proved_tensors was given them; FileNotFoundError,
    and ValueError for a file that is damaged, changed, or not of this kind."""
    with open_tensors(path) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    text = header.get("json", "")
    if header.get("sha256") != _tensors_hash(tensors, text):
        raise ValueError(f"{path} was changed, is damaged, or is of another version of this "
                         "package")  # fmt: skip
    about = parse_json(text)
    check_format(path, about.pop("format", None))
    return tensors, about


def _tensors_hash(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    add_tensors(digest, sorted(tensors.items()))
    return digest.hexdigest()


@contextmanager
def whole_file(path: Path | str):
    """Yield a scratch path beside `path` (a link's target); when the block succeeds, the file takes
    its place: there is the old file or the new one, never half of one."""
    path = real_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    _sweep(path)
    try:
        with system_errors(path):
            yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove scratch files of `path` that killed processes have left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if os.name == "posix" and (process := left.suffix[1:]).isdecimal():
            try:
                os.kill(int(process), 0)  # asks alone whether it runs
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except (PermissionError, OverflowError):  # another user's; no process's number
                pass


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all; ValueError for NaN and Inf."""
    text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
