"""One process at a time writes a folder: a lock that ends with the process that holds it."""

import os
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from . import processes
from .paths import short_path

LOCK = ".lock"  # in the folder; it holds the process's number, and stays when the lock is gone


@contextmanager
def held(folder: Path | str):
    """Hold `folder`, made if need be, within the block, also while this process holds it already.
    Several processes of one launch share what the first of them holds. Raises ValueError, at once
    and with its number, where another process holds it; OSError for a folder that is read-only."""
    folder = Path(folder)
    path = folder.resolve() / LOCK  # one file, however the folder is called
    lock = FileLock(path, timeout=0, is_singleton=True, thread_local=False)
    processes.on_first(lambda: _take(lock, path, folder))
    try:
        yield
    finally:
        if processes.first():
            lock.release()


def _take(lock: FileLock, path: Path, folder: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace")
        holder = f"process {holder}" if holder.isdecimal() else "another process"
        raise ValueError(f"{short_path(folder)} is in use by {holder}; wait until it has ended, "
                         "or name another folder") from None  # fmt: skip
    path.write_text(str(os.getpid()), encoding="utf-8")
