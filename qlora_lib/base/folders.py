"""Folders that prove themselves: written whole or not at all, with the hash of each of their files.

hashes.json holds the SHA-256 of every other file of a folder that this package wrote. It is written
last, so a folder that has it is complete; check_folder compares before a value is used.
"""

import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from .files import FORMAT, check_format, read_json, system_errors, write_json_atomic
from .hashes import file_hash
from .paths import real_path

HASHES = "hashes.json"


def check_place(folder: Path | str, marker: str) -> None:
    """Raise what writing a checkpoint to `folder` would raise: ValueError for a mount point, and
    for files, but no `marker` of a checkpoint; OSError when nothing can be written beside it."""
    given, folder = folder, real_path(folder)  # a link may lead to another disk
    if folder.exists() and not (folder / marker).exists() and any(folder.iterdir()):
        raise ValueError(f"{given} holds other files; give a folder of its own")
    if folder.is_mount():
        raise ValueError(f"{given} is a mount point, which can't be renamed; give a folder in it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder.parent):
        pass


def check_folder(folder: Path | str) -> bool:
    """Return whether `folder` has a hashes.json, after comparing all that it lists: False for what
    others or older versions wrote. A save that died between two renames is finished first. Raises
    ValueError, naming the file, for one that is missing, damaged or was changed, and for weights
    or their index that were put there since."""
    folder = real_path(folder)
    _recover(folder)
    if not (folder / HASHES).is_file():
        return False
    said = read_json(folder / HASHES)
    check_format(folder / HASHES, said.get("format"))
    if not isinstance(said.get("files"), dict):
        raise ValueError(f"{folder / HASHES} lists no files; it was changed or is damaged")
    for name, was in said["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, and {HASHES} lists it; copy the folder again")
        if file_hash(path) != was:
            raise ValueError(f"{path} is not as it was written: damaged, or changed; get it again, "
                             f"or delete {HASHES} if the change is yours")  # fmt: skip
    for path in folder.glob("*.safetensors*"):  # an index that came later would lead to others
        if path.name not in said["files"]:
            raise ValueError(f"{path} is not among the files that were saved here; take it away")
    return True


def write_hashes(folder: Path) -> None:
    """Write hashes.json for all that lies in `folder`: the last step of a save."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / HASHES)
    found = {path.relative_to(folder).as_posix(): file_hash(path) for path in files}
    write_json_atomic(folder / HASHES, {"format": FORMAT, "files": found})


def _recover(folder: Path) -> None:
    """Finish a save that died between its two renames, or take back what it had moved away."""
    part, old = _beside(folder, ".part"), _beside(folder, ".old")
    if folder.exists() or not old.is_dir():
        return
    source = part if (part / HASHES).is_file() else old
    source.rename(folder)
    what = "finished" if source == part else "taken back"
    print(f"{folder.name}: a save that was interrupted was {what}", file=sys.stderr)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


@contextmanager
def atomic_folder(folder: Path | str, marker: str, keep: bool = False):
    """Yield a scratch folder beside `folder` (a link's target) that takes its place, with the
    hashes of its files, when the block succeeds. keep: a block that fails leaves its scratch
    folder, and the next one finds it. Raises what check_place raises."""
    _recover(real_path(folder))
    check_place(folder, marker)
    folder = real_path(folder)
    scratch = _beside(folder, ".unfinished" if keep else ".part")
    if not keep:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=keep)
    old = _beside(folder, ".old")
    try:
        with system_errors(folder):
            yield scratch
            write_hashes(scratch)
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
