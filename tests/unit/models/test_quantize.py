"""Whole models: calibration block by block, reports, dtypes, the way back to dense."""

import copy

import pytest
import torch
from torch import nn

from qlora_lib.base.devices import dtype_name, resolve_dtype
from qlora_lib.layers.blocks import decoder_blocks
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.models import quantize as models
from qlora_lib.models.quantize import dequantize_model, quantize_model, quantized_layers
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import NF4Spec, quantize_nf4
from tests.support.calibrated_models import STAGES, batches, logits, packed, same
from tests.support.small_models import small_model
from tests.support.tensors import normal, relative

SPEC = QuantSpec(3, 16, clip_search=False)  # a search would only take time here


def inputs_of(model, path: str, data) -> Hessian:
    """The Hessian of a layer's real inputs in the whole model, padding left out."""
    layer = model.get_submodule(path)
    hessian, mask = Hessian(layer.in_features), None
    handle = layer.register_forward_hook(lambda m, args, out: hessian.update(args[0][mask]))
    for batch in data:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    handle.remove()
    return hessian


def test_each_layer_is_calibrated_on_its_own_inputs_of_the_quantized_model():
    """By hand: whole forward passes, in which all layers before the next are quantized."""
    model, by_hand, data = small_model(), small_model(), batches()
    report = {row.name: row for row in quantize_model(model, data, SPEC)}
    hessians = {}
    for block in range(2):
        for stage in STAGES:
            paths = [f"model.layers.{block}.{name}" for name in stage]
            h = inputs_of(by_hand, paths[0], data)
            for path in paths:
                hessians[path] = h
                linear = by_hand.get_submodule(path)
                layer = QuantizedLinear.from_linear(linear, gptq_quantize(linear.weight, h, SPEC))
                parent, _, name = path.rpartition(".")
                setattr(by_hand.get_submodule(parent), name, layer)
    assert same(model, by_hand)
    assert torch.equal(logits(model), logits(by_hand))

    # An o_proj calibrated on anything else comes out otherwise: the test can tell.
    o_proj = "model.layers.1.self_attn.o_proj"
    weight = small_model().get_submodule(o_proj).weight
    error = report[o_proj].output_error
    dequantized = quantized_layers(model)[o_proj].dequantize()
    assert error == models.output_error(weight.detach(), dequantized, hessians[o_proj])
    unquantized = inputs_of(small_model(), o_proj, data)
    for other in (unquantized, hessians["model.layers.1.self_attn.q_proj"]):
        codes = gptq_quantize(weight, other, SPEC).codes
        assert not torch.equal(codes, packed(model)[f"{o_proj}.codes"])


def test_padding_changes_no_code():
    """In float64, where the attention's masked sums agree to 1e-16 with the unpadded ones."""
    plain, padded = small_model().double(), small_model().double()
    quantize_model(plain, batches(), SPEC)
    quantize_model(padded, batches(pad=9), SPEC)
    assert same(plain, padded)


def test_padding_would_matter():
    """The control: without the mask, padding does change codes."""
    plain, padded = small_model().double(), small_model().double()
    quantize_model(plain, batches(), SPEC)
    data = batches(pad=9)
    for batch in data:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    quantize_model(padded, data, SPEC)
    assert not same(plain, padded)


def test_gptq_beats_round_to_nearest_on_the_models_own_outputs():
    def correlated_model():
        model = small_model()  # embeddings of rank 16: layer inputs that correlate
        model.model.embed_tokens.weight.data = normal(308, 16) @ normal(16, 64, seed=1) * 0.1
        return model

    data, held_out, errors = batches(8), batches(1, 16, seed=9)[0]["input_ids"], {}
    want = logits(correlated_model(), held_out)
    for method in ("rtn", "gptq"):
        model = correlated_model()
        report = quantize_model(model, data, QuantSpec(3, 16), method)
        errors[method] = relative(logits(model, held_out), want)
        assert all(0 < row.output_error < 0.5 for row in report)
        errors[method, "layers"] = sum(row.output_error for row in report)
    assert errors["gptq"] < 0.8 * errors["rtn"]
    assert errors["gptq", "layers"] < 0.8 * errors["rtn", "layers"]


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("method, spec", [("rtn", QuantSpec(4, 16)), ("nf4", NF4Spec(32))])
def test_calibration_only_measures_where_it_is_not_used(method, spec, calibrated):
    model, dense = small_model(), small_model()
    report = quantize_model(model, batches() if calibrated else None, spec, method)
    assert len(report) == 14 and all((r.output_error is not None) == calibrated for r in report)
    for path, layer in quantized_layers(model).items():
        weight = dense.get_submodule(path).weight
        want = quantize_rtn(weight, spec) if method == "rtn" else quantize_nf4(weight, 32)
        assert torch.equal(layer.codes, want.codes)
    assert relative(logits(model), logits(dense)) < 0.5


def test_report_rows():
    report = quantize_model(small_model(), batches(), QuantSpec(4, 16))
    assert {row.name.rpartition(".")[2] for row in report} == set(ALL_LINEAR)
    row = next(r for r in report if r.name == "model.layers.0.self_attn.k_proj")
    assert row.shape == (32, 64) and row.bytes_before == 32 * 64 * 4
    assert row.bytes_after == 32 * 64 // 2 + 32 * 4 * 3  # codes; fp16 scale and uint8 zero-point
    assert row.bits_per_weight == 4 + 24 / 16 and row.seconds >= 0 and row.output_error > 0
    assert sum(r.bytes_after for r in report) < 0.2 * sum(r.bytes_before for r in report)


def test_dense_weights_are_gone_and_the_rest_is_untouched():
    model, dense = small_model(), small_model()
    quantize_model(model, batches(), SPEC, target_modules=ATTENTION)
    assert set(quantized_layers(model)) == set(models.find_linears(dense, ATTENTION))
    assert len(quantized_layers(model)) == 8
    rest = dict(model.named_parameters())
    assert not any("self_attn" in name for name in rest)
    theirs = dict(dense.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in rest.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, still
    assert isinstance(model.lm_head, nn.Linear)
    assert not model._forward_pre_hooks and not any(m._forward_pre_hooks for m in model.modules())


def test_g_idx_comes_with_dynamic_groups():
    model = small_model()
    options = GPTQOptions(static_groups=False)
    quantize_model(model, batches(), QuantSpec(4, 16), options=options)
    assert all(layer.g_idx is not None for layer in quantized_layers(model).values())
    assert relative(logits(model), logits(small_model())) < 0.5


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back(training):
    model = small_model().train(training)
    quantize_model(model, batches(1), SPEC)
    assert model.training == training


def test_a_bf16_model_is_calibrated_in_fp32_sums():
    model = small_model().bfloat16()
    report = quantize_model(model, batches(), QuantSpec(4, 16))
    assert report[0].bytes_before == 64 * 64 * 2
    assert all(layer.scale.dtype == torch.float16 for layer in quantized_layers(model).values())
    assert logits(model).dtype == torch.bfloat16 and logits(model).isfinite().all()


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(method="awq"), "method='awq' must be one of gptq, rtn, nf4"),
        (dict(method="nf4"), "method='nf4' does not go with QuantSpec"),
        (dict(spec=NF4Spec()), "method='gptq' does not go with NF4Spec"),
        (dict(calibration=None), "needs calibration batches"),
        (dict(calibration=[]), "needs calibration batches"),
        (dict(target_modules=("query",)), r"\['query'\] match no linear layer"),
        (dict(target_modules=("lm_head",)), "lm_head.*outside the decoder blocks"),
        (dict(spec=QuantSpec(4, 48)), "q_proj: group_size=48 does not divide in_features=64"),
    ],
)
def test_bad_calls_are_named_and_change_nothing(given, message):
    model, call = small_model(), dict(calibration=batches(1), spec=SPEC)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, **{**call, **given})
    assert not quantized_layers(model)


def test_nan_weights_and_activations_are_named():
    for name in ("layers.1.mlp.up_proj.weight", "layers.0.input_layernorm.weight"):
        model = small_model()
        model.model.get_parameter(name).data.view(-1)[0] = float("nan")
        for method, data in (("rtn", None), ("gptq", batches(1))):
            with pytest.raises(ValueError, match=f"{name} holds NaN or Inf"):
                quantize_model(model, data, SPEC, method)
            assert not quantized_layers(model)
    model = small_model()
    data = batches()
    model.model.layers[0].input_layernorm.weight.data.fill_(3e38)  # finite, what it gives is not
    with pytest.raises(ValueError, match="calibration inputs hold NaN or Inf"):
        quantize_model(model, data, SPEC)


@pytest.mark.parametrize("wrong, message", [
    (lambda data: data[0], "calibration is a dict, but must be a list"),
    (lambda data: data[0]["input_ids"], "calibration is a Tensor, but must be a list"),
    (lambda data: (batch for batch in data), "calibration is a generator, but must be a list"),
    (lambda data: [data[0]["input_ids"]], "a batch holds Tensor, but needs input_ids"),
    (lambda data: [data], "a batch holds list, but needs input_ids"),
    (lambda data: [{"input_ids": data[0]["input_ids"][0]}], "but needs input_ids, a tensor"),
    (lambda data: [{"input_ids": data[0]["input_ids"].tolist()}], "but needs input_ids, a tensor"),
    (lambda data: [{"input_ids": data[0]["input_ids"][:0]}], "but needs input_ids, a tensor"),
    (lambda data: [{"input_ids": data[0]["input_ids"] - 999}], "token id -9.* is negative"),
    (lambda data: [{"input_ids": data[0]["input_ids"] + 9999}], "has embeddings of"),
    (lambda data: [{"input_ids": data[0]["input_ids"].float()}], "of whole numbers"),
])  # fmt: skip
def test_calibration_that_is_no_list_of_batches_is_refused_before_it_starts(wrong, message):
    model = small_model()
    for method in ("gptq", "rtn"):
        with pytest.raises(ValueError, match=message):
            quantize_model(model, wrong(batches()), SPEC, method)
    assert not quantized_layers(model)


def test_quantized_models_and_models_with_adapters_are_refused():
    model = small_model()
    quantize_model(model, None, SPEC, "rtn")
    message = "q_proj is a QuantizedLinear; .*already .QuantSpec.*quantize a dense model"
    with pytest.raises(ValueError, match=message):
        quantize_model(model, batches(1), SPEC)
    model = small_model()
    inject_lora(model)
    with pytest.raises(ValueError, match="q_proj is a LoRALinear; quantize a dense model"):
        quantize_model(model, batches(1), SPEC)


@pytest.mark.parametrize("kind", ["grid", "nf4"])
def test_dequantizing_keeps_outputs_and_adapters(kind):
    model = small_model()
    spec, method = (SPEC, "rtn") if kind == "grid" else (NF4Spec(), "nf4")
    quantize_model(model, None, spec, method)
    bare = copy.deepcopy(model)
    inject_lora(model, rank=4)
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_B["default"].data = normal(*layer.lora_B["default"].shape, seed=i, std=0.1)
    for m in (bare, model):
        before, layers = logits(m), set(quantized_layers(m))
        assert set(dequantize_model(m)) == layers and len(layers) == 14
        assert not quantized_layers(m)
        assert not any(isinstance(x, QuantizedLinear) for x in m.modules())
        assert (logits(m) - before).abs().max() < 1e-4
    assert len(lora_layers(model)) == 8
    assert not model.get_submodule("model.layers.0.mlp.up_proj").weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["grid", "nf4"])
def test_dequantized_weights_are_the_layers_own_and_adapters_stay(kind, dtype):
    model = small_model().to(dtype)
    quantize_model(model, None, *((SPEC, "rtn") if kind == "grid" else (NF4Spec(), "nf4")))
    inject_lora(model, ("q_proj", "down_proj"), rank=4)
    inject_lora(model, ("q_proj",), rank=2, adapter="second")
    weights = {path: layer.dequantize(dtype) for path, layer in quantized_layers(model).items()}
    adapters = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert dequantize_model(model) == list(weights)
    adapted = lora_layers(model)
    for path, weight in weights.items():
        layer = adapted[path].base if path in adapted else model.get_submodule(path)
        assert type(layer) is nn.Linear and torch.equal(layer.weight, weight)
    after = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapted) == 4 and after.keys() == adapters.keys()
    assert all(p is adapters[n] for n, p in after.items())


def test_a_batch_without_a_mask_has_no_padding():
    models = small_model(), small_model()
    for model, keys in zip(models, (("input_ids", "attention_mask"), ("input_ids",))):
        quantize_model(model, [{k: b[k] for k in keys} for b in batches()], SPEC)
    assert same(*models)
    for batch, message in (
        ({"attention_mask": torch.ones(1, 4)}, r"holds \['attention_mask'\], but needs input_ids"),
        ({"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.ones(1, 5)},
         r"attention_mask \(1, 5\) for input_ids \(1, 4\)"),
        ({"input_ids": torch.full((1, 4), 308)}, "token id 308, but the model has embeddings"),
    ):  # fmt: skip
        model = small_model()
        before = {n: m for n, m in model.named_modules()}
        with pytest.raises(ValueError, match=message):
            quantize_model(model, [batch], SPEC)
        assert {n: m for n, m in model.named_modules()} == before


def test_dequantizing_takes_merged_layers_along():
    model = small_model()
    quantize_model(model, None, SPEC, "rtn")
    inject_lora(model, rank=4)
    merge_lora(model, into="rtn")
    before = logits(model)
    dequantize_model(model)
    assert not any(isinstance(x, QuantizedLinear) for x in model.modules())
    assert (logits(model) - before).abs().max() < 1e-4


def test_dequantizing_gives_the_models_own_dtype():
    model = small_model().bfloat16()
    quantize_model(model, None, SPEC, "rtn")
    dequantize_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_resolve_dtype(monkeypatch):
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert resolve_dtype(name, "cpu") == resolve_dtype(name, "cuda") == dtype
        assert dtype_name(dtype) == name
    with pytest.raises(ValueError, match="compute_dtype='int4' must be auto, bf16, fp16 or fp32"):
        resolve_dtype("int4")

    def native(cpu=False, gpu=False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu)

    for cpu, gpu in ((True, True), (False, False)):
        native(cpu, gpu)
        assert resolve_dtype("auto", "cpu") == (torch.bfloat16 if cpu else torch.float32)
        assert resolve_dtype("auto", torch.device("cuda")) == (
            torch.bfloat16 if gpu else torch.float16
        )


def test_decoder_blocks_are_found_or_named():
    path, blocks = decoder_blocks(small_model())
    assert path == "model.layers" and len(blocks) == 2
    odd = small_model()
    odd.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of 5 decoder blocks"):
        decoder_blocks(odd)


def test_long_quantizing_says_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr("qlora_lib.base.progress.EVERY", 0.0)  # as if each layer took a minute
    model = small_model()
    quantize_model(model, None, QuantSpec(4, 32), "rtn")
    lines = capsys.readouterr().err.splitlines()
    first = next(iter(quantized_layers(model)))
    assert len(lines) == 14 and lines[0].startswith(f"quantizing with rtn: 1 of 14 layers, {first}")
