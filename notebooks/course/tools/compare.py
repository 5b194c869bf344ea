"""When are two printed outputs of a notebook the same?

Words and whole numbers must be equal. Floats may differ by a relative tolerance: other
processors, other thread counts and other BLAS kernels add up in another order. A line printed
by `record` is compared with the tolerance that it states.
"""
import math
import re

from ..kit.record import LINE

RTOL, ATOL = 1e-2, 1e-9
# A number that is not part of a name (int4), a version (1.2.3) or a word (3x).
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w]|\.\d)")


def same_text(stored: str, fresh: str, rtol: float = RTOL, atol: float = ATOL) -> bool:
    """Whether `fresh` says what `stored` said, up to blanks and to noise in its floats."""
    lines = _lines(stored), _lines(fresh)
    return len(lines[0]) == len(lines[1]) and all(
        _same_record(a, b) if LINE.fullmatch(a) and LINE.fullmatch(b)
        else _same_line(a, b, rtol, atol) for a, b in zip(*lines))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _same_record(a: str, b: str) -> bool:
    """Same name, same verdict, same expectation; a verdict of ✓ must also hold as printed."""
    x, y = LINE.fullmatch(a), LINE.fullmatch(b)
    if any(x[k] != y[k] for k in ("mark", "name", "expected", "tolerance")):
        return False
    # Printed with 6 digits, a number on the edge may seem to lie a little outside.
    middle, half = float(x["expected"]), float(x["tolerance"] or 0)
    slack = half + 1e-5 * abs(middle) if half else 0.0
    return x["mark"] == "✗" or all(abs(float(m["value"]) - middle) <= slack for m in (x, y))


def _same_line(a: str, b: str, rtol: float, atol: float) -> bool:
    if [x.split() for x in NUMBER.split(a)] != [x.split() for x in NUMBER.split(b)]:
        return False
    return all(_same_number(x, y, rtol, atol)
               for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)))


def _same_number(x: str, y: str, rtol: float, atol: float) -> bool:
    if x == y:
        return True
    # "12." may be a whole number that ends a sentence: a float shows a digit after its point.
    both_floats = all(re.search(r"\.\d|[eE]", s) for s in (x, y))
    return both_floats and math.isclose(float(x), float(y), rel_tol=rtol, abs_tol=atol)
