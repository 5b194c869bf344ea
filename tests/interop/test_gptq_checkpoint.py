"""GPTQ checkpoints against transformers and GPTQModel: the same logits, both ways."""

import copy
import json

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM

from qlora_lib.formats import gptq_layout
from qlora_lib.formats.gptq_checkpoint import export_gptq, import_gptq
from qlora_lib.models.quantize import dequantize_model, quantize_model, quantized_layers
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.packing import pack
from tests.support.small_models import small_tokenizer
from tests.support.tensors import relative

IDS = torch.randint(3, 260, (4, 64), generator=torch.Generator().manual_seed(0))
ORDERS = {
    "in order": GPTQOptions(desc_act=False),
    "act-order, static": GPTQOptions(),
    "act-order": GPTQOptions(static_groups=False),
}


def random_llama(seed: int = 0, **given) -> LlamaForCausalLM:
    """Inputs of 128 and 256, so that groups of 128 fit; fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(small_tokenizer()), hidden_size=128, intermediate_size=256,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **given,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def quantized(spec: QuantSpec, options=GPTQOptions(), targets=None, **given):
    model = random_llama(**given)
    data = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    targets = {} if targets is None else {"target_modules": targets}
    quantize_model(model, data, spec, options=options, **targets)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def as_they_decode(model) -> torch.Tensor:
    """Our logits, with weights and biases rounded to fp16: GPTQModel's torch kernel holds them
    so and multiplies scale and code in fp16, whatever the dtype of the inputs."""
    model = copy.deepcopy(model)
    paths = quantized_layers(model)
    dequantize_model(model)
    for path in paths:
        for p in model.get_submodule(path).parameters():
            p.data = p.data.half().float()
    return logits(model)


def in_transformers(folder, bits: int = 4):
    """The kernel is named: the automatic choice computes in bf16 for some widths."""
    how = GPTQConfig(bits=bits, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu", quantization_config=how
    )


def relabel(folder, checkpoint_format: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = checkpoint_format
    (folder / "config.json").write_text(json.dumps(config))


def check_equal(model, folder) -> float:
    """Relative error of transformers' logits. 1e-3 is what fp16 products cost (about 2^-11 a
    weight); with that rounding done here as well, what is left is the order of sums in fp32."""
    theirs = logits(in_transformers(folder))
    error = relative(theirs, logits(model))
    assert error < 1e-3
    assert relative(theirs, as_they_decode(model)) < 1e-5
    return error


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_gives_the_same_logits(bits, group_size, order, tmp_path, record_property):
    model = quantized(QuantSpec(bits, group_size), ORDERS[order])
    export_gptq(model, tmp_path / "m", tokenizer=small_tokenizer())
    record_property("relative error", check_equal(model, tmp_path / "m"))
    described = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert described["desc_act"] == (order == "act-order" and group_size is not None)


@pytest.mark.parametrize("checkpoint_format", ["gptq_v2", "gptq"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grids_in_both_formats(bits, checkpoint_format, tmp_path):
    model = quantized(QuantSpec(bits, 32, symmetric=True))
    export_gptq(model, tmp_path / "m", checkpoint_format)
    check_equal(model, tmp_path / "m")


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("order", ["in order", "act-order"])
def test_asymmetric_grids_in_v1(bits, order, tmp_path):
    model = quantized(QuantSpec(bits, 128), ORDERS[order])
    export_gptq(model, tmp_path / "m", "gptq")
    check_equal(model, tmp_path / "m")


def test_zero_points_that_were_lifted_for_v1(tmp_path):
    """Rows without negative weights have the zero-point 0; here they leave a code unused."""
    model = quantized(QuantSpec(4, 32))
    layer = quantized_layers(model)["model.layers.0.mlp.up_proj"]
    layer.zero_point[::2] = 0
    layer.codes.bitwise_and_(0x77)  # codes up to 7
    export_gptq(model, tmp_path / "m", "gptq")
    check_equal(model, tmp_path / "m")


def test_biases_and_layers_that_stay_dense(tmp_path):
    model = quantized(QuantSpec(4, 32), targets=("q_proj", "down_proj"), attention_bias=True)
    for block in model.model.layers:
        block.self_attn.q_proj.bias.normal_(generator=torch.Generator().manual_seed(1))
    export_gptq(model, tmp_path / "m")
    theirs = in_transformers(tmp_path / "m")
    assert type(theirs.model.layers[1].mlp.up_proj) is torch.nn.Linear
    check_equal(model, tmp_path / "m")


def test_shards(tmp_path):
    model = quantized(QuantSpec(4, 32))
    export_gptq(model, tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    check_equal(model, tmp_path / "m")


@pytest.mark.parametrize("dense", [False, True])
def test_gptqmodel_loads_it(dense, tmp_path):
    targets = ("q_proj", "down_proj") if dense else None
    model = quantized(QuantSpec(4, 32), targets=targets)
    export_gptq(model, tmp_path / "m", tokenizer=small_tokenizer())
    loaded = GPTQModel.load(  # its loader refuses fp32 for this kernel
        str(tmp_path / "m"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    packed = [n for n, m in loaded.model.named_modules() if hasattr(m, "qweight")]
    assert sorted(packed) == sorted(quantized_layers(model))
    assert relative(logits(loaded), logits(model)) < 1e-2  # fp16 throughout: 11 bits a value


# --- the other way ----------------------------------------------------------------------------


def gptqmodel_quantizes(folder, monkeypatch, **given) -> None:
    """folder/m: what GPTQModel itself makes of the random Llama."""
    monkeypatch.chdir(folder)  # it writes logs/ into the working directory
    dense = folder / "dense"
    random_llama().save_pretrained(dense)
    small_tokenizer().save_pretrained(dense)
    config = QuantizeConfig(offload_to_disk=False, **given)
    model = GPTQModel.load(str(dense), config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in IDS]
    model.quantize(rows * 8, batch_size=4)
    model.save(str(folder / "m"))


@pytest.mark.parametrize(
    "given",
    [
        dict(bits=4, group_size=32, sym=True, format="gptq"),
        dict(bits=4, group_size=32, sym=False, format="gptq_v2", desc_act=True),
        dict(bits=3, group_size=128, sym=True, format="gptq"),
        dict(bits=8, group_size=-1, sym=False, format="gptq_v2", act_group_aware=False),
    ],
    ids=str,
)
def test_what_gptqmodel_wrote_has_its_logits_here(given, tmp_path, monkeypatch):
    gptqmodel_quantizes(tmp_path, monkeypatch, **given)
    with safe_open(next((tmp_path / "m").glob("*.safetensors")), "pt") as file:
        assert any(name.endswith(".qweight") for name in file.keys())
    model, tokenizer = import_gptq(tmp_path / "m", "cpu", "fp32")
    spec = next(iter(quantized_layers(model).values())).spec
    assert (spec.bits, spec.group_size or -1) == (given["bits"], given["group_size"])
    assert spec.symmetric == given["sym"] and tokenizer("Ava").input_ids
    check_equal(model, tmp_path / "m")
    # No garbage on both sides: that would be an error of about 1.5.
    assert relative(logits(model), logits(random_llama())) < 0.8


def test_what_transformers_saved_again_comes_back(tmp_path):
    model = quantized(QuantSpec(4, 32))
    export_gptq(model, tmp_path / "m")
    in_transformers(tmp_path / "m").save_pretrained(tmp_path / "again")
    again, _ = import_gptq(tmp_path / "again", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))


def test_what_transformers_mislabels_is_refused(tmp_path):
    """transformers 5.23 turns v1 into v2 when it loads, and saves it labelled v1."""
    model = quantized(QuantSpec(4, 32, symmetric=True))
    export_gptq(model, tmp_path / "m", "gptq")
    in_transformers(tmp_path / "m").save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="a zero-point is 9, not 8: .*wrong checkpoint_format"):
        import_gptq(tmp_path / "again", "cpu", "fp32")
    relabel(tmp_path / "again", "gptq_v2")  # what the message says to look at
    assert torch.equal(logits(import_gptq(tmp_path / "again", "cpu", "fp32")[0]), logits(model))


# --- the traps --------------------------------------------------------------------------------


def test_v2_data_labelled_v1_is_garbage(tmp_path):
    """So the tests above would see a zero-point that is off by one."""
    model = quantized(QuantSpec(4, 32))
    export_gptq(model, tmp_path / "m")
    relabel(tmp_path / "m", "gptq")
    assert relative(logits(in_transformers(tmp_path / "m")), logits(model)) > 0.5


def test_a_zero_point_of_0_in_v1_would_be_garbage_and_is_refused(tmp_path, monkeypatch):
    model = quantized(QuantSpec(4, 32))
    for layer in quantized_layers(model).values():
        layer.zero_point[::4] = 0
    with pytest.raises(ValueError, match=r"q_proj\.qzeros: \d+ of 128 outputs.*as 'gptq_v2'"):
        export_gptq(model, tmp_path / "m", "gptq")
    export_gptq(model, tmp_path / "m")  # v2 holds it
    check_equal(model, tmp_path / "m")
    # Written all the same, -1 masked to 15:
    monkeypatch.setattr(gptq_layout, "_without_zero", lambda path, q, _: (q.codes, q.zero_point))
    monkeypatch.setattr(gptq_layout, "pack", lambda q, bits: pack(q & 15, bits))
    export_gptq(model, tmp_path / "m", "gptq")
    assert relative(logits(in_transformers(tmp_path / "m")), logits(model)) > 0.5
