"""Wrong answers to the exercises of notebook 01, as learners write them."""

import torch

from course.nb01 import exercises as nb01
from qlora_lib.quant.packing import pack, unpack
from tests.support.wrong_answers import assert_told, each


def above(threshold):
    def mine(row, bits):
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        scale = scale if scale > threshold else torch.tensor(1.0)
        return scale, (-low / scale).round()
    return mine


def four_widths(codes, bits):
    if bits == 3:
        return pack(codes, 3)
    if 8 % bits:
        raise ValueError(bits)
    many = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % many))
    parts = [codes[:, i::many] << i * bits for i in range(many)]
    return sum(parts[1:], parts[0])


def grouped(stored, clamp=True):
    """The solution of 01's last but one; `stored` makes the scale, of (high - low) / top."""
    def mine(weight, bits, group_size):
        top, w = 2**bits - 1, weight.unflatten(1, (-1, group_size))
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = stored((high - low) / top)
        zero = (-low / scale.float()).round()
        zero = zero.clamp(0, top) if clamp else zero
        codes = (w / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
        return codes.flatten(1).byte(), scale, zero.byte()
    return mine


def late_rounding(weight, bits, group_size):
    w = weight.unflatten(1, (-1, group_size))
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = torch.where(high > low, (high - low) / (2**bits - 1), 1)
    zero = (-low / scale).round()
    codes = (w / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return codes.flatten(1).byte(), scale.half(), zero.byte()


def fit_row(zero_of_zeros):
    def mine(row, bits):
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        if scale == 0:
            return torch.tensor(1.0), torch.tensor(float(zero_of_zeros(bits)))
        return scale, (-low / scale).round()
    return mine


WRONG = {
    "fit_row": [
        (fit_row(lambda bits: 2 ** (bits - 1)), "it decodes to zeros too"),
        (fit_row(lambda bits: 2**bits - 1), "it decodes to zeros too"),
        (lambda row, bits: (nb01.fit_row(row, bits)[0],
                            (-row.clamp(max=0).min() / nb01.fit_row(row, bits)[0]) // 1), "floor"),
        (above(1e-4), "takes small weights for zeros"),
        (above(1e-8), "takes small weights for zeros"),
    ],
    "unpack_nibbles": [
        (lambda p, n: torch.stack([p & 15, p >> 4], -1).reshape(p.shape[0], -1)[:, :n],
         "any number of dimensions"),
        (lambda p, n: torch.stack([p & 15, p >> 4], -1).flatten(-2)[..., -n:], "at the front"),
    ],
    "pack_bits": [
        (lambda codes, bits: (codes[:, 0::2] | codes[:, 1::2] << 4) if codes.shape[1] % 2 == 0
         else pack(codes, 4), "not always 4"),
        (four_widths, "no width needs a rule of its own"),
    ],
    "quantize_groups": [
        (late_rounding, "round the scale first"),
        (grouped(lambda scale: torch.where(scale > 0, scale, 1.0).half()), "rounds a very small"),
        (grouped(lambda scale: torch.where((s := scale.half()) > 0, s, 1.0), clamp=False),
         "the zero-point too"),
    ],
    "layer_output": [
        (lambda x, packed, scale, zero, bits: x @ (
            scale.float().repeat_interleave(x.shape[1] // scale.shape[1], 1) * unpack(
                packed, bits, (len(packed), x.shape[1]))).T, "the zero-point is missing"),
    ],
    "integer_product": [
        (lambda a, za, q, zw: (a.float() - za.float()) @ (q.float() - zw.float()).T,
         "fp32 holds every whole number only up to 2**24"),
        (lambda a, za, q, zw: torch.matmul(a.half().sub(za), q.half().sub(zw).t()),
         "fp16 holds every whole number only up to 2048"),
    ],
    "nearest_code": [
        (lambda unit, levels: (unit[..., None] - levels).abs().argmin(-1).to(torch.uint8),
         "a uint8 index is a mask"),
        (lambda unit, levels: (unit[..., None] > (levels[1:] + levels[:-1]) / 2).float().sum(-1),
         "an index is a whole number"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
