"""Exercises of notebook 01: a grid, groups, nibbles, the integer product, NF4 codes."""
import torch
from torch import Tensor

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


def _symmetric(row, bits):
    scale = 2 * row.abs().max() / (2**bits - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return scale, torch.tensor(float(2 ** (bits - 1)))


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
        (_symmetric, "this is the symmetric grid; the asymmetric one spans [min, max] and 0"),
    ],
    exact_dtype=False))


# --- 2. Dequantize with groups -----------------------------------------------------------

def dequantize_groups(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    grouped = q.float().unflatten(1, (scale.shape[1], -1))
    return (scale.unsqueeze(-1) * (grouped - zero_point.unsqueeze(-1))).flatten(1)


def _wide(x, q):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)  # (out, groups) -> (out, in)


def _groups_interleaved(q, scale, zero_point):
    times = q.shape[1] // scale.shape[1]
    return scale.repeat(1, times) * (q - zero_point.repeat(1, times))


def _codes(g, *shape, high=16):
    return torch.randint(0, high, shape, generator=g, dtype=torch.uint8)


def _grouped(out, groups, size, high=16):
    def make(g):
        return (_codes(g, out, groups * size, high=high), torch.rand(out, groups, generator=g),
                torch.randint(0, high, (out, groups), generator=g).float())
    return make


register(Exercise(
    name="dequantize_groups",
    reference=dequantize_groups,
    cases=[
        (_grouped(3, 2, 4), "3 rows of 2 groups of 4"),
        (_grouped(4, 4, 1), "groups of one weight"),
        (_grouped(5, 1, 8), "one group a row"),
        (_grouped(2, 3, 4), "2 rows of 3 groups of 4"),
        (_grouped(4, 2, 2), "a square matrix"),
    ],
    mistakes=[
        (lambda q, s, z: s * (q - z),
         "(out, groups) does not line up with (out, in): give each group an axis of its own, "
         "(out, groups, group_size), and scale.unsqueeze(-1)"),
        (lambda q, s, z: s[:, :1] * (q - z[:, :1]),
         "every group has its own scale and zero-point; this uses group 0's"),
        (_groups_interleaved,
         "input feature k is in group k // group_size, not k % groups"),
        (lambda q, s, z: _wide(s, q) * q - _wide(z, q),
         "subtract the zero-point from the code first, then scale"),
        (lambda q, s, z: _wide(s, q) * (q + _wide(z, q)),
         "the zero-point is subtracted: s (q - z)"),
        (lambda q, s, z: _wide(s, q) * q,
         "the zero-point is missing: s (q - z)"),
        (lambda q, s, z: dequantize_groups(q, s, z).unflatten(1, (s.shape[1], -1)),
         "the values are right; bring (out, groups, group_size) back to (out, in) with flatten(1)"),
    ],
    exact_dtype=False))


# --- 3. Unpack nibbles -------------------------------------------------------------------

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
    ],
    exact_dtype=False))


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


def _zw_not_turned(a, za, q, zw):
    a, q, za, zw = (t.int() for t in (a, q, za, zw))
    return a @ q.T - zw * a.sum(1, keepdim=True) - za * q.sum(1) + a.shape[1] * za * zw


def _product_case(tokens, n, out):
    def make(g):
        return (_codes(g, tokens, n, high=256), _codes(g, tokens, 1, high=256),
                _codes(g, out, n), _codes(g, out, 1))
    return make


register(Exercise(
    name="integer_product",
    reference=integer_product,
    cases=[
        (_product_case(2, 8, 3), "2 tokens, 8 features, 3 outputs"),
        (_product_case(3, 64, 5), "64 features"),
        (_product_case(4, 4, 4), "everything square"),
        (_product_case(1, 16, 2), "a single token"),
    ],
    mistakes=[
        (lambda *t: _terms(*t, zw_a=0, za_q=0, constant=0),
         "this is only the first of four sums; the zero-points are missing"),
        (lambda *t: _terms(*t, constant=0),
         "the fourth term is missing: + n za zw"),
        (lambda a, *t: _terms(a, *t, constant=1 / a.shape[1]).long(),
         "za zw is added once for each of the n features: + n za zw"),
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
    ],
    exact_dtype=False))


# --- 5. Nearest NF4 code -----------------------------------------------------------------

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
    ]))
