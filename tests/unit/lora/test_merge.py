"""Merging adapters into dense and into packed weights, and apart again."""

import copy

import pytest
import torch
from torch import nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import inject_lora, set_adapter, trainable_parameters, use_adapter
from qlora_lib.lora.layer import LoRAConfig, LoRALinear, lora_layers
from qlora_lib.lora.merge import merge_into_original, merge_lora, unmerge_lora
from qlora_lib.lora.targets import ALL_LINEAR, replace_module
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.lora_models import IDS, adapted, base_of, logits, trained
from tests.support.small_models import small_model
from tests.support.tensors import bf16_autocast, normal, relative


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


@pytest.mark.parametrize("bias, model", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_packed_layers_bias_of_another_dtype_goes_along(bias, model):
    """A file's biases keep their dtype, whatever the rest of the model is loaded in."""
    bias, dtype = getattr(torch, bias), getattr(torch, model)
    quantized = quantize_rtn(normal(8, 16), QuantSpec(4, 8))
    layer = LoRALinear(QuantizedLinear(quantized, normal(8).to(bias)))
    layer.add("default", LoRAConfig(rank=2))
    model = nn.Sequential(nn.Linear(16, 16).to(dtype), layer)
    x = normal(3, 16).to(dtype)
    before = model(x)
    merge_lora(model)
    assert layer.merged.bias.dtype == dtype and relative(model(x).float(), before.float()) < 1e-2
    assert layer.base.bias.dtype == bias and torch.equal(layer.base.bias, normal(8).to(bias))


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_changes_no_merge(dora):
    """Within it a product would be of bf16's 8 bits, and `lost` would not show it."""
    merged = []
    for around in (torch.no_grad, bf16_autocast):
        model, original = adapted(base_of("grid4"), use_dora=dora), small_model()
        with around():
            merge_into_original(model, original)
            merge_lora(model, unload=True)
        merged.append([*model.parameters(), *original.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*merged, strict=True))


def test_a_merged_model_keeps_its_default():
    """What would be chosen has no effect: the merged weights are used."""
    model = adapted(small_model())
    inject_lora(model, rank=2, adapter="b")
    merge_lora(model)
    for name in ("b", None, "default"):
        with pytest.raises(ValueError, match="q_proj is merged .*; call unmerge_lora"):
            set_adapter(model, name)
    assert {m.active for m in lora_layers(model).values()} == {"default"}
    unmerge_lora(model)
    set_adapter(model, None)
    assert torch.equal(logits(model), logits(small_model()))


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


def test_gptq_does_not_make_nf4_and_says_so():
    model = base_of("nf4")
    inject_lora(model, rank=4)
    with pytest.raises(ValueError, match="q_proj is NF4, which GPTQ does not make; merge into="):
        merge_lora(model, into="gptq", hessians={})


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("into", ["rtn", "gptq"])
def test_a_merge_that_fails_in_its_last_layer_leaves_none_merged(into, unload):
    model = base_of("grid4")
    inject_lora(model, rank=4)
    trained(model)
    last, layer = list(lora_layers(model).items())[-1]
    layer.lora_B["default"].data[3, 1] = float("nan")
    hessians = {path: Hessian(64) for path in lora_layers(model)}
    for hessian in hessians.values():
        hessian.update(normal(100, 64))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"{last}: .*NaN or Inf"):
        merge_lora(model, into=into, hessians=hessians, unload=unload)
    assert all(m.merged is None for m in lora_layers(model).values())
    assert dict(model.named_modules()) == before


# --- into the original --------------------------------------------------------------------------


def quantized_and_original(kind="grid4", dtype=torch.float32):
    model, original = base_of(kind), small_model().to(dtype)
    inject_lora(model, ALL_LINEAR, rank=4)
    return trained(model), original


@pytest.mark.parametrize("kind", ["dense", "grid3", "nf4"])
def test_the_original_gets_the_update_and_not_the_quantization_error(kind):
    model, original = quantized_and_original(kind)
    rows = merge_into_original(model, original)
    weights = dict(small_model().named_modules())
    for row, (path, layer) in zip(rows, lora_layers(model).items(), strict=True):
        w, update = weights[path].weight.detach(), layer.delta("default")
        assert row.name == path and torch.equal(original.get_submodule(path).weight, w + update)
        base = layer.base.weight if kind == "dense" else layer.base.dequantize()
        assert abs(row.base_gap - float((w - base).norm() / update.norm())) < 1e-5
        assert abs(row.update_norm - float(update.norm() / w.norm())) < 1e-6
        assert row.lost < 1e-6 and (row.base_gap == 0) == (kind == "dense")
    gap = (logits(original) - logits(model)).abs().max()
    if kind == "dense":  # the same base: the same model
        assert gap < 1e-4
    else:  # another model than the one that was trained; merged into its own base it is that one
        assert gap > 0.1
        merge_lora(model, unload=True)
        assert (logits(model) - logits(quantized_and_original(kind)[0])).abs().max() < 1e-4


def test_the_original_keeps_its_dtype_and_tells_what_rounding_took():
    model, original = quantized_and_original("nf4", torch.bfloat16)
    rows = merge_into_original(model, original)
    assert {p.dtype for p in original.parameters()} == {torch.bfloat16}
    # Half a step of bf16's 8 bits, spread evenly, is 2^-9 / sqrt(3) to twice that of a weight.
    for row in rows:
        assert 2**-10.8 < row.lost * row.update_norm < 2**-8.8


def test_tied_embeddings_are_not_dragged_along():
    model, original = small_model(), small_model()
    inject_lora(model, ("lm_head",), rank=4)
    trained(model)
    embeddings = original.model.embed_tokens.weight.detach().clone()
    merge_into_original(model, original)
    assert torch.equal(original.model.embed_tokens.weight, embeddings)
    assert (logits(original) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "original, message",
    [
        (lambda: small_model(seed=1), "`original` is another model"),
        (lambda: small_model(layers=3), "`original` is another model"),
        (lambda: base_of("grid4"), r"0.self_attn.q_proj: .* \(64, 64\), found QuantizedL"),
        (lambda: adapted(small_model()), "q_proj: .*found LoRALinear"),
    ],
)
def test_only_the_dense_original_takes_the_update(original, message):
    model, original = base_of("grid4"), original()
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_into_original(model, original)
    inject_lora(model, rank=4)
    trained(model)
    before = logits(original)
    with pytest.raises(ValueError, match=message):
        merge_into_original(model, original)
    assert torch.equal(logits(original), before)


@pytest.mark.parametrize("given", [{}, dict(alpha=3), dict(use_rslora=True)], ids=str)
def test_the_original_gets_what_pissa_learned(given):
    """The adapter began as a part of the weight, which the original has already."""
    model, original = small_model(), small_model()
    inject_lora(model, ALL_LINEAR, rank=4, init="pissa", **given)
    rows = merge_into_original(model, original)  # nothing yet, to the bit
    assert torch.equal(logits(original), logits(small_model()))
    assert all(row.update_norm < 1e-30 for row in rows)
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in trainable_parameters(model).values():
            p -= 0.05 * p.grad
    rows = merge_into_original(model, original)
    assert relative(logits(original), logits(model)) < 1e-4
    assert relative(logits(small_model()), logits(model)) > 1e-2
    # it was trained beside the weight itself, taken apart: no quantization error
    assert all(row.update_norm > 1e-4 and row.base_gap < 1e-2 for row in rows)


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_an_adapter_of_its_own_quantized_base_fits_no_original(init):
    model, original = small_model(), small_model()
    inject_lora(model, ALL_LINEAR, rank=4, init=init, spec=NF4Spec(32))
    with pytest.raises(ValueError, match="q_proj: adapter 'default' was made together"):
        merge_into_original(model, original)
    assert torch.equal(logits(original), logits(small_model()))
