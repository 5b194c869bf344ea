"""NaN and Inf are found wherever they are, and nothing else is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.base.finite import check_finite, is_finite
from tests.support.tensors import PROPERTY, normal


@PROPERTY
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    shape=st.sampled_from([(1,), (37,), (3, 50), (2, 3, 4)]),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    where=st.integers(0, 10**6),
)
def test_one_bad_value_is_enough(dtype, shape, bad, where):
    t = normal(*shape).to(dtype)
    assert is_finite(t) and is_finite(torch.full_like(t, torch.finfo(dtype).max))
    t.view(-1)[where % t.numel()] = bad
    assert not is_finite(t) and not is_finite(t.t() if t.dim() == 2 else t)
    with pytest.raises(ValueError, match="there: b holds NaN or Inf"):
        check_finite([("a", torch.ones(2)), ("b", t)], "there")


def test_what_has_no_nan_is_passed_over():
    fp8 = torch.ones(4).to(torch.float8_e4m3fn)
    for t in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), torch.ones(0),
              torch.ones(3, device="meta"), torch.nn.Parameter(torch.ones(())), fp8):  # fmt: skip
        assert is_finite(t)
    assert not is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
