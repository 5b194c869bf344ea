"""Intervals and tests for counts of right answers: Wilson, McNemar, Newcombe."""

import math

from .ranges import ABOVE_ZERO, FROM_ZERO, Range

MOST_TOSSES = 100_000  # of McNemar's exact test, whose sum is of as many terms


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return Wilson's score interval (1927) for a proportion, (low, high) in [0, 1]; the default z
    gives 95%. Raises ValueError unless 0 <= correct <= n, n > 0 and z > 0."""
    ABOVE_ZERO.check("z", z)
    for name, count in (("correct", correct), ("n", n)):
        Range(-math.inf, whole=True).check(name, count)
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"got {correct} correct of {n}; expected 0 <= correct <= n and n > 0")
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends centre and half are equal but for the rounding, which would give 2e-19.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == n else min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided p of McNemar's exact test (1947), of questions that only one of two
    models has right: 2 P(X <= min), X binomial(a + b, 1/2). ValueError for what are no counts, or over MOST_TOSSES in all."""
    for name, count in (("only_a", only_a), ("only_b", only_b)):
        FROM_ZERO.check(name, count)
    tosses = only_a + only_b
    if tosses > MOST_TOSSES:
        raise ValueError(f"{tosses:,} questions that one has right: the exact test takes up to "
                         f"{MOST_TOSSES:,}; for more look at `newcombe`")  # fmt: skip
    tail = sum(math.comb(tosses, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def newcombe(
    right_a: int, n_a: int, right_b: int, n_b: int, both: int | None = None
) -> tuple[float, float]:
    """Return the 95% interval for a difference of two proportions, a - b, from Wilson's of each.

    Unpaired (both=None): Newcombe's method 10 of Statistics in Medicine 17 (1998) 873-890. Paired,
    with `both` right in a and b: method 10 of 17 (1998) 2635-2650, the same with a correlation.
    Raises ValueError for counts that do not fit together.
    """
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n_a), wilson(right_b, n_b)
    a, b, phi = right_a / n_a, right_b / n_b, 0.0
    if both is not None:
        Range(-math.inf, whole=True).check("both", both)
        only_a, only_b = right_a - both, right_b - both
        neither = n_a - both - only_a - only_b
        if n_a != n_b or min(both, only_a, only_b, neither) < 0:
            raise ValueError(f"{right_a} of {n_a} and {right_b} of {n_b} cannot have {both} "
                             "questions right in both")  # fmt: skip
        product = both * neither - only_a * only_b
        product = max(product - n_a / 2, 0) if product > 0 else product
        spread = right_a * (n_a - right_a) * right_b * (n_b - right_b)
        phi = product / math.sqrt(spread) if spread else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = a - b - distance(a - low_a, high_b - b)
    high = a - b + distance(high_a - a, b - low_b)
    return max(-1.0, low), min(1.0, high)
