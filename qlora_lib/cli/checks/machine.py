"""Memory, cores and disk."""

import os
import shutil
from pathlib import Path

from ...base.machine import container_memory, cores, free_memory
from .finding import Findings, gb, note, ok, problem
from .hub import hub_cache

NEEDED_MEMORY = 2e9  # of the longest notebook, at its peak
NEEDED_DISK, LARGE_DISK = 0.5e9, 15e9  # of the outputs of the tiny profile; of LLaMA-2-7B's weights


def check_machine() -> Findings:
    free, limit = free_memory(), container_memory()[1]
    of = f" (this container's limit is {gb(limit)})" if limit < float("inf") else ""
    if free < NEEDED_MEMORY:
        yield problem(f"{gb(free)} of memory free{of}, and a notebook takes up to "
                      f"{gb(NEEDED_MEMORY)}: end other programs and kernels")  # fmt: skip
    elif free == float("inf"):
        yield ok(f"free memory: this system does not say; {gb(NEEDED_MEMORY)} a notebook")
    else:
        yield ok(f"{gb(free)} of memory free{of}")
    count = cores()
    yield ok(f"{count} cores") if count > 1 else note("1 core: the course takes twice as long")
    yield from disk_lines("checkpoints/ and outputs/", Path.cwd(), NEEDED_DISK, problem,
                          "free some, or work in a clone on a larger disk")  # fmt: skip
    yield from disk_lines("the hub's cache", hub_cache(), LARGE_DISK, note, "LLaMA-2-7B would not "
                          "fit; export HF_HOME=a folder on a larger disk")  # fmt: skip


def disk_lines(what: str, folder: Path, needed: float, state, remedy: str) -> Findings:
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        yield state(f"{what}: {there} can't be written: chown it, or take another folder")
    elif free < needed:
        yield state(f"{what}: {gb(free)} free in {there}, less than {gb(needed)}: {remedy}")
    else:
        yield ok(f"{what}: {gb(free)} of disk free in {there}")
