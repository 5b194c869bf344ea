"""Values that a process returned, through JSON."""
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from course.kit.exercise import Result
from course.tools.plain_values import LARGEST, dumps, loads


def through(value):
    return loads(dumps([Result(value)]))[0].value


@pytest.mark.parametrize("value", [
    None, True, 7, -0.5, math.inf, "a\n\ud800", ..., (1, [2, (3.5, None)]), [], (),
    Fraction(-3, 4), {"a": [1], 2: (3,)}, 10**1000])
def test_what_exercises_return_stays_as_it_is(value):
    assert through(value) == value and type(through(value)) is type(value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16,
                                   torch.bfloat16, torch.float32, torch.float64,
                                   torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)])
def test_tensors_stay_as_they_are(shape, dtype):
    tensor = (8 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    for value in (tensor, tensor.clone().mT if tensor.ndim == 2 else tensor):
        got = through(value)
        assert got.dtype == dtype and got.shape == value.shape and torch.equal(got, value)


def test_a_tensor_that_can_be_trained_by_stays_so():
    for needed in (True, False):
        got = through(torch.ones(2, requires_grad=needed) * 3)
        assert got.requires_grad == needed and got.tolist() == [3, 3]


def test_arrays_and_their_numbers_stay():
    for value in (np.arange(6.0).reshape(2, 3), np.float64(0.5), np.int32(3), np.bool_(True)):
        got = through(value)
        assert isinstance(got, np.ndarray) and got.dtype == value.dtype
        assert np.array_equal(got, value)


def test_results_keep_their_error_and_what_was_changed():
    class Strange(Exception):
        def __str__(self):
            raise ValueError

    errors = [KeyError("x"), ValueError("a", 1), IndexError(), Strange(),
              ExceptionGroup("g", [ValueError()])]
    got = loads(dumps([Result(error=error, wrote=True, changed=[True]) for error in errors]))
    assert [type(r.error).__name__ for r in got] == [type(e).__name__ for e in errors]
    assert [str(r.error) for r in got[:4]] == ["'x'", "('a', 1)", "", ""]
    assert type(got[0].error) is KeyError and got[0].wrote and got[0].changed == [True]


def test_other_values_arrive_as_how_they_show():
    me = []
    me.append(me)
    class Hostile:
        __eq__ = __bool__ = lambda *_: True
        __repr__ = lambda self: "x" * 1000
    for value, shown in [({1, 2}, "{1, 2}"), (Hostile(), "x" * 60), (me, "[[...]]"),
                         (10**5000, ""), (torch.empty(3, device="meta"), "tensor("),
                         (torch.zeros(LARGEST), "tensor([0., 0., 0."),
                         (list(range(LARGEST)), "[0, 1, 2")]:
        got = through(value)
        assert type(got).__name__ == type(value).__name__ and repr(got).startswith(shown)
        assert type(got).__module__ == "course.tools.plain_values" and not got == 1


@pytest.mark.parametrize("text", [
    "", "5", "null", "[5]", "[[]]", "[[1, 2, 3]]", '[[{}, null, false, null]]', "[" * 100_000,
    '[[["Tensor", "int64", [2], "AAAA"], null, false, null]]',
    '[[["Tensor", "os", [0], ""], null, false, null]]',
    '[[["Tensor", "int64", [1e99], ""], null, false, null]]',
    '[[["Fraction", 1, 0], null, false, null]]', '[[["..", 1], null, false, null]]',
    '[[["other", 1, 2], null, false, null]]', '[[1, 5, false, null]]', b"\xff\xfe\x00"])
def test_what_nobody_wrote_is_an_exception(text):
    with pytest.raises((ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError,
                        RuntimeError)):
        loads(text)


def test_a_bool_is_0_or_1():
    text = json.dumps([[["Tensor", "bool", [4], "AAECAw=="], None, False, None]])
    assert loads(text)[0].value.double().tolist() == [0, 1, 1, 1]
