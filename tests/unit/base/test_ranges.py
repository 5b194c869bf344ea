"""Numbers that may be given, and those that may not."""

import math
from argparse import ArgumentTypeError
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.base.ranges import (
    ABOVE_ZERO, ANY_SEED, COUNT, SHARE, SHARE_BELOW_ONE, ZERO_ON, check_fields,
)  # fmt: skip

ALL = (ABOVE_ZERO, ANY_SEED, COUNT, SHARE, SHARE_BELOW_ONE, ZERO_ON)


@pytest.mark.parametrize("allowed", ALL, ids=str)
def test_no_range_has_what_is_no_number(allowed):
    for value in (math.nan, math.inf, -math.inf, None, "1", True, [1], 1j, -1, 10**400):
        assert value not in allowed
        with pytest.raises(ValueError, match="rate="):
            allowed.check("rate", value)


def test_ends_belong_to_a_range_or_not():
    assert 0 in ZERO_ON and 0 not in ABOVE_ZERO and 5e-324 in ABOVE_ZERO
    assert 1 in SHARE and 0 not in SHARE and 1 not in SHARE_BELOW_ONE and 0 in SHARE_BELOW_ONE
    assert 1 in COUNT and 0 not in COUNT and 2**31 not in COUNT and 1.0 not in COUNT
    assert 2**32 - 1 in ANY_SEED and 2**32 not in ANY_SEED
    assert np.int64(3) in COUNT and np.float32(0.5) in SHARE and Fraction(1, 2) in SHARE


@given(st.one_of(st.text(max_size=8), st.floats().map(str), st.integers().map(str)))
def test_a_text_gives_a_number_of_the_range_or_an_error(text):
    for allowed in ALL:
        try:
            value = allowed(text)
        except ArgumentTypeError as error:
            assert "expected" in str(error)
        else:
            assert value in allowed and value == float(text)


@pytest.mark.parametrize("text", ["", " ", "nan", "inf", "1_0", "\u0664", "0x10", "1,5", "\0", "1" * 50])
def test_texts_that_python_or_a_reader_would_take_for_numbers_are_none(text):
    for allowed in ALL:
        with pytest.raises(ArgumentTypeError):
            allowed(text)


def test_fields_may_be_none_only_where_that_is_the_default():
    @dataclass
    class Settings:
        steps: int = 1
        limit: int | None = None

    check_fields(Settings(), steps=COUNT, limit=COUNT)
    for wrong in (Settings(steps=None), Settings(limit=0), Settings(limit=2.5)):
        with pytest.raises(ValueError, match="expected a whole number"):
            check_fields(wrong, steps=COUNT, limit=COUNT)
