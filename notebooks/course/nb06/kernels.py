"""The kernel of notebook 06's long exercise, for those who go on without it."""

from .triton_or_stub import tl, triton


@triton.jit
def by_groups(x, packed, scale, zero, y, out, row_bytes, groups,
              BLOCK: tl.constexpr, HALF: tl.constexpr):
    """y = W x for BLOCK rows; a pass takes HALF bytes, one group."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for g in range(0, groups):
        at = g * HALF + tl.arange(0, HALF)  # the bytes of a group
        even, odd = tl.load(x + 2 * at), tl.load(x + 2 * at + 1)
        tile = tl.load(packed + rows[:, None] * row_bytes + at[None, :],
                       mask=(rows < out)[:, None], other=0)  # (BLOCK, HALF)
        low, high = (tile & 15).to(tl.float32), (tile >> 4).to(tl.float32)
        sums = tl.sum(low * even[None, :] + high * odd[None, :], axis=1)  # (BLOCK,)
        s = tl.load(scale + rows * groups + g, mask=rows < out, other=0.0)
        z = tl.load(zero + rows * groups + g, mask=rows < out, other=0.0)
        total += s * (sums - z * tl.sum(even + odd, axis=0))
    tl.store(y + rows, total, mask=rows < out)
