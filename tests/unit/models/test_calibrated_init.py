"""Whole models whose adapters start from what rounding lost."""

import copy

import pytest
import torch
from torch import nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.init import LOST_INITS, lost_part
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import find_linears
from qlora_lib.models.calibrated_init import inject_calibrated
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.merge_hessians import input_hessians, merge_hessians
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.dense_target import dense_target
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.quant.recipe import Recipe
from tests.support.lora_models import base_of, logits
from tests.support.small_models import built_once, small_model, small_tokenizer
from tests.support.tensors import relative

IDS = torch.randint(3, 260, (8, 40), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 30:] = 0
BATCHES = [{"input_ids": IDS[i : i + 4], "attention_mask": MASK[i : i + 4]} for i in (0, 4)]
SPEC = QuantSpec(2, 16, clip_search=False)
DENSE = small_model()


@built_once
def quantized(method="gptq", match_dense=False):
    model = small_model()
    spec = NF4Spec(32) if method == "nf4" else SPEC
    options = GPTQOptions(match_dense=match_dense)
    quantize_model(model, BATCHES if method == "gptq" else None, spec, method, options)
    return model


def hessians_of(model, dense=None):
    return input_hessians(model, find_linears(model, "all"), BATCHES, halves=True, dense=dense)


def off(model) -> float:
    return relative(logits(model), logits(DENSE))


@pytest.mark.parametrize("init", LOST_INITS)
@pytest.mark.parametrize("method", ["gptq", "rtn", "nf4"])
def test_a_base_of_any_method_comes_closer_to_the_dense_model(method, init):
    model = quantized(method)
    codes = {p: m.codes.clone() for p, m in find_linears(model, "all").items()}
    rows = inject_calibrated(model, DENSE, hessians_of(model), init, rank=16)
    assert [row.name for row in rows] == list(codes) and len(rows) == 14
    layers = lora_layers(model)
    for path, layer in layers.items():  # the base stays as it was
        assert torch.equal(layer.base.codes, codes[path]) and layer.residual_of is None
        assert layer.configs["default"].init == init
    assert all(row.after < row.before for row in rows if init == "cloq")
    assert off(model) < off(quantized(method))
    names = trainable_parameters(model)
    assert len(names) == 28 and all(".lora_" in n for n in names)


@pytest.mark.parametrize("scale", [dict(), dict(alpha=3), dict(use_rslora=True, alpha=9)], ids=str)
def test_the_scaling_is_divided_out(scale):
    model = quantized()
    path = "model.layers.1.mlp.down_proj"
    h, base = hessians_of(model)[path], model.get_submodule(path).dequantize()
    (row,) = inject_calibrated(model, DENSE, {path: h}, target_modules="all", rank={path: 6},
                               **scale)  # fmt: skip
    b, a = lost_part(DENSE.get_submodule(path).weight.detach() - base, 6, "cloq", h)
    layer = model.get_submodule(path)
    assert relative(layer.delta("default"), b @ a) < 1e-5
    norms = [t["default"].detach().norm().item() for t in (layer.lora_A, layer.lora_B)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert row.name == path and row.after < row.before


def test_dora_starts_from_the_lengths_of_the_mended_weight():
    """So that step 0 is that of the same adapter without it."""
    plain, dora = quantized(), quantized()
    inject_calibrated(plain, DENSE, hessians_of(plain), rank=4)
    inject_calibrated(dora, DENSE, hessians_of(dora), rank=4, use_dora=True)
    assert relative(logits(dora), logits(plain)) < 1e-5


def test_a_folder_a_state_dict_and_a_model_give_the_same(tmp_path):
    """Of a folder a layer at a time is read: no second dense model is in memory."""
    DENSE.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    found = []
    for dense in (DENSE, DENSE.state_dict(), tmp_path / "sharded", str(tmp_path / "sharded")):
        model = quantized()
        inject_calibrated(model, dense, hessians_of(model), rank=4)
        found.append(trainable_parameters(model))
    for other in found[1:]:
        assert all(torch.equal(p, found[0][n]) for n, p in other.items())


def test_what_is_saved_is_plain_lora_beside_the_untouched_base(tmp_path):
    model = quantized()
    inject_calibrated(model, DENSE, hessians_of(model), rank=4, alpha=3)
    save_quantized(model, small_tokenizer(), tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    for again in (quantized(), load_quantized(tmp_path / "base", "cpu", "fp32")[0]):
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(logits(again), logits(model))
        assert next(iter(lora_layers(again).values())).configs["default"].rank == 4


def test_a_second_adapter_starts_from_the_base_alone():
    model, want = quantized(), quantized()
    h = hessians_of(model)
    inject_lora(model, "all", rank=2)
    inject_calibrated(model, DENSE, h, rank=4, adapter="second")
    inject_calibrated(want, DENSE, h, rank=4)
    layers = lora_layers(model)
    for path, layer in lora_layers(want).items():
        assert torch.equal(layers[path].delta("second"), layer.delta("default"))


def test_hessians_of_adapted_layers_are_those_of_the_model():
    model = quantized()
    want = hessians_of(model)
    inject_lora(model, "all", rank=2)
    for path, hessian in merge_hessians(model, BATCHES).items():
        assert torch.equal(hessian.matrix, want[path].matrix)


def test_a_base_that_aims_at_the_dense_outputs_has_an_adapter_that_does():
    model = quantized(match_dense=True)
    h, path = hessians_of(model, DENSE), "model.layers.1.mlp.up_proj"
    first = model.get_submodule(path).dequantize()
    rows = inject_calibrated(model, DENSE, h, rank=16)
    target = dense_target(DENSE.get_submodule(path).weight.detach(), h[path], 0.01)
    b, a = lost_part(target - first, 16, "cloq", h[path])
    assert relative(model.get_submodule(path).delta("default"), b @ a) < 1e-5
    assert all(row.after < row.before for row in rows)
    # Its inputs are those of the same tokens in the dense model.
    own = {}
    hook = DENSE.get_submodule(path).register_forward_pre_hook(lambda _, x: own.update(x=x[0]))
    DENSE(BATCHES[0]["input_ids"], attention_mask=BATCHES[0]["attention_mask"])
    hook.remove()
    seen = []
    model = quantized(match_dense=True)
    model.get_submodule(path).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    one = input_hessians(model, {path: model.get_submodule(path)}, BATCHES[:1], dense=DENSE)
    keep = MASK[:4].bool()
    cross = own["x"][keep].T @ seen[0][keep] / keep.sum()
    assert relative(one[path].cross, cross.detach()) < 1e-5


def test_quantizing_again_beside_the_adapter_helps(tmp_path):
    once, again, recipe = quantized(), quantized(), Recipe.of(SPEC)
    first = inject_calibrated(once, DENSE, hessians_of(once), rank=8)
    h = hessians_of(again)
    rows = inject_calibrated(again, DENSE, h, rank=8, again=recipe, steps=8)
    assert sum(row.after for row in rows) < 0.95 * sum(row.after for row in first)
    save_quantized(again, small_tokenizer(), tmp_path / "base")
    save_adapter(again, tmp_path / "adapter")
    loaded, _ = load_quantized(tmp_path / "base", "cpu", "fp32")
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(again))
    with pytest.raises(ValueError, match="init='cloq' made this adapter together with its"):
        load_adapter(quantized(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no model by itself"):
        inject_lora(again, "all", rank=2, adapter="second")


def test_a_base_that_aims_at_the_dense_outputs_is_quantized_again_towards_them():
    model = quantized(match_dense=True)
    recipe = Recipe.of(SPEC, options=GPTQOptions(match_dense=True))
    rows = inject_calibrated(model, DENSE, hessians_of(model, DENSE), rank=8, again=recipe)
    assert all(row.after < row.before for row in rows)


def broken(path="model.layers.1.mlp.up_proj", value=float("nan")):
    model = copy.deepcopy(DENSE)
    model.get_submodule(path).weight.data[0, 0] = value
    return model


def of_other_shape():
    model = copy.deepcopy(DENSE)
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 64, bias=False)
    return model


@pytest.mark.parametrize(
    "base, given, message",
    [
        ("dense", dict(), "q_proj: init='cloq' starts from what rounding lost, and this base is"),
        ("gptq", dict(hessians=None), r"layers\.0.*q_proj: init='cloq' weighs .* needs its Hess"),
        ("gptq", dict(hessians={}), r"layers\.0.*q_proj: init='cloq' weighs .* needs its Hess"),
        ("gptq", dict(init="loftq"), "init='loftq' is not one of"),
        ("gptq", dict(dense={}), r"should hold model\.layers\.0.*weight \(64, 64\), found nothing"),
        ("gptq", dict(dense=quantized()), "found nothing; give those that the base was quantized"),
        ("gptq", dict(dense=of_other_shape()), r"up_proj.* \(128, 64\), found \(64, 64\)"),
        ("gptq", dict(dense=broken()), r"layers\.1\.mlp\.up_proj: the weight holds"),
        ("gptq", dict(rank=100), "rank=100 exceeds the rank of a layer"),
        ("gptq", dict(alpha=0), "alpha=0: expected a number above 0"),
        ("gptq", dict(target_modules="x_proj"), "match no linear layer"),
        ("gptq", dict(again=Recipe.of(SPEC), use_dora=True), "leave use_dora out"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(base, given, message):
    model = base_of("dense") if base == "dense" else quantized()
    before = logits(model)
    given = dict(dense=DENSE, hessians=hessians_of(model)) | given
    with pytest.raises(ValueError, match=message):
        inject_calibrated(model, **given)
    assert not lora_layers(model) and torch.equal(logits(model), before)
    kind = nn.Linear if base == "dense" else QuantizedLinear
    assert type(model.model.layers[0].mlp.up_proj) is kind


def test_a_missing_folder_is_named(tmp_path):
    model = quantized()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inject_calibrated(model, tmp_path / "nowhere", hessians_of(model))


@pytest.mark.parametrize("given", [dict(init="cloq"), dict(starts={})], ids=str)
def test_inject_lora_sends_you_there(given):
    with pytest.raises(ValueError, match="products that inject_calibrated computes"):
        inject_lora(quantized(), **given)
