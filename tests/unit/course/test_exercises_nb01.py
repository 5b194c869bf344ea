"""The exercises of notebook 01 mean what the library does, and take any right answer.

That each typical mistake gets its own message, and that the folded solutions pass, is tested
for all exercises together.
"""
import pytest
import torch

from course.kit import check
from course.nb01 import exercises as nb01
from qlora_lib.quant.grid import (
    QuantSpec,
    fit_grid,
    quant_matmul,
    quantize_activations,
    quantize_rtn,
)
from qlora_lib.quant.nf4 import NF4_LEVELS, nf4_codes, quantize_nf4
from qlora_lib.quant.packing import pack, unpack

WEIGHT = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("row", [WEIGHT[0], WEIGHT[1].abs() + 1, -WEIGHT[2].abs() - 1,
                                 torch.zeros(8), torch.full((8,), 0.3)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fit_row_is_the_librarys_grid_up_to_the_fp16_scale(row, bits):
    scale, zero = nb01.fit_row(row, bits)
    stored, stored_zero = fit_grid(row, QuantSpec(bits, None, clip_search=False))
    assert torch.isclose(scale, stored, rtol=2**-10)
    assert (zero - stored_zero).abs() <= (bits == 8)  # a tie may fall the other way


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_of_one_s_own_is_the_librarys(bits):
    q = quantize_rtn(WEIGHT, QuantSpec(bits, 16, clip_search=False))
    codes, scale, zero = nb01.quantize_groups(WEIGHT, bits, 16)
    packed = nb01.pack_bits(codes, bits)
    assert torch.equal(packed, q.codes) and torch.equal(scale, q.scale)
    assert torch.equal(zero, q.zero_point)
    x = WEIGHT[:3]
    mine = nb01.layer_output(x, packed, scale, zero, bits)
    assert torch.allclose(mine, x @ q.dequantize().T, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_unpack_nibbles_inverts_pack(n):
    q = torch.randint(0, 16, (3, n), dtype=torch.uint8)
    assert torch.equal(nb01.unpack_nibbles(pack(q, 4), n), q)


def test_integer_product_is_that_of_quant_matmul():
    x = WEIGHT[:3]
    q = quantize_rtn(WEIGHT, QuantSpec(4, None))
    a, s, z = quantize_activations(x)
    bracket = nb01.integer_product(a.byte(), z.byte(), unpack(q.codes, 4, q.shape), q.zero_point)
    y = s * q.scale.float().T * bracket
    assert torch.allclose(y, quant_matmul(x, q), atol=1e-5)


def test_nearest_code_gives_the_librarys_nf4_codes():
    blocks = WEIGHT.view(-1, 64)
    unit = blocks / blocks.abs().amax(1, True)
    codes = nb01.nearest_code(unit, torch.tensor(NF4_LEVELS))
    assert torch.equal(codes.view(WEIGHT.shape).byte(), nf4_codes(quantize_nf4(WEIGHT, 64)))


def fit_row(row, bits):
    row = torch.cat([row, torch.zeros(1)])  # so that the range includes 0
    scale = (row.max() - row.min()) / (2**bits - 1)
    if scale == 0:
        scale = torch.tensor(1.0)
    return scale, torch.round(-row.min() / scale).int()


def unpack_nibbles(packed, n):
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.int64)
    out[..., 0::2], out[..., 1::2] = packed % 16, packed // 16
    return out[..., :n]


def pack_bits(codes, bits):
    rows = []
    for row in codes.tolist():
        number = sum(code << i * bits for i, code in enumerate(row))
        rows.append(list(number.to_bytes(-(-len(row) * bits // 8), "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def quantize_groups(weight, bits, group_size):
    codes, scales, zeros = [], [], []
    for group in weight.reshape(-1, group_size):
        scale = nb01.fit_row(group, bits)[0].half()
        scale = scale if scale > 0 else torch.tensor(1.0).half()
        zero = (-group.min().clamp(max=0) / scale.float()).round().clamp(0, 2**bits - 1)
        codes.append((group / scale.float() + zero).round().clamp(0, 2**bits - 1))
        scales.append(scale), zeros.append(zero)
    shape = len(weight), -1
    return (torch.stack(codes).view(weight.shape).to(torch.uint8),
            torch.stack(scales).view(shape), torch.stack(zeros).view(shape).to(torch.uint8))


def layer_output(x, packed, scale, zero_point, bits):
    codes = unpack(packed, bits, (len(packed), x.shape[1])).float()
    wide = x.shape[1] // scale.shape[1]
    w = torch.repeat_interleave(scale.float(), wide, 1)
    return torch.nn.functional.linear(x, w * (codes - zero_point.repeat_interleave(wide, 1)))


def integer_product(a, za, q, zw):
    return (a.long() - za.long()) @ (q.long() - zw.long()).T


def nearest_code(unit, levels):
    return (unit.unsqueeze(-1) - levels).abs().argmin(-1)


@pytest.mark.parametrize("mine", [fit_row, unpack_nibbles, integer_product, nearest_code,
                                  pack_bits, quantize_groups, layer_output],
                         ids=lambda f: f.__name__)
def test_another_right_way_passes(mine, capsys):
    assert check(mine.__name__, mine) is mine, capsys.readouterr().out
