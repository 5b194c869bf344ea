"""Channels rescaled between their writer and readers; outliers, SmoothQuant and AWQ."""

import copy

import pytest
import torch

from qlora_lib.lora.targets import find_linears
from qlora_lib.models.input_sizes import input_absmax
from qlora_lib.models.merge_hessians import input_hessians
from qlora_lib.models.quantize import quantize_model
from qlora_lib.models.rescale import (
    awq_scales,
    plant_outliers,
    rescale_channels,
    rescaling_places,
    smooth,
)
from qlora_lib.quant.grid import QuantSpec
from tests.support.calibrated_models import batches, logits
from tests.support.families import build
from tests.support.known_layout import EXACT, FAMILIES, change, known
from tests.support.small_models import small_model


@pytest.mark.parametrize("family", FAMILIES)
def test_any_factors_leave_the_function_alone(family):
    model = known(family)
    before = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    scales = {name: torch.rand(place.channels, generator=g) * 4 + 0.25
              for name, place in rescaling_places(model).items()}  # fmt: skip
    assert len(scales) == 4 * model.config.num_hidden_layers
    rescale_channels(model, scales)
    assert change(model, before) < EXACT
    for name, place in rescaling_places(model).items():  # and yet each layer is another one
        for path in place.readers:
            was, new = (m.get_submodule(path).weight for m in (before, model))
            assert (new / was - 1).abs().max() > 0.5


def test_places_of_a_llama_with_shared_values():
    model = small_model()  # 4 query heads, 2 key heads of 16
    places = rescaling_places(model)
    assert [name.removeprefix("model.layers.0.") for name in places][:4] == [
        "input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj",
    ]  # fmt: skip
    values = places["model.layers.1.self_attn.v_proj"]
    assert (values.channels, values.head_dim, values.repeats) == (32, 16, 2)
    assert values.readers == ("model.layers.1.self_attn.o_proj",)
    channels = torch.arange(32.0)
    columns = values.columns(channels)  # two query heads read one key head
    assert columns.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
    assert torch.equal(values.by_channel(columns), torch.stack([channels, channels]))


def test_planted_outliers_are_in_the_inputs_and_not_in_the_logits():
    model, ids = small_model(), batches(1)
    before = copy.deepcopy(model)
    factors = plant_outliers(model, 64, channels=2, seed=3)
    assert torch.equal(logits(model), logits(before))  # a power of two: to the bit
    was, new = input_absmax(before, ids), input_absmax(model, ids)
    for name, place in rescaling_places(model).items():
        made = place.columns(1 / factors[name]) > 1
        assert made.sum() == 2 * place.repeats
        for path in place.readers:
            assert torch.equal(new[path][made], 64 * was[path][made])
            assert torch.equal(new[path][~made], was[path][~made])
    norms = [factors[n] for n in factors if "layernorm" in n]
    assert all(torch.equal(norms[0], other) for other in norms)  # the same channels all along
    other = plant_outliers(small_model(), 64, channels=2, seed=4)
    assert any(not torch.equal(other[name], factors[name]) for name in factors)


def test_outliers_may_be_planted_in_some_places_only():
    model = small_model()
    before, name = copy.deepcopy(model), "model.layers.0.mlp.up_proj"
    assert list(plant_outliers(model, 10, places=[name])) == [name]
    changed = {n for n, p in model.named_parameters()
               if not torch.equal(p, before.get_parameter(n))}  # fmt: skip
    assert changed == {f"{name}.weight", "model.layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_undoes_planted_outliers_and_keeps_the_function(family):
    model, ids = known(family), batches(2)
    before = copy.deepcopy(model)
    plant_outliers(model, 50, channels=1, seed=0)

    def spread(model) -> float:
        """The largest input of a layer over its median one, the worst layer's."""
        return max(float(x.amax() / x.median()) for x in input_absmax(model, ids).values())

    planted = spread(model)
    smooth(model, input_absmax(model, ids), alpha=0.5)
    assert change(model, before) < EXACT
    assert spread(model) < planted / 5


SPEC = QuantSpec(3, 16, clip_search=False)


def error(model, ids) -> float:
    """The mean relative error of the layers' outputs after rounding to nearest."""
    report = quantize_model(copy.deepcopy(model), ids, SPEC, "rtn")
    return sum(row.output_error for row in report) / len(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_keeps_the_function_and_lowers_the_error_of_planted_outliers(family):
    """Rounding to nearest errs most where a weight that was made small meets a large input."""
    model, ids = known(family), batches(2)
    before = copy.deepcopy(model)
    plant_outliers(model, 50, channels=1, seed=0)
    planted = error(model, ids)
    hessians = input_hessians(model, find_linears(model, "all"), ids)
    scales, rows = awq_scales(model, hessians, SPEC, steps=8)
    assert change(model, before) < EXACT  # the search changes nothing
    rescale_channels(model, scales)
    assert change(model, before) < EXACT
    assert error(model, ids) < 0.9 * planted
    assert [row.place for row in rows] == list(rescaling_places(model))
    assert all(0 <= row.exponent <= 1 and row.after <= row.before for row in rows)
    assert any(row.exponent > 0 for row in rows)


def test_what_cannot_be_rescaled_is_refused_by_name():
    with pytest.raises(ValueError, match="'gemma3_text'.*llama, mistral"):
        rescaling_places(build("gemma3"))
    with pytest.raises(ValueError, match="'Linear'"):
        rescaling_places(torch.nn.Linear(2, 2))
    model = small_model()
    before = copy.deepcopy(model)
    name = "model.layers.0.input_layernorm"
    for scales, match in [
        ({"model.norm": torch.ones(64)}, "no place 'model.norm'"),
        ({name: torch.ones(63)}, r"\(63,\) must be positive, \(64,\)"),
        ({name: torch.zeros(64)}, "must be positive"),
        ({name: torch.full((64,), float("nan"))}, "NaN"),
    ]:
        with pytest.raises(ValueError, match=match):
            rescale_channels(model, scales)
    with pytest.raises(ValueError, match="expected 1 to 64 channels"):
        plant_outliers(model, 2, channels=65)
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters())
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    with pytest.raises(ValueError, match="is a QuantizedLinear; change a dense model"):
        rescaling_places(model)
