"""Exercises of notebook 12: floats of 4 bits and their scales, factors for channels, rotations."""
import torch
from torch import Tensor

from qlora_lib.quant.minifloat import decode_float, encode_float

from ..kit.exercise import Exercise, register

# --- 1. The values of E2M1 -----------------------------------------------------------------


def e2m1_values(codes: Tensor) -> Tensor:
    return decode_float(codes, "e2m1")


def _read(value=lambda e, m: torch.where(e > 0, (1 + m / 2) * 2.0 ** (e - 1), m / 2),
          sign=lambda c: 1.0 - 2.0 * (c >> 3), exponent=lambda c: c >> 1 & 3,
          mantissa=lambda c: c & 1):
    """A reader of codes with another place of a field, or another value of the fields."""
    def wrong(codes):
        c = codes.int()
        return sign(c) * value(exponent(c), mantissa(c))
    return wrong


def _codes(*values):
    return lambda g: (torch.tensor(values, dtype=torch.uint8),)


register(Exercise(
    name="e2m1_values",
    reference=e2m1_values,
    cases=[
        (_codes(2, 4, 6), "mantissa 0: powers of two"),
        (_codes(0, 1), "exponent 0: no leading 1"),
        (_codes(*range(16)), "all sixteen codes"),
        (lambda g: (torch.randint(16, (3, 8), generator=g).byte(),), "codes (3, 8)"),
    ],
    mistakes=[
        (_read(lambda e, m: (1 + m / 2) * 2.0 ** (e - 1)),
         "exponent 0 has no leading 1: its values are 0 and 0.5, or there would be no zero"),
        (_read(lambda e, m: torch.where(e > 0, (1 + m / 2) * 2.0 ** (e - 1), m / 4)),
         "exponent 0 keeps the steps of exponent 1, of 0.5"),
        (_read(lambda e, m: torch.where(e > 0, (1 + m / 2) * 2.0**e, 1.0 * m)),
         "the bias is missing: the exponent's bits, less 1, are the power of two"),
        (_read(lambda e, m: torch.where(e > 0, (1 + m) * 2.0 ** (e - 1), 1.0 * m)),
         "the mantissa's bit is worth a half: 1.0 or 1.5"),
        (_read(lambda e, m: torch.where(e > 0, (1 + m / 2) * 2.0 ** (e - 2), m / 4)),
         "this is half of it: the bias of two exponent bits is 1, not 2"),
        (_read(sign=lambda c: 1.0), "the highest bit is the sign"),
        (_read(sign=lambda c: 2.0 * (c >> 3) - 1), "sign bit 1 means minus"),
        (_read(exponent=lambda c: c & 3, mantissa=lambda c: c >> 2 & 1),
         "from the top: sign, exponent, mantissa; the mantissa is the lowest bit"),
        (lambda c: (1 - 2 * (c >> 3)) * e2m1_values(c & 7),
         "uint8 has no negative numbers: 1 - 2 * sign is 255; go on with codes.int()"),
        (lambda c: torch.where(c > 7, c.float() - 16, c.float()),
         "this reads whole numbers in two's complement; E2M1 has sign, exponent and mantissa"),
    ],
))


# --- 2. A block of MXFP4 -------------------------------------------------------------------

def encode_mx(block: Tensor) -> tuple[int, Tensor]:
    power = torch.floor(torch.log2(block.abs().max() / 7)) + 1
    codes = encode_float(block / 2**power, "e2m1")
    return int(power) + 127, codes[0::2] | codes[1::2] << 4


def _mx(power=lambda most: torch.floor(torch.log2(most / 7)) + 1, byte=lambda p: int(p) + 127,
        scaled=lambda block, p: block / 2**p, pack=lambda c: c[0::2] | c[1::2] << 4):
    """An encoder with another exponent, scale byte, direction or order of nibbles."""
    def wrong(block):
        p = power(block.abs().max())
        return byte(p), pack(encode_float(scaled(block, p), "e2m1"))
    return wrong


def _block(size: float, spread: float = 1.0):
    """32 weights whose absmax is `size`, a negative one."""
    def make(g):
        block = spread * torch.randn(32, generator=g).clamp(-2.5, 2.5)
        block[5] = -3 * spread
        return (block * size / block.abs().max(),)
    return make


register(Exercise(
    name="encode_mx",
    reference=encode_mx,
    cases=[
        (lambda g: (torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6] * 3
                                 + [-0.5, -1, -1.5, -2, -3, -4, -6, 0]),),
         "values of E2M1 themselves"),
        (_block(0.3), "weights up to 0.3"),
        (_block(100.0), "weights up to 100"),
        (_block(6.9), "the largest is 6.9: it stays, and becomes 6"),
        (_block(7.5), "the largest is 7.5: the scale becomes 2"),
        (_block(7.0), "the largest is 7: the scale becomes 2"),
    ],
    mistakes=[
        (_mx(lambda most: torch.floor(torch.log2(most)) - 2),
         "this is OCP's rule; here a block's largest weight stays below 7, not below 8"),
        (_mx(byte=int), "the byte is the exponent plus the bias of E8M0, 127"),
        (_mx(byte=lambda p: int(p) + 128), "the bias of E8M0 is 127, not 128"),
        (_mx(pack=lambda c: c[0::2] << 4 | c[1::2]),
         "the first weight goes into the low nibble, the second into the high one"),
        (_mx(pack=lambda c: c), "two codes a byte: (16,)"),
        (_mx(pack=lambda c: c[:16] | c[16:] << 4),
         "a byte holds two neighbors, not weights i and i + 16"),
        (_mx(scaled=lambda block, p: block * 2**p), "divide by the scale before rounding"),
        (_mx(scaled=lambda block, p: block), "the weights have to be divided by the scale first"),
        (_mx(lambda most: torch.floor(torch.log2(most))),
         "this brings the largest weight between 1 and 2; E2M1 reaches 6"),
        (_mx(lambda most: torch.ceil(torch.log2(most / 6))),
         "this never lets a weight exceed 6; up to 7 it is closer to 6 than to 8, and the finer "
         "scale is kept"),
        (_mx(lambda most: torch.floor(torch.log2(most / 7))),
         "this brings the largest weight between 7 and 14: the exponent is one more"),
        (lambda block: _mx(lambda _: torch.floor(torch.log2(block.max() / 7)) + 1)(block),
         "the largest |weight|: it may be a negative one"),
        (_mx(lambda most: torch.ceil(torch.log2(most / 7))),
         "a largest weight of exactly 7 still has the finer scale here; from 7 on it is the next"),
        (_mx(scaled=lambda block, p: block / block.abs().max() * 6),
         "this divides by absmax / 6, but what is stored is a power of two: divide by that"),
    ],
))


# --- 3. The two scales of NVFP4 ------------------------------------------------------------

def nv_scales(absmax: Tensor) -> tuple[Tensor, Tensor]:
    whole = 6 * 448 / absmax.max()
    return (absmax / 6 * whole).to(torch.float8_e4m3fn).float(), whole


def _nv(whole=lambda a: 6 * 448 / a.max(), scale=lambda a, t: a / 6 * t,
        stored=lambda s: s.to(torch.float8_e4m3fn).float(), told=lambda t: t):
    def wrong(absmax):
        t = whole(absmax)
        return stored(scale(absmax, t)), told(t)
    return wrong


def _absmax(out: int, blocks: int, size: float):
    return lambda g: (size * (0.3 + torch.rand(out, blocks, generator=g)),)


register(Exercise(
    name="nv_scales",
    reference=nv_scales,
    cases=[
        (lambda g: (torch.tensor([[6.0, 3.0], [1.5, 0.7]]),), "four blocks"),
        (_absmax(3, 5, 0.05), "weights up to 0.065"),
        (_absmax(4, 3, 40.0), "weights up to 52"),
    ],
    mistakes=[
        (_nv(stored=lambda s: s), "the blocks' scales are stored in E4M3: round them"),
        (_nv(whole=lambda a: 448 / a.max()),
         "the 6 is missing: the largest block's scale, absmax / 6, is to become 448"),
        (_nv(whole=lambda a: 6 / a.max()), "the 448 is missing: E4M3 reaches 448, not 1"),
        (_nv(told=lambda t: 1 / t), "this is the inverse, which NVIDIA's own files hold; here the "
                                    "scales are divided by it"),
        (_nv(scale=lambda a, t: a * t), "the 6 is missing: a block's absmax is to become level 6"),
        (_nv(scale=lambda a, t: a / 6),
         "the blocks' scales have to be multiplied by the tensor's before they are rounded"),
        (_nv(scale=lambda a, t: a / 6 / t, stored=lambda s: s.clamp(max=448).to(
            torch.float8_e4m3fn).float()), "multiply by the tensor's scale, not divide"),
        (_nv(whole=lambda a: 6 * 448 / a.amax(1, keepdim=True)),
         "one scale for the whole tensor, not one a row"),
        (_nv(whole=lambda a: 6 * 448 / a.mean()),
         "the largest absmax, not the mean: larger blocks would exceed 448"),
        (_nv(stored=torch.round), "round to values of E4M3, not to whole numbers"),
    ],
))


# --- 4. Range moved from inputs to weights -------------------------------------------------

def migrated(gain: Tensor, weight: Tensor, absmax: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = absmax**alpha / weight.abs().amax(0) ** (1 - alpha)
    return gain / s, weight * s


def _migrate(inputs=lambda x, alpha: x**alpha, weights=lambda w, alpha: w**(1 - alpha),
             largest=lambda w: w.abs().amax(0), fold=lambda g, w, s: (g / s, w * s)):
    def wrong(gain, weight, absmax, alpha):
        s = inputs(absmax, alpha) / weights(largest(weight), alpha)
        return fold(gain, weight, s)
    return wrong


def _loud(out: int, features: int, alpha: float):
    def make(g):
        absmax = 1 + torch.rand(features, generator=g)
        absmax[1] *= 30
        return (0.5 + torch.rand(features, generator=g), torch.randn(out, features, generator=g),
                absmax, alpha)
    return make


register(Exercise(
    name="migrated",
    reference=migrated,
    cases=[
        (lambda g: (torch.ones(2), torch.tensor([[1.0, 0.5], [-2.0, 0.25]]),
                    torch.tensor([2.0, 50.0]), 0.5), "two channels, the second loud"),
        (_loud(3, 5, 0.5), "three outputs, five channels"),
        (_loud(6, 4, 0.75), "alpha 0.75"),
        (_loud(5, 5, 0.25), "alpha 0.25, square"),
    ],
    mistakes=[
        (_migrate(fold=lambda g, w, s: (g * s, w / s)),
         "the wrong way round: inputs are divided by s and columns multiplied"),
        (_migrate(fold=lambda g, w, s: (g / s, w / s)),
         "both are divided; the product keeps its value only if one is multiplied"),
        (_migrate(fold=lambda g, w, s: (g, w * s)),
         "the norm's gains have to be divided by s, or the function changes"),
        (_migrate(fold=lambda g, w, s: (g / s, w)),
         "the columns have to be multiplied by s, or the function changes"),
        (_migrate(weights=lambda w, alpha: 1), "the weights' range is missing: this is x^alpha "
                                               "alone, as AWQ's factors"),
        (_migrate(weights=lambda w, alpha: w**alpha), "the weights' exponent is 1 - alpha"),
        (_migrate(lambda x, alpha: x**(1 - alpha), lambda w, alpha: w**alpha),
         "the exponents are exchanged: alpha is the inputs'"),
        (_migrate(lambda x, alpha: x, lambda w, alpha: w),
         "alpha is missing: this is max|x| / max|w|"),
        (_migrate(largest=lambda w: w.amax(0)), "the largest |w|: weights may be negative"),
        (_migrate(largest=lambda w: w.abs().mean(0)), "the largest |w| of a column, not the mean"),
        (_migrate(largest=lambda w: w.abs().max()),
         "the largest |w| of each column, not of the whole weight"),
    ],
))


# --- 5. AWQ's exponent ---------------------------------------------------------------------

def awq_exponent(weight, x, quantize, exponents) -> float:
    return _least(_awq_losses(weight, x, quantize, exponents), exponents)


def _awq_losses(weight, x, quantize, exponents, size=lambda x: x.abs().mean(0),
                factor=lambda size, e: size**e, back=lambda w, s: w / s,
                loss=lambda x, d: (x @ d.T).square().sum()):
    """What each exponent costs, with another size, factor, way back or loss."""
    losses = []
    for e in exponents:
        s = factor(size(x), e)
        losses.append(float(loss(x, back(quantize(weight * s), s) - weight)))
    return losses


def _least(losses, exponents) -> float:
    return exponents[losses.index(min(losses))]


def _awq(pick=_least, **other):
    return lambda w, x, quantize, exponents: pick(
        _awq_losses(w, x, quantize, exponents, **other), exponents)


def to_int4(weight: Tensor) -> Tensor:
    """Each row (out, in) on 15 even levels up to its absmax."""
    step = weight.abs().amax(1, keepdim=True) / 7
    return (weight / step).round() * step


def _awq_case(features: int, size: float, shrunk: float, exponents: tuple, scaled: float = 1.0):
    """Inputs whose channel 1 is `size` times as loud, and its column `shrunk` times as small."""
    def make(g):
        x = scaled * torch.randn(64, features, generator=g)
        w = torch.randn(16, features, generator=g)
        x[:, 1] *= size
        w[:, 1] /= shrunk
        return w, x, to_int4, exponents
    return make


register(Exercise(
    name="awq_exponent",
    reference=awq_exponent,
    cases=[
        (_awq_case(8, 30.0, 30.0, (0.0, 0.125, 0.5, 1.0)), "a loud channel with small weights"),
        (_awq_case(8, 1.0, 1.0, (0.0, 2.0, 4.0)), "channels alike"),
        (_awq_case(32, 200.0, 1.0, (0.0, 0.4, 1.0), 0.02), "quiet inputs, one loud channel"),
        (_awq_case(16, 16.0, 16.0, (0.0, 1.0, 3.0)), "exponents up to 3"),
    ],
    mistakes=[
        (_awq(loss=lambda x, d: d.square().sum()),
         "this is the error of the weights; AWQ looks at the outputs, x times it"),
        (_awq(back=lambda w, s: w), "divide by s again after rounding: that is what the inputs' "
                                    "division by s amounts to"),
        (_awq(factor=lambda size, e: size**-e), "columns that meet loud inputs are made larger: "
                                                "multiply by size^e"),
        (lambda w, x, q, e: _awq_losses(w, x, q, e).index(min(_awq_losses(w, x, q, e))),
         "this is the place in the list; the exponent itself is asked for"),
        (lambda w, x, q, e: min(_awq_losses(w, x, q, e)),
         "this is the least error; its exponent is asked for"),
        (_awq(pick=lambda losses, exponents: exponents[losses.index(max(losses))]),
         "this has the largest error, not the least"),
        (_awq(size=lambda x: x.abs().mean(1)), "a factor a channel: the mean over the tokens, "
                                               "dimension 0"),
        (_awq(loss=lambda x, d: (x @ d.T).sum().abs()),
         "errors of both signs cancel in this sum: square them"),
        (lambda w, x, q, e: e[0], "this is always the first exponent: without rounding nothing is "
                                  "lost, and all are alike"),
        (_awq(size=lambda x: x.abs().amax(0)), "the mean of |x| over the tokens, not the largest"),
        (_awq(size=lambda x: x.mean(0).abs()), "the mean of |x|: the mean of x is near 0 for any "
                                               "channel"),
    ],
))


# --- 6. Hadamard's matrix ------------------------------------------------------------------

def hadamard(n: int) -> Tensor:
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])  # (n, n) -> (2n, 2n)
    return h / n**0.5


def _doubled(last=lambda h: -h, off=lambda h: h, size=lambda n: n**0.5, begin=1):
    """Doubling with other signs, or another factor in the end."""
    def wrong(n):
        h = torch.ones(begin, begin)
        while len(h) < n:
            h = torch.cat([torch.cat([h, off(h)], 1), torch.cat([off(h), last(h)], 1)])
        return h / size(n)
    return wrong


register(Exercise(
    name="hadamard",
    reference=hadamard,
    cases=[(lambda g, n=n: (n,), f"n = {n}") for n in (2, 4, 1, 16)],
    mistakes=[
        (_doubled(size=lambda n: 1), "divide by the root of n, for H H^T to be the identity"),
        (_doubled(size=lambda n: n), "divide by the root of n, not by n"),
        (_doubled(size=lambda n: 2**0.5), "this divides once by the root of 2; in all it must be "
                                          "the root of n"),
        (_doubled(last=lambda h: h), "one of the four blocks has a minus, or the rows are alike"),
        (_doubled(off=lambda h: -h, last=lambda h: h),
         "the minus stands at the last block: [[H, H], [H, -H]]"),
        (_doubled(off=torch.zeros_like, last=lambda h: h),
         "this is the identity: it moves nothing between channels"),
        (lambda n: torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0)))[0],
         "orthogonal, but its entries are not of one size: double [[H, H], [H, -H]] instead"),
    ],
    rtol=1e-5, atol=1e-6,
))


# --- 7. A rotation folded into a norm and its neighbors ------------------------------------

def rotated(gain: Tensor, reads: Tensor, writes: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    return (reads * gain) @ r, r.T @ writes


def _rotate(read=lambda g, w, r: (w * g) @ r, write=lambda w, r: r.T @ w):
    return lambda gain, reads, writes, r: (read(gain, reads, r), write(writes, r))


def _turn(hidden: int, out: int, features: int):
    def make(g):
        r, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=g))
        return (0.5 + torch.rand(hidden, generator=g), torch.randn(out, hidden, generator=g),
                torch.randn(hidden, features, generator=g), r)
    return make


register(Exercise(
    name="rotated",
    reference=rotated,
    cases=[
        (lambda g: (torch.tensor([1.0, 10.0]), torch.tensor([[1.0, 0.1]]),
                    torch.tensor([[3.0], [4.0]]), torch.tensor([[0.6, 0.8], [-0.8, 0.6]])),
         "two channels, by hand"),
        (_turn(4, 3, 5), "four channels"),
        (_turn(6, 6, 6), "square weights"),
    ],
    mistakes=[
        (_rotate(read=lambda g, w, r: w @ r), "the norm's gains are missing: they go into the "
                                              "columns of the layer that reads"),
        (_rotate(read=lambda g, w, r: (w @ r) * g),
         "gains first, then the rotation: afterwards the channels are mixed"),
        (_rotate(read=lambda g, w, r: (w / g) @ r), "multiply the columns by the gains"),
        (_rotate(read=lambda g, w, r: (w * g) @ r.T),
         "the reader gets x R: it needs W R, as R R^T is the identity"),
        (_rotate(read=lambda g, w, r: w * g), "the reader is not rotated, but its input is"),
        (_rotate(lambda g, w, r: (w * g) @ r.T, lambda w, r: r @ w),
         "outputs stay, but the stream is y R^T: exchange R and R^T"),
        (_rotate(write=lambda w, r: r @ w), "y R is asked of the writer: R^T V, not R V"),
        (_rotate(write=lambda w, r: w @ r), "the writer's OUTPUTS are rotated: its rows, from the "
                                            "left"),
        (_rotate(write=lambda w, r: w), "the writer is not rotated: what it adds would not fit the "
                                        "rotated stream"),
    ],
    rtol=1e-4, atol=1e-5,
))
