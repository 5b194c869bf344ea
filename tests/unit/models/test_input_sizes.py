"""The largest inputs of each layer, channel by channel."""

import pytest
import torch

from qlora_lib.models.input_sizes import input_absmax
from tests.support.calibrated_models import STAGES, batches
from tests.support.small_models import small_model


def test_they_are_the_largest_over_real_tokens():
    model, padded = small_model(), batches(2, rows=2, length=8, pad=5)
    found = input_absmax(model.train(), padded)
    assert model.training and len(found) == 14
    want: dict = {}
    with torch.no_grad():
        for batch in batches(2, rows=2, length=8):  # the same tokens, without padding
            hidden = model.eval().model(**batch, output_hidden_states=True).hidden_states
            for i in range(2):
                x = model.model.layers[i].input_layernorm(hidden[i]).abs().amax((0, 1))
                want[i] = torch.maximum(want.get(i, x), x)
    for i in range(2):
        for name in STAGES[0]:  # q, k and v share an input
            assert torch.allclose(found[f"model.layers.{i}.{name}"], want[i], atol=1e-5)


def test_only_the_layers_asked_for():
    model = small_model()
    asked = {"up": model.model.layers[1].mlp.up_proj}
    assert {n: x.shape for n, x in input_absmax(model, batches(1), asked).items()} == {"up": (64,)}
    with pytest.raises(ValueError, match="no calibration batches"):
        input_absmax(model, [])
