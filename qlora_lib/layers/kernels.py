"""Products with a packed weight, on the path that is fastest for device, dtype and batch.

Within `linear.decoding_layout` the codes of 4-bit grids lie in another order, and a few tokens in
16 bits are multiplied as they are: in bf16 on a CPU by torch's int4 operator (`Int4Tiles`), on a
GPU by our Triton kernel (`Fragments`). For everything else rows of the weight are made dense: some
at a time on a CPU, all at once by a Triton kernel on a GPU.

Why not these, on a GPU, as they are: 8 bits read twice the bytes of 4, and would need a kernel of
their own; NF4's levels are looked up, weight by weight, where a grid's code is a number already;
and with act-order without static groups (`g_idx`) the features of a group lie apart, so that each
weight needs a scale and zero of its own. (Act-order with static groups, GPTQ's default here, is
served as it is.)
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..quant.grid import QuantizedTensor
from ..quant.packing import pack, unpack
from ..quant.recipe import Quantized
from .fragments import Fragments, fragments

INT4_TOKENS = 32  # with more, making rows dense once is cheaper than unpacking them for each
INT4_GROUPS = (32, 64, 128, 256)  # the group sizes that the operator knows


@dataclass
class Int4Tiles(QuantizedTensor):
    """A 4-bit weight with its codes in the order of torch's int4 operator.

    codes       uint8 (out / tile, in, tile / 2): byte [t, k, i] holds input feature k of row
                i of tile t (low nibble) and of row i + tile / 2 (high nibble)
    op_grids    bf16 (groups, out, 2): scale, and the value of code 8
    """

    op_grids: Tensor

    def unpacked(self, rows: slice) -> Tensor:
        half = self.codes.shape[2]
        bytes_ = self.codes[rows.start // (2 * half) : rows.stop // (2 * half)]
        bytes_ = bytes_.transpose(1, 2).contiguous()  # (tiles, tile / 2, in)
        codes = bytes_.new_empty(len(bytes_), 2, half, self.shape[1])
        torch.bitwise_and(bytes_, 15, out=codes[:, 0])
        torch.bitwise_right_shift(bytes_, 4, out=codes[:, 1])
        return codes.view(-1, self.shape[1])

    def in_order(self) -> QuantizedTensor:
        """The same weight with its codes in our order."""
        own = vars(self) | {"codes": pack(self.unpacked(slice(0, self.shape[0])), 4)}
        del own["op_grids"]
        return QuantizedTensor(**own)


class HeldDense:
    """A packed weight whose dense fp32 rows are held (see `linear.held_dense`)."""

    def __init__(self, weight: Quantized):
        self.shape, self.held = weight.shape, list(weight.pieces(torch.float32))

    def pieces(self, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
        return self.held


@lru_cache
def tile_rows() -> int | None:
    """Rows of a tile, which depend on the vector instructions in use; None: another order."""
    q = torch.arange(64 * 2).view(64, 2) * 7 % 16  # (out, in)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    fitting = (t for t in (32, 64) if torch.equal(packed.flatten(), _tiled(q.byte(), t).flatten()))
    return next(fitting, None)


def _tiled(q: Tensor, tile: int) -> Tensor:
    """Codes (out, in) -> bytes (out / tile, in, tile / 2)."""
    q = q.view(-1, 2, tile // 2, q.shape[1])
    return (q[:, 0] | q[:, 1] << 4).transpose(1, 2).contiguous()


def int4_tiles(weight: Quantized) -> Int4Tiles | None:
    """The weight in the operator's order, or None where the operator can't serve it."""
    grids = isinstance(weight, QuantizedTensor) and weight.spec.bits == 4 and weight.g_idx is None
    if not grids or weight.codes.device.type != "cpu":
        return None
    (out, n), groups = weight.shape, weight.scale.shape[1]
    if n // groups not in INT4_GROUPS or tile_rows() is None or out % tile_rows():
        return None
    scale, zero = weight.scale.float(), weight.zero_point.float()
    op_grids = torch.stack([scale.t(), ((8 - zero) * scale).t()], dim=2)  # (groups, out, 2)
    codes = _tiled(unpack(weight.codes, 4, weight.shape), tile_rows())
    return Int4Tiles(**vars(weight) | {"codes": codes, "op_grids": op_grids.bfloat16()})


def laid_out(weight: Quantized) -> Int4Tiles | Fragments | None:
    """The weight in the order in which a few tokens are multiplied fastest on its device; None
    where there is no such order."""
    device = weight.codes.device
    if device.type == "cpu":
        return int4_tiles(weight)
    # Before sm_80 (a T4, say) tensor cores take half as much and nothing is copied in advance: the
    # kernel would keep half of its numbers in memory.
    recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return fragments(weight) if recent and fused_kernels(device) else None


def work_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In what a product in `dtype` is computed: fp32 on a CPU where half precision is slow."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    bf16_is_fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return dtype if dtype == torch.bfloat16 and bf16_is_fast else torch.float32


def pieces(weight: Quantized | HeldDense, dtype: torch.dtype):
    """Slices of rows in order, each with its dense weights (rows, in) in `dtype`."""
    fused = None if isinstance(weight, HeldDense) else fused_kernels(weight.codes.device)
    if fused and fused.makes_dense(weight, dtype):
        return [(slice(0, weight.shape[0]), fused.dense(weight, dtype))]
    return weight.pieces(dtype)


def dense_matmul(x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x (..., in) @ W^T -> (..., out) in `dtype`, by way of dense rows."""
    work = work_dtype(dtype, x.device)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(dtype).to(work)  # (tokens, in)
    y = flat.new_empty(len(flat), weight.shape[0], dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):  # the dtypes are decided here
        for rows, w in pieces(weight, work):
            if dtype == work:
                torch.mm(flat, w.t(), out=y[:, rows])  # in place, no copy
            else:
                y[:, rows] = flat @ w.t()
    return y.view(*x.shape[:-1], weight.shape[0])


def dense_matmul_back(grad: Tensor, weight: Quantized) -> Tensor:
    """grad (..., out) @ W -> (..., in) in its dtype: the gradient of `dense_matmul`."""
    work, total = work_dtype(grad.dtype, grad.device), None
    flat = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).to(work)  # (tokens, out)
    for rows, w in pieces(weight, work):
        if total is None:
            total = flat[:, rows] @ w  # (tokens, in)
            if len(w) < weight.shape[0]:  # several pieces are summed in fp32 at least
                total = total.to(torch.promote_types(work, torch.float32))
        elif total.dtype == work:
            total.addmm_(flat[:, rows], w)
        else:
            total += flat[:, rows] @ w
    return total.view(*grad.shape[:-1], weight.shape[1]).to(grad.dtype)


@lru_cache
def fused_kernels(device: torch.device):
    """The module of Triton kernels on a GPU where Triton is installed and compiles; None on a CPU,
    and with one warning where it is not or does not."""
    if device.type != "cuda":
        return None
    try:
        if find_spec("triton") is None:
            raise ImportError("it is not installed: pip install triton")
        from . import triton_kernels

        triton_kernels.try_out(device)
    except Exception as error:  # no C compiler, no headers of Python, a GPU that Triton can't serve
        warnings.warn(f"Triton does not work here ({error}): products are slower. It needs a C "
                      "compiler and Python's headers (apt install gcc python3-dev)")  # fmt: skip
        return None
    return triton_kernels


def serves_few(x: Tensor, weight: Quantized, dtype: torch.dtype) -> bool:
    """Whether a Triton kernel multiplies x (..., in) with the weight as it is."""
    fused = fused_kernels(x.device)
    return bool(fused and fused.serves(weight, x.shape[:-1].numel(), dtype))


def product(x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x (..., in) @ W^T -> (..., out) in `dtype`: by a Triton kernel, or by way of dense rows."""
    if serves_few(x, weight, dtype):
        return fused_kernels(x.device).matmul(x, weight, dtype)
    return dense_matmul(x, weight, dtype)


def matmul(x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x (..., in) @ W^T -> (..., out) in `dtype`, without gradients; from `product` it differs by
    the operator's bf16 grids: up to 2**-8 of |x| |W|^T."""
    few = x.shape[:-1].numel() <= INT4_TOKENS
    if not (isinstance(weight, Int4Tiles) and dtype == torch.bfloat16 and few):
        return product(x, weight, dtype)
    (out, n), groups = weight.shape, weight.scale.shape[1]
    if x.shape[-1] != n:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {n}")
    flat = x.reshape(x.shape[:-1].numel(), n).to(dtype).contiguous()
    codes = weight.codes.view(out, n // 2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, codes, n // groups, weight.op_grids)
    return y.view(*x.shape[:-1], out)
