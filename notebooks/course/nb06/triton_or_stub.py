"""Triton for notebook 06, which must run where Triton is not.

With a GPU: Triton. On a CPU: its interpreter, switched on before Triton is imported (so import
this before transformers, which imports Triton). Where Triton has no wheel (Windows, macOS):
stand-ins, with which kernels can be defined and read; `HAVE_TRITON` is False then.
"""
import contextlib
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from course.nb06.exercises import ReadBeyond, StoredBeyond, block_for

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


def launched(kernel) -> Callable[..., torch.Tensor]:
    """A kernel of notebook 06 that takes a group a pass, as a function of (x, codes, scale, zero)
    that returns y; the kernel is its attribute `kernel`.

    The kernel takes pointers to these and to y, then out, row_bytes and groups, BLOCK (rows of a
    program: `block_for(out)`) and HALF. What is not stored is NaN. Raises ReadBeyond and
    StoredBeyond for addresses outside of the tensors, NotImplementedError for a stub and where
    Triton can't run.
    """
    def product(x, codes, scale, zero):
        out, y = len(codes), torch.full((len(codes),), float("nan"))
        block = block_for(out)
        return _launch(kernel, (-(-out // block),), y, {
            "x": x, "packed": codes, "scale": scale, "zero": zero}, scale.shape[1], block)

    product.kernel = kernel
    return product


def decoding(kernel) -> Callable[..., torch.Tensor]:
    """The same for a kernel that decodes: a function of (codes, scale, zero) that returns the
    weight w (out, n); programs are (tiles of rows, groups)."""
    def decode(codes, scale, zero):
        (out, row_bytes), groups = codes.shape, scale.shape[1]
        w, block = torch.full((out, 2 * row_bytes), float("nan")), block_for(out)
        return _launch(kernel, (-(-out // block), groups), w, {
            "packed": codes, "scale": scale, "zero": zero}, groups, block)

    decode.kernel = kernel
    return decode


def _launch(kernel, grid, result, tensors, groups, block):
    if not CAN_RUN or "NotImplementedError" in kernel.fn.__code__.co_names:
        raise NotImplementedError
    out, row_bytes = tensors["packed"].shape
    shape, tensors = result.shape, {**tensors, "the result": result}
    with_margin = {name: _with_margin(t) for name, t in tensors.items()}
    last = with_margin["the result"]
    last[result.numel():] = float("inf")  # which no kernel stores
    with _guarded(tensors, with_margin):
        kernel[grid](*with_margin.values(), out, row_bytes, groups, BLOCK=block,
                     HALF=row_bytes // groups)
    if not last[result.numel():].isposinf().all():
        raise StoredBeyond("it stores beyond the end of the result")
    return last[:result.numel()].view(shape).cpu()


def _with_margin(tensor: torch.Tensor, margin: int = 4096) -> torch.Tensor:
    """Its numbers in a row, on DEVICE, and behind them NaN, or 0 where there is none: there a
    forgotten mask does no harm."""
    beyond = float("nan") if tensor.is_floating_point() else 0
    return torch.cat([tensor.flatten(), tensor.new_full((margin,), beyond)]).to(DEVICE)


@contextlib.contextmanager
def _guarded(tensors: dict[str, torch.Tensor], with_margin: dict[str, torch.Tensor]):
    """While it runs, the interpreter looks at every address that is not masked. (On a GPU nobody
    does: there a read beyond the end gives any numbers, or ends the process's use of the GPU.)"""
    if DEVICE.type == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterError, interpreter_builder as builder

    spans = {name: (with_margin[name].data_ptr(), t.nbytes, t.element_size())
             for name, t in tensors.items()}

    def look(at, mask, kind, verb):
        for address in at[mask].tolist():
            if not any(start <= address < start + size for start, size, _ in spans.values()):
                near = {name: (address - start) // width for name, (start, _, width)
                        in spans.items() if address >= start}
                name = min(near, key=lambda n: address - spans[n][0], default=None)
                where = f"element {near[name]} of {name}, which has {tensors[name].numel()}" \
                    if name else "an address outside of all tensors"
                raise kind(f"it {verb} {where}: mask it")

    load, store = builder.create_masked_load, builder.create_masked_store

    def guarded_load(pointers, mask, *rest):
        look(pointers.data, mask.data.astype(bool), ReadBeyond, "reads")
        return load(pointers, mask, *rest)

    def guarded_store(pointers, value, mask, *rest):
        look(pointers.data, mask.data.astype(bool), StoredBeyond, "stores")
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = guarded_load, guarded_store
    try:
        yield
    except InterpreterError as error:
        raise (error.__cause__ or error) from None
    finally:
        del builder.create_masked_load, builder.create_masked_store


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
