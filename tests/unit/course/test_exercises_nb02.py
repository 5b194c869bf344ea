"""The references of notebook 02's exercises against definitions made another way.

That each wrong answer is told its own message, and that the folded solutions pass, is
tested for all exercises together.
"""
import pytest
import torch

from course.kit import check, example
from course.kit.exercise import registered
from course.nb02 import exercises as nb02
from qlora_lib.quant.damping import expected_loss
from qlora_lib.quant.hessian import Hessian

NAMES = ("obs_step", "masked_hessian", "lazy_update", "undo_order", "foretold_loss")


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


@pytest.mark.parametrize("case", [1, 2, 3, 4])
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


@pytest.mark.parametrize("case", [1, 2, 3])
def test_foretold_loss_is_the_library_s_and_what_random_rounding_errors_lose(case):
    factor, other = example("foretold_loss", case)
    h = torch.linalg.inv((factor.T @ factor).double())
    want = nb02.foretold_loss(factor, other).item()
    assert expected_loss(h, other.double(), 0.0) == pytest.approx(want, rel=1e-5)
    g = torch.Generator().manual_seed(0)
    z = torch.rand(100_000, len(other), generator=g) - 0.5  # rounding errors, the step is 1
    d = z @ (factor / factor.diagonal().unsqueeze(1))  # W - Q
    lost = ((d @ other) * d).sum(1).mean().item()
    assert 12 * lost == pytest.approx(want, rel=0.03)  # a mean of 100,000
