"""Exercises of notebook 01: a grid, nibbles, NF4 codes, the integer product; then a layer from its
weights to bytes and back, in three steps."""
import torch
from torch import Tensor
from torch.nn.functional import pad

from qlora_lib.quant.nf4 import NF4_LEVELS
from ..kit.exercise import Exercise, register

LEVELS = torch.tensor(NF4_LEVELS)


# --- 1. Fit an asymmetric grid to a row --------------------------------------------------

def fit_row(row: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (low.abs() / scale).round()  # in [0, 2**bits - 1], since low <= 0 <= high


def _no_zero_in_range(row, bits):
    scale = (row.max() - row.min()) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-row.min() / scale).round().clamp(0, 2**bits - 1)


def _no_zero_unclamped(row, bits):
    scale = (row.max() - row.min()) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-row.min() / scale).round()


def _no_zero_at_all(row, bits):
    scale = (row.max() - row.min()) / (2**bits - 1)
    return scale, (-row.min() / scale).round()


def _levels_for_steps(row, bits):
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = (high - low) / 2**bits
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _zero_point_not_rounded(row, bits):
    low = row.min().clamp(max=0)
    scale = fit_row(row, bits)[0]
    return scale, -low / scale


def _zero_point_sign(row, bits):
    low = row.min().clamp(max=0)
    scale = fit_row(row, bits)[0]
    return scale, (low / scale).round()


def _scale_of_zeros_is_zero(row, bits):
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _absolute_floor(row, bits):
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-3)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def _epsilon(row, bits):
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = (high - low) / (2**bits - 1) + 1e-8
    return scale, (-low / scale).round()


def _threshold(row, bits):
    scale, zero = fit_row(row, bits)
    return (scale, zero) if scale > 1e-6 else (torch.tensor(1.0), torch.tensor(0.0))


def _scale_in_fp16(row, bits):
    scale = fit_row(row, bits)[0].half().float()
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, (-row.min().clamp(max=0) / scale).round()


def _symmetric(row, bits):
    scale = 2 * row.abs().max() / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.tensor(float(2 ** (bits - 1)))


def _zero_row_at(code):
    """The solution with another zero-point for a row of zeros; `code` is a function of bits."""
    def wrong(row, bits):
        scale, zero = fit_row(row, bits)
        return scale, zero if row.any() else torch.tensor(float(code(bits)))
    return wrong


def _floored_zero_point(row, bits):
    scale = fit_row(row, bits)[0]
    return scale, (-row.min().clamp(max=0) / scale).floor()


def _raised_zero_point(row, bits):
    scale = fit_row(row, bits)[0]
    return scale, (-row.min().clamp(max=0) / scale).ceil()


def _fifteen_steps(row, bits):
    return fit_row(row, 4)


def _from_the_mean(row, bits):
    scale = fit_row(row, bits)[0]
    return scale, (2 ** (bits - 1) - row.mean() / scale).round().clamp(0, 2**bits - 1)


def _low_as_zero_point(row, bits):
    return fit_row(row, bits)[0], row.min().clamp(max=0)


ANY_ZERO = "with scale 1 it decodes to zeros too, but asked is -low / scale, which is 0"
NO_ZERO = "0 is not in the range: move `low` down to 0 or `high` up to 0 before the scale"
register(Exercise(
    name="fit_row",
    reference=fit_row,
    cases=[
        (lambda g: (torch.randn(16, generator=g), 4), "16 weights of both signs at 4 bits"),
        (lambda g: (torch.randn(16, generator=g), 3), "the same at 3 bits"),
        (lambda g: (torch.rand(16, generator=g) + 2, 4), "all weights positive"),
        (lambda g: (-torch.rand(16, generator=g) - 2, 4), "all weights negative"),
        (lambda g: (torch.full((8,), 0.3), 4), "a constant row"),
        (lambda g: (0.002 * torch.randn(64, generator=g), 4), "tiny weights, std 0.002"),
        (lambda g: (torch.zeros(8), 4), "a row of zeros"),
        (lambda g: (1e-12 * torch.randn(16, generator=g), 4), "weights of about 1e-12"),
    ],
    mistakes=[
        (_no_zero_in_range, NO_ZERO),
        (_no_zero_unclamped, NO_ZERO + "; then the zero-point stays between 0 and 2**bits - 1"),
        (_no_zero_at_all, NO_ZERO + "; that mends the constant row too, whose scale is 0 here"),
        (_levels_for_steps, "2**bits levels have 2**bits - 1 steps between them"),
        (_zero_point_not_rounded, "the zero-point must be whole, or no code decodes to 0.0"),
        (_zero_point_sign, "w = s (q - z) and code 0 decodes to low, so z = -low / s, not low / s"),
        (_scale_of_zeros_is_zero, "a row of zeros gives scale 0 and 0 / 0; use scale 1 there"),
        (_epsilon,
         "a tiny number added to every scale keeps rows of zeros from 0 / 0, but the scale asked "
         "for there is 1"),
        (_absolute_floor, "an absolute floor on the scale coarsens small weights; only an exact "
                          "0 needs care"),
        (_threshold, "this takes small weights for zeros: only a row that is exactly 0 gets "
                     "scale 1"),
        (_scale_in_fp16, "the scale stays fp32 here; rounding it to fp16 comes later"),
        (_symmetric, "this is the symmetric grid; the asymmetric one spans [min, max] and 0"),
        (_zero_row_at(lambda bits: 2 ** (bits - 1)),
         "a row of zeros has the symmetric grid's zero-point here: " + ANY_ZERO),
        (_zero_row_at(lambda bits: 2**bits - 1),
         "a row of zeros has the last code as zero-point here, max = s (2^b - 1 - z): " + ANY_ZERO),
        (_floored_zero_point, "floor moves the zero-point down by up to a whole step: round to "
                              "the nearest code"),
        (_raised_zero_point, "ceil moves the zero-point up by up to a whole step: round to the "
                             "nearest code"),
        (_fifteen_steps, "15 steps are those of 4 bits: with `bits` bits there are 2**bits - 1"),
        (_from_the_mean, "the middle code does not go to the row's mean: code 0 goes to low, so "
                         "z = -low / s"),
        (_low_as_zero_point, "this is the lowest weight itself; the zero-point is a code: how many "
                             "steps is low below 0?"),
    ],
    atol=0,  # a scale may be as small as the weights
    exact_dtype=False))


# --- 2. Unpack nibbles -------------------------------------------------------------------

def _codes(g, *shape, high=16):
    return torch.randint(0, high, shape, generator=g, dtype=torch.uint8)


def _interleave(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=-1).flatten(-2)


def unpack_nibbles(packed: Tensor, n: int) -> Tensor:
    return _interleave(packed & 15, packed >> 4)[..., :n]


register(Exercise(
    name="unpack_nibbles",
    reference=unpack_nibbles,
    cases=[
        (lambda g: (torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4), "the bytes 0x21, 0x43"),
        (lambda g: (_codes(g, 3, 4, high=256), 8), "3 rows of 8 codes"),
        (lambda g: (_codes(g, 2, 3, high=256) & 255, 5), "5 codes a row: half a byte is padding"),
        (lambda g: (_codes(g, 6, high=256), 12), "one row, a 1-D tensor"),
        (lambda g: (_codes(g, 2, 3, 2, high=256), 3), "three dimensions, 3 codes a row"),
    ],
    mistakes=[
        (lambda p, n: _interleave(p >> 4, p & 15)[..., :n],
         "the even code sits in the low nibble; this reads the high one first"),
        (lambda p, n: _interleave(p >> 4, p & 15),
         "two things: the even code sits in the low nibble, and an odd row ends in half a byte "
         "of padding that must go"),
        (lambda p, n: _interleave(p & 15, p >> 4),
         "an odd row ends in half a byte of padding; cut to n codes"),
        (lambda p, n: torch.cat([p & 15, p >> 4], dim=-1)[..., :n],
         "codes 0 and 1 share byte 0; this puts all low nibbles before all high ones: stack on "
         "a new last axis, then flatten"),
        (lambda p, n: _interleave(p, p >> 4)[..., :n],
         "the low nibble needs its mask: packed & 15"),
        (lambda p, n: _interleave(p & 15, p & 240)[..., :n],
         "the high nibble must come down by four bits: packed >> 4"),
        (lambda p, n: _interleave(p & 15, p >> 4)[..., -n:],
         "this cuts at the front; the padding is at the end of a row: [..., :n]"),
        (lambda p, n: _interleave(p & 15, p >> 4)[..., :n - 1],
         "one too few: n codes are [..., :n]"),
        (lambda p, n: _interleave(p & 15, p >> 4).reshape(p.shape[0], -1)[:, :n],
         "right for a matrix; packed may have any number of dimensions: flatten the last two and "
         "cut with [..., :n]"),
        (lambda p, n: _interleave(p & 15, p >> 4)[:, :n],
         "right for a matrix; packed may have any number of dimensions: cut with [..., :n]"),
    ],
    exact_dtype=False))


# --- 3. Nearest NF4 code -----------------------------------------------------------------

def nearest_code(unit: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2)


register(Exercise(
    name="nearest_code",
    reference=nearest_code,
    cases=[
        (lambda g: (torch.tensor([-1.0, -0.9, -0.1, 0.0, 0.03, 0.05, 0.7, 1.0]), LEVELS),
         "eight values, -1, 0 and 1 among them"),
        (lambda g: (2 * torch.rand(4, 64, generator=g) - 1, LEVELS), "4 blocks of 64"),
        (lambda g: (2 * torch.rand(32, generator=g) - 1, torch.tensor([-1.0, -0.2, 0.0, 1.0])),
         "another table, of 4 levels"),
    ],
    mistakes=[
        (lambda unit, levels: torch.bucketize(unit, levels),
         "buckets end halfway between two levels, not at the levels: use the midpoints as "
         "boundaries"),
        (lambda unit, levels: torch.bucketize(unit, levels, right=True) - 1,
         "this takes the level below; the nearest may be the one above: use the midpoints as "
         "boundaries"),
        (lambda unit, levels: ((unit + 1) * (len(levels) - 1) / 2).round().long(),
         "the levels are not evenly spaced, so rounding can't find the nearest one"),
        (lambda unit, levels: levels[nearest_code(unit, levels)],
         "this returns the levels themselves; asked for are their indices"),
        (lambda unit, levels: nearest_code(unit, levels) + 1,
         "off by one: codes begin at 0"),
        (lambda unit, levels: (unit.unsqueeze(-1) - levels).argmin(-1),
         "a distance has no sign: take abs() before argmin"),
        (lambda unit, levels: nearest_code(unit, levels).byte(),
         "the codes will index the table of levels, and in PyTorch a uint8 index is a mask: "
         "return int64"),
        (lambda unit, levels: nearest_code(unit, levels).float(),
         "the codes will index the table of levels, and an index is a whole number: return int64"),
        (lambda unit, levels: (unit.unsqueeze(-1) - levels).abs().argmax(-1),
         "this is the level farthest away: argmin"),
        (lambda unit, levels: nearest_code(unit, levels) - 1,
         "off by one: a value below the first midpoint has code 0; bucketize counts none there"),
        (lambda unit, levels: nearest_code(unit, LEVELS),
         "the levels are an argument, not always those of NF4"),
        (lambda unit, levels: len(levels) - 1 - nearest_code(unit, levels),
         "the codes count from the largest level down; code 0 is the smallest level"),
        (lambda unit, levels: nearest_code(unit.abs(), levels),
         "the sign counts: levels are negative and positive"),
        (lambda unit, levels: torch.bucketize(unit, (levels[1:] - levels[:-1]) / 2),
         "these are half the distances of neighboring levels; their midpoints are (a + b) / 2"),
    ]))


# --- 4. Integer product ------------------------------------------------------------------

def integer_product(a: Tensor, za: Tensor, q: Tensor, zw: Tensor) -> Tensor:
    a, q, za, zw = (t.int() for t in (a, q, za, zw))
    return a @ q.T - zw.T * a.sum(1, keepdim=True) - za * q.sum(1) + a.shape[1] * za * zw.T


def _terms(a, za, q, zw, product=1, zw_a=-1, za_q=-1, constant=1):
    """The bracket with its four terms times the given factors."""
    a, q, za, zw = (t.int() for t in (a, q, za, zw))
    return (product * (a @ q.T) + zw_a * (zw.T * a.sum(1, keepdim=True))
            + za_q * (za * q.sum(1)) + constant * za * zw.T * a.shape[1])


def _sums_swapped(a, za, q, zw):
    a, q, za, zw = (t.int() for t in (a, q, za, zw))
    return a @ q.T - za * a.sum(1, keepdim=True) - zw.T * q.sum(1) + a.shape[1] * za * zw.T


def _narrow(dtype):
    """The solution in a dtype that is too narrow for the sums, or for the codes themselves."""
    def wrong(a, za, q, zw):
        a, q, za, zw = (t.to(dtype) for t in (a, q, za, zw))
        n = torch.tensor(a.shape[1]).to(dtype)
        return a @ q.T - zw.T * a.sum(1, keepdim=True, dtype=dtype) - za * q.sum(1, dtype=dtype) \
            + n * za * zw.T
    return wrong


def _zw_not_turned(a, za, q, zw):
    a, q, za, zw = (t.int() for t in (a, q, za, zw))
    return a @ q.T - zw * a.sum(1, keepdim=True) - za * q.sum(1) + a.shape[1] * za * zw


def _product_case(tokens, n, out, high=16):
    def make(g):
        return (_codes(g, tokens, n, high=256), _codes(g, tokens, 1, high=256),
                _codes(g, out, n, high=high), _codes(g, out, 1, high=high))
    return make


register(Exercise(
    name="integer_product",
    reference=integer_product,
    cases=[
        (_product_case(2, 8, 3), "2 tokens, 8 features, 3 outputs"),
        (_product_case(3, 64, 5), "64 features"),
        (_product_case(4, 4, 4), "everything square"),
        (_product_case(1, 16, 2), "a single token"),
        (_product_case(5, 11_008, 7, high=256), "11,008 features, 8 bits on both sides"),
    ],
    mistakes=[
        (lambda *t: _terms(*t, zw_a=0, za_q=0, constant=0),
         "this is only the first of four sums; the zero-points are missing"),
        (lambda *t: _terms(*t, constant=0),
         "the fourth term is missing: + n za zw"),
        (lambda a, *t: _terms(a, *t, constant=1 / a.shape[1]).long(),
         "za zw is added once for each of the n features: + n za zw"),
        (lambda a, *t: _terms(a, *t, constant=len(a) / a.shape[1]).long(),
         "n is the number of features, a.shape[1], not that of tokens"),
        (lambda a, za, q, zw: _terms(a, za, q, zw, constant=0) + a.shape[1] * za * zw.T,
         "the last term alone is still uint8 and wraps around at 256: cast za and zw too"),
        (lambda *t: _terms(*t, constant=-1),
         "minus times minus: the fourth term is added, + n za zw"),
        (lambda *t: _terms(*t, zw_a=1, za_q=1),
         "the two terms in the middle are subtracted"),
        (lambda *t: _terms(*t, za_q=0, constant=0),
         "two of the terms hold za: - za sum(q) and + n za zw"),
        (_sums_swapped,
         "crossed: zw goes with the sum of a, za with the sum of q"),
        (lambda a, za, q, zw: _terms(a, za, q, zw) - a.int() @ q.int().T + a.int() @ q.int(),
         "a is (tokens, n) and q is (out, n): the product is a @ q.T"),
        (lambda a, za, q, zw: (a - za).int() @ (q - zw).int().T,
         "uint8 minus uint8 wraps around below 0 (3 - 5 = 254); cast with .int() first"),
        (lambda a, za, q, zw: _terms(a, za, q, zw, product=0) + a @ q.T,
         "a product of uint8 stays uint8 and wraps around at 256; cast with .int() first"),
        (lambda a, za, q, zw: a @ q.T - zw.T * a.sum(1, keepdim=True) - za * q.sum(1)
         + a.shape[1] * za * zw.T,
         "a product of uint8 stays uint8 and wraps around at 256; cast all four with .int() first"),
        (_zw_not_turned, "zw is (out, 1), the result (tokens, out): use zw.T"),
        (lambda a, za, q, zw: (a.half() - za) @ (q.half() - zw).T,
         "fp16 holds every whole number only up to 2048, bf16 up to 256; cast with .int()"),
        (lambda a, za, q, zw: (a.float() - za) @ (q.float() - zw).T,
         "the bracket is a whole number, this is a float; and fp32 holds every whole number only "
         "up to 2**24, which sums over 11,008 features exceed: cast with .int() and stay there"),
        (_narrow(torch.int16), "int16 ends at 32767 and wraps around: cast with .int()"),
        (lambda a, za, q, zw: (a.to(torch.int8) - za) @ (q.to(torch.int8) - zw).T,
         "codes of uint8 reach 255, int8 ends at 127: cast with .int()"),
        (lambda *t: _terms(*t, za_q=0), "the third sum is missing: - za sum(q)"),
        (lambda *t: _terms(*t, zw_a=0), "the second sum is missing: - zw sum(a)"),
        (lambda *t: _terms(*t).T, "this is (out, tokens); the result is (tokens, out)"),
        (lambda a, za, q, zw: torch.relu(_terms(a, za, q, zw)).byte(),
         "the bracket is negative for some and far above 255 for most: return int32, not uint8"),
    ],
    exact_dtype=False))


# --- 5. A layer from its weights to bytes and back, in three steps ---------------------------

def pack_bits(codes: Tensor, bits: int) -> Tensor:
    stream = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1)  # (rows, n * bits)
    stream = pad(stream, (0, -stream.shape[1] % 8)).unflatten(1, (-1, 8))
    return (stream << torch.arange(8)).sum(-1).byte()


def _stream(codes, bits, order, last=None, padded_in_front=False):
    """The packer with other orders of a code's and a byte's bits."""
    stream = (codes.unsqueeze(-1) >> torch.arange(bits) & 1)
    stream = (stream.flip(-1) if order == "high" else stream).flatten(1)
    gap = -stream.shape[1] % 8
    stream = pad(stream, (gap, 0) if padded_in_front else (0, gap)).unflatten(1, (-1, 8))
    places = torch.arange(8).flip(0) if last == "high" else torch.arange(8)
    return (stream << places).sum(-1).byte()


def _whole_codes_a_byte(codes, bits):
    per = 8 // bits
    codes = pad(codes, (0, -codes.shape[1] % per)).unflatten(1, (-1, per))
    return (codes.long() << bits * torch.arange(per)).sum(-1).byte()


def _cut_short(codes, bits):
    return pack_bits(codes, bits)[:, :codes.shape[1] * bits // 8]


def _always_nibbles(codes, bits):
    return pack_bits(codes, 4)


def _over_rows(codes, bits):
    return pack_bits(codes.reshape(1, -1), bits).flatten()


def _one_bit_a_byte(codes, bits):
    return (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1).byte()


def _columns(codes, bits):
    return pack_bits(codes.T, bits)


def _eight_codes_wide(codes, bits):
    return pack_bits(pad(codes, (0, -codes.shape[1] % 8)), bits)


def _known_widths(codes, bits):
    if bits not in (2, 3, 4, 8):
        raise ValueError
    return pack_bits(codes, bits)


def _code_cells(rows, n, bits):
    return lambda g: (_codes(g, rows, n, high=2**bits), bits)


register(Exercise(
    name="pack_bits",
    reference=pack_bits,
    cases=[
        (lambda g: (torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 4), "codes 1 2 3 4, 4 bits"),
        (_code_cells(2, 8, 3), "8 codes of 3 bits fill 3 bytes"),
        (_code_cells(3, 5, 3), "5 codes of 3 bits: 15 bits, so one bit of padding"),
        (_code_cells(4, 7, 2), "7 codes of 2 bits"),
        (_code_cells(2, 5, 8), "8 bits: nothing to pack"),
        (_code_cells(3, 77, 4), "77 codes of 4 bits"),
        (_code_cells(2, 6, 5), "6 codes of 5 bits"),
    ],
    mistakes=[
        (lambda codes, bits: _stream(codes, bits, "high"),
         "within a code the lowest bit comes first in the stream"),
        (lambda codes, bits: _stream(codes, bits, "low", "high"),
         "bit j of the stream has the value 2**j in its byte: the first bit is the lowest"),
        (lambda codes, bits: _stream(codes, bits, "high", "high"),
         "this is the order of bitsandbytes, high bits first; asked is low bits first"),
        (lambda codes, bits: _stream(codes, bits, "low", padded_in_front=True),
         "the padding comes after the last code, not before the first"),
        (_whole_codes_a_byte, "two codes of 3 bits a byte leave two bits empty: codes may straddle "
                              "bytes, and 8 of them fill 3 bytes"),
        (_cut_short, "the last byte may be filled in part: round the number of bytes up"),
        (_always_nibbles, "`bits` is an argument, not always 4"),
        (_over_rows, "every row has bytes of its own: (rows, bytes), padding at each row's end"),
        (_one_bit_a_byte, "this is the stream of bits, one in each byte; eight of them make one"),
        (_columns, "pack along a row, not along a column"),
        (_eight_codes_wide, "pad the stream to whole bytes, not the codes to a multiple of 8"),
        (_known_widths, "any width from 1 to 8 bits: in the stream of bits no width needs a rule of "
                        "its own"),
        (lambda codes, bits: pack_bits(codes, bits).flip(1),
         "the bytes stand in the other order: code 0 begins in the first byte of its row"),
        (lambda codes, bits: codes,
         "nothing is packed here: n codes take ceil(n * bits / 8) bytes"),
    ],
    exact_dtype=True))


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return _groups(weight, bits, group_size)


def _groups(weight, bits, size, half=True, codes_from_exact=False, zero_from_exact=False,
            with_zero=True, steps=None, clamp=True, rounded=torch.round, ones_first=False,
            clamp_zero=True):
    """The solution, or it with one thing left out."""
    top = 2**bits - 1
    w = weight.unflatten(1, (-1, size))  # (out, groups, group_size)
    low, high = w.amin(-1), w.amax(-1)
    if with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    exact = (high - low) / (steps or top)
    stored = exact.half() if half else exact
    stored = torch.where(exact > 0 if ones_first else stored > 0, stored, 1.0)
    exact = torch.where(exact > 0, exact, 1.0)
    scale = exact if codes_from_exact else stored.float()
    zero = (-low / (exact if zero_from_exact else scale)).round()
    zero = zero.clamp(0, top) if clamp and clamp_zero else zero
    codes = rounded(w / scale.unsqueeze(-1) + zero.unsqueeze(-1))
    codes = codes.clamp(0, top) if clamp else codes
    return codes.flatten(1).byte(), stored, zero.byte()


def _weights(out, n, bits, size, std=0.02, add=0.0):
    return lambda g: (std * torch.randn(out, n, generator=g) + add, bits, size)


def _a_zero_group(g):
    weight = 0.02 * torch.randn(3, 64, generator=g)
    weight[1, 32:] = 0
    return weight, 4, 32


def _small_groups(g):
    weight = 0.02 * torch.randn(3, 64, generator=g)
    weight[0, :32] = -2.2e-5 * torch.linspace(0, 1, 32)  # fp16 makes the step a third smaller
    weight[2, 32:] *= 1e-6  # and this one 0
    return weight, 8, 32


def _codes_from_low(weight, bits, size):
    codes, scale, zero = _groups(weight, bits, size)
    w = weight.unflatten(1, (-1, size))
    codes = (w - w.amin(-1, True).clamp(max=0)) / scale.float().unsqueeze(-1)
    return codes.round().clamp(0, 2**bits - 1).flatten(1).byte(), scale, zero


def _grid_a_row(weight, bits, size):
    codes, scale, zero = _groups(weight, bits, weight.shape[1])
    groups = weight.shape[1] // size
    return codes, scale.expand(-1, groups), zero.expand(-1, groups)


def _grids_of_columns(weight, bits, size):
    w = weight.unflatten(1, (size, -1)).transpose(1, 2).flatten(1)  # every groups-th feature
    codes, scale, zero = _groups(w, bits, size)
    return codes.unflatten(1, (-1, size)).transpose(1, 2).flatten(1), scale, zero


def _symmetric_groups(weight, bits, size):
    w = weight.unflatten(1, (-1, size))
    scale = (2 * w.abs().amax(-1) / (2**bits - 1)).half()
    scale = torch.where(scale > 0, scale, 1)
    codes = (w / scale.float().unsqueeze(-1)).round() + 2 ** (bits - 1)
    return (codes.clamp(0, 2**bits - 1).flatten(1).byte(), scale,
            torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8))


register(Exercise(
    name="quantize_groups",
    reference=quantize_groups,
    cases=[
        (_weights(3, 64, 4, 32), "3 rows, two groups of 32, 4 bits"),
        (_weights(5, 96, 3, 32), "3 bits"),
        (_weights(8, 256, 8, 64), "8 bits, where a scale rounded too late moves codes"),
        (_weights(4, 64, 2, 16, add=0.05), "2 bits, all weights positive"),
        (_a_zero_group, "a group of zeros"),
        (_small_groups, "groups so small that fp16 rounds one scale by a third and one to 0"),
    ],
    mistakes=[
        (lambda *t: _groups(*t, codes_from_exact=True),
         "the codes belong to the exact scale; the reader of the file has the fp16 one: round the "
         "scale first, then compute zero-point and codes with it"),
        (lambda *t: _groups(*t, zero_from_exact=True),
         "the zero-point belongs to the exact scale, the codes to the fp16 one: compute both with "
         "what is stored"),
        (lambda *t: _groups(*t, ones_first=True),
         "fp16 rounds a very small scale to 0: round first, then put 1 where the scale is 0"),
        (lambda *t: _groups(*t, clamp_zero=False),
         "where fp16 rounds a small scale down, -low / s exceeds the last code, and uint8 wraps "
         "around: clamp the zero-point too"),
        (_codes_from_low, "code 0 decodes to s (0 - z), not to low, because z is rounded: the codes "
                          "are round(w / s + z)"),
        (lambda *t: _groups(*t, half=False), "the scale is stored in fp16: .half()"),
        (lambda *t: _groups(*t, with_zero=False),
         "0 is not in the range of every group: widen [low, high] to 0"),
        (lambda w, bits, size: _groups(w, bits, size, steps=2**bits),
         "2**bits levels have 2**bits - 1 steps between them"),
        (lambda w, bits, size: _groups(w, bits, size, steps=15),
         "15 steps are those of 4 bits: 2**bits - 1"),
        (lambda *t: _groups(*t, rounded=torch.floor), "floor is not the nearest code: round"),
        (lambda *t: _groups(*t, clamp=False),
         "codes at the ends can round past the last one: clamp them to [0, 2**bits - 1]"),
        (_grid_a_row, "each group has a grid of its own; this takes the row's"),
        (_grids_of_columns, "a group is a stretch of neighbors of one row: unflatten(1, (-1, "
                            "group_size))"),
        (_symmetric_groups, "this is the symmetric grid; asked is the one from low to high"),
        (lambda w, bits, size: (_groups(w, bits, size)[0].unflatten(1, (-1, size)),
                                *_groups(w, bits, size)[1:]),
         "the codes come back as (out, in): flatten the groups"),
        (lambda w, bits, size: (_groups(w, bits, size)[0].float(), *_groups(w, bits, size)[1:]),
         "codes are stored as uint8, to be packed"),
        (lambda w, bits, size: (*_groups(w, bits, size)[:2], _groups(w, bits, size)[2].float()),
         "the zero-point is a code and takes one byte: uint8"),
    ]))


def layer_output(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return _layer(x, packed, scale, zero, bits)


def _layer(x, packed, scale, zero, bits, decode=lambda q, s, z: s * (q - z), codes=None):
    """The solution, or it with another decoding or another way to read the codes."""
    n = x.shape[1]
    if codes is None:
        stream = (packed.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1)[:, :n * bits]
        codes = (stream.unflatten(1, (n, bits)) << torch.arange(bits)).sum(-1)
    q = codes.float().unflatten(1, (scale.shape[1], -1))  # (out, groups, group_size)
    w = decode(q, scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)).flatten(1)
    return x @ w.T


def _high_bits_first(x, packed, scale, zero, bits):
    stream = (packed.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1)[:, :x.shape[1] * bits]
    places = torch.arange(bits).flip(0)
    codes = (stream.unflatten(1, (-1, bits)) << places).sum(-1)
    return _layer(x, packed, scale, zero, bits, codes=codes)


def _as_nibbles(x, packed, scale, zero, bits):
    codes = unpack_nibbles(packed, x.shape[1])
    codes = pad(codes, (0, x.shape[1] - codes.shape[1]))
    return _layer(x, packed, scale, zero, bits, codes=codes)


def _row_0_s_grids(x, packed, scale, zero, bits):
    return _layer(x, packed, scale[:1].expand_as(scale), zero[:1].expand_as(zero), bits)


def _grids_in_turns(x, packed, scale, zero, bits):
    times = x.shape[1] // scale.shape[1]
    return _layer(x, packed, scale.repeat(1, times), zero.repeat(1, times), bits)


def _group_0_s_grids(x, packed, scale, zero, bits):
    return _layer(x, packed, scale[:, :1].expand_as(scale), zero[:, :1].expand_as(zero), bits)


def _layer_case(tokens, out, n, bits, size):
    def make(g):
        codes, scale, zero = quantize_groups(torch.randn(out, n, generator=g), bits, size)
        return torch.randn(tokens, n, generator=g), pack_bits(codes, bits), scale, zero, bits
    return make


def _wrapped(q, s, z):
    return s * ((q - z) % 256)


register(Exercise(
    name="layer_output",
    reference=layer_output,
    cases=[
        (_layer_case(1, 3, 32, 8, 16), "8 bits, one token"),
        (_layer_case(2, 5, 64, 4, 32), "4 bits, 2 tokens"),
        (_layer_case(3, 4, 96, 3, 32), "3 bits: codes straddle bytes"),
        (_layer_case(2, 6, 25, 3, 5), "3 bits, 25 features: padding at the end of a row"),
        (_layer_case(4, 4, 64, 2, 16), "2 bits, a square output"),
    ],
    mistakes=[
        (_high_bits_first, "within a code the first bit of the stream is the lowest"),
        (_as_nibbles, "these are nibbles; `bits` may be 2, 3 or 8: read the stream bit by bit"),
        (_row_0_s_grids, "each row has its own scales and zero-points"),
        (_group_0_s_grids, "each group has its own scale and zero-point"),
        (_grids_in_turns, "a group is a stretch of neighbors: repeat_interleave its scale, not "
                          "repeat"),
        (lambda x, packed, scale, zero, bits: _layer(
            x, packed, scale, zero, bits, lambda q, s, z: (s.half() * (q - z).half()).float()),
         "the weights were rounded to fp16: cast the scale with .float() before you multiply"),
        (lambda *t: _layer(*t, decode=lambda q, s, z: s * q), "the zero-point is missing: "
                                                              "s (q - z)"),
        (lambda *t: _layer(*t, decode=lambda q, s, z: s * q - z),
         "the zero-point is a code, so it is scaled too: s (q - z)"),
        (lambda *t: _layer(*t, decode=lambda q, s, z: s * (q + z)),
         "the zero-point is subtracted: s (q - z)"),
        (lambda *t: _layer(*t, decode=_wrapped),
         "uint8 wraps around below 0: make the codes floats before you subtract"),
        (lambda *t: _layer(*t, decode=lambda q, s, z: q - z), "the scales are not used"),
        (lambda *t: _layer(*t).T, "this is (out, tokens); a layer returns (tokens, out)"),
        (lambda x, *t: _layer(torch.eye(x.shape[1]), *t).T,
         "this is the decoded weight; multiply the inputs with it, x @ w.T"),
        (lambda *t: _layer(*t).half(), "return fp32: the inputs are fp32"),
    ],
    atol=1e-4))  # sums in another order
