"""The room on a device, and whether a training fits into it."""

import torch

from ..base.machine import free_memory


class NotEnoughMemory(ValueError, MemoryError):
    """What was asked for is larger than the free memory of the device."""


def available_memory(device: torch.device | str) -> float:
    """Bytes that this process can still take: on the GPU (what PyTorch holds unused counts as
    free), else of the machine or its container; inf where nobody says."""
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    return free_memory()


def check_fits(ledger, device: torch.device | str) -> None:
    """Raises NotEnoughMemory, with the ledger, when its peak exceeds what is free."""
    free = available_memory(device)
    if ledger.peak > free:
        needed, room = f"{ledger.peak / 1e9:.2f} GB", f"{free / 1e9:.2f} GB"
        raise NotEnoughMemory(f"training needs {needed} at its peak, and {device} has {room} free; "
                              "take fewer or shorter sequences at a time, gradient checkpointing, "
                              f"a quantized base or a smaller model\n{ledger}")  # fmt: skip
