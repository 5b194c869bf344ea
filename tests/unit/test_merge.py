"""Merging adapters into dense and into packed weights, and apart again."""

import copy

import pytest
import torch
from lora_models import base_of, logits, trained
from small_models import small_model
from torch import nn

from qlora_lib.gptq import Hessian
from qlora_lib.linear import QuantizedLinear
from qlora_lib.lora import (
    ALL_LINEAR,
    LoRAConfig,
    LoRALinear,
    inject_lora,
    lora_layers,
    replace_module,
    use_adapter,
)
from qlora_lib.merge import merge_lora, unmerge_lora
from tests.helpers import normal


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_merging_into_dense_keeps_the_logits(kind, rslora):
    model = base_of(kind)
    base = logits(model)
    inject_lora(model, ALL_LINEAR, rank=4, use_rslora=rslora)
    trained(model)
    before = logits(model)
    assert (before - base).abs().max() > 0.05
    rows = merge_lora(model)
    merged = logits(model)
    assert (merged - before).abs().max() < 1e-4
    assert len(rows) == 14 and all(r.lost < 1e-5 and r.update_norm > 0.01 for r in rows)
    with use_adapter(model, None):  # the base can still be asked for
        assert torch.equal(logits(model), base)
    unmerge_lora(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["dense", "grid4"])
def test_merge_and_unload_leave_plain_layers(kind):
    model = base_of(kind)
    inject_lora(model, rank=4)
    trained(model)
    before = logits(model)
    merge_lora(model, unload=True)
    assert not lora_layers(model) and (logits(model) - before).abs().max() < 1e-4
    assert type(model.get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear


def test_merging_keeps_the_bias():
    model = nn.Sequential(nn.Linear(16, 8))
    x, layer = normal(3, 16), LoRALinear(model[0])
    layer.add("default", LoRAConfig(rank=2))
    layer.lora_B["default"].data = normal(8, 2)
    replace_module(model, "0", layer)
    before = model(x)
    merge_lora(model, unload=True)
    assert (model(x) - before).abs().max() < 1e-5 and torch.equal(model[0].bias, layer.base.bias)


@pytest.mark.parametrize("kind", ["grid4", "nf4"])
def test_merging_into_the_grid_again_reports_what_is_lost(kind):
    model = base_of(kind)
    inject_lora(model, rank=4)
    trained(model, std=0.01)
    before, layers = logits(model), copy.deepcopy(lora_layers(model))
    rows = merge_lora(model, into="rtn")
    for row in rows:
        layer = layers[row.name]
        merged = lora_layers(model)[row.name].merged
        assert isinstance(merged, QuantizedLinear) and merged.spec == layer.base.spec
        update = layer.delta("default")
        missing = layer.base.dequantize() + update - merged.dequantize()
        assert abs(row.lost - float(missing.norm() / update.norm())) < 1e-5
        assert row.lost > 0.1  # a small update drowns in half a step
        ratio = float(update.norm() / layer.base.dequantize().norm())
        assert abs(row.update_norm - ratio) < 1e-6
    assert (logits(model) - before).abs().max() > 1e-4
    unmerge_lora(model)
    assert torch.equal(logits(model), before)


def test_merging_with_gptq_loses_less_on_the_layers_inputs():
    model = base_of("grid4")
    inject_lora(model, ("q_proj",), rank=4)
    trained(model)
    hessians = {}
    for i, path in enumerate(lora_layers(model)):
        x = normal(200, 64, seed=i) @ normal(64, 64, seed=9)
        hessians[path] = Hessian(64)
        hessians[path].update(x)
    errors = {}
    for into in ("rtn", "gptq"):
        merge_lora(model, into=into, hessians=hessians)
        errors[into] = 0.0
        for path, layer in lora_layers(model).items():
            d = layer.base.dequantize() + layer.delta("default") - layer.merged.dequantize()
            errors[into] += float((d @ hessians[path].matrix * d).sum())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_merging_refuses_what_it_cannot_do_and_then_leaves_the_model_alone():
    model = base_of("grid4")
    with pytest.raises(ValueError, match="no layer has an active adapter"):
        merge_lora(model)
    inject_lora(model, rank=4)
    trained(model)
    before = logits(model)
    with pytest.raises(ValueError, match="into='int4' must be 'dense', 'rtn' or 'gptq'"):
        merge_lora(model, into="int4")
    first = next(iter(lora_layers(model)))
    one = Hessian(64)
    one.update(normal(100, 64))
    with pytest.raises(ValueError, match="needs the Hessian of model.layers.0.self_attn.k_proj"):
        merge_lora(model, into="gptq", hessians={first: one})
    assert torch.equal(logits(model), before)  # not half merged
    dense = small_model()
    inject_lora(dense)
    with pytest.raises(ValueError, match="q_proj is dense; merge into='dense', then quantize"):
        merge_lora(dense, into="rtn")


