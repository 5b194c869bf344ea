"""Bit packing: codes of 2, 3, 4 or 8 bits in a stream of bytes.

The stream is little-endian: code i of a row sits at bit offset i * bits. Read as
32-bit words it is the layout of GPTQ checkpoints; 3-bit codes straddle bytes.
"""

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)


def check_bits(bits: int) -> None:
    if bits not in BITS or not isinstance(bits, int):  # 4.0 is in them
        raise ValueError(f"bits={bits!r} is not supported; choose one of {BITS}")


def packed_width(n: int, bits: int) -> int:
    """Bytes that hold n codes of the given width."""
    return (n * bits + 7) // 8


def pack(q: Tensor, bits: int) -> Tensor:
    """Integer codes (..., n), packed along the last axis: uint8 (..., ceil(n * bits / 8)). Raises
    ValueError for another width, for floats, and for codes outside [0, 2**bits - 1]."""
    check_bits(bits)
    if q.is_floating_point():
        raise ValueError(f"pack takes integer codes, got {q.dtype}; round and cast first")
    if q.numel() and (q.min() < 0 or q.max() > 2**bits - 1):
        got = [int(q.min()), int(q.max())]
        raise ValueError(f"codes must lie in [0, {2**bits - 1}] for {bits} bits, got {got}")
    n = q.shape[-1]
    if bits == 8:
        return q.to(torch.uint8).contiguous()
    # Eight codes fill exactly `bits` bytes at every width, so eight is the unit of work.
    q = torch.nn.functional.pad(q.to(torch.uint8), (0, -n % 8))
    if 8 % bits == 0:  # whole codes in each byte
        stream = q[..., :: 8 // bits].clone()
        for i in range(1, 8 // bits):
            stream |= q[..., i :: 8 // bits] << (bits * i)
    else:
        word = sum(q[..., i::8].int() << (bits * i) for i in range(8))  # (..., n/8): 24 bits
        stream = torch.stack([(word >> (8 * j)) & 255 for j in range(bits)], -1).flatten(-2)
    return stream.to(torch.uint8)[..., : packed_width(n, bits)].contiguous()


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of `pack`: uint8 codes of `shape` (..., n); ValueError when the bytes do not fit."""
    check_bits(bits)
    n = shape[-1]
    expected = (*shape[:-1], packed_width(n, bits))
    if packed.dtype != torch.uint8 or packed.shape != expected:
        raise ValueError(f"{bits}-bit codes of shape {tuple(shape)} take uint8 bytes of shape "
                         f"{expected}, got {packed.dtype} {tuple(packed.shape)}")  # fmt: skip
    if bits == 8:
        return packed.clone()
    per = {2: 4, 3: 8, 4: 2}[bits]  # codes that fill whole bytes, and then as many bytes
    word = packed.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[per])
    if bits == 3:
        word = torch.nn.functional.pad(word, (0, -packed.shape[-1] % 3)).unflatten(-1, (-1, 3))
        word = word[..., 0] | word[..., 1] << 8 | word[..., 2] << 16  # (..., n/8)
    # Spread a word's codes over its bytes: the upper half of them, the upper half of each half...
    # With 4 bits in one step, 0xba -> 0x0b0a. Far fewer operations than a shift for each code.
    half = per // 2
    while half:
        ones = (1 << bits * half) - 1
        mask = sum(ones << 8 * half * i for i in range(per // half))
        word = (word | word << (8 - bits) * half) & mask
        half //= 2
    codes = word.flatten().view(torch.uint8)  # flat first: without rows the stride is arbitrary
    return codes.view(*word.shape[:-1], per * word.shape[-1])[..., :n].contiguous()


def as_words(packed: Tensor) -> Tensor:
    """The bytes (..., 4 * n) as 32-bit words, int32 (..., n), without a copy; else ValueError."""
    if packed.dtype != torch.uint8 or packed.shape[-1] % 4:
        got = f"{packed.dtype} {tuple(packed.shape)}"
        raise ValueError(f"words take uint8 bytes, a multiple of 4 in a row, got {got}")
    # Flat first: the stride of a single row is arbitrary, and view() asks for a multiple of 4.
    words = packed.flatten().view(torch.int32)
    return words.view(*packed.shape[:-1], packed.shape[-1] // 4)


def as_bytes(words: Tensor) -> Tensor:
    """Inverse of `as_words`: int32 (..., n) -> uint8 (..., 4 * n). ValueError for other dtypes."""
    if words.dtype != torch.int32:
        raise ValueError(f"words are int32, got {words.dtype}")
    return words.flatten().view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])
