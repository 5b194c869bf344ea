"""Notebooks side by side: how many, in which order, and each in a process of its own."""
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path

from qlora_lib.base.machine import cores
from .copies import copy_of
from .normal_form import read

NOTEBOOK_BYTES = 2 << 30  # one kernel on the tiny profile, at its peak
GRACE = 20  # seconds that a process has to end its kernel
MINUTES = re.compile(r"\| `tiny`.*?(\d+\.\d+|\d+|\ban?) minutes?( and a half)?")


def how_many() -> int:
    """As many notebooks as there are cores and memory for, at least one."""
    from qlora_lib.train.measure import available_memory

    return int(max(1, min(cores(), available_memory("cpu") // NOTEBOOK_BYTES)))


def expected_seconds(path: Path, profile: str = "tiny") -> float:
    """What the notebook took when it last ran on the profile; else what its introduction says of
    `tiny`, or a minute."""
    copy = copy_of(path, profile)
    if took := copy and copy.metadata.get("papermill", {}).get("duration"):
        return took
    words = "\n".join(c.source for c in read(path).cells[:6] if c.cell_type == "markdown")
    if said := MINUTES.search(words):
        count = 1.0 if said[1].startswith("a") else float(said[1])
        return 60 * (count + 0.5 * bool(said[2]))
    return 60.0


def longest_first(paths: list[Path], profile: str = "tiny") -> list[Path]:
    """The notebooks in the order in which to begin them: one that takes long, begun last, would
    end alone."""
    return sorted(paths, key=lambda path: -expected_seconds(path, profile))


def side_by_side(work: Callable[..., str | None], tasks: dict[str, tuple], jobs: int,
                 after: dict[str, str] = {}) -> Iterator[tuple[str, str | None, float]]:
    """Call work(*arguments) for each task in a process of its own, at most `jobs` at a time.

    Tasks begin in their order, but a task in `after` waits for the one that it names there.
    Yields (name, what work returned, seconds) as tasks end; a process that was killed is said in
    place of what it did not return. When the caller stops or is stopped, so is all that runs.
    """
    context = _context()
    waiting, running = dict(tasks), {}
    try:
        while waiting or running:
            unfinished = waiting.keys() | {name for name, *_ in running.values()}
            for name in [n for n in waiting if after.get(n) not in unfinished]:
                if len(running) < jobs:
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_alone, args=(
                        sender, dict(os.environ), work, waiting[name]))
                    process.start()
                    sender.close()
                    running[process.sentinel] = name, process, receiver, time.monotonic()
                    del waiting[name]
            for sentinel in wait(list(running)):
                name, process, receiver, began = running.pop(sentinel)
                process.join()
                try:
                    result = receiver.recv()
                except EOFError:
                    result = f"its process ended with exit code {process.exitcode}"
                yield name, result, time.monotonic() - began
    finally:
        for _, process, *_ in running.values():
            process.terminate()
        for _, process, *_ in running.values():
            process.join(GRACE)
            process.kill()


def _context():
    """Processes that are forked from one which has imported this file and papermill, where there is
    forking."""
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "papermill"])
    return context


def _alone(sender, environment, work, arguments) -> None:
    os.environ.clear()
    os.environ.update(environment)  # a fork has that of the time when its server began
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(work(*arguments))


def _stop(*_) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a kernel says as it is ended
    sys.exit(143)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
