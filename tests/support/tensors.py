"""Inputs, slow specifications and measuring tools that several test files share."""

from contextlib import contextmanager

import torch
from hypothesis import settings
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# Properties are tried on the same examples each time, and leave no database behind.
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def normal(*shape: int, seed: int = 0, std: float = 1.0, dtype=torch.float32) -> Tensor:
    """Seeded N(0, std) of the given shape."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * std).to(dtype)


def ar1(tokens: int, features: int, rho=0.9, seed: int = 0, dtype=torch.float32) -> Tensor:
    """Inputs (tokens, features) of unit variance; neighbouring features correlate by rho."""
    noise = normal(tokens, features, seed=seed, dtype=torch.float64)
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0]
    for j in range(1, features):
        x[:, j] = rho * x[:, j - 1] + (1 - rho**2) ** 0.5 * noise[:, j]
    return x.to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, Frobenius norms."""
    return float((a - b).detach().norm() / b.detach().norm())


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Within it, torch makes new tensors in this dtype, as libraries that load models do."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def bf16_autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensor storages made inside the block that are alive together.

    `peak` is their maximum after any operation. Storages are known by weak references, so
    whatever keeps one alive, Python or the autograd graph, is counted.
    """

    def __init__(self, *not_counted: Tensor):
        super().__init__()
        self.skip = {t.untyped_storage().data_ptr() for t in not_counted}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.skip:
                storage = t.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes alive at this moment."""
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        return sum(size for _, size in self.live.values())
