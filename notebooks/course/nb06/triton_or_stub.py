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
    from qlora_lib.layers import triton_kernels  # first: it switches the interpreter on

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


# What `ceilings` measures: numbers to copy, width of the product, and its dtype. On a GPU that of
# its tensor cores, of matrices that fill it, and a copy that no cache holds.
MEASURED = {"cpu": (1 << 24, 1024, torch.float32), "cuda": (1 << 27, 8192, torch.bfloat16)}


def ceilings() -> tuple[float, float]:
    """(operations a second, bytes a second) that this machine reaches: a product of two square
    matrices, and a copy of fp32 numbers, read and written (see MEASURED)."""
    numbers, width, dtype = MEASURED[DEVICE.type]
    source = torch.ones(numbers, device=DEVICE)
    target = torch.empty_like(source)
    square = torch.ones(width, width, device=DEVICE, dtype=dtype)
    return (2 * width**3 / seconds(lambda: square @ square),
            2 * source.nbytes / seconds(lambda: target.copy_(source)))


def launched(kernel, block: int = 4) -> Callable[..., torch.Tensor]:
    """A kernel of notebook 06 that takes a group a pass, as a function of (x, codes, scale, zero)
    that returns y.

    The kernel takes pointers to these and to y, then out, row_bytes and groups, BLOCK and HALF. A
    margin lies behind each tensor, so that a missing mask does no harm; what is not stored is NaN.
    The function raises IndexError for a store beyond y, NotImplementedError for a stub and where
    Triton can't run.
    """
    def product(x, codes, scale, zero):
        if not CAN_RUN or "NotImplementedError" in kernel.fn.__code__.co_names:
            raise NotImplementedError
        (out, row_bytes), groups = codes.shape, scale.shape[1]
        tensors = [_with_margin(t) for t in (x, codes, scale, zero)]
        y = _with_margin(torch.full((out,), float("nan")))
        y[out:] = float("inf")  # which no kernel stores
        kernel[(-(-out // block),)](*tensors, y, out, row_bytes, groups, BLOCK=block,
                                    HALF=row_bytes // groups)
        if not y[out:].isposinf().all():
            raise IndexError("it stores beyond the last row")
        return y[:out].cpu()

    return product


def _with_margin(tensor: torch.Tensor, margin: int = 4096) -> torch.Tensor:
    """Its numbers in a row, on DEVICE, and behind them NaN, or 0 where there is none."""
    beyond = float("nan") if tensor.is_floating_point() else 0
    return torch.cat([tensor.flatten(), tensor.new_full((margin,), beyond)]).to(DEVICE)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
