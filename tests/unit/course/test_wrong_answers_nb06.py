"""Wrong answers to the exercises of notebook 06, as learners write them."""

import torch

from tests.support.wrong_answers import assert_told, each


def roofline(moved, of=max):
    """06's first; `moved` is a function of (tokens, out, n, bits)."""
    return lambda tokens, out, n, bits, flops, bandwidth: of(
        2 * tokens * out * n / flops, moved(tokens, out, n, bits) / bandwidth)


def all_bytes(tokens, out, n, bits):
    return out * n * bits / 8 + 2 * tokens * (n + out)


def cache_size(stored, overhead=lambda numbers, group_size: numbers // group_size * 4):
    """06's fifth; `stored` is a function of (tokens, group_size, recent)."""
    def mine(layers, kv_heads, head_dim, tokens, bits, group_size, recent):
        old, numbers = stored(tokens, group_size, recent), 2 * layers * kv_heads * head_dim
        return (numbers * old * bits // 8 + overhead(numbers * old, group_size)
                + numbers * (tokens - old) * 2)
    return mine


def whole_groups(tokens, size, recent):
    return max(0, tokens - recent) // size * size


def in_uint8(x, codes, scale, zero):
    codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    size = len(x) // scale.shape[1]
    away = codes - zero.byte().repeat_interleave(size, 1)
    return (scale.repeat_interleave(size, 1) * away) @ x


WRONG = {
    "roofline": [
        (roofline(all_bytes, lambda work, read: read), "the reading's time alone"),
        (lambda tokens, out, n, bits, flops, bandwidth: max(
            2 * tokens * out * n / bandwidth, all_bytes(tokens, out, n, bits) / flops),
         "the ceilings are swapped"),
        (roofline(lambda tokens, out, n, bits: (n * out + tokens * (n + out)) * bits / 8),
         "only the weight is packed"),
        (roofline(lambda tokens, out, n, bits: out * n * (bits // 8) + 2 * tokens * (n + out)),
         "diagnosis: bits // 8 is 0"),
        (roofline(lambda tokens, out, n, bits: n * out * bits / 8 + 2 * tokens * n),
         "the outputs, tokens * out_features"),
    ],
    "tile_offsets": [
        (lambda program, block, size: (at := program * block + torch.arange(block), at >= size),
         "the mask is upside down"),
        (lambda program, block, size: ((at := program * block + torch.arange(block))[at < size],
                                       at < size), "it does not cut them"),
    ],
    "packed_dot": [(in_uint8, "wrap around below 0")],
    "cache_size": [
        (cache_size(lambda tokens, size, recent: max(0, tokens // size * size - recent)),
         "leaves no whole groups"),
        (cache_size(lambda tokens, size, recent: (tokens - recent) // size * size),
         "not a negative number"),
        (cache_size(lambda tokens, size, recent: max(0, tokens - -(-recent // size) * size)
                    // size * size), "as long as it is"),
        (cache_size(lambda tokens, size, recent: whole_groups(tokens, 32, recent),
                    lambda numbers, size: numbers // 32 * 4), "not always 32"),
        (cache_size(whole_groups, lambda numbers, size: numbers // 8), "scales follow"),
        (cache_size(lambda tokens, size, recent: round(max(0, tokens - recent) / size) * size),
         "not to the nearest"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
