"""The probabilities that notebook 08 draws a token with, against transformers' warpers."""

import pytest
import torch
from course.nb08.next_token import token_probabilities
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from tests.support.tensors import normal


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 1.0])
def test_token_probabilities_are_those_that_generate_draws_from(temperature, top_p):
    logits = normal(5, 40, seed=1, std=3)
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    warped = TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    torch.testing.assert_close(
        token_probabilities(logits, temperature, top_p), warped.softmax(-1), rtol=1e-5, atol=1e-7
    )


def test_temperature_zero_is_greedy_and_the_likeliest_token_always_stays():
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0])
    assert token_probabilities(logits, 0).tolist() == [0, 1, 0, 0]
    assert token_probabilities(logits, 1, 1e-6).tolist() == [0, 1, 0, 0]
    for bad in ({"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}):
        with pytest.raises(ValueError, match="expected temperature >= 0"):
            token_probabilities(logits, **bad)


def test_top_p_1_cuts_no_token_though_sums_are_rounded():
    logits = torch.cat([torch.tensor([20.0]), normal(511, std=2)])
    assert (token_probabilities(logits, 1.0, 1.0) > 0).all()
