"""Wrong answers to the exercises of notebook 12, as learners write them."""

import torch

from qlora_lib.quant.minifloat import encode_float
from tests.support.wrong_answers import assert_told, each


def read(normal=lambda e, m: 2.0 ** (e - 1) * (1 + m / 2), small=lambda m: m / 2, minus=True):
    """The solution of the first, with another formula or no sign."""
    def mine(codes):
        c = codes.int()
        e, m = (c >> 1) % 4, c % 2
        value = torch.where(e == 0, small(m), normal(e, m))
        return torch.where((c >= 8) & minus, -value, value)
    return mine


def block(power=lambda most: torch.floor(torch.log2(most / 7)) + 1, bias=127, low_first=True,
          divide=True):
    """That of the second, with another exponent, bias or order, or without the division."""
    def mine(weights):
        p = power(weights.abs().amax())
        codes = encode_float(weights * 2**-p if divide else weights * 2**p, "e2m1").view(16, 2)
        first, second = codes.unbind(1)
        packed = first + 16 * second if low_first else 16 * first + second
        return int(p) + bias, packed
    return mine


def migrate(alpha_of=lambda alpha: (alpha, 1 - alpha), largest=lambda w: w.abs().max(0).values,
            gain_too=True, turned=False):
    """That of the fourth, with other exponents or another size, or not folded."""
    def mine(gain, weight, absmax, alpha):
        a, b = alpha_of(alpha)
        s = absmax**a / largest(weight) ** b
        s = 1 / s if turned else s
        return (gain / s if gain_too else gain), weight * s[None]
    return mine


def exponent(undo=True, sign=1, outputs=True, pick=min):
    """That of the fifth, without the way back, with another sign or error."""
    def mine(weight, x, quantize, exponents):
        def loss(a):
            s = x.abs().mean(0) ** (sign * a)
            lost = quantize(weight * s) / (s if undo else 1) - weight
            return (lost @ x.T if outputs else lost).pow(2).sum().item()
        return pick(exponents, key=loss)
    return mine


def doubled(corner=-1, side=1, divide=lambda n: n**0.5):
    """That of the sixth, with other signs or another factor."""
    def mine(n):
        h = torch.ones(1, 1)
        while len(h) < n:
            h = torch.kron(torch.tensor([[1.0, side], [side, corner]]), h)
        return h / divide(n)
    return mine


WRONG = {
    "e2m1_values": [
        (read(small=lambda m: 0.5 * (1 + m / 2)), "exponent 0 has no leading 1"),
        (read(lambda e, m: 2.0**e * (1 + m / 2), small=lambda m: 1.0 * m), "the bias is missing"),
        (read(lambda e, m: 2.0 ** (e - 1) * (1 + m), small=lambda m: 1.0 * m), "worth a half"),
        (read(minus=False), "the highest bit is the sign"),
        (read(small=lambda m: m / 4), "keeps the steps of exponent 1"),
    ],
    "encode_mx": [
        (block(lambda most: torch.floor(torch.log2(most)) - 2), "OCP's rule"),
        (block(bias=0), "the bias of E8M0, 127"),
        (block(low_first=False), "into the low nibble"),
        (block(divide=False), "divide by the scale"),
        (block(lambda most: torch.ceil(torch.log2(most / 6))), "never lets a weight exceed 6"),
        (block(lambda most: torch.floor(torch.log2(most))), "between 1 and 2"),
    ],
    "nv_scales": [
        (lambda a: (a * 448 / a.amax(), 6 * 448 / a.amax()), "round them"),
        (lambda a: ((a / 6 * (t := 448 / a.max())).to(torch.float8_e4m3fn).float(), t),
         "the 6 is missing: the largest"),
        (lambda a: ((a / 6).to(torch.float8_e4m3fn).float(), 6 * 448 / a.max()),
         "before they are rounded"),
        (lambda a: ((a / a.max() * 448).to(torch.float8_e4m3fn).float(), a.max() / 2688),
         "the inverse"),
        (lambda a: ((a / 6 * (t := 2688 / a.max(1, keepdim=True).values)).to(
            torch.float8_e4m3fn).float(), t), "one scale for the whole tensor"),
    ],
    "migrated": [
        (migrate(turned=True), "the wrong way round"),
        (migrate(gain_too=False), "the norm's gains have to be divided"),
        (migrate(lambda a: (1 - a, a)), "the exponents are exchanged"),
        (migrate(lambda a: (a, 0)), "as AWQ's factors"),
        (migrate(lambda a: (1, 1)), "alpha is missing"),
        (migrate(largest=lambda w: w.abs().max()), "not of the whole weight"),
    ],
    "awq_exponent": [
        (exponent(outputs=False), "the error of the weights"),
        (exponent(undo=False), "divide by s again"),
        (exponent(sign=-1), "multiply by size^e"),
        (exponent(pick=max), "the largest error"),
        (lambda w, x, q, e: e.index(exponent()(w, x, q, e)), "the place in the list"),
    ],
    "hadamard": [
        (doubled(divide=lambda n: 1), "for H H^T to be the identity"),
        (doubled(divide=lambda n: n), "not by n"),
        (doubled(corner=1), "has a minus"),
        (doubled(corner=1, side=-1), "stands at the last block"),
        (doubled(corner=1, side=0), "this is the identity"),
    ],
    "rotated": [
        (lambda g, w, v, r: (w @ r, r.T @ v), "gains are missing"),
        (lambda g, w, v, r: (w @ r @ torch.diag(g), r.T @ v), "gains first"),
        (lambda g, w, v, r: (w @ torch.diag(g) @ r.T, r.T @ v), "it needs W R"),
        (lambda g, w, v, r: (w @ torch.diag(g) @ r, r @ v), "R^T V, not R V"),
        (lambda g, w, v, r: (w @ torch.diag(g) @ r, v), "the writer is not rotated"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
