"""Products of a few tokens with a 4-bit weight in Triton: decode and multiply in one launch.

Up to some tens of tokens the time goes into reading the weight. So its codes lie as tensor cores
take them (`fragments`); they are copied into shared memory some passes ahead (STAGES, cp.async),
16 bytes a thread, with scales and inputs; and the features are split between programs (split-K),
so that all multiprocessors read. The last program of a tile adds up the sums of the others, in
fixed order, and stores the output in its dtype: there is no second launch.

Decoding costs less than an instruction a weight. A code goes into the lowest bits of a 16-bit
fraction below the exponent of 128, for two codes at once: (word >> k) & 0x000F000F | 0x43004300 are
two numbers 128 + q in bf16, exactly. With z' = 128 + zero, a group's scale and zero leave its sum:
    sum_k scale (q_k - zero) x_k  =  scale (sum_k (128 + q_k) x_k  -  z' sum_k x_k)
Beyond 32 tokens there are more sums than weights, and weights are scaled.
"""

import torch
from torch import Tensor

from .fragments import BLOCK, Fragments, span
from .triton_language import INTERPRETED, KINDS, tl, triton

MOST_TOKENS = 128  # with more, decoding once for cuBLAS costs less than decoding for each tile
PROGRAMS = 8  # for each multiprocessor of the GPU: warps enough to keep its memory busy
# Sizes by tokens of a tile: (warps, blocks of a pass, passes in shared memory)
SIZES = {8: (1, 2, 4), 16: (1, 1, 4), 32: (1, 1, 4), 64: (2, 2, 3)}
SCALED = tl.constexpr(32)  # tokens up to which sums are scaled: with more, weights are
ONES = {torch.bfloat16: 0x43004300, torch.float16: 0x58005800}  # two times 128


@triton.jit
def decoded(words, ones, KIND: tl.constexpr, BLOCKS: tl.constexpr, W: tl.constexpr):
    """int32 (BLOCKS * W * 128,), of W pieces a block -> 128 + q in KIND (64, BLOCKS * W * 16).
    No element changes its thread: only the names of the axes change."""
    w = tl.reshape(words, (BLOCKS, 4, 8, 4, W, 1))  # (block, a, g, t, w, -)
    at = 4 * tl.reshape(tl.arange(0, 4), (1, 1, 1, 1, 1, 4))
    if KIND == tl.bfloat16:  # 7 bits of fraction, in each half of the word
        v = ((w >> at) & 0x000F000F) | ones
    else:  # 10 bits of fraction
        v = (((w >> at) & 0x000F000F) << 3) | ones
    v = tl.reshape(v, (BLOCKS, 4, 8, 4, W, 4, 1))
    v = v >> (16 * tl.reshape(tl.arange(0, 2), (1, 1, 1, 1, 1, 1, 2)))
    halves = tl.reshape(v.to(tl.int16), (BLOCKS, 4, 8, 4, W, 2, 2, 2))  # (..., w, c, b, d)
    # rows a, b, g; features block, w, c, t, d
    halves = tl.permute(halves, (1, 6, 2, 0, 4, 5, 3, 7))
    return tl.reshape(halves, (64, BLOCKS * W * 16)).to(KIND, bitcast=True)


@triton.jit
def half(word):
    """The lower 16 bits as a number of fp16, in fp32."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _product(
    x, codes, grids, y, sums, arrived, ones, tokens, out, n, blocks, groups, per_split, splits,
    token_tiles, GROUP: tl.constexpr, SPAN: tl.constexpr, RAGGED: tl.constexpr,
    KIND: tl.constexpr, DOT: tl.constexpr, TOKENS: tl.constexpr, PASS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x (tokens, n), codes and grids as in Fragments -> y (tokens, out); a program makes 64 rows
    for TOKENS tokens, or its share of their sums (splits, programs, 64, TOKENS)."""
    tile, part = tl.program_id(0) // token_tiles, tl.program_id(1)
    # The third axis has one program. But so `ones` is in a register, for LOP3: arguments are not.
    ones += tl.program_id(2)
    row = tl.arange(0, 64)
    token = tl.program_id(0) % token_tiles * TOKENS + tl.arange(0, TOKENS)
    lines = tl.minimum(token, tokens - 1)[:, None]  # behind the last one: it again, without a mask
    # Words of SPAN features: of one block or two, of half of one with SPAN 32
    BLOCKS: tl.constexpr = 2 if SPAN == 128 else 1
    W: tl.constexpr = 2 if SPAN == 32 else 4
    at = tl.arange(0, BLOCKS * W * 128)
    at = at // W * 4 + at % W
    feature = tl.arange(0, SPAN)
    total = tl.zeros((64, TOKENS), tl.float32)
    every = tl.full((16, SPAN), 1.0, DOT)
    first = part * per_split
    last = tl.minimum(first + per_split, blocks)
    for start in tl.range(first, last, PASS, num_stages=STAGES):
        for i in tl.static_range(PASS * 64 // SPAN):
            block = start + i * SPAN // 64
            if PASS > BLOCKS:  # beyond the end: the last block again, with scales of 0
                block = tl.minimum(block, blocks - BLOCKS)
            k = block * 64 + i * SPAN % 64  # the first feature
            grid = grids + (tile * groups + k // GROUP) * 64 + row  # (64,)
            if PASS > BLOCKS:
                grid = tl.load(grid, mask=start + i * SPAN // 64 < last, other=0)
            else:
                grid = tl.load(grid)
            words = tl.load(codes + (tile * blocks + block) * 512 + i * SPAN % 64 // 16 + at)
            if RAGGED:
                inputs = tl.load(x + lines * n + (k + feature)[None, :],
                                 mask=(k + feature < n)[None, :], other=0.0)  # fmt: skip
            else:
                inputs = tl.load(x + lines * n + (k + feature)[None, :])  # (TOKENS, SPAN)
            inputs = tl.trans(inputs.to(DOT))
            w = decoded(words, ones, KIND, BLOCKS, W).to(DOT)  # (64, SPAN)
            scale, zero = half(grid)[:, None], half(grid >> 16)[:, None]  # zero: -(128 + zero)
            if TOKENS <= SCALED:  # few outputs: scaling them is less work than scaling weights
                part_sum = tl.dot(w, inputs, input_precision="ieee")
                # In each of 16 rows sum_k x_k: a tensor core's sum, where the outputs lie
                input_sum = tl.dot(every, inputs, input_precision="ieee")
                input_sum = tl.broadcast_to(input_sum[None, :, :], (4, 16, TOKENS))
                input_sum = tl.reshape(input_sum, (64, TOKENS))
                total += scale * (part_sum + zero * input_sum)
            else:
                w = (w + zero.to(DOT)) * scale.to(DOT)  # the sum is exact
                total = tl.dot(w, inputs, total, input_precision="ieee")
    where = token[None, :] * out + (tile * 64 + row)[:, None]
    mask = (tile * 64 + row < out)[:, None] & (token < tokens)[None, :]
    if splits == 1:
        tl.store(y + where, total, mask=mask)
    else:
        mine = tl.program_id(0) * 64 * TOKENS + row[:, None] * TOKENS
        mine = mine + tl.arange(0, TOKENS)[None, :]
        step = tl.num_programs(0) * 64 * TOKENS
        tl.store(sums + part * step + mine, total)
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(arrived + tl.program_id(0), 1) == splits - 1:
            total = tl.zeros((64, TOKENS), tl.float32)
            for other in range(splits):
                total += tl.load(sums + other * step + mine, cache_modifier=".cg")
            tl.store(y + where, total, mask=mask)
            tl.store(arrived + tl.program_id(0), 0)  # for the next launch


def tile_tokens(tokens: int) -> int:
    """Tokens of a program's tile: tensor cores take them in eights."""
    return next((size for size in SIZES if tokens <= size), 64)


def kernel_span(width: int, size: int) -> int:
    """Features of one product for a tile of `size` tokens: 128 of 32 tokens don't fit registers."""
    return width if size <= 16 else min(width, 64)


def splits(programs: int, passes: int, processors: int) -> int:
    """Programs that share the features of a tile: so many that all multiprocessors read."""
    return max(1, min(passes, -(-PROGRAMS * processors // programs)))


def serves(weight, tokens: int, dtype: torch.dtype) -> bool:
    """Whether `matmul` multiplies so many tokens in `dtype` with this weight."""
    return isinstance(weight, Fragments) and 0 < tokens <= MOST_TOKENS and dtype in KINDS


# One for each stream, on which launches follow each other: each leaves zeros behind.
_arrived: dict[tuple, Tensor] = {}


def arrived(device: torch.device, programs: int) -> Tensor:
    """int32 zeros, one a program at least, in which the programs of a tile count themselves."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _arrived.get((device, stream))
    if found is None or len(found) < programs:
        found = torch.zeros(max(programs, 4096), dtype=torch.int32, device=device)
        _arrived[device, stream] = found
    return found


def plan(weight: Fragments, tokens: int, processors: int) -> tuple[tuple[int, int], dict, dict]:
    """(programs, splits), the launch's numbers and its sizes, by the kernel's arguments' names."""
    (tiles, blocks, _), (out, n), groups = weight.codes.shape, weight.shape, weight.scale.shape[1]
    size = tile_tokens(tokens)
    warps, per_pass, stages = SIZES[size]
    width = kernel_span(span(weight), size)
    per_pass = max(per_pass, width // BLOCK)
    token_tiles = -(-tokens // size)
    parts = splits(tiles * token_tiles, -(-blocks // per_pass), processors)
    per_split = -(-blocks // (parts * per_pass)) * per_pass
    parts = -(-blocks // per_split)
    numbers = {"tokens": tokens, "out": out, "n": n, "blocks": blocks,
               "groups": weight.op_grids.shape[1],
               "per_split": per_split, "splits": parts, "token_tiles": token_tiles}  # fmt: skip
    sizes = {"GROUP": n // groups if groups > 1 else blocks * BLOCK, "SPAN": width,
             "RAGGED": n % BLOCK > 0, "TOKENS": size, "PASS": per_pass,
             "STAGES": stages, "num_warps": warps}  # fmt: skip
    return (tiles * token_tiles, parts), numbers, sizes


def matmul(x: Tensor, weight: Fragments, dtype: torch.dtype) -> Tensor:
    """x (..., in) @ W^T -> (..., out) in `dtype`, accumulated in fp32, without gradients, where
    `serves` says so. Raises ValueError for another number of features."""
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError("on a CPU these kernels need Triton's interpreter: set the environment "
                         "variable TRITON_INTERPRET=1 before Python starts")  # fmt: skip
    out, n = weight.shape
    if x.shape[-1] != n:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {n}")
    flat = x.reshape(-1, n).to(dtype).contiguous()
    processors = 4  # for the interpreter, some splits
    if x.device.type == "cuda":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    grid, numbers, sizes = plan(weight, len(flat), processors)
    y = flat.new_empty(len(flat), out)
    split = grid[1] > 1
    sums = flat.new_empty(grid[0] * grid[1] * BLOCK * sizes["TOKENS"] if split else 0,
                          dtype=torch.float32)  # fmt: skip
    kind = KINDS[dtype]
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _product[grid](
            flat, weight.codes, weight.op_grids, y, sums, arrived(x.device, grid[0]), ONES[dtype],
            **numbers, **sizes, KIND=kind, DOT=tl.float32 if INTERPRETED else kind,
        )  # fmt: skip
    return y.view(*x.shape[:-1], out)
