"""Adapters that start from what rounding lost: the closed form is the best product of its rank."""

import pytest
import torch

from qlora_lib.lora.init import LOST_INITS, alternate, loftq, lost_part, low_rank
from qlora_lib.quant.damping import choose_damping
from qlora_lib.quant.gptq import gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian, hessian_factor
from tests.support.tensors import ar1, bf16_autocast, normal, relative

F64 = torch.float64
D = normal(12, 10, seed=1, dtype=F64)
# Unlike scales, and neighbours that correlate
X = ar1(80, 10, dtype=F64) * torch.logspace(0, -1, 10, dtype=F64)
H = X.T @ X / len(X)


def loss(product, h=H, d=D):
    """tr((D - B A) H (D - B A)^T), the mean squared error of the outputs."""
    return float((((d - product) @ h) * (d - product)).sum())


def descended(rank: int, seed: int, h) -> float:
    """What L-BFGS reaches from a random start."""
    b = normal(12, rank, seed=seed, dtype=F64).requires_grad_()
    a = normal(rank, 10, seed=seed + 1, dtype=F64).requires_grad_()
    search = torch.optim.LBFGS([b, a], max_iter=400, history_size=40,
                               tolerance_grad=1e-9, tolerance_change=1e-12,
                               line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        search.zero_grad()
        off = D - b @ a
        value = ((off @ h) * off).sum()
        value.backward()
        return value

    search.step(closure)
    return loss((b @ a).detach(), h)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("init", LOST_INITS)
def test_no_descent_finds_a_better_product(init, rank):
    """Each is the best by its own measure: none, the diagonal, or all of H."""
    h = {"svd": torch.eye(10, dtype=F64), "qera": H.diagonal().diag(), "cloq": H}[init]
    b, a = lost_part(D, rank, init, H, damp_percent=0)
    assert b.shape == (12, rank) and a.shape == (rank, 10) and b.dtype == F64
    found, reached = loss(b @ a, h), [descended(rank, seed, h) for seed in (0, 10, 20)]
    assert found <= min(reached) * (1 + 1e-9)
    assert min(reached) == pytest.approx(found, rel=1e-6)  # and descent gets there


@pytest.mark.parametrize("damping", [0, 0.1])
def test_what_is_left_is_the_tail_of_the_singular_values(damping):
    r = hessian_factor(H, damping)
    s = torch.linalg.svdvals(D @ r)
    for rank in range(1, 11):
        b, a = lost_part(D, rank, "cloq", H, damping)
        left = float(((D - b @ a) @ r).square().sum())
        assert left == pytest.approx(float(s[rank:].square().sum()), rel=1e-9, abs=1e-20)


def test_the_symmetric_root_of_qeras_exact_form_gives_the_same_product():
    """H = R R^T = S S: S is R times a rotation, which singular values do not see."""
    values, vectors = torch.linalg.eigh(H)
    root = vectors * values.sqrt() @ vectors.T
    b, a = low_rank(D @ root, 4)
    theirs = b @ a @ torch.linalg.inv(root)
    b, a = lost_part(D, 4, "cloq", H, 0)
    assert relative(b @ a, theirs) < 1e-10
    b, a = lost_part(D, 4, "qera", H, 0)
    assert relative(b @ a, theirs) > 0.01  # the approximate form is another one
    scale = H.diagonal().sqrt()  # S of QERA's approximate form
    ub, ua = low_rank(D * scale, 4)
    assert relative(b @ a, ub @ ua / scale) < 1e-10


@pytest.mark.parametrize("init", LOST_INITS)
def test_white_inputs_leave_the_plain_svd(init):
    b, a = lost_part(D, 3, init, 7 * torch.eye(10, dtype=F64), 0.01)
    ub, ua = low_rank(D, 3)
    assert relative(b @ a, ub @ ua) < 1e-12


@pytest.mark.parametrize("init", LOST_INITS)
def test_the_units_of_the_inputs_change_neither_factor(init):
    want = lost_part(D, 3, init, H, 0.05)
    for scale in (1e-4, 1e4):
        found = lost_part(D, 3, init, H * scale**2, 0.05)
        for one, other in zip(found, want):  # up to the sign of a singular vector
            assert relative(one.abs(), other.abs()) < 1e-9


@pytest.mark.parametrize("init", LOST_INITS)
def test_factors_are_of_one_size(init):
    b, a = lost_part(D, 4, init, H, 0.01)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1), rtol=1e-9)
    assert torch.allclose(b.T @ b, a @ a.T, atol=1e-9)


def test_fp32_and_autocast_give_what_fp64_gives():
    want = torch.matmul(*lost_part(D, 4, "cloq", H))
    with bf16_autocast():
        b, a = lost_part(D.float(), 4, "cloq", H.float())
    assert b.dtype == torch.float32 and relative(b @ a, want) < 1e-4


def test_columns_that_no_input_excites_and_nothing_lost():
    h = H.clone()
    h[3] = h[:, 3] = 0
    b, a = lost_part(D, 4, "cloq", h)
    assert torch.isfinite(b @ a).all()
    b, a = lost_part(torch.zeros(12, 10), 4, "cloq", H)
    assert not b.any() and not a.any()


def test_damping_is_chosen_as_gptq_chooses_it():
    hessian = Hessian(10, dtype=F64, halves=True)
    hessian.update(X)
    found = lost_part(D, 3, "cloq", hessian, None)
    want = lost_part(D, 3, "cloq", hessian, choose_damping(hessian))
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(init="pissa"), "init='pissa' is not one of"),
        (dict(hessian=None), "'cloq' weighs errors by the layer's inputs and needs its Hessian"),
        (dict(hessian=H[:4, :4]), r"takes 10 inputs, the Hessian is \(4, 4\)"),
        (dict(hessian=H * float("nan")), "the Hessian holds NaN or Inf"),
        (dict(hessian=Hessian(10)), "has seen no tokens"),
        (dict(hessian=-H), "not positive definite"),
        (dict(damp_percent=None), "needs a Hessian with halves"),
        (dict(difference=D / 0), "holds 120 NaN or Inf"),
        (dict(difference=D[0]), "must be a floating-point matrix"),
        (dict(rank=11), r"rank=11 exceeds that of a difference \(12, 10\)"),
    ],
)
def test_bad_input_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        lost_part(**dict(difference=D, rank=3, init="cloq", hessian=H) | given)


# --- quantized again beside the adapter -----------------------------------------------------

WEIGHT = normal(64, 96, seed=3) * torch.logspace(0, -1, 96)
INPUTS = ar1(600, 96, seed=5)
SEEN = INPUTS.T @ INPUTS / len(INPUTS)
SPEC = QuantSpec(2, 16, clip_search=False)


def by_gptq(weight):
    return gptq_quantize(weight, SEEN, SPEC)


def test_quantizing_again_beside_the_adapter_helps_and_stops_when_it_does_not():
    base, b, a, errors = alternate(WEIGHT, 8, by_gptq, "cloq", SEEN, steps=30)
    assert len(errors) < 30 and errors[-1] > min(errors) == errors[-2] < errors[0]
    assert all(x >= y for x, y in zip(errors[:-1], errors[1:-1]))
    r = hessian_factor(SEEN, 0.01)
    left = WEIGHT - base.dequantize() - b @ a  # what is returned is the best of them
    assert float((left @ r).norm() / (WEIGHT @ r).norm()) == pytest.approx(min(errors), rel=1e-5)


def test_one_step_is_the_closed_form_on_the_plain_base():
    base, b, a, (error,) = alternate(WEIGHT, 8, by_gptq, "cloq", SEEN, steps=1)
    plain = by_gptq(WEIGHT)
    assert torch.equal(base.codes, plain.codes)
    want = lost_part(WEIGHT - plain.dequantize(), 8, "cloq", SEEN)
    assert torch.equal(b, want[0]) and torch.equal(a, want[1])


def test_without_inputs_it_is_loftqs_loop():
    def quantize(weight):
        return quantize_rtn(weight, SPEC)

    *found, errors = alternate(WEIGHT, 8, quantize, "svd", steps=3)
    assert len(errors) == 3  # it still helps: both have gone as far
    base, b, a = loftq(WEIGHT, 8, SPEC, steps=3)
    assert torch.equal(found[0].dequantize(), base.dequantize())
    assert torch.equal(found[1], b) and torch.equal(found[2], a)
