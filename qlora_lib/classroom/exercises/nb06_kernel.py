"""The exercise of notebook 06 that is a Triton kernel: a product with packed groups.

`lab.launched` makes of a kernel a function of tensors. So the reference, and what kernels with
typical mistakes compute, are written in PyTorch; tests run such kernels in the interpreter.
"""
import torch

from ..checks import Exercise, register
from . import nb06
from .nb06 import packed_dot

BLOCK = 4  # rows of a program, as lab.launched has it


def _rows_from(first_byte):
    """Rows of the tile begin at these bytes; `first_byte` is a function of (rows, row_bytes)."""
    def wrong(x, codes, scale, zero):
        rows, row_bytes = codes.shape
        at = first_byte(torch.arange(rows), row_bytes)[:, None] + torch.arange(row_bytes)
        return packed_dot(x, codes.flatten()[at], scale, zero)
    return wrong


def _row_0_s_grids(x, codes, scale, zero):
    return packed_dot(x, codes, scale[:1].expand_as(scale), zero[:1].expand_as(zero))


def _first_tile(x, codes, scale, zero):
    there = torch.arange(len(codes)) < BLOCK
    return torch.where(there, packed_dot(x, codes, scale, zero), torch.nan)


def _one_group(group):
    """The codes, the inputs or the sums of one group alone; `group` cuts columns."""
    def wrong(x, codes, scale, zero):
        groups = scale.shape[1]
        parts = [t.unflatten(-1, (groups, -1))[..., group, :].flatten(-2)
                 for t in (x, codes, scale, zero)]
        return packed_dot(*parts)
    return wrong


def _halves_of_a_group(x, codes, scale, zero):
    groups = scale.shape[1]
    first, second = x.view(groups, 2, -1).unbind(1)
    return packed_dot(torch.stack([first, second], -1).flatten(), codes, scale, zero)


def _same_inputs(x, codes, scale, zero):
    groups = scale.shape[1]
    return packed_dot(x[:len(x) // groups].repeat(groups), codes, scale, zero)


def _same_bytes(x, codes, scale, zero):
    groups = scale.shape[1]
    return packed_dot(x, codes[:, :codes.shape[1] // groups].repeat(1, groups), scale, zero)


def _beyond_x(x, codes, scale, zero):
    y = packed_dot(x, codes, scale, zero)
    return y if scale.shape[1] == 1 else torch.full_like(y, torch.nan)


def _beyond_y(x, codes, scale, zero):
    if len(codes) % BLOCK:
        raise IndexError
    return packed_dot(x, codes, scale, zero)


def _nothing(x, codes, scale, zero):
    return torch.full((len(codes),), torch.nan)


register(Exercise(
    name="group_kernel",
    reference=packed_dot,
    cases=[
        (nb06.packed_case(4, 32, 1), "one tile, one group"),
        (nb06.packed_case(8, 64, 2), "two tiles, two groups"),
        (nb06.packed_case(10, 96, 3), "the last tile half outside, three groups"),
    ],
    mistakes=[
        *((wrong, message) for wrong, message in nb06.PACKED_DOT.mistakes),
        (_rows_from(lambda rows, row_bytes: 0 * rows),
         "every row reads the bytes of row 0: row r begins at byte r * row_bytes"),
        (_rows_from(lambda rows, row_bytes: rows),
         "rows lie row_bytes apart, not one byte: rows[:, None] * row_bytes"),
        (_row_0_s_grids, "all rows have the grids of row 0: those of row r are at r * groups + g"),
        (_first_tile, "NaN was never stored: the rows of a program begin at program_id * BLOCK"),
        (_one_group(slice(-1, None)), "only the last group counts: add to the total, +="),
        (_one_group(slice(0, 1)), "only the first group counts: the loop takes all `groups`"),
        (_halves_of_a_group, "byte `at` holds two neighbors, features 2 * at and 2 * at + 1, not "
                             "one of each half of the group"),
        (_same_inputs, "each group has inputs of its own: those of byte `at` are 2 * at and after"),
        (_same_bytes, "each group has bytes of its own: group g begins at byte g * HALF"),
        (_beyond_x, "inputs were read beyond the end of x: group g has the bytes from g * HALF, "
                    "byte `at` the inputs 2 * at and 2 * at + 1"),
        (_beyond_y, "the last tile sticks out: give the store its mask, rows < out"),
        (_nothing, "nothing was stored: tl.store(y + rows, total, mask=rows < out)"),
    ],
    atol=1e-4,  # sums in another order
))
