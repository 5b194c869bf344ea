"""Bit packing against a specification that places one bit at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant.packing import BITS, as_bytes, as_words, pack, packed_width, unpack
from tests.support.tensors import PROPERTY


def codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), generator=g, dtype=torch.uint8)


def slow_pack(row: list[int], bits: int) -> list[int]:
    """Bit b of code i is bit i * bits + b of the stream; bit k is bit k % 8 of byte k // 8."""
    stream = [0] * ((len(row) * bits + 7) // 8)
    for i, code in enumerate(row):
        for b in range(bits):
            k = i * bits + b
            stream[k // 8] |= ((code >> b) & 1) << (k % 8)
    return stream


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    lead=st.sampled_from([(), (1,), (3,), (2, 3)]),
    n=st.integers(1, 97),
    seed=st.integers(0, 10**6),
)
def test_round_trip_at_any_width_and_length(bits, lead, n, seed):
    rows = int(torch.tensor(lead).prod()) if lead else 1
    q = codes(rows, n, bits, seed).reshape(*lead, n)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (*lead, -(-n * bits // 8))
    assert torch.equal(unpack(packed, bits, q.shape), q)


@PROPERTY
@given(
    bits=st.sampled_from(BITS),
    n=st.integers(1, 41),
    seed=st.integers(0, 10**6),
)
def test_bytes_equal_the_slow_specification(bits, n, seed):
    q = codes(1, n, bits, seed)
    assert pack(q, bits)[0].tolist() == slow_pack(q[0].tolist(), bits)


@pytest.mark.parametrize("bits", BITS)
def test_byte_count_is_the_smallest_possible(bits):
    for n in range(1, 100):
        assert packed_width(n, bits) == -(-n * bits // 8)
        assert pack(codes(2, n, bits), bits).numel() == 2 * packed_width(n, bits)
    # "4-bit" that is one byte a weight would be twice this
    assert pack(codes(8, 64, 4), 4).numel() * 2 == 8 * 64


def test_three_bit_codes_straddle_bytes():
    # 5 = 101b at bits 0..2, 3 = 011b at 3..5, 6 = 110b at 6..8: its top bit is in byte 1
    assert pack(torch.tensor([5, 3, 6]), 3).tolist() == [0b10011101, 0b1]


def test_four_bits_keep_the_first_code_in_the_low_nibble():
    assert pack(torch.tensor([0x1, 0xF, 0x2]), 4).tolist() == [0xF1, 0x02]


@pytest.mark.parametrize("bits", BITS)
def test_read_as_32_bit_words_it_is_the_gptq_layout(bits):
    """GPTQ checkpoints: code i sits at bit i * bits of a stream of little-endian words."""
    q = codes(3, 64, bits, seed=1)
    words = pack(q, bits).view(torch.int32).long() & 0xFFFFFFFF  # (3, 64 * bits / 32)
    for row, packed_row in zip(q.tolist(), words.tolist()):
        stream = sum(code << (i * bits) for i, code in enumerate(row))  # one big integer
        assert packed_row == [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(2 * bits)]


def test_three_bit_words_equal_the_published_straddling_code():
    """The 10-1-10-1-10 scheme of GPTQ's 3-bit kernels: codes 10 and 21 cross words."""
    q = codes(1, 32, 3, seed=2)[0].tolist()
    words = [0, 0, 0]
    for i in range(10):
        words[0] |= q[i] << (3 * i)
    words[0] |= q[10] << 30
    words[1] |= q[10] >> 2
    for i in range(10):
        words[1] |= q[11 + i] << (3 * i + 1)
    words[1] |= q[21] << 31
    words[2] |= q[21] >> 1
    for i in range(10):
        words[2] |= q[22 + i] << (3 * i + 2)
    got = pack(torch.tensor(q), 3).view(torch.int32).long() & 0xFFFFFFFF
    assert got.tolist() == [w & 0xFFFFFFFF for w in words]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool])
def test_any_integer_dtype_and_any_strides(dtype):
    q = codes(6, 10, 2).clamp(max=1).t()  # transposed: not contiguous
    assert torch.equal(pack(q.to(dtype), 2), pack(q.contiguous(), 2))


@pytest.mark.parametrize("bits", BITS)
def test_packed_bytes_of_any_strides(bits):
    q = codes(6, 24, bits)
    packed = pack(q, bits).t().contiguous().t()
    assert not packed.is_contiguous()
    got = unpack(packed, bits, q.shape)
    assert torch.equal(got, q) and got.dtype == torch.uint8
    cut = pack(q, bits)[1::2]
    assert torch.equal(unpack(cut, bits, (3, 24)), q[1::2])


@pytest.mark.parametrize("bits", BITS)
def test_no_rows_and_no_columns_are_packed_into_no_bytes(bits):
    for shape in ((0, 8), (3, 0)):
        packed = pack(torch.zeros(shape, dtype=torch.uint8), bits)
        assert packed.shape == (shape[0], packed_width(shape[1], bits))
        assert unpack(packed, bits, shape).shape == shape


def test_eight_bits_do_not_share_memory_with_the_packed_bytes():
    packed = pack(codes(2, 5, 8), 8)
    unpack(packed, 8, (2, 5)).zero_()
    assert packed.any()


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 16, None, "4"])
def test_other_widths_are_refused(bits):
    for call in (lambda: pack(codes(1, 4, 2), bits), lambda: unpack(codes(1, 4, 2), bits, (1, 4))):
        with pytest.raises(ValueError, match=rf"bits={bits!r}.*\(2, 3, 4, 8\)"):
            call()


def test_codes_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"\[0, 7\] for 3 bits, got \[2, 8\]"):
        pack(torch.tensor([2, 8]), 3)
    with pytest.raises(ValueError, match=r"got \[-1, 3\]"):
        pack(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match="integer codes, got torch.float32"):
        pack(torch.tensor([1.0]), 4)


def test_bytes_that_disagree_with_the_shape_are_refused():
    packed = pack(codes(2, 12, 4), 4)  # (2, 6) bytes
    for shape in [(2, 10), (2, 13), (3, 12), (12,)]:
        with pytest.raises(ValueError, match=r"take uint8 bytes .* got torch.uint8 \(2, 6"):
            unpack(packed, 4, shape)
    with pytest.raises(ValueError, match="got torch.int32"):
        unpack(packed.int(), 4, (2, 12))


@pytest.mark.parametrize("rows", [1, 3])
def test_words_and_bytes_are_two_readings_of_one_stream(rows):
    packed = pack(codes(64, rows, 8).t(), 8)  # (rows, 64), whose strides are arbitrary for 1 row
    words = as_words(packed)
    assert words.shape == (rows, 16) and words.dtype == torch.int32
    first = int.from_bytes(bytes(packed[0, :4].tolist()), "little", signed=True)
    assert int(words[0, 0]) == first
    assert torch.equal(as_bytes(words), packed)
    assert torch.equal(as_bytes(words.t().contiguous().t()), packed)
    for shape in ((64,), (64 * rows,), (rows, 2, 32)):
        bytes_ = packed[0] if shape == (64,) else packed.reshape(shape)
        assert torch.equal(as_bytes(as_words(bytes_)), bytes_)


def test_what_is_no_stream_of_words_is_refused():
    with pytest.raises(ValueError, match=r"multiple of 4 in a row, got torch.uint8 \(2, 6\)"):
        as_words(pack(codes(2, 12, 4), 4))
    with pytest.raises(ValueError, match="uint8 bytes.* got torch.int32"):
        as_words(torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="words are int32, got torch.uint8"):
        as_bytes(torch.zeros(2, 4, dtype=torch.uint8))
