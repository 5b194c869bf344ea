"""The references of notebook 09's exercises against the library and other definitions."""
import itertools

import pytest
import torch

from course.kit import example
from course.nb09 import exercises as nb09
from qlora_lib.quant.damping import expected_loss
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.refit import refit_scales


@pytest.mark.parametrize("case", [1, 2, 3])
def test_foretold_loss_is_the_library_s_and_what_random_rounding_errors_lose(case):
    factor, other = example("foretold_loss", case)
    h = torch.linalg.inv((factor.T @ factor).double())
    want = nb09.foretold_loss(factor, other)
    assert expected_loss(h, other.double(), 0.0) == pytest.approx(want, rel=1e-5)
    g = torch.Generator().manual_seed(0)
    z = torch.rand(100_000, len(other), generator=g) - 0.5  # rounding errors, the step is 1
    d = z @ (factor / factor.diagonal().unsqueeze(1))  # W - Q
    lost = ((d @ other) * d).sum(1).mean().item()
    assert 12 * lost == pytest.approx(want, rel=0.03)  # a mean of 100,000


@pytest.mark.parametrize("case", [1, 2, 4])
def test_the_nearest_plane_is_the_nearest_point_or_close_to_it(case):
    vectors, y = example("nearest_plane", case)
    numbers = nb09.nearest_plane(vectors, y)
    near = itertools.product(range(-2, 3), repeat=len(numbers))
    around = numbers + torch.tensor(list(near)).to(numbers)
    least = (around @ vectors.T - y).square().sum(1).min()
    own = (vectors @ numbers - y).square().sum()
    _, r = torch.linalg.qr(vectors)
    assert least <= own <= r.diagonal().square().sum() / 4 + 1e-9  # half of each side of a brick


def test_scales_from_tokens_and_from_h_are_the_library_s():
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 32, generator=g), torch.randn(5, 32, generator=g)
    x[:, 1:] += 0.8 * x[:, :-1]
    q = quantize_rtn(weight, QuantSpec(3, 8))
    zero = q.zero_point.float().repeat_interleave(8, 1)
    numbers = q.unpacked(slice(None)).float() - zero
    h = x.T @ x / len(x)
    mine = nb09.refit_rows(h, weight, numbers, 8)
    theirs = refit_scales(weight, q, h, damp_percent=0).scale.float()
    assert torch.allclose(mine, theirs, rtol=2e-3)  # theirs are fp16
    for row in range(5):
        alone = nb09.refit_row(x, weight[row], numbers[row], 8)
        assert torch.allclose(alone, mine[row], rtol=1e-3)


def test_the_dense_weight_is_the_library_s():
    g = torch.Generator().manual_seed(0)
    dense = torch.randn(100, 6, generator=g)
    x = dense + 0.3 * torch.randn(100, 6, generator=g)
    weight = torch.randn(4, 6, generator=g)
    hessian = Hessian(6)
    hessian.update(x, dense)
    mine = nb09.dense_weight(weight, hessian.matrix, hessian.cross)
    assert torch.allclose(mine, dense_target(weight, hessian, 0.0), rtol=1e-3, atol=1e-5)
    fitted = torch.linalg.lstsq(x, dense @ weight.T).solution.T
    assert torch.allclose(mine, fitted, rtol=1e-3, atol=1e-4)
