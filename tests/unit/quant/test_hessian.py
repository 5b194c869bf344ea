"""Second moments of a layer's inputs, and their triangular factor."""

import pytest
import torch
from torch import Tensor

from qlora_lib.quant.hessian import Hessian, act_order, hessian_factor
from tests.support.slow_gptq import damped
from tests.support.tensors import ar1, normal, relative


def inputs(tokens=90, features=24, seed=1) -> Tensor:
    """Correlated, their columns of different sizes, fp64 (tokens, features)."""
    return ar1(tokens, features, seed=seed).double() * normal(features, seed=2, std=0.7).exp()


def moment(x: Tensor) -> Tensor:
    return sum(torch.outer(row, row) for row in x.double()) / len(x)


def test_it_is_the_mean_of_outer_products():
    x = normal(3, 5, 8)
    h = Hessian(8)
    h.update(x[:1])
    h.update(x[1:])
    assert h.tokens == 15 and h.matrix.dtype == torch.float32
    assert (h.matrix - moment(x.reshape(-1, 8))).abs().max() < 1e-6


def test_bf16_inputs_are_summed_in_fp32():
    x = normal(4096, 16).bfloat16() + 1
    h = Hessian(16)
    for part in x.split(64):
        h.update(part)
    want = x.double().T @ x.double() / 4096
    assert relative(h.matrix, want) < 1e-5  # a bf16 sum is off by 1e-2


@pytest.mark.parametrize("tokens", [90, 5])
def test_halves_are_halves_of_each_update(tokens):
    x = inputs(tokens)
    hessian, plain = (Hessian(24, dtype=torch.float64, halves=on) for on in (True, False))
    parts = x.split(tokens // 3 + 1)  # of 5 tokens the updates are 2, 2 and 1
    for part in parts:
        hessian.update(part)
        plain.update(part)
    first = torch.cat([part[: len(part) // 2] for part in parts])
    second = torch.cat([part[len(part) // 2 :] for part in parts])
    for got, want in zip(hessian.halves, (first, second)):
        torch.testing.assert_close(got, moment(want))
    assert torch.equal(plain.matrix, hessian.matrix)  # halves change nothing else


def test_halves_of_a_batch_are_whole_sequences():
    x = normal(4, 10, 8)
    hessian = Hessian(8, halves=True)
    hessian.update(x)
    for got, part in zip(hessian.halves, x.split(2)):
        torch.testing.assert_close(got.double(), moment(part.flatten(0, 1)), rtol=1e-5, atol=1e-6)


def test_the_dense_models_inputs_are_paired_with_its_own():
    x, dense = inputs(), inputs(seed=5)
    hessian = Hessian(24, dtype=torch.float64)
    assert hessian.cross is None
    for part, before in zip(x.split(40), dense.split(40)):
        hessian.update(part, before)
    want = sum(torch.outer(a, b) for a, b in zip(dense, x)) / len(x)
    torch.testing.assert_close(hessian.cross, want)
    torch.testing.assert_close(hessian.matrix, moment(x))


def test_it_keeps_no_graph_and_leaves_the_inputs_as_they_were():
    x = inputs().float().requires_grad_()
    before = x.detach().clone()
    hessian = Hessian(24, halves=True)
    hessian.update(x, 2 * x)
    for matrix in (hessian.matrix, hessian.cross, *hessian.halves):
        assert not matrix.requires_grad
    assert torch.equal(x, before)


def test_what_it_cannot_use_is_refused_and_leaves_it_as_it_was():
    x, nan = inputs(6), torch.full((6, 24), float("nan"))
    inf = inputs(6)
    inf[1, 3] = -float("inf")
    empty, alone, paired = Hessian(24), Hessian(24), Hessian(24)
    with pytest.raises(ValueError, match="has seen no tokens"):
        empty.matrix
    alone.update(x)
    paired.update(x, x)
    for hessian, given, message in (
        (empty, (normal(2, 25),), "inputs have 25 features, this Hessian 24"),
        (empty, (nan,), "NaN or Inf"),
        (alone, (inf,), "NaN or Inf"),
        (paired, (x, nan), "NaN or Inf"),
        (paired, (inf, x), "NaN or Inf"),
        (empty, (x, x[:5]), r"dense inputs are \(5, 24\), not \(6, 24\)"),
        (alone, (x, x), "at every update, or never"),
        (paired, (x,), "at every update, or never"),
    ):
        before = hessian.tokens, hessian._sum.clone()
        with pytest.raises(ValueError, match=message):
            hessian.update(*given)
        assert hessian.tokens == before[0] and torch.equal(hessian._sum, before[1])
    assert torch.equal(paired.matrix, paired.cross) and torch.equal(paired.matrix, alone.matrix)


def test_halves_that_are_not_there_are_named():
    plain, single = Hessian(24), Hessian(24, halves=True)
    plain.update(inputs(4))
    for row in inputs(4):
        single.update(row)
    with pytest.raises(ValueError, match="halves=True"):
        plain.halves
    with pytest.raises(ValueError, match="no update had two tokens"):
        single.halves


def test_act_order_begins_with_the_largest_and_keeps_equals_in_order():
    h = torch.diag(torch.tensor([1.0, 3.0, 1.0, 7.0, 3.0] + [1.0] * 30))
    assert act_order(h)[:7].tolist() == [3, 1, 4, 0, 2, 5, 6]


def test_the_factor_is_the_inverse_of_the_papers_factor():
    """Three steps in the paper: H = L L^T, its inverse from L, and the factor of the inverse."""
    h = moment(inputs(600, 96))
    order = act_order(h)
    r = hessian_factor(h, 0.01, order)
    assert torch.equal(r, r.triu())
    d = damped(h, 0.01)[order][:, order]
    assert relative(r @ r.T, d) < 1e-12
    paper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(d)), upper=True)
    assert relative(torch.linalg.inv(r), paper) < 1e-10


def test_the_factor_without_an_order_is_of_the_matrix_as_it_is():
    h = moment(inputs())
    before = h.clone()
    r = hessian_factor(h, 0.05)
    assert relative(r @ r.T, damped(h, 0.05)) < 1e-12 and torch.equal(h, before)
    assert torch.equal(r, hessian_factor(h, 0.05, torch.arange(24)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dead", [[0, 7], list(range(24))], ids=["some", "all"])
def test_columns_that_no_input_reaches_get_the_mean_of_the_others(dead, dtype):
    x = inputs()
    x[:, dead] = 0
    h = moment(x).to(dtype)
    r = hessian_factor(h, 0.01)
    alive = [j for j in range(24) if j not in dead]
    mean = h.diagonal()[alive].mean() if alive else 1.0
    want = h + 0.01 * mean * torch.eye(24, dtype=dtype)
    want[dead, dead] = 1.01 * mean
    assert r.dtype == dtype
    torch.testing.assert_close(r @ r.T, want, rtol=1e-5, atol=1e-5)


def test_a_matrix_that_is_not_positive_definite_is_refused():
    h = torch.eye(8)
    h[2, 5] = h[5, 2] = 3.0  # seen from the end of the loop, column 2 is the one that fails
    with pytest.raises(ValueError, match="not positive definite at column 2 with damp_percent=0.5"):
        hessian_factor(h, 0.5)
    assert hessian_factor(h, 3.0).isfinite().all()
