"""The room on a device, and whether a training fits into it."""

import math
import os
from pathlib import Path

import torch


class NotEnoughMemory(ValueError, MemoryError):
    """What was asked for is larger than the free memory of the device."""


def available_memory(device: torch.device | str) -> float:
    """Bytes that this process can still take: on the GPU (what PyTorch holds unused counts as
    free), else of the machine or its container (cgroup v2); inf where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # Windows, macOS
            return math.inf
    return min(free, _room_in_container())


def _room_in_container(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes below the limit of a cgroup v2, file caches that can go not counted as used."""
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        return limit - used + int(dict(map(str.split, lines))["inactive_file"])
    except (OSError, ValueError, KeyError):  # no cgroup v2, or "max": no limit
        return math.inf


def check_fits(ledger, device: torch.device | str) -> None:
    """Raises NotEnoughMemory, with the ledger, when its peak exceeds what is free."""
    free = available_memory(device)
    if ledger.peak > free:
        needed, room = f"{ledger.peak / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise NotEnoughMemory(f"training needs {needed} at its peak, and {device} has {room} free; "
                              "take fewer or shorter sequences at a time, gradient checkpointing, "
                              f"a quantized base or a smaller model\n{ledger}")  # fmt: skip
