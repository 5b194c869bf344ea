"""NF4 against bitsandbytes: the same bytes, the same values."""

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lib.nf4 import NESTED_BLOCK, NF4_LEVELS, dynamic_map, quantize_nf4
from tests.helpers import normal

# (out, in): square, tall, wide, an odd number of blocks, blocks across rows, odd sizes
SHAPES = [(64, 64), (512, 512), (96, 320), (33, 192), (7, 320), (10, 100), (3, 33), (1, 63)]


def theirs(w, block_size=64, double_quant=False):
    return bnb.quantize_4bit(
        w, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def test_levels_and_map_are_the_same_bits():
    _, state = theirs(normal(64, 64), double_quant=True)
    assert torch.equal(state.code, torch.tensor(NF4_LEVELS))
    assert torch.equal(state.state2.code, dynamic_map())


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_bytes_and_absmax_are_equal(shape, block_size):
    w = normal(*shape, seed=sum(shape), std=0.02)
    codes, state = theirs(w, block_size)
    ours = quantize_nf4(w, block_size, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_bytes_of_half_precision_weights_are_equal(dtype):
    w = normal(64, 256, std=0.02).to(dtype)
    assert torch.equal(quantize_nf4(w).codes, theirs(w)[0].flatten())


def test_zero_blocks_and_large_weights_have_equal_bytes():
    w = normal(32, 128)
    w[3] = 0
    w[4] *= 1e4
    w[5] *= 1e-6
    codes, state = theirs(w)
    ours = quantize_nf4(w, double_quant=False)
    assert torch.equal(ours.codes, codes.flatten()) and torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantization_is_equal_up_to_ties(shape):
    """Ours is the nearest level. bitsandbytes' own search is approximate on a CPU: it may
    take a level that is up to 3e-5 (of a range of 1) farther away."""
    w = normal(*shape, seed=sum(shape), std=0.02)
    codes, state = theirs(w, double_quant=True)
    ours = quantize_nf4(w)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)

    nested = ours.nested_absmax.repeat_interleave(NESTED_BLOCK)[: ours.absmax.numel()]
    # A single block is its own mean: nested absmax 0, and any code decodes to 0.
    other = ((ours.absmax != state.absmax) & (nested > 0)).nonzero().flatten()
    assert other.numel() <= 0.01 * ours.absmax.numel()
    absmax = quantize_nf4(w, double_quant=False).absmax
    value = ((absmax[other] - ours.offset) / nested[other]).double()
    levels = dynamic_map().double()
    mine = (value - levels[ours.absmax[other].int()]).abs()
    his = (value - levels[state.absmax[other].int()]).abs()
    assert (mine <= his + 1e-7).all() and (his - mine < 3e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (96, 320), (33, 192)], ids=str)
def test_dequantized_values_are_equal(shape, block_size, dtype):
    """Rows made of whole blocks. Where a block crosses rows, the CPU kernel of bitsandbytes
    0.50.2 takes another block's absmax: its own error on 64 x 64 weights in blocks of 128 is
    0.29 where decoding block by block gives 0.095."""
    w = normal(*shape, seed=sum(shape), std=0.02).to(dtype)
    codes, state = theirs(w, block_size)
    ours = quantize_nf4(w, block_size, double_quant=False)
    assert torch.equal(ours.dequantize(dtype), bnb.dequantize_4bit(codes, state))


def test_dequantized_values_are_equal_under_double_quantization():
    w = normal(96, 320, std=0.02)
    codes, state = theirs(w, double_quant=True)
    ours = quantize_nf4(w)
    ours.absmax = state.absmax  # the same ties
    assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(codes, state))


def test_a_linear4bit_gives_the_same_output():
    import bitsandbytes as package

    from qlora_lib.linear import QuantizedLinear

    w, x = normal(96, 128, std=0.02), normal(5, 128, seed=1)
    theirs_layer = package.nn.Linear4bit(
        128, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4",
        compress_statistics=False,
    )
    theirs_layer.load_state_dict({"weight": w})
    theirs_layer = theirs_layer.to("cpu")  # .to() quantizes
    ours = QuantizedLinear(quantize_nf4(w, double_quant=False))
    assert (ours(x) - theirs_layer(x)).abs().max() < 1e-5
