"""The references of notebook 02's exercises against definitions made another way.

That each wrong answer is told its own message, and that the folded solutions pass, is
tested for all exercises together.
"""
import pytest
import torch

from course.kit import check, example
from course.kit.exercise import registered
from course.nb02 import exercises as nb02
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, fit_grid
from qlora_lib.quant.hessian import Hessian

NAMES = ("obs_step", "slow_gptq", "upper_factor", "gptq_columns", "masked_hessian", "lazy_update",
         "undo_order")


def own(name):
    return registered()[name]


@pytest.mark.parametrize("name", NAMES)
def test_unsolved_goes_on_with_the_reference(name, capsys):
    def unsolved(*arguments):
        raise NotImplementedError

    assert check(name, unsolved) is own(name).reference
    assert "not solved yet" in capsys.readouterr().out


@pytest.mark.parametrize("case", [1, 2, 3, 4])
def test_obs_step_is_the_least_squares_answer(case):
    weight, h, column, target = (t.double() if isinstance(t, torch.Tensor) else t
                                 for t in example("obs_step", case))
    h = (h + h.T) / 2  # x^T x in fp32 need not be symmetric to the bit; Cholesky reads one half
    root = torch.linalg.cholesky(h, upper=True)  # H = R^T R: R stands for inputs with this H
    free = [k for k in range(weight.shape[1]) if k != column]
    # Minimise |R_free d_free + R_column d_column|: an ordinary least-squares problem.
    fixed = torch.outer(root[:, column], target - weight[:, column])  # (in, out)
    moves = torch.linalg.lstsq(root[:, free], -fixed).solution.T  # (out, in - 1)
    want = weight.clone()
    want[:, column], want[:, free] = target, weight[:, free] + moves
    assert torch.allclose(nb02.obs_step(weight, h, column, target), want, atol=1e-10)


@pytest.mark.parametrize("case", range(1, 6))
def test_the_loop_is_the_slow_method_and_its_errors_tell_the_loss(case):
    weight, h, *grid = (t.double() if isinstance(t, torch.Tensor) else t
                        for t in example("slow_gptq", case))
    u = nb02.upper_factor(h, 0.0)
    q, errors = nb02.gptq_columns(weight, u, *grid)
    assert torch.allclose(q, nb02.slow_gptq(weight, h, *grid), atol=1e-8)
    assert torch.allclose(weight - q, errors @ u, atol=1e-8)
    loss = (((weight - q) @ h) * (weight - q)).sum()
    assert torch.isclose(loss, errors.square().sum(), rtol=1e-4)


def test_the_loop_is_the_library_s():
    g = torch.Generator().manual_seed(0)
    weight, spec = torch.randn(6, 32, generator=g).double(), QuantSpec(3, 8)
    h = nb02._hessian(g, 32).double()
    grid = (t.repeat_interleave(8, 1) for t in fit_grid(weight.unflatten(1, (-1, 8)), spec))
    q, _ = nb02.gptq_columns(weight, nb02.upper_factor(h, 0.01), *grid, spec.max_code)
    theirs = gptq_quantize(weight, h, spec, GPTQOptions(desc_act=False))
    assert torch.allclose(q, theirs.dequantize(torch.float64), atol=1e-8)


@pytest.mark.parametrize("case", range(1, 7))
def test_masked_hessian_is_the_library_s(case):
    x, mask = example("masked_hessian", case)
    hessian = Hessian(x.shape[-1])
    hessian.update(x[mask.bool()])
    assert torch.allclose(nb02.masked_hessian(x, mask), hessian.matrix, rtol=1e-5, atol=1e-6)


def test_lazy_update_adds_up_the_single_columns():
    weight, errors, factor, start, end = example("lazy_update", 2)
    want = weight.clone()
    for j in range(start, end):
        want[:, end:] -= torch.outer(errors[:, j - start], factor[j, end:])
    assert torch.allclose(nb02.lazy_update(weight, errors, factor, start, end), want, atol=1e-6)


def test_undo_order_brings_every_column_home():
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 16, (3, 17), generator=torch.Generator().manual_seed(1))
    assert torch.equal(nb02.undo_order(codes[:, order], order), codes)
