"""Wilson's interval against published ones."""

import pytest

from qlora_lib.base.statistics import wilson


@pytest.mark.parametrize("correct, n, low, high", [
    (487, 1319, 34.4, 39.6), (964, 1319, 70.6, 75.4), (0, 10, 0.0, 27.8), (10, 10, 72.2, 100.0)])
def test_wilson_against_published_intervals(correct, n, low, high):
    assert [round(100 * x, 1) for x in wilson(correct, n)] == [low, high]


@pytest.mark.parametrize("correct, n", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_says_what_it_was_given(correct, n):
    with pytest.raises(ValueError, match=f"got {correct} correct of {n}"):
        wilson(correct, n)
