"""Wilson's interval against published ones."""

import math

import pytest

from qlora_lib.base.statistics import mcnemar, newcombe, wilson


@pytest.mark.parametrize("correct, n, low, high", [
    (487, 1319, 34.4, 39.6), (964, 1319, 70.6, 75.4), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0)])
def test_wilson_against_published_intervals(correct, n, low, high):
    assert [round(100 * x, 1) for x in wilson(correct, n)] == [low, high]


@pytest.mark.parametrize("correct, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_says_what_it_was_given(correct, n):
    with pytest.raises(ValueError, match=f"got {correct} correct of {n}"):
        wilson(correct, n)


@pytest.mark.parametrize("call", [
    lambda: wilson(1, 3, -1), lambda: wilson(1, 3, math.nan), lambda: wilson(1, 3, 0),
    lambda: wilson(math.nan, 3), lambda: wilson("1", 3), lambda: wilson(1, math.inf),
    lambda: mcnemar(1.5, 2), lambda: mcnemar(math.nan, 1), lambda: mcnemar("1", 2),
    lambda: mcnemar(10**7, 10**7), lambda: newcombe(1, 2, 1, 2, math.nan),
    lambda: newcombe(1, 0, 1, 2), lambda: newcombe(1, 2, 1, 2, 0.5),
])  # fmt: skip
def test_what_are_no_counts_is_refused(call):
    with pytest.raises(ValueError, match="expected|up to"):
        call()
