"""Triton for notebook 06, which must run where Triton is not.

With a GPU: Triton. On a CPU: its interpreter, switched on before Triton is imported (so import
this before transformers, which imports Triton). Where Triton has no wheel (Windows, macOS):
stand-ins, with which kernels can be defined and read; `HAVE_TRITON` is False then.
"""
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

HAVE_TRITON = find_spec("triton") is not None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if HAVE_TRITON:
    from .. import triton_kernels  # first: it switches the interpreter on

    import triton
    import triton.language as tl

    CAN_RUN = DEVICE.type == "cuda" or triton_kernels.INTERPRETED
else:
    class triton:  # noqa: N801
        """A stand-in: `@triton.jit` leaves the function as it is."""

        jit = staticmethod(lambda function: function)

    class tl:  # noqa: N801
        """A stand-in for the annotations of a kernel's arguments."""

        constexpr = int

    triton_kernels, CAN_RUN = None, False


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The least time of some calls after one that is not counted; waits for a GPU."""
    run()
    best = float("inf")
    for _ in range(repeats):
        _wait()
        began = time.perf_counter()
        run()
        _wait()
        best = min(best, time.perf_counter() - began)
    return best


def ceilings(numbers: int = 1 << 24, width: int = 1024) -> tuple[float, float]:
    """(operations a second, bytes a second) that this machine reaches: an fp32 product of two
    width x width matrices, and a copy of so many fp32 numbers, read and written."""
    source = torch.ones(numbers, device=DEVICE)
    target, square = torch.empty_like(source), torch.ones(width, width, device=DEVICE)
    return (2 * width**3 / seconds(lambda: square @ square),
            2 * source.nbytes / seconds(lambda: target.copy_(source)))


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
