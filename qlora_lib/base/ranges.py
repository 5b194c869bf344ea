"""Numbers that may be given: finite and in range, whether by the command line, a call, or JSON."""

import math
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

LARGEST = 2**31 - 1  # a count that PyTorch's kernels still take
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclass(frozen=True)
class Range:
    """The finite numbers from `low` to `high`; called, it reads one from a text, for argparse."""

    low: float
    high: float = math.inf
    whole: bool = False
    above: bool = False  # low itself is not among them
    below: bool = False  # nor high

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False  # True would be 1
        try:
            if not math.isfinite(value):
                return False
        except OverflowError:  # a whole number that no float holds
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high)  # fmt: skip

    def __str__(self) -> str:
        text = f"a {'whole ' if self.whole else ''}number"
        if self.low > -math.inf:
            text += f" {'above' if self.above else 'of at least'} {self.low}"
        if self.high < math.inf:
            text += f", {'below' if self.below else 'at most'} {self.high}"
        return text

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, with the name, unless `value` is one of these numbers."""
        if value not in self:
            raise ValueError(f"{name}={value!r:.60}: expected {self}")

    def __call__(self, text: str) -> float:
        """Return the number that a text writes in ASCII; ArgumentTypeError for any other."""
        if NUMBER.fullmatch(text) and len(text) <= 40:
            value = int(text) if self.whole and text.lstrip("+-").isdigit() else float(text)
            if value in self:
                return value
        raise ArgumentTypeError(f"expected {self}, got {text!r:.60}")


COUNT = Range(1, LARGEST, whole=True)
FROM_ZERO = Range(0, LARGEST, whole=True)
ANY_SEED = Range(0, 2**32 - 1, whole=True)  # what NumPy takes too
ABOVE_ZERO = Range(0, above=True)
ZERO_ON = Range(0)
SHARE = Range(0, 1, above=True)
SHARE_BELOW_ONE = Range(0, 1, below=True)


def check_fields(owner: Any, **ranges: Range) -> None:
    """Raise ValueError for a field of a dataclass outside its range; None passes as a default."""
    defaults = {field.name: field.default for field in fields(owner)}
    for name, allowed in ranges.items():
        value = getattr(owner, name)
        if value is not None or defaults[name] is not None:
            allowed.check(name, value)
