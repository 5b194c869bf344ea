"""What this process may use of its machine, or of the container that it runs in."""

import math
import os
from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
# The files of cgroup v2, then v1, that say a container's limit and use of memory, and the entry of
# memory.stat with the file caches that can go.
MEMORY = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
)  # fmt: skip


def cores(group: Path = GROUP) -> int:
    """Return the cores that this process may use: its affinity, or its container's share."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # Windows, macOS
        count = os.cpu_count() or 1
    try:
        quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return count


def free_memory(group: Path = GROUP) -> float:
    """Return the bytes that this process can still take, of the machine or of its container; inf
    where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows, macOS
            return math.inf
    return min(free, container_memory(group)[0])


def container_memory(group: Path = GROUP) -> tuple[float, float]:
    """Return (free bytes, limit) of this container; file caches that can go count as free. inf
    where there is no limit."""
    for limit_file, used_file, stat_file, cache in MEMORY:
        try:
            limit, used = (
                int((group / f).read_text(encoding="utf-8")) for f in (limit_file, used_file)
            )
            lines = (group / stat_file).read_text(encoding="utf-8").splitlines()
            if limit < 2**60:  # v1 says 2**63 for none
                return limit - used + int(dict(map(str.split, lines))[cache]), limit
        except (OSError, ValueError, KeyError):  # not this version, or "max": no limit
            pass
    return math.inf, math.inf
