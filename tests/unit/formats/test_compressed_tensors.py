"""Checkpoints of compressed-tensors: whole models there and back, what is refused, and damage;
tests/interop compares the bytes and loads them with transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lib.base.folders import HASHES
from qlora_lib.formats.compressed_layout import from_compressed, to_compressed
from qlora_lib.formats.compressed_tensors import MARKER, export_compressed, import_compressed
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.conv1d import linear_from_conv1d
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.models.stored_weights import WEIGHTS
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.lora_models import IDS, adapted, base_of, files, logits, rewrite
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import normal

SPECS = {
    "nvfp4": FP4Spec("nvfp4"), "mxfp4": FP4Spec("mxfp4"), "e4m3": FP8Spec(),
    "grid": QuantSpec(4, 32, symmetric=True), "rows": QuantSpec(8, None, True, clip_search=False),
}  # fmt: skip
Q_PROJ = "model.layers.0.self_attn.q_proj"


def model_of(kind: str, **given):
    model = small_model(layers=1)
    quantize_model(model, None, SPECS[kind], "rtn", **given)
    return model


@pytest.mark.parametrize("kind", SPECS)
def test_a_model_comes_back_to_the_bit(kind, tmp_path):
    model = model_of(kind)
    export_compressed(model, tmp_path / "new" / "m", small_tokenizer(), max_shard_size="50kB")
    again, tokenizer = import_compressed(tmp_path / "new" / "m", "cpu", "fp32")
    ours, theirs = quantized_layers(model), quantized_layers(again)
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for path, layer in ours.items():
        assert theirs[path].spec == layer.spec
        a, b = layer.state_dict(), theirs[path].state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and again.lm_head.weight is again.model.embed_tokens.weight
    assert tokenizer("Ava has 12").input_ids == small_tokenizer()("Ava has 12").input_ids
    save_quantized(again, tokenizer, tmp_path / "ours")  # the config says nothing of it now
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    assert torch.equal(logits(load_quantized(tmp_path / "ours", "cpu", "fp32")[0]), logits(model))


def test_the_folder_is_what_readers_ask_for(tmp_path):
    export_compressed(model_of("nvfp4"), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    described = config["quantization_config"]
    assert described == json.loads((tmp_path / "m" / MARKER).read_text())
    wanted = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
              "quantization_status": "compressed", "ignore": ["lm_head"]}  # fmt: skip
    assert wanted.items() <= described.items()
    assert described["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "dynamic": False,
        "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    state = load_file(tmp_path / "m" / WEIGHTS)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items() if n.startswith(Q_PROJ)} == {
        f"{Q_PROJ}.weight_packed": (torch.uint8, (64, 32)),
        f"{Q_PROJ}.weight_scale": (torch.float8_e4m3fn, (64, 4)),
        f"{Q_PROJ}.weight_global_scale": (torch.float32, (1,)),
    }
    assert "lm_head.weight" not in state  # tied: stored once
    assert import_compressed(tmp_path / "m", "cpu", "fp32")[1] is None  # it has no tokenizer


def test_dense_layers_are_named_and_biases_stay(tmp_path):
    from transformers import LlamaForCausalLM

    config = small_model(layers=1).config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    model.model.layers[0].self_attn.q_proj.bias.data = normal(64)
    quantize_model(model, None, FP4Spec("mxfp4"), "rtn", target_modules=("q_proj", "up_proj"))
    export_compressed(model, tmp_path / "m")
    again, _ = import_compressed(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model)) and len(quantized_layers(again)) == 2
    ignored = json.loads((tmp_path / "m" / MARKER).read_text())["ignore"]
    assert len(ignored) == 6 and "model.layers.0.mlp.down_proj" in ignored


def test_it_warns_of_tensor_scales_that_vllm_would_mix(tmp_path, recwarn):
    for kind in ("nvfp4", "mxfp4"):  # of quantize_model they share one
        export_compressed(model_of(kind), tmp_path / kind)
    assert not [w for w in recwarn if "vLLM" in str(w.message)]
    model = model_of("nvfp4")
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = QuantizedLinear(quantize_fp4(2 * up.dequantize()))
    with pytest.warns(UserWarning, match="gate_proj and the layers that vLLM computes with it"):
        export_compressed(model, tmp_path / "m")


# --- what is refused --------------------------------------------------------------------------


def refused(model, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        export_compressed(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_models_that_the_format_can_not_hold_are_refused(tmp_path):
    refused(small_model(), tmp_path, "no layer is quantized; call quantize_model")
    refused(base_of("nf4"), tmp_path, r"layers\.0\.self_attn\.q_proj is NF4Spec.*FP4Spec")
    refused(base_of("e5m2"), tmp_path, r"q_proj is FP8Spec\(format='e5m2'\), which is not written")
    refused(base_of("grid4"), tmp_path, r"q_proj: .*symmetric grids.*symmetric=True.*export_gptq")
    refused(adapted(base_of("mxfp4")), tmp_path, r"q_proj has an adapter.*merge_lora\(")
    model = model_of("nvfp4")
    other = quantize_fp4(normal(64, 64), FP4Spec("mxfp4"))
    model.model.layers[0].self_attn.o_proj = QuantizedLinear(other)
    refused(model, tmp_path, "one checkpoint has one spec: .*nvfp4.*o_proj .*mxfp4")
    model, spec = small_model(layers=1), QuantSpec(4, 32, symmetric=True)
    data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    quantize_model(model, data, spec, options=GPTQOptions(static_groups=False))
    refused(model, tmp_path, "keeps groups in order; quantize with static_groups=True")
    layer = quantize_rtn(normal(4, 60), QuantSpec(4, 20, symmetric=True))
    with pytest.raises(ValueError, match="a: codes of 4 bits of 60 inputs fill no whole words"):
        to_compressed("a", layer)
    layer = quantize_rtn(normal(4, 64), QuantSpec(4, 32, symmetric=True))
    layer.zero_point[0, 0] = 7
    with pytest.raises(ValueError, match="a: symmetric grids have the zero-point 8"):
        to_compressed("a", layer)


def test_layers_that_readers_would_not_take_for_packed_are_refused(tmp_path):
    """They would start from random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    linear_from_conv1d(model)
    quantize_model(model, None, FP4Spec("mxfp4"), "rtn")
    refused(model, tmp_path, "c_attn is a Conv1D in transformers")


def test_folders_with_other_files_are_left_as_they_are(tmp_path):
    save_quantized(base_of("mxfp4"), small_tokenizer(), tmp_path / "m")
    before = files(tmp_path / "m")
    with pytest.raises(ValueError, match="holds other files"):
        export_compressed(model_of("mxfp4"), tmp_path / "m")
    assert files(tmp_path / "m") == before


def saved(kind: str, folder):
    """As another tool would have written it: without hashes."""
    export_compressed(model_of(kind), folder)
    (folder / HASHES).unlink()
    return folder


def set_config(folder, change):
    def apply(config):
        described = config["quantization_config"]
        change(described, described["config_groups"]["group_0"])

    rewrite(folder, "config.json", apply)


@pytest.mark.parametrize("change, message", [
    (lambda d, g: d.update(quant_method="gptq"), "is 'gptq', not 'compressed-tensors'"),
    (lambda d, g: d.update(format="marlin-24"), "format='marlin-24' is not one of"),
    (lambda d, g: d.update(config_groups={"a": g, "b": g}), "must be one group"),
    (lambda d, g: d.update(config_groups=[]), "must be one group"),
    (lambda d, g: g.update(weights=None), "must be one group with settings of weights"),
    (lambda d, g: g.update(input_activations={"num_bits": 4}), "input_activations are quantized"),
    (lambda d, g: d.update(kv_cache_scheme={}), "kv_cache_scheme is not read"),
    (lambda d, g: g["weights"].update(num_bits=8), "weights have num_bits=8, nvfp4-pack.* 4"),
    (lambda d, g: g["weights"].update(group_size=32), "weights have group_size=32"),
    (lambda d, g: g["weights"].update(strategy="block"), "weights have strategy='block'"),
    (lambda d, g: d.update(format="mxfp4-pack-quantized"), "weights have strategy="),
])  # fmt: skip
def test_settings_that_are_not_supported_are_named(change, message, tmp_path):
    folder = saved("nvfp4", tmp_path / "m")
    set_config(folder, change)
    with pytest.raises(ValueError, match=message):
        import_compressed(folder, "cpu", "fp32")


@pytest.mark.parametrize("change, message", [
    (lambda d, g: g["weights"].update(num_bits=5), "bits=5 is not supported"),
    (lambda d, g: g["weights"].update(num_bits=8), "weight_packed is .* belong to these"),
    (lambda d, g: g["weights"].update(symmetric=False), "takes symmetric grids here"),
    (lambda d, g: g["weights"].update(actorder="group"), "actorder='group' is not read"),
    (lambda d, g: g["weights"].update(group_size=-1, strategy="channel"), "weight_scale is"),
    (lambda d, g: g["weights"].update(group_size="x"), "group_size='x' must be"),
])  # fmt: skip
def test_settings_of_grids_too(change, message, tmp_path):
    folder = saved("grid", tmp_path / "m")
    set_config(folder, change)
    with pytest.raises(ValueError, match=message):
        import_compressed(folder, "cpu", "fp32")


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop(f"{Q_PROJ}.weight_packed"), f"{Q_PROJ}: weight_packed is missing"),
    (lambda s: s.pop(f"{Q_PROJ}.weight_scale"), rf"missing \['{Q_PROJ}.weight'\]"),
    (lambda s: s.update({f"{Q_PROJ}.weight_zero_point": torch.ones(1)}), "is not expected"),
    (lambda s: s.update({f"{Q_PROJ}.weight_packed": torch.ones(64, 8).byte()}), "does config.json"),
    (lambda s: s[f"{Q_PROJ}.weight_scale"].view(torch.uint8).fill_(127), "outside 0 to 126"),
    (lambda s: s[f"{Q_PROJ}.weight_global_scale"].fill_(0), "makes no finite weights"),
    (lambda s: s[f"{Q_PROJ}.weight_global_scale"].fill_(torch.nan), "NaN or Inf"),
    (lambda s: s.pop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
    (lambda s: s.update(extra=torch.ones(1)), r"not expected \['extra'\]"),
    (lambda s: [s.pop(n) for n in list(s) if n.endswith("weight_scale")], "holds no weight_scale"),
])  # fmt: skip
def test_damaged_weights_are_named(change, message, tmp_path):
    folder = saved("nvfp4", tmp_path / "m")
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        import_compressed(folder, "cpu", "fp32")


def test_a_changed_file_is_named(tmp_path):
    export_compressed(model_of("grid"), tmp_path / "m")
    change_weights(tmp_path / "m", lambda s: s[f"{Q_PROJ}.weight_packed"][0].add_(1))
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not as it was written"):
        import_compressed(tmp_path / "m")


def test_a_grid_tells_its_own_shape():
    spec = QuantSpec(4, 32, symmetric=True)
    tensors = to_compressed("a", quantize_rtn(normal(8, 64), spec))
    with pytest.raises(ValueError, match=r"a: weight_shape is \[64, 8\], .* \[8, 64\]"):
        from_compressed("a", tensors | {"weight_shape": torch.tensor([64, 8])}, (8, 64), spec)
