"""Linear layers whose inputs are rounded, token by token."""

import copy

import pytest
import torch

from qlora_lib.layers.rounded_inputs import rounded_inputs, rounded_tokens
from qlora_lib.lora.inject import inject_lora
from qlora_lib.models.quantize import quantize_model
from qlora_lib.models.rescale import plant_outliers
from qlora_lib.models.rotate import rotate_model
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.grid import QuantSpec, quant_matmul
from qlora_lib.quant.minifloat import decode_float, quantize_fp8
from tests.support.calibrated_models import logits
from tests.support.small_models import small_model
from tests.support.tensors import normal, relative


def test_a_packed_layer_then_gives_what_the_integer_product_gives():
    model = small_model()
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    layer, x = model.model.layers[0].mlp.up_proj, normal(2, 5, 64)
    with rounded_inputs(model, 8), torch.no_grad():
        got = layer(x)
    assert (got - quant_matmul(x, layer.quantized)).abs().max() < 1e-4  # sums in another order
    assert not torch.equal(got, layer(x))  # and afterwards the input is as it was


@pytest.mark.parametrize("how, most", [
    (8, 0.06), (4, 0.8), ("e4m3", 0.2), ("e5m2", 0.4), ("nvfp4", 0.7), ("mxfp4", 0.9),
])  # fmt: skip
def test_fewer_bits_cost_more(how, most):
    model = small_model()
    before = logits(model)
    settings = {"bits": how} if isinstance(how, int) else {"how": how}
    with rounded_inputs(model, **settings):
        error = relative(logits(model), before)
    assert most / 10 < error < most
    assert torch.equal(logits(model), before)


def test_each_token_has_a_grid_of_its_own_at_any_shape_and_dtype():
    x = torch.stack([normal(16), 1000 * normal(16)])[None].bfloat16()  # (1, 2, 16)
    got = rounded_tokens(x, 4)
    assert got.shape == x.shape and got.dtype == torch.bfloat16
    for t in range(2):
        assert len(got[0, t].unique()) <= 16 and relative(got[0, t].float(), x[0, t].float()) < 0.2


def test_floats_are_those_of_their_formats():
    x = normal(3, 32, seed=1)
    x[1] *= 1000
    codes, scale = quantize_fp8(x, "e4m3")
    assert torch.equal(rounded_tokens(x, how="e4m3"), decode_float(codes, "e4m3") * scale)
    for how in ("mxfp4", "nvfp4"):
        got = rounded_tokens(x[None], how=how)[0]
        assert torch.equal(got, quantize_fp4(x, FP4Spec(how)).dequantize())


def test_outliers_take_the_grid_and_a_rotation_gives_it_back():
    """The function is the same in all three models; only what rounding makes of it differs."""
    model, errors = small_model(), {}
    planted = copy.deepcopy(model)
    plant_outliers(planted, 64, seed=0)
    rotated = copy.deepcopy(planted)
    rotate_model(rotated, online=True)
    for name, m in {"own": model, "planted": planted, "rotated": rotated}.items():
        exact = logits(m)
        with rounded_inputs(m, 8):
            errors[name] = relative(logits(m), exact)
    assert errors["planted"] > 4 * errors["own"] and errors["rotated"] < errors["planted"] / 2


def test_a_layer_with_an_adapter_rounds_the_input_of_its_base_alone():
    model, x = small_model(), normal(3, 64)
    inject_lora(model, ("up_proj",), rank=2)
    layer = model.model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B["default"])
    with torch.no_grad():
        update = layer(x) - layer.base(x)
        with rounded_inputs(model, 4):
            got = layer(x)
        assert torch.allclose(got, layer.base(rounded_tokens(x, 4)) + update, atol=1e-4)


@pytest.mark.parametrize("how", ["fp", None, "e9m9"])
def test_unknown_ways_are_refused(how):
    with pytest.raises(ValueError, match="must be"), rounded_inputs(small_model(), how=how):
        pass
