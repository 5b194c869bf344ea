"""Products with a packed 4-bit weight in Triton: decode and multiply in one pass (W4A16).

The codes are decoded in registers, a tile at a time; no dense weight is written to memory.
`_vector` serves one token, the step of decoding, on ordinary cores, `_matrix` more of them on
tensor cores, `_backward` the gradient of the inputs.

Scale and zero-point are the same for a whole group, so they leave the sum:
    sum_k scale (q_k - zero) x_k  =  scale (sum_k q_k x_k  -  zero sum_k x_k)
A row's features are cut into units that lie in one group each: 32, 64 or 128 features.
A byte holds an even feature (low nibble) and the odd one after it (high nibble): even codes meet
even inputs, odd codes odd inputs, and both sums add up. With few tokens there are few tiles: the
features are split between several programs (split-K), whose sums are added in fixed order.

Without a GPU the kernels run in Triton's interpreter, in NumPy. Its +, * and tl.dot of bf16 are
wrong, without an error: everything here is computed in fp32, or in the dtype that DOT names.
"""

import os
import sys

import torch
from torch import Tensor

from ..quant.grid import QuantizedTensor
from ..quant.recipe import Quantized

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
MOST_TOKENS = 2048  # with more, decoding once for cuBLAS costs little beside the product
FEW_TOKENS = 16  # up to here the weight's bytes are the cost, and the features are split
PROGRAMS = 4  # for each multiprocessor of the GPU: that many keep its memory busy


def tiles(*configs: tuple[dict, int, int]) -> list[triton.Config]:
    """(sizes, warps, stages) to be timed on a GPU at the first call of a shape; in the interpreter
    one small tile, so that small shapes have several, and edges to mask."""
    if INTERPRETED:
        return [triton.Config({k: 2 if k == "UNITS" else 16 for k in configs[0][0]})]
    return [triton.Config(sizes, num_warps=w, num_stages=s) for sizes, w, s in configs]


@triton.autotune(
    tiles(
        ({"BLOCK_OUT": 16, "UNITS": 4}, 4, 2), ({"BLOCK_OUT": 8, "UNITS": 8}, 4, 2),
        ({"BLOCK_OUT": 16, "UNITS": 8}, 8, 2), ({"BLOCK_OUT": 32, "UNITS": 4}, 8, 2),
    ),
    key=["out", "n", "WIDTH"],
)  # fmt: skip
@triton.jit
def _vector(
    x, codes, scale, zero, y, out, n, row_bytes, groups, per_group, per_split,
    WIDTH: tl.constexpr, BLOCK_OUT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """x (n,), codes (out, row_bytes) -> y fp32 (splits, out); a program makes BLOCK_OUT sums."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = tl.program_id(1) * per_split  # of the units that this program adds up
    total = tl.zeros((BLOCK_OUT,), tl.float32)
    for unit in range(first, first + per_split, UNITS):
        units = unit + tl.arange(0, UNITS)
        at = units[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]  # bytes of a row
        even = tl.load(x + 2 * at, mask=2 * at < n, other=0.0).to(tl.float32)  # (UNITS, WIDTH / 2)
        odd = tl.load(x + 2 * at + 1, mask=2 * at + 1 < n, other=0.0).to(tl.float32)
        inside = (rows < out)[:, None, None] & (at < row_bytes)[None, :, :]
        packed = tl.load(
            codes + rows[:, None, None] * row_bytes + at[None, :, :], mask=inside, other=0
        )  # (BLOCK_OUT, UNITS, WIDTH / 2)
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        sums = tl.sum(low * even[None, :, :] + high * odd[None, :, :], axis=2)  # (BLOCK_OUT, UNITS)
        group = units // per_group
        known = (rows < out)[:, None] & (group < groups)[None, :]
        grid = rows[:, None] * groups + group[None, :]
        s = tl.load(scale + grid, mask=known, other=0.0).to(tl.float32)
        z = tl.load(zero + grid, mask=known, other=0).to(tl.float32)
        total += tl.sum(s * (sums - z * tl.sum(even + odd, axis=1)[None, :]), axis=1)
    tl.store(y + tl.program_id(1) * out + rows, total, mask=rows < out)


@triton.autotune(
    tiles(
        ({"BLOCK_OUT": 64, "BLOCK_TOKENS": 16}, 4, 4),
        ({"BLOCK_OUT": 128, "BLOCK_TOKENS": 16}, 8, 3),
        ({"BLOCK_OUT": 64, "BLOCK_TOKENS": 64}, 4, 3),
        ({"BLOCK_OUT": 128, "BLOCK_TOKENS": 64}, 8, 3),
        ({"BLOCK_OUT": 128, "BLOCK_TOKENS": 128}, 8, 3),
    ),
    key=["out", "n", "WIDTH", "about"],
)  # fmt: skip
@triton.jit
def _matrix(
    x, codes, scale, zero, y, about, tokens, out, n, row_bytes, groups, per_group, per_split,
    WIDTH: tl.constexpr, DOT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """x (tokens, n), codes (out, row_bytes) -> y (splits, tokens, out), a tile of W x^T a program:
    the decoded codes are the left factor, as they lie in registers."""
    rows = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first = tl.program_id(2) * per_split
    last = tl.minimum(first + per_split, tl.cdiv(n, WIDTH))
    total = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
    for unit in range(first, last):
        at = unit * (WIDTH // 2) + tl.arange(0, WIDTH // 2)  # bytes of a row
        inside = (rows < out)[:, None] & (at < row_bytes)[None, :]
        packed = tl.load(codes + rows[:, None] * row_bytes + at[None, :], mask=inside, other=0)
        grid = rows * groups + unit // per_group
        s = tl.load(scale + grid, mask=rows < out, other=0.0).to(tl.float32)
        z = tl.load(zero + grid, mask=rows < out, other=0).to(tl.float32)
        low = ((packed & 15).to(tl.float32) - z[:, None]).to(DOT)  # (BLOCK_OUT, WIDTH / 2), exact
        high = ((packed >> 4).to(tl.float32) - z[:, None]).to(DOT)
        feature = unit * WIDTH + tl.arange(0, WIDTH)
        inputs = tl.load(
            x + token[:, None] * n + feature[None, :],
            mask=(token < tokens)[:, None] & (feature < n)[None, :], other=0.0,
        ).to(DOT)  # (BLOCK_TOKENS, WIDTH)  # fmt: skip
        even, odd = tl.split(tl.reshape(inputs, (BLOCK_TOKENS, WIDTH // 2, 2)))
        sums = tl.dot(low, tl.trans(even), input_precision="ieee")  # (BLOCK_OUT, BLOCK_TOKENS)
        sums = tl.dot(high, tl.trans(odd), sums, input_precision="ieee")
        total += sums * s[:, None]
    where = (tl.program_id(2) * tokens + token[None, :]) * out + rows[:, None]
    tl.store(y + where, total, mask=(rows < out)[:, None] & (token < tokens)[None, :])


@triton.autotune(
    tiles(
        ({"BLOCK_OUT": 64, "BLOCK_TOKENS": 64}, 4, 3),
        ({"BLOCK_OUT": 64, "BLOCK_TOKENS": 128}, 8, 3),
        ({"BLOCK_OUT": 32, "BLOCK_TOKENS": 128}, 4, 4),
    ),
    key=["out", "n", "WIDTH", "about"],
)  # fmt: skip
@triton.jit
def _backward(
    grad, codes, scale, zero, dx, about, tokens, out, n, row_bytes, groups, per_group,
    WIDTH: tl.constexpr, DOT: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """grad (tokens, out), codes (out, row_bytes) -> dx (tokens, n) = grad W, a unit of features
    for BLOCK_TOKENS tokens a program. The sum runs over rows, and with it the scales change."""
    unit = tl.program_id(0)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    at = unit * (WIDTH // 2) + tl.arange(0, WIDTH // 2)
    even = tl.zeros((BLOCK_TOKENS, WIDTH // 2), tl.float32)
    odd = tl.zeros((BLOCK_TOKENS, WIDTH // 2), tl.float32)
    for start in range(0, out, BLOCK_OUT):
        rows = start + tl.arange(0, BLOCK_OUT)
        inside = (rows < out)[:, None] & (at < row_bytes)[None, :]
        packed = tl.load(codes + rows[:, None] * row_bytes + at[None, :], mask=inside, other=0)
        grid = rows * groups + unit // per_group
        s = tl.load(scale + grid, mask=rows < out, other=0.0).to(tl.float32)[:, None]
        z = tl.load(zero + grid, mask=rows < out, other=0).to(tl.float32)[:, None]
        low = (((packed & 15).to(tl.float32) - z) * s).to(DOT)  # (BLOCK_OUT, WIDTH / 2)
        high = (((packed >> 4).to(tl.float32) - z) * s).to(DOT)
        g = tl.load(
            grad + token[:, None] * out + rows[None, :],
            mask=(token < tokens)[:, None] & (rows < out)[None, :], other=0.0,
        ).to(DOT)  # (BLOCK_TOKENS, BLOCK_OUT)  # fmt: skip
        even = tl.dot(g, low, even, input_precision="ieee")  # (BLOCK_TOKENS, WIDTH / 2)
        odd = tl.dot(g, high, odd, input_precision="ieee")
    feature = unit * WIDTH + tl.arange(0, WIDTH)
    mask = (token < tokens)[:, None] & (feature < n)[None, :]
    tl.store(dx + token[:, None] * n + feature[None, :], tl.interleave(even, odd), mask=mask)


@triton.jit
def _touch(x):
    tl.store(x, 1.0)


def try_out(device: torch.device) -> None:
    """Runs the smallest of kernels; raises whatever keeps Triton from compiling it."""
    x = torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _touch[(1,)](x)


def unit_width(weight: QuantizedTensor) -> int | None:
    """Features of a unit, which lies in one group: 128, 64 or 32; None: no such unit."""
    n, groups = weight.shape[1], weight.scale.shape[1]
    if groups == 1:
        return 128 if n > 64 else 32  # masks take care of the end of a row
    return next((w for w in (128, 64, 32) if n // groups % w == 0), None)


def serves(weight: Quantized, tokens: int, dtype: torch.dtype) -> bool:
    """Whether these kernels can multiply so many tokens in `dtype` with this weight."""
    ours = type(weight) is QuantizedTensor and weight.spec.bits == 4 and weight.g_idx is None
    # Tensor cores multiply 16 bits; exact products of fp32 are cuBLAS's business.
    most = {torch.bfloat16: MOST_TOKENS, torch.float16: MOST_TOKENS, torch.float32: FEW_TOKENS}
    return ours and 0 < tokens <= most.get(dtype, 0) and unit_width(weight) is not None


def _layout(weight: QuantizedTensor) -> dict:
    """What the kernels ask about the packed weight, by their arguments' names."""
    (out, n), groups, width = weight.shape, weight.scale.shape[1], unit_width(weight)
    per_group = max(1, n // groups // width) if groups > 1 else -(-n // width)
    packed = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero_point}
    return packed | {"out": out, "n": n, "row_bytes": weight.codes.shape[1], "groups": groups,
                     "per_group": per_group, "WIDTH": width}  # fmt: skip


def _rows(x: Tensor, width: int, what: str) -> Tensor:
    """x (..., width) -> (tokens, width), contiguous."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError("on a CPU these kernels need Triton's interpreter: set the environment "
                         "variable TRITON_INTERPRET=1 before Python starts")  # fmt: skip
    if x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} {what}, the weight takes {width}")
    return x.reshape(-1, width).contiguous()


def _of_tokens(tokens: int, dtype: torch.dtype) -> dict:
    """The same about several tokens in `dtype`."""
    # Tile sizes are timed for 16, 64 and 256 tokens, not for each number of them.
    about = FEW_TOKENS if tokens <= FEW_TOKENS else 64 if tokens <= 64 else 256
    dot = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16}
    return {"tokens": tokens, "about": about, "DOT": dot.get(dtype, tl.float32)}


def splits(out: int, tokens: int, units: int, device: torch.device) -> int:
    """Programs that share the features of a row: so many that all multiprocessors work."""
    if device.type != "cuda":
        return 2  # to be seen at work in the interpreter
    wanted = PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
    tiles_of_rows = -(-out // (16 if tokens == 1 else 64))
    return max(1, min(units // 8, 16, -(-wanted // tiles_of_rows)))  # 8 units each, or more


def matmul(x: Tensor, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """x (..., in) @ W^T -> (..., out) in `dtype`, accumulated in fp32, without gradients, where
    `serves` says so. Raises ValueError for another number of features."""
    layout, (out, n) = _layout(weight), weight.shape
    flat = _rows(x, n, "features").to(dtype)
    tokens, units = len(flat), -(-n // layout["WIDTH"])
    parts = splits(out, tokens, units, x.device) if tokens <= FEW_TOKENS else 1
    per_split = -(-units // parts)
    if tokens == 1:
        per_split = -(-per_split // 8) * 8  # a multiple of every UNITS
    parts = -(-units // per_split)
    whole = parts == 1 and tokens > 1
    y = flat.new_empty(parts, tokens, out, dtype=dtype if whole else torch.float32)

    def programs(c):
        columns = (triton.cdiv(tokens, c["BLOCK_TOKENS"]),) if tokens > 1 else ()
        return triton.cdiv(out, c["BLOCK_OUT"]), *columns, parts

    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        if tokens == 1:
            _vector[programs](x=flat, y=y, per_split=per_split, **layout)
        else:
            several = _of_tokens(tokens, dtype)
            _matrix[programs](x=flat, y=y, per_split=per_split, **several, **layout)
    return (y[0] if parts == 1 else y.sum(0)).to(dtype).view(*x.shape[:-1], out)


def matmul_back(grad: Tensor, weight: QuantizedTensor) -> Tensor:
    """grad (..., out) @ W -> (..., in) in its dtype: the gradient of `matmul`'s x."""
    layout = _layout(weight)
    flat = _rows(grad, weight.shape[0], "output features")
    tokens, n = len(flat), weight.shape[1]
    dx = flat.new_empty(tokens, n)

    def programs(c):
        return triton.cdiv(n, layout["WIDTH"]), triton.cdiv(tokens, c["BLOCK_TOKENS"])

    with torch.cuda.device_of(grad):
        _backward[programs](grad=flat, dx=dx, **_of_tokens(tokens, grad.dtype), **layout)
    return dx.view(*grad.shape[:-1], n)
