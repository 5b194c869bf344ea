"""Exercises of notebook 06: roofline, tiles with masks, a product with packed codes in PyTorch and
as a kernel, a cache."""
import torch

from ..kit.exercise import Exercise, register

# -- roofline -----------------------------------------------------------------------------------


def roofline(tokens, out_features, in_features, bits, flops, bandwidth):
    work = 2 * tokens * out_features * in_features
    moved = out_features * in_features * bits / 8 + 2 * tokens * (in_features + out_features)
    return max(work / flops, moved / bandwidth)


def _bytes(tokens, out, n, bits):
    return out * n * bits / 8 + 2 * tokens * (n + out)


def _other(work=lambda tokens, out, n: 2 * tokens * out * n, moved=_bytes, of=max):
    """The roofline with other operations, other bytes, or another choice of the two times."""
    def wrong(tokens, out, n, bits, flops, bandwidth):
        return of(work(tokens, out, n) / flops, moved(tokens, out, n, bits) / bandwidth)
    return wrong


def _rate(tokens, out, n, bits, flops, bandwidth):
    work = 2 * tokens * out * n
    return min(flops, work / _bytes(tokens, out, n, bits) * bandwidth)


register(Exercise(
    name="roofline",
    reference=roofline,
    cases=[
        (lambda g: (1, 1000, 1000, 16, 1e12, 1e11), "one token, bound by memory"),
        (lambda g: (1, 500, 2000, 4, 1e12, 1e11), "one token, 4 bits"),
        (lambda g: (512, 1000, 1000, 16, 1e12, 1e11), "many tokens, bound by arithmetic"),
        (lambda g: (16, 256, 1024, 4, 1e14, 1e11), "activations that are no trifle"),
        (lambda g: (8, 4096, 4096, 8, 9.9e14, 3.3e12), "a GPU's ceilings"),
        (lambda g: (4, 512, 256, 16, 1e10, 1e11), "slow arithmetic"),
    ],
    mistakes=[
        (_other(lambda tokens, out, n: tokens * out * n),
         "a product takes two operations for each weight and token, a multiplication and an "
         "addition"),
        (_other(lambda tokens, out, n: 2 * out * n),
         "each weight is multiplied with every token: 2 * tokens operations a weight"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits + 2 * tokens * (n + out)),
         "the ceiling counts bytes: divide the bits of the weight by 8"),
        (_other(moved=lambda tokens, out, n, bits: out * n * (bits // 8) + 2 * tokens * (n + out)),
         "bits // 8 is 0 for 4 bits: divide with /"),
        (_other(moved=lambda tokens, out, n, bits: 2 * out * n + 2 * tokens * (n + out)),
         "2 bytes a number are for inputs and outputs; a weight takes bits / 8"),
        (_other(of=min), "both must be done: the slower of the two decides, not the faster"),
        (_other(of=lambda arithmetic, reading: arithmetic + reading),
         "while some numbers are multiplied the next are read: take the larger of the two times, "
         "not their sum"),
        (_other(of=lambda arithmetic, reading: arithmetic),
         "this is the arithmetic's time alone: with few tokens reading takes longer"),
        (_other(of=lambda arithmetic, reading: reading),
         "this is the reading's time alone: with many tokens arithmetic takes longer"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits / 8),
         "inputs are read and outputs are written too, two bytes a number"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits / 8 + 2 * tokens * n),
         "the outputs, tokens * out_features of them, are moved too"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits / 8 + 2 * tokens * out),
         "the inputs, tokens * in_features of them, are moved too"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits / 8 + 2 * (n + out)),
         "each token has its own input and output: multiply by tokens"),
        (_other(moved=lambda tokens, out, n, bits: (out * n + tokens * (n + out)) * bits / 8),
         "only the weight is packed: inputs and outputs take 2 bytes a number at any `bits`"),
        (_other(moved=lambda tokens, out, n, bits: tokens * out * n * bits / 8
                + 2 * tokens * (n + out)),
         "the weight is read once for all tokens: that is why a batch is cheap"),
        (lambda tokens, out, n, bits, flops, bandwidth:
         roofline(tokens, out, n, bits, bandwidth, flops),
         "the ceilings are swapped: operations are divided by flops, bytes by bandwidth"),
        (_other(moved=lambda tokens, out, n, bits: out * n * bits / 8 + tokens * (n + out)),
         "inputs and outputs take 2 bytes a number, not one"),
        (lambda tokens, out, n, bits, flops, bandwidth:
         2 * tokens * out * n / _bytes(tokens, out, n, bits),
         "this is the intensity, operations a byte; asked is the time"),
        (_rate, "this is the attainable rate in operations a second; asked is the time"),
    ],
    atol=0,  # times are micro- and milliseconds
))

# -- tile_offsets -------------------------------------------------------------------------------


def tile_offsets(program, block, size):
    offsets = program * block + torch.arange(block)
    return offsets, offsets < size


def _next_to_each_other(program, block, size):
    offsets = program + torch.arange(block)
    return offsets, offsets < size


def _from_zero(program, block, size):
    offsets = torch.arange(block)
    return offsets, offsets < size


def _one_too_many(program, block, size):
    offsets = program * block + torch.arange(block)
    return offsets, offsets <= size


def _all_inside(program, block, size):
    offsets = program * block + torch.arange(block)
    return offsets, torch.ones(block, dtype=torch.bool)


def _shorter(program, block, size):
    offsets = torch.arange(program * block, min((program + 1) * block, size))
    return offsets, offsets < size


def _cut_by_the_mask(program, block, size):
    offsets, mask = tile_offsets(program, block, size)
    return offsets[mask], mask


def _clamped(program, block, size):
    offsets = (program * block + torch.arange(block)).clamp(max=size - 1)
    return offsets, offsets < size


def _counted_from_one(program, block, size):
    offsets = (program - 1) * block + torch.arange(block)
    return offsets, offsets < size


register(Exercise(
    name="tile_offsets",
    reference=tile_offsets,
    cases=[
        (lambda g: (0, 4, 12), "the first tile"),
        (lambda g: (2, 4, 12), "the last tile, full"),
        (lambda g: (2, 4, 10), "the last tile, half outside"),
        (lambda g: (0, 8, 3), "a tile larger than the matrix"),
        (lambda g: (3, 4, 12), "a tile beyond the end"),
    ],
    mistakes=[
        (_next_to_each_other, "tiles would overlap: program 1 begins where program 0's block ends, "
                              "at program * block"),
        (_from_zero, "every program would work on the first tile: add program * block"),
        (_one_too_many, "the last index is size - 1: the mask is offsets < size"),
        (_all_inside, "offsets beyond the end are read all the same: mask them"),
        (_shorter, "a tile always has `block` offsets, on a GPU its shape is compiled in; what "
                   "lies outside is masked, not cut"),
        (_clamped, "clamped offsets stay inside, but count the last row several times: mask "
                   "them instead"),
        (_counted_from_one, "programs are numbered from 0"),
        (lambda program, block, size: (tile_offsets(program, block, size)[0],
                                       ~tile_offsets(program, block, size)[1]),
         "the mask is upside down: True is what lies inside"),
        (lambda program, block, size: tile_offsets(program, block, size)[::-1],
         "right values in the other order: offsets first, then the mask"),
        (lambda program, block, size: (tile_offsets(program, block, size)[0],
                                       torch.arange(block) < size),
         "the mask compares places within the tile; compare the offsets with size"),
        (lambda program, block, size: (program + block * torch.arange(block),
                                       program + block * torch.arange(block) < size),
         "a tile's rows are neighbors: program * block + 0, 1, 2, ..., not `block` apart"),
        (_cut_by_the_mask, "the mask goes beside the offsets, it does not cut them: a tile always "
                           "has `block` of them"),
    ],
))

# -- packed_dot ---------------------------------------------------------------------------------


def packed_dot(x, codes, scale, zero):
    groups = scale.shape[1]
    low, high = (codes & 15).float(), (codes >> 4).float()
    even, odd = x[0::2], x[1::2]
    products = low * even + high * odd  # (rows, n / 2)
    sums = products.unflatten(1, (groups, -1)).sum(2)  # (rows, groups)
    return (scale * (sums - zero * x.view(groups, -1).sum(1))).sum(1)


def _by_the_book(x, q, scale, zero, decode):
    groups = scale.shape[1]
    w = decode(q.float().unflatten(1, (groups, -1)), scale[..., None], zero[..., None])
    return w.flatten(1) @ x


def _codes_of(codes, first, second):
    return torch.stack([first(codes), second(codes)], 2).flatten(1)


def _right(codes):
    return _codes_of(codes, lambda c: c & 15, lambda c: c >> 4)


def _high_first(x, codes, scale, zero):
    q = _codes_of(codes, lambda c: c >> 4, lambda c: c & 15)
    return _by_the_book(x, q, scale, zero, lambda q, s, z: s * (q - z))


def _halves(x, codes, scale, zero):
    q = torch.cat([codes & 15, codes >> 4], 1)
    return _by_the_book(x, q, scale, zero, lambda q, s, z: s * (q - z))


def _no_zero(x, codes, scale, zero):
    return _by_the_book(x, _right(codes), scale, zero, lambda q, s, z: s * q)


def _zero_unscaled(x, codes, scale, zero):
    return _by_the_book(x, _right(codes), scale, zero, lambda q, s, z: s * q - z)


def _first_grid(x, codes, scale, zero):
    first = torch.zeros_like(scale)
    return _by_the_book(x, _right(codes), scale[:, :1] + first, zero[:, :1] + first,
                        lambda q, s, z: s * (q - z))


def _corrected(inputs):
    """The solution with another correction; `inputs` is a function of x (groups, size)."""
    def wrong(x, codes, scale, zero):
        parts = x.view(scale.shape[1], -1)
        sums = (_right(codes).float() * x).unflatten(1, (scale.shape[1], -1)).sum(2)
        return (scale * (sums - zero * inputs(parts))).sum(1)
    return wrong


def _grids_in_turns(x, codes, scale, zero):
    times = len(x) // scale.shape[1]
    return (scale.repeat(1, times) * (_right(codes) - zero.repeat(1, times))) @ x


def packed_case(rows, n, groups):
    def make(g):
        codes = torch.randint(0, 256, (rows, n // 2), generator=g, dtype=torch.uint8)
        scale = torch.rand(rows, groups, generator=g) / 10 + 0.01
        zero = torch.randint(4, 12, (rows, groups), generator=g).float()
        return torch.randn(n, generator=g), codes, scale, zero

    return make


PACKED_DOT = register(Exercise(
    name="packed_dot",
    reference=packed_dot,
    cases=[
        (packed_case(1, 4, 1), "one row, one group"),
        (packed_case(3, 8, 1), "several rows"),
        (packed_case(2, 16, 4), "several groups"),
        (packed_case(5, 64, 2), "more of everything"),
    ],
    mistakes=[
        (_high_first, "the low nibble (codes & 15) is the even feature, the high one the odd "
                      "feature after it"),
        (_halves, "low nibbles are features 0, 2, 4, ..., not the first half: they meet x[0::2]"),
        (_no_zero, "a code stands for scale * (code - zero): where is the zero-point?"),
        (_corrected(lambda parts: 1),
         "each input has the zero-point taken off its own code: together that is zero times the "
         "SUM of the group's inputs"),
        (_zero_unscaled, "the zero-point is a code, so it is scaled too: scale * (code - zero)"),
        (_first_grid, "every group has its own scale and zero-point"),
        (_corrected(lambda parts: parts.sum()),
         "a group's correction takes the inputs of that group alone"),
        (_corrected(lambda parts: parts[:, 0::2].sum(1)),
         "the correction takes ALL inputs of the group, those of the high nibbles too"),
        (_corrected(lambda parts: parts.mean(1)), "the correction takes the SUM of the group's "
                                                  "inputs, not their mean"),
        (_corrected(lambda parts: -parts.sum(1)), "the zero-point is taken off: code - zero"),
        (_grids_in_turns, "a group is a stretch of neighbors: repeat_interleave its scale, not "
                          "repeat"),
        (lambda x, codes, scale, zero: _by_the_book(x, _right(codes), scale, zero,
                                                    lambda q, s, z: s * ((q - z) % 256)),
         "codes are uint8 and wrap around below 0: make them floats before you subtract"),
        (lambda x, codes, scale, zero: _by_the_book(
            x, _codes_of(codes, lambda c: c & 15, lambda c: c & 240), scale, zero,
            lambda q, s, z: s * (q - z)),
         "the high nibble must be moved down by 4 bits: codes >> 4"),
        (lambda x, codes, scale, zero: _by_the_book(x, _right(codes), scale, zero,
                                                    lambda q, s, z: q - z),
         "the scales are not used"),
    ],
    atol=1e-4,  # sums in another order
))

# -- cache_size ---------------------------------------------------------------------------------


def cache_size(layers, kv_heads, head_dim, tokens, bits, group_size, recent):
    stored = max(0, tokens - recent) // group_size * group_size
    numbers = 2 * layers * kv_heads * head_dim
    old = numbers * stored * bits // 8 + numbers * stored // group_size * 4
    return old + numbers * (tokens - stored) * 2


def _whole(tokens, group_size, recent):
    return max(0, tokens - recent) // group_size * group_size


def _size(layers, kv_heads, head_dim, tokens, bits, group_size, recent, *, pair=2, extra=4,
          stored=_whole, unit=8, kept=2, scales=None):
    old = stored(tokens, group_size, recent)
    numbers = pair * layers * kv_heads * head_dim
    groups = numbers * old // group_size if scales is None else scales(numbers, old)
    return numbers * old * bits // unit + groups * extra + numbers * (tokens - old) * kept


def _variant(**how):
    return lambda *arguments: _size(*arguments, **how)


def _all_old(layers, kv_heads, head_dim, tokens, bits, group_size, recent):
    numbers = 2 * layers * kv_heads * head_dim * tokens
    return numbers * bits // 8 + numbers // group_size * 4


def _no_recent_bytes(layers, kv_heads, head_dim, tokens, bits, group_size, recent):
    stored = max(0, tokens - recent) // group_size * group_size
    numbers = 2 * layers * kv_heads * head_dim * stored
    return numbers * bits // 8 + numbers // group_size * 4


register(Exercise(
    name="cache_size",
    reference=cache_size,
    cases=[
        (lambda g: (1, 1, 32, 32, 8, 32, 0), "one group a channel"),
        (lambda g: (2, 3, 64, 96, 4, 32, 32), "a recent window"),
        (lambda g: (2, 2, 64, 120, 4, 32, 0), "a group that is not whole yet"),
        (lambda g: (4, 2, 64, 20, 4, 32, 32), "nothing old"),
        (lambda g: (4, 2, 64, 20, 4, 32, 64), "a window longer than the text"),
        (lambda g: (2, 2, 64, 150, 4, 32, 20), "a recent window of 20, groups of 32"),
        (lambda g: (2, 2, 64, 170, 2, 16, 20), "groups of 16, 2 bits"),
        (lambda g: (32, 32, 128, 4096, 4, 32, 128), "LLaMA-2-7B at 4k"),
    ],
    mistakes=[
        (_variant(pair=1), "keys AND values are kept"),
        (_variant(extra=0), "each group also keeps a scale and a lowest value, 2 bytes each"),
        (_variant(extra=2), "a group keeps two fp16 numbers, a scale and a lowest value: 4 bytes"),
        (_variant(unit=1), "the codes are counted in bits: 8 bits are a byte"),
        (_variant(unit=1, extra=32, kept=16), "bytes are asked, not bits: divide by 8"),
        (_variant(kept=4), "what stays as it came takes 2 bytes a number"),
        (_variant(stored=lambda tokens, size, recent: tokens // size * size),
         "the newest `recent` tokens stay in 16 bits: take them off before you round down"),
        (_variant(stored=lambda tokens, size, recent: max(0, tokens // size * size - recent)),
         "first take off the recent tokens, then round down to whole groups; the other order "
         "leaves no whole groups"),
        (_variant(stored=lambda tokens, size, recent: (tokens - recent) // size * size),
         "with fewer tokens than `recent` nothing is stored, not a negative number: max(0, ...)"),
        (_variant(stored=lambda tokens, size, recent: -(-max(0, tokens - recent) // size) * size),
         "a group that is not whole yet is not stored: round down"),
        (_variant(stored=lambda tokens, size, recent: round(max(0, tokens - recent) / size) * size),
         "a group that is not whole yet is not stored: round down, not to the nearest"),
        (_variant(scales=lambda numbers, old: numbers * old),
         "a scale and a lowest value belong to a GROUP of numbers, not to each"),
        (_variant(scales=lambda numbers, old: old),
         "a token has many groups: one for every `group_size` of its numbers"),
        (_variant(stored=lambda tokens, size, recent: max(0, tokens - recent)),
         "only whole groups of tokens are stored as codes; the rest stays in 16 bits"),
        (_variant(stored=lambda tokens, size, recent:
                  max(0, tokens - -(-recent // size) * size) // size * size),
         "the recent window is as long as it is: only what is older is cut to whole groups"),
        (lambda layers, heads, dim, tokens, bits, group_size, recent:
         cache_size(layers, heads, dim, tokens, bits, group_size, 32),
         "the recent window is an argument, not always 32"),
        (lambda layers, heads, dim, tokens, bits, group_size, recent:
         cache_size(layers, heads, dim, tokens, 4, group_size, recent),
         "the number of bits is an argument, not always 4"),
        (_variant(extra=3), "both numbers of a group are fp16 here: 4 bytes, not 3"),
        (lambda layers, heads, dim, tokens, bits, group_size, recent:
         cache_size(layers, heads, dim, tokens, bits, 32, recent),
         "the group size is an argument, not always 32"),
        (_variant(scales=lambda numbers, old: numbers * old // 32),
         "scales follow the group size too: 4 bytes for every `group_size` numbers"),
        (_all_old, "the recent tokens, and those of a group that is not whole, stay in 16 bits"),
        (_no_recent_bytes, "tokens that stay in 16 bits take bytes too"),
    ],
))

# -- the Triton kernel: a product with packed groups ---------------------------------------------

# `triton_or_stub.launched` makes of a kernel a function of tensors. So the reference, and what
# kernels with typical mistakes compute, are written in PyTorch; tests run such kernels in the
# interpreter.


class ReadBeyond(IndexError):
    """A kernel reads what is not of its tensors."""


class StoredBeyond(IndexError):
    """A kernel stores beyond its result."""


def block_for(rows: int) -> int:
    """Rows of a program in the checks: 2, 4 or 8, so that no kernel can rely on one of them."""
    return 2 if rows < 8 else 4 if rows < 16 else 8



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
    there = torch.arange(len(codes)) < block_for(len(codes))
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
    if scale.shape[1] > 1:
        raise ReadBeyond
    return packed_dot(x, codes, scale, zero)


def _sticks_out(kind):
    """Right where the last tile is full, else this error."""
    def wrong(*arguments):
        codes = arguments[-3]
        if len(codes) % block_for(len(codes)):
            raise kind
        return packed_dot(*arguments) if len(arguments) == 4 else decode(*arguments)
    return wrong


def _sixteen_bytes(x, codes, scale, zero):
    """16 where HALF belongs: only the first 16 bytes of a group count."""
    groups = scale.shape[1]
    parts = codes.unflatten(1, (groups, -1))[..., :16].flatten(1)
    return packed_dot(x.view(groups, -1)[:, :32].flatten(), parts, scale, zero)


def _last_scale(x, codes, scale, zero):
    """Each group's sum, all times the scale of the last one: it is multiplied after the loop."""
    ones = torch.ones_like(scale)
    return scale[:, -1] * packed_dot(x, codes, ones, zero)


def _four_rows(x, codes, scale, zero):
    """4 where BLOCK belongs: of larger tiles the other rows are not stored."""
    y = packed_dot(x, codes, scale, zero)
    y[torch.arange(len(y)) % block_for(len(y)) >= 4] = torch.nan
    return y


def _nothing(x, codes, scale, zero):
    return torch.full((len(codes),), torch.nan)


# -- a kernel that decodes ------------------------------------------------------------------------


def decode(codes, scale, zero):
    size = 2 * codes.shape[1] // scale.shape[1]
    wide_scale, wide_zero = (t.repeat_interleave(size, 1) for t in (scale, zero))
    return wide_scale * (_right(codes).float() - wide_zero)


def _decoded(first=lambda c: c & 15, second=lambda c: c >> 4, of=lambda q, s, z: s * (q - z)):
    """The decoder, or it with other nibbles or another formula."""
    def wrong(codes, scale, zero):
        size = 2 * codes.shape[1] // scale.shape[1]
        q = _codes_of(codes, first, second).float()
        return of(q, scale.repeat_interleave(size, 1), zero.repeat_interleave(size, 1))
    return wrong


def _in_halves(codes, scale, zero):
    w = decode(codes, scale, zero).unflatten(1, (scale.shape[1], -1))
    return torch.cat([w[..., 0::2], w[..., 1::2]], -1).flatten(1)


def _only_even(codes, scale, zero):
    w = decode(codes, scale, zero)
    w[:, 1::2] = torch.nan
    return w


def _first_group(codes, scale, zero):
    w = decode(codes, scale, zero)
    w[:, w.shape[1] // scale.shape[1]:] = torch.nan
    return w


def _first_rows(codes, scale, zero):
    w = decode(codes, scale, zero)
    w[block_for(len(codes)):] = torch.nan
    return w


def _grids_of(row, group):
    """The decoder with the grids of row 0, or of group 0."""
    def wrong(codes, scale, zero):
        pick = slice(None, 1) if row else slice(None), slice(None, 1) if group else slice(None)
        return decode(codes, *(t[pick].expand_as(scale) for t in (scale, zero)))
    return wrong


def _bytes_of_row_0(codes, scale, zero):
    return decode(codes[:1].expand_as(codes), scale, zero)


def decode_case(rows, n, groups):
    make = packed_case(rows, n, groups)
    return lambda g: make(g)[1:]


register(Exercise(
    name="decode_kernel",
    reference=decode,
    cases=[
        (decode_case(4, 32, 1), "two tiles of 2 rows, one group of 32"),
        (decode_case(8, 128, 2), "two tiles of 4 rows, groups of 64"),
        (decode_case(10, 96, 3), "the last tile of 4 half outside, three groups of 32"),
        (decode_case(17, 128, 4), "tiles of 8, one row in the last"),
    ],
    mistakes=[
        (_decoded(lambda c: c >> 4, lambda c: c & 15),
         "the low nibble (tile & 15) is the even feature, the high one the odd feature after it"),
        (_decoded(of=lambda q, s, z: s * q), "the zero-point is missing: s * (code - z)"),
        (_decoded(of=lambda q, s, z: q - z), "the scale is missing: s * (code - z)"),
        (_decoded(of=lambda q, s, z: s * q - z), "the zero-point is scaled too: s * (code - z)"),
        (_decoded(of=lambda q, s, z: s * (q + z)), "the zero-point is subtracted"),
        (_decoded(of=lambda q, s, z: s * ((q - z) % 256)),
         "codes are uint8 and wrap around below 0: .to(tl.float32) before you subtract"),
        (_decoded(second=lambda c: c & 240), "the high nibble must be moved down: tile >> 4"),
        (_decoded(second=lambda c: c & 15), "the second store is the high nibble: tile >> 4"),
        (_in_halves, "byte `at` becomes the features 2 * at and 2 * at + 1, which are neighbors"),
        (_only_even, "NaN was never stored: each byte has two codes, so there are two stores"),
        (_first_group, "NaN was never stored: the group is tl.program_id(1), and its bytes begin "
                       "at g * HALF"),
        (_first_rows, "NaN was never stored: the rows begin at tl.program_id(0) * BLOCK"),
        (_grids_of(True, False), "every row has grids of its own: rows * groups + g"),
        (_grids_of(False, True), "every group has its own grid: rows * groups + g"),
        (_bytes_of_row_0, "every row has bytes of its own: rows[:, None] * row_bytes"),
        (_sticks_out(ReadBeyond), "the last tile sticks out: every load needs its mask, "
                                  "rows < out"),
        (_sticks_out(StoredBeyond), "the last tile sticks out: both stores need the mask "
                                    "(rows < out)[:, None]"),
        (lambda codes, scale, zero: torch.full((len(codes), 2 * codes.shape[1]), torch.nan),
         "nothing was stored"),
    ],
    atol=1e-5,
))

register(Exercise(
    name="group_kernel",
    reference=packed_dot,
    cases=[
        (packed_case(4, 32, 1), "two tiles of 2 rows, one group of 32"),
        (packed_case(8, 128, 2), "two tiles of 4 rows, groups of 64"),
        (packed_case(10, 96, 3), "the last tile of 4 half outside, three groups of 32"),
        (packed_case(17, 128, 4), "tiles of 8, one row in the last"),
        (packed_case(16, 256, 2), "two tiles of 8, groups of 128"),
    ],
    mistakes=[
        *((wrong, message) for wrong, message in PACKED_DOT.mistakes),
        (_rows_from(lambda rows, row_bytes: 0 * rows),
         "every row reads the bytes of row 0: row r begins at byte r * row_bytes"),
        (_rows_from(lambda rows, row_bytes: rows),
         "rows lie row_bytes apart, not one byte: rows[:, None] * row_bytes"),
        (_row_0_s_grids, "all rows have the grids of row 0: those of row r are at r * groups + g"),
        (_first_tile, "NaN was never stored: the rows of a program begin at program_id * BLOCK"),
        (_last_scale, "the last group's scale multiplies all: scales differ from group to group, so "
                      "multiply inside the loop"),
        (_one_group(slice(-1, None)), "only the last group counts: add to the total, +="),
        (_one_group(slice(0, 1)), "only the first group counts: the loop takes all `groups`"),
        (_halves_of_a_group, "byte `at` holds two neighbors, features 2 * at and 2 * at + 1, not "
                             "one of each half of the group"),
        (_same_inputs, "each group has inputs of its own: those of byte `at` are 2 * at and after"),
        (_same_bytes, "each group has bytes of its own: group g begins at byte g * HALF"),
        (_beyond_x, "inputs were read beyond the end of x: group g has the bytes from g * HALF, "
                    "byte `at` the inputs 2 * at and 2 * at + 1"),
        (_sticks_out(ReadBeyond), "the last tile sticks out: every load that has rows in its "
                                  "address needs the mask rows < out, the codes' as a column, "
                                  "(rows < out)[:, None]"),
        (_sticks_out(StoredBeyond), "the last tile sticks out: give the store its mask, "
                                    "rows < out"),
        (_sixteen_bytes, "a group has HALF bytes, not always 16: tl.arange(0, HALF)"),
        (_four_rows, "NaN was never stored: a tile has BLOCK rows, not always 4"),
        (_nothing, "nothing was stored: tl.store(y + rows, total, mask=rows < out)"),
    ],
    atol=1e-4,  # sums in another order
))
