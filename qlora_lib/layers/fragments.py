"""A 4-bit weight in the order in which a GPU's tensor cores take it.

A tensor core multiplies pieces of 16 rows and 16 features (PTX's mma.m16n8k16), of which each of
32 threads holds 8 numbers in four registers, two in a register. Here a 32-bit word holds the codes
of just these 8 numbers, and the words of 32 threads lie side by side: a thread loads four of its
words, for four pieces, in 16 bytes, and what it has decoded is in place. (The idea is Marlin's,
Frantar et al. 2024, arXiv 2408.11743. Its order of codes is another one.)

A block has 64 rows and 64 features, 512 words. Which codes a word of it holds:

    rows      16 a + 8 b + g        a = 0..3, b = 0..1, g = 0..7
    features  16 w + 8 c + 2 t + d  w = 0..3, c = 0..1, t = 0..3, d = 0..1
    word      ((a * 8 + g) * 4 + t) * 4 + w
    bits      16 d + 4 (2 c + b) and the next three
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..quant.grid import QuantizedTensor
from ..quant.packing import pack, unpack
from ..quant.recipe import Quantized

BLOCK = 64  # rows and features of a block
SPANS = (128, 64, 32)  # features of one group that a kernel multiplies at a time
# Axes of a matrix (tile, a, b, g) x (block, w, c, t, d), numbered in this order, as words have them
WORDS = (0, 4, 1, 3, 7, 5, 8, 6, 2)  # tile, block, a, g, t, w, then d, c, b: the bits


@dataclass
class Fragments(QuantizedTensor):
    """A 4-bit weight with its codes in the order of tensor cores, padded with zeros.

    codes     int32 (out / 64, in / 64, 512), both rounded up: see above
    op_grids  int32 (out / 64, groups, 64): a row's scale in fp16, and -(128 + zero_point) in fp16
              in the upper half; 0 where there is no row, and for groups of added features alone
    """

    op_grids: Tensor

    def unpacked(self, rows: slice) -> Tensor:
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        words = self.codes[first:last]
        tiles, blocks = words.shape[:2]
        bytes_ = words.contiguous().view(torch.uint8)  # (tiles, blocks, 2048): d c are a byte
        q = unpack(bytes_, 4, (tiles, blocks, 2 * bytes_.shape[-1]))
        q = q.view(tiles, blocks, 4, 8, 4, 4, 2, 2, 2).permute(*_inverse(WORDS))
        q = q.reshape(tiles * BLOCK, blocks * BLOCK)[:, : self.shape[1]]
        return q[rows.start - first * BLOCK : rows.stop - first * BLOCK]

    def in_order(self) -> QuantizedTensor:
        """The same weight with its codes in our order."""
        own = vars(self) | {"codes": pack(self.unpacked(slice(0, self.shape[0])), 4)}
        del own["op_grids"]
        return QuantizedTensor(**own)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def span(weight: QuantizedTensor) -> int | None:
    """Features that are multiplied at a time, all of one group: 128, 64 or 32; None: no such."""
    n, groups = weight.shape[1], weight.scale.shape[1]
    # A single group ends where the row does; the zeros behind it belong to it too.
    size = -(-n // BLOCK) * BLOCK if groups == 1 else n // groups
    return next((s for s in SPANS if size % s == 0), None)


def fragments(weight: Quantized) -> Fragments | None:
    """The weight in the order of tensor cores, or None where it is no 4-bit grid in groups of a
    multiple of 32, in order, with scales of fp16."""
    grids = type(weight) is QuantizedTensor and weight.spec.bits == 4 and weight.g_idx is None
    if not grids or weight.scale.dtype != torch.float16 or span(weight) is None:
        return None
    (out, n), groups = weight.shape, weight.scale.shape[1]
    rows, features = -out % BLOCK, -n % BLOCK  # to be added
    q = pad(unpack(weight.codes, 4, weight.shape), (0, features, 0, rows))
    q = q.view(-1, 4, 2, 8, (n + features) // BLOCK, 4, 2, 4, 2).permute(*WORDS)
    codes = pack(q.reshape(*q.shape[:2], 8 * 512), 4).view(torch.int32)  # (tiles, blocks, 512)
    zero = -128 - weight.zero_point.half()  # exact
    pairs = [half.view(torch.int16) for half in (weight.scale, zero)]  # no floats for autocast
    op_grids = torch.stack(pairs, -1).view(torch.int32)[..., 0]  # (out, groups)
    more = 0 if groups == 1 else -(-features * groups // n)  # groups that there are not
    op_grids = pad(op_grids, (0, more, 0, rows)).view(-1, BLOCK, groups + more)
    op_grids = op_grids.transpose(1, 2).contiguous()
    return Fragments(**vars(weight) | {"codes": codes, "op_grids": op_grids})
