"""GPTQ checkpoints: whole models there and back, what is refused, and every damage."""
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_lib.base.folders import HASHES
from qlora_lib.formats.gptq_checkpoint import MARKER, export_gptq, import_gptq
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.merge import merge_lora
from qlora_lib.models.checkpoint import load_quantized, save_quantized
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.models.stored_weights import INDEX, WEIGHTS
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.lora_models import IDS, adapted, base_of, files, logits, rewrite
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import normal

# --- whole models -----------------------------------------------------------------------------

KINDS = ["grid2", "grid3", "grid4", "grid8", "symmetric", "g_idx"]


@pytest.mark.long
@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_to_the_bit(kind, checkpoint_format, tmp_path):
    model = base_of(kind)
    if checkpoint_format == "gptq":  # it has no zero-point of 0, and random rows have some
        for layer in quantized_layers(model).values():
            layer.zero_point.clamp_(min=1)
    export_gptq(model, tmp_path / "new" / "m", checkpoint_format, small_tokenizer())
    again, tokenizer = import_gptq(tmp_path / "new" / "m", "cpu", "fp32")
    ours, theirs = quantized_layers(model), quantized_layers(again)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for path, layer in ours.items():
        assert theirs[path].spec == layer.spec
        assert torch.equal(theirs[path].dequantize(), layer.dequantize())
        assert (theirs[path].g_idx is None) == (layer.g_idx is None)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert tokenizer("Ava has 12").input_ids == small_tokenizer()("Ava has 12").input_ids
    save_quantized(again, tokenizer, tmp_path / "ours")  # the config says nothing of GPTQ now
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    assert torch.equal(logits(load_quantized(tmp_path / "ours", "cpu", "fp32")[0]), logits(model))


def test_the_folder_is_what_readers_ask_for(tmp_path):
    model = base_of("grid4")
    export_gptq(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"
    described = config["quantization_config"]
    assert described == json.loads((tmp_path / "m" / MARKER).read_text())
    wanted = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4, "group_size": 16,
              "sym": False, "desc_act": False, "lm_head": False, "pack_dtype": "int32"}
    assert wanted.items() <= described.items()
    assert "modules_in_block_to_quantize" not in described and "dynamic" not in described
    with safe_open(tmp_path / "m" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    prefix = "model.layers.1.self_attn.q_proj"
    assert {n for n in names if n.startswith(prefix)} == {
        f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert "model.norm.weight" in names and "lm_head.weight" not in names  # tied: stored once
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        WEIGHTS, "config.json", "generation_config.json", MARKER, HASHES
    }  # fmt: skip
    assert not hasattr(model.config, "quantization_config")  # of the file, not of our model
    assert import_gptq(tmp_path / "m", "cpu", "fp32")[1] is None  # it has no tokenizer


def test_act_order_is_said_only_where_groups_are_shuffled(tmp_path):
    data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    for options, expected in ((GPTQOptions(), False), (GPTQOptions(static_groups=False), True)):
        model = small_model(layers=1)
        quantize_model(model, data, QuantSpec(4, 16), options=options)
        export_gptq(model, tmp_path / "m")
        assert json.loads((tmp_path / "m" / MARKER).read_text())["desc_act"] == expected


def test_shards_with_an_index(tmp_path):
    model = base_of("grid4")
    export_gptq(model, tmp_path / "m", max_shard_size=30_000)
    parts = sorted(p.name for p in (tmp_path / "m").glob("*.safetensors"))
    assert len(parts) > 2 and WEIGHTS not in parts
    again, _ = import_gptq(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    (tmp_path / "m" / parts[1]).unlink()
    with pytest.raises(ValueError, match=f"{parts[1]} is missing"):
        import_gptq(tmp_path / "m")
    (tmp_path / "m" / HASHES).unlink()
    with pytest.raises(FileNotFoundError, match=f"{parts[1]} does not exist"):
        import_gptq(tmp_path / "m")


def test_biases_and_dense_layers(tmp_path):
    from transformers import LlamaForCausalLM

    config = small_model().config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    for i, block in enumerate(model.model.layers):
        block.self_attn.q_proj.bias.data = normal(64, seed=i)
    quantize_model(model, None, QuantSpec(4, 32), "rtn", target_modules=("q_proj", "up_proj"))
    export_gptq(model, tmp_path / "m")
    again, _ = import_gptq(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    assert len(quantized_layers(again)) == 4
    described = json.loads((tmp_path / "m" / MARKER).read_text())
    assert described["modules_in_block_to_quantize"] == [["self_attn.q_proj", "mlp.up_proj"]]
    assert r"-:.*\.mlp\.down_proj$" in described["dynamic"] and len(described["dynamic"]) == 5


# --- models that are refused ------------------------------------------------------------------


def refused(model, tmp_path, message, **given):
    with pytest.raises(ValueError, match=message):
        export_gptq(model, tmp_path / "m", **given)
    assert not list(tmp_path.iterdir())


def test_models_that_the_format_can_not_hold_are_refused(tmp_path):
    refused(small_model(), tmp_path, "no layer is quantized; call quantize_model")
    refused(base_of("nf4"), tmp_path, r"layers\.0\.self_attn\.q_proj is NF4.*QuantSpec")
    refused(adapted(base_of("grid4")), tmp_path, r"q_proj has an adapter.*merge_lora\(.*save_ada")
    refused(base_of("grid4"), tmp_path, "'gptq_v3' must be one of", checkpoint_format="gptq_v3")

    model = base_of("grid4")
    path = "model.layers.1.mlp.up_proj"
    layer = model.get_submodule(path)
    other = quantize_rtn(layer.dequantize(), QuantSpec(3, 16))
    model.model.layers[1].mlp.up_proj = QuantizedLinear(other)
    refused(model, tmp_path, rf"one checkpoint has one spec: .*q_proj .*bits=4.*{path} .*bits=3")
    model.model.layers[1].mlp.up_proj = layer.to_linear()
    refused(model, tmp_path, f"{path} is dense, in other blocks it is quantized")
    head = small_model()
    quantize_model(head, None, QuantSpec(4, 16), "rtn", target_modules=("lm_head",))
    refused(head, tmp_path, "lm_head")


def test_an_adapter_merged_and_unloaded_can_be_exported(tmp_path):
    model = adapted(base_of("grid4"))
    merge_lora(model, "rtn", unload=True)
    export_gptq(model, tmp_path / "m")
    assert torch.equal(logits(import_gptq(tmp_path / "m", "cpu", "fp32")[0]), logits(model))


# --- folders that are refused -----------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """As another tool would have written it: without hashes."""
    export_gptq(base_of("grid4"), tmp_path / "m", tokenizer=small_tokenizer())
    (tmp_path / "m" / HASHES).unlink()
    return tmp_path / "m"


def set_config(folder, **change):
    def apply(config):
        config["quantization_config"] |= change

    rewrite(folder, "config.json", apply)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bits=5), r"config.json: bits=5 is not one of \(2, 3, 4, 8\)"),
        (dict(bits=8), r"proj\.qweight is torch.int32 .*for 8 bits"),
        (dict(checkpoint_format="marlin"), "checkpoint_format='marlin' is not one of"),
        (dict(quant_method="awq"), "config.json: quantization_config is 'awq', not 'gptq'"),
        (dict(pack_dtype="int16"), "pack_dtype='int16' must be 'int32'"),
        (dict(dynamic={"+:.*q_proj": {"bits": 8}}), "dynamic gives .*q_proj' settings of its own"),
        (dict(group_size=48), "group_size=48 does not divide"),
        (dict(group_size=32), r"proj\.qzeros is .*for 4 bits in . groups; does config.json"),
        (dict(sym=True), r"qzeros: sym is true, but a zero-point is \d+, not 8"),
    ],
    ids=str,
)
def test_settings_that_are_not_supported_are_named(saved, change, message):
    set_config(saved, **change)
    with pytest.raises(ValueError, match=message):
        import_gptq(saved, "cpu", "fp32")


def test_older_names_of_the_version_are_read(saved):
    want = logits(base_of("grid4"))

    def rename(config):
        described = config["quantization_config"]
        described["format"] = described.pop("checkpoint_format")

    rewrite(saved, "config.json", rename)
    assert torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), want)
    rewrite(saved, "config.json", lambda c: c["quantization_config"].pop("format"))
    try:  # a file that names none is v1: read so, or refused, but never taken for v2
        assert not torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), want)
    except ValueError as error:
        assert "overflowed" in str(error)


def test_old_checkpoints_are_read(saved):
    """As AutoGPTQ wrote them: settings in a file of their own, weights of another name, and rotary
    frequencies, which follow from the config."""
    want = logits(base_of("grid4"))
    rewrite(saved, "config.json", lambda config: config.pop("quantization_config"))
    rewrite(saved, MARKER, lambda described: described.pop("quant_method"))
    change_weights(saved, lambda s: s.update({
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)
    }))  # fmt: skip
    (saved / WEIGHTS).rename(saved / "gptq_model-4bit-16g.safetensors")
    assert torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), want)
    (saved / "gptq_model-8bit-16g.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="holds 2 files of weights .*gptq_model-4bit-16g"):
        import_gptq(saved, "cpu", "fp32")


def test_a_dense_model_is_no_gptq_checkpoint(saved):
    rewrite(saved, "config.json", lambda config: config.pop("quantization_config"))
    (saved / MARKER).unlink()
    with pytest.raises(ValueError, match="config.json: quantization_config is None, not 'gptq'"):
        import_gptq(saved)


def change_weights(folder, change):
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop(f"{Q_PROJ}.g_idx"), rf"{Q_PROJ}\.g_idx is missing"),
        (lambda s: s.pop("model.norm.weight"), r"missing \['model.norm.weight'\]"),
        (lambda s: s.update(extra=torch.ones(1)), r"not expected \['extra'\]"),
        (lambda s: s.update({"a.qweight": torch.ones(1)}), "a is quantized, but .* has no a$"),
        (
            lambda s: [s.pop(n) for n in list(s) if n.endswith("qweight")],
            "holds no qweight; is it a GPTQ checkpoint",
        ),
        (lambda s: s[f"{Q_PROJ}.scales"][0].fill_(float("nan")), rf"{Q_PROJ}.*scale holds NaN"),
        (lambda s: s[f"{Q_PROJ}.g_idx"][:3].fill_(99), f"{Q_PROJ}: g_idx lies outside"),
        (lambda s: s["model.norm.weight"].fill_(float("inf")), "norm.weight holds NaN or Inf"),
    ],
)
def test_damaged_weights_are_named(saved, change, message):
    change_weights(saved, change)
    with pytest.raises(ValueError, match=message):
        import_gptq(saved, "cpu", "fp32")


@pytest.mark.parametrize("size", [0, 100, -1])
def test_truncated_weights_are_named(saved, size):
    (saved / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes()[:size])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        import_gptq(saved)


def test_missing_files_are_named(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} does not exist"):
        import_gptq(saved)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        import_gptq(saved / "nowhere")
    (saved / INDEX).write_text('{"weight_map')
    with pytest.raises(ValueError, match="index.json is not valid JSON"):
        import_gptq(saved)


# --- saving -----------------------------------------------------------------------------------


def test_a_failed_export_leaves_the_old_checkpoint(saved, monkeypatch):
    before = files(saved)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(small_tokenizer()), "save_pretrained", fail)  # after the weights
    with pytest.raises(OSError, match="disk full"):
        export_gptq(base_of("grid2"), saved, tokenizer=small_tokenizer())
    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", fail)
    with pytest.raises(OSError, match="disk full"):
        export_gptq(base_of("grid2"), saved)
    assert files(saved) == before and [p.name for p in saved.parent.iterdir()] == ["m"]


def test_an_export_replaces_an_export_and_nothing_else(saved, tmp_path):
    model = base_of("grid8")
    export_gptq(model, saved)
    assert torch.equal(logits(import_gptq(saved, "cpu", "fp32")[0]), logits(model))
    small_model().save_pretrained(tmp_path / "dense")
    before = files(tmp_path / "dense")
    with pytest.raises(ValueError, match="dense holds other files; give a folder of its own"):
        export_gptq(model, tmp_path / "dense")
    assert files(tmp_path / "dense") == before
