"""Perplexity against float64, token by token."""

import math

import pytest
import torch

from experiments.perplexity import perplexity
from tests.support.small_models import small_model

IDS = torch.randint(3, 300, (75,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("window", [10, 32, 75, 200])
def test_it_is_that_of_float64_token_by_token(window):
    """fp32 against float64 on 75 tokens: relative 1e-4."""
    model, exact = small_model(), small_model().double()
    total, count = 0.0, 0
    for start in range(0, 75, window):
        part = IDS[start : start + window]
        for i in range(1, len(part)):
            with torch.no_grad():
                log_p = exact(part[None, :i]).logits[0, -1].log_softmax(-1)
            total -= log_p[part[i]].item()
            count += 1
    found = perplexity(model, IDS, window)
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.tokens == count and str(found).startswith(f"{found.value:.3f} (")


def test_a_model_that_knows_nothing_hesitates_between_all_tokens():
    model = small_model()
    model.lm_head.weight.data.zero_()
    vocab = model.config.vocab_size
    assert perplexity(model, IDS, 25).value == pytest.approx(vocab, rel=1e-5)


def test_it_refuses_too_little_and_too_much():
    for ids, window in ((IDS[:1], 16), (IDS, 1), (IDS, 257)):
        with pytest.raises(ValueError, match="at least 2 tokens and a window"):
            perplexity(small_model(), ids, window)
    model = small_model().train()
    perplexity(model, IDS.tolist(), 32)
    assert model.training
