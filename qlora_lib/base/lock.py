"""One process at a time writes a folder: a lock that ends with the process that holds it."""

import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from . import processes
from .paths import short_path

LOCK = ".lock"  # in the folder; it holds the process's number, and stays when the lock is gone
MOMENT = 0.2  # seconds: longer than anybody looks whether a folder is free


@contextmanager
def held(folder: Path | str):
    """Hold `folder`, made if need be, within the block, also while this process holds it already.
    Several processes of one launch share it: the first of them holds it. Raises ValueError, at once
    and with its number, where another process does; OSError for a folder that is read-only."""
    if not processes.first():
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = _take(Path(folder))
    try:
        (Path(folder) / LOCK).write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        lock.release()


def check_free(folder: Path | str) -> None:
    """Raise ValueError where another process holds `folder`, which is to be read."""
    if (Path(folder) / LOCK).is_file() and processes.first():
        try:
            _take(Path(folder), MOMENT).release()
        except OSError:  # read-only: nobody writes here
            pass


def _take(folder: Path, patience: float = 0) -> FileLock:
    path = folder.resolve() / LOCK  # one file, however the folder is called
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:  # an OSError, too
        holder = path.read_text(encoding="utf-8", errors="replace")
        holder = f"process {holder}" if holder.isdecimal() else "another process"
        raise ValueError(f"{short_path(folder)} is in use by {holder}; wait until it has ended, "
                         "or name another folder") from None  # fmt: skip
    return lock
