"""Hadamard matrices and their fast product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.quant.hadamard import (
    hadamard,
    hadamard_core,
    hadamard_transform,
    random_orthogonal,
)
from tests.support.tensors import normal

# Widths of models: tiny (256, 768), SmolLM2 (576, 1536), Qwen2-0.5B (896, 4864), heads of 64.
ORDERS = [1, 2, 4, 12, 20, 24, 28, 36, 64, 256, 576, 768, 896, 1536]


@pytest.mark.parametrize("n", ORDERS)
def test_it_is_orthogonal_with_entries_of_one_size(n):
    h = hadamard(n)
    assert h.dtype == torch.float64
    # sums of n products of 1 / n
    assert (h @ h.t() - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13
    assert (h.abs() * n**0.5 - 1).abs().max() < 1e-13


def test_powers_of_two_are_sylvesters():
    h4 = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(hadamard(4), h4.double())


@pytest.mark.parametrize("n, m", [(64, 1), (576, 36), (768, 12), (896, 28), (40, 20), (4864, 76)])
def test_the_core_is_the_smallest_that_is_known(n, m):
    assert len(hadamard_core(n)) == m


@pytest.mark.parametrize("n", [3, 6, 7, 46, 92])
def test_other_orders_are_refused_by_name(n):
    with pytest.raises(ValueError, match=f"order {n} is known here.*random_orthogonal"):
        hadamard(n)


@given(st.sampled_from(ORDERS), st.integers(0, 99))
def test_the_fast_product_is_that_with_the_matrix(n, seed):
    x = normal(2, 3, n, seed=seed).double()
    got = hadamard_transform(x)
    assert got.shape == x.shape
    assert (got - x @ hadamard(n)).abs().max() < 1e-12  # sums in another order
    in_fp32 = hadamard_transform(x.float(), hadamard_core(n).float())
    assert in_fp32.dtype == torch.float32 and (in_fp32 - got).abs().max() < 1e-5


def test_an_outlier_is_spread_over_all_channels():
    x = torch.zeros(576)
    x[17] = 240
    assert (hadamard_transform(x).abs() - 10).abs().max() < 1e-4  # 240 / sqrt(576)


@pytest.mark.parametrize("n", [64, 576, 6])
def test_random_rotations_follow_their_seed(n):
    q = random_orthogonal(n, seed=3)
    assert (q @ q.t() - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13
    assert torch.equal(q, random_orthogonal(n, seed=3))
    assert not torch.equal(q, random_orthogonal(n, seed=4))
