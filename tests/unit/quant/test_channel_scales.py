"""Factors for channels: SmoothQuant's and AWQ's."""

import pytest
import torch

from qlora_lib.quant.channel_scales import awq_search, rounded, smoothing_scales
from qlora_lib.quant.gptq import output_error
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.tensors import normal

SPEC = QuantSpec(bits=3, group_size=16)


def layer(outlier: float = 30.0):
    """A weight (24, 32), and the mean of x^T x of inputs whose channel 5 is an outlier."""
    x = normal(400, 32, seed=1)
    x[:, 5] *= outlier
    return normal(24, 32, seed=2), x.t() @ x / len(x)


def test_half_the_range_goes_over():
    x, w = torch.tensor([8.0, 2.0, 0.0, 3.0]), torch.tensor([2.0, 2.0, 5.0, 0.0])
    s = smoothing_scales(x, w)
    assert torch.allclose(s, torch.tensor([2.0, 1.0, 1.0, 1.0]))  # nothing to move: 1
    assert torch.allclose((x / s)[:2], (w * s)[:2])  # both with the same range
    assert torch.allclose(smoothing_scales(x, w, 1.0)[:2], x[:2])  # inputs all of size 1
    assert torch.allclose(smoothing_scales(x, w, 0.0)[:2], 1 / w[:2])  # weights
    small = smoothing_scales(x / 100, w / 100)  # the unit of both does not matter
    assert torch.allclose(small, s)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_a_part(alpha):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        smoothing_scales(torch.ones(2), torch.ones(2), alpha)


def test_awq_finds_the_exponent_that_costs_the_output_least():
    w, h = layer()
    scale, alpha, errors = awq_search([w], h, SPEC)
    plain = QuantSpec(3, 16, clip_search=False)
    by_hand = []
    for step in range(21):
        s = h.diagonal().sqrt() ** (step / 20)
        s /= (s.max() * s.min()).sqrt()
        by_hand.append(output_error(w, quantize_rtn(w * s, plain).dequantize() / s, h))
    assert torch.allclose(torch.tensor(errors), torch.tensor(by_hand), rtol=1e-3)
    assert alpha == errors.index(min(errors)) / 20 and 0 < alpha < 1
    assert min(errors) < 0.6 * errors[0]  # 30 times as large: it pays
    assert scale[5] == scale.max() and scale.max() * scale.min() == pytest.approx(1, abs=1e-4)
    small, at, _ = awq_search([w], h / 2**20, SPEC)  # nor does the inputs' unit matter
    assert at == alpha and torch.allclose(small, scale, rtol=1e-4)


def test_weights_that_share_an_input_share_the_factors():
    w, h = layer()
    both = awq_search([w, 3 * normal(8, 32, seed=4)], h, SPEC)
    assert both[0].shape == (32,)
    alone = awq_search([w], h, SPEC)
    assert len(both[2]) == len(alone[2]) == 21 and both[2] != alone[2]


def test_where_inputs_are_alike_nothing_is_scaled_much():
    scale, _, errors = awq_search([normal(24, 32, seed=2)], torch.eye(32), SPEC)
    assert torch.allclose(scale, torch.ones(32)) and len(set(errors)) == 1


def test_dead_inputs_get_the_factor_of_the_least():
    w, h = layer()
    h[3], h[:, 3] = 0, 0
    scale, _, errors = awq_search([w], h, SPEC)
    assert torch.isfinite(scale).all() and scale[3] == scale.min() and min(errors) < errors[0]


def test_rounded_is_what_the_packed_weight_decodes_to():
    w = normal(24, 32)
    assert torch.equal(rounded(w, SPEC), quantize_rtn(w, SPEC).dequantize())
