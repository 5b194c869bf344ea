"""The U of Algorithm 1 that notebook 02 works with, beside the library's factor."""

import pytest
import torch

from course.nb02.inverse_factor import inverse_factor
from tests.support.tensors import ar1


@pytest.mark.parametrize("ordered", [False, True])
def test_inverse_factor_inverts_the_damped_hessian(ordered):
    x = ar1(300, 32, dtype=torch.float64)
    h = x.T @ x / 300
    order = h.diagonal().argsort(descending=True) if ordered else torch.arange(32)
    u = inverse_factor(h, 0.01, order if ordered else None)
    assert torch.equal(u, u.triu())
    eye = torch.eye(32, dtype=torch.float64)
    damped = h + 0.01 * h.diagonal().mean() * eye
    assert (u.T @ u @ damped[order][:, order] - eye).abs().max() < 1e-9
