"""GGUF folders: written, read back to the same codes, and what is refused by name."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from qlora_lib.base.folders import write_hashes
from qlora_lib.formats.gguf_checkpoint import export_gguf
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.models.gguf_folder import ADAPTER, BASE, read_gguf, read_gguf_adapter
from qlora_lib.models.load import is_whole, load_model
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.gguf_models import ARCHITECTURES, random_model
from tests.support.small_models import small_tokenizer

gguf = pytest.importorskip("gguf")
IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def packed(name: str = "llama", spec=QuantSpec(4, 32, symmetric=True), **given):
    model = random_model(name, **given)
    quantize_model(model, None, spec, "nf4" if isinstance(spec, NF4Spec) else "rtn")
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("spec", [QuantSpec(4, 32, True), QuantSpec(4, 64), QuantSpec(8, 32, True)],
                         ids=str)  # fmt: skip
def test_load_model_reads_it_back_to_the_same_codes(name, spec, tmp_path):
    model = packed(name, spec)
    rows = export_gguf(model, tmp_path / "m", small_tokenizer())
    back, tokenizer = load_model(tmp_path / "m", "cpu", "fp32")
    ours, theirs = quantized_layers(model), quantized_layers(back)
    assert list(ours) == list(theirs) and {row.name for row in rows} == set(ours)
    for path, layer in ours.items():
        assert torch.equal(layer.codes, theirs[path].codes)
        assert theirs[path].spec.group_size == 32
    assert torch.equal(logits(back), logits(model)) or "gemma" in name
    assert torch.allclose(logits(back), logits(model), atol=1e-4)  # norms + 1 - 1
    assert tokenizer("Ava").input_ids == small_tokenizer()("Ava").input_ids
    lost = max(row.lost for row in rows)
    assert lost == 0 if spec.symmetric else 0 < lost < 2**-10


def test_a_dense_model_stays_one_unless_it_is_rounded_as_llama_cpp_rounds(tmp_path):
    model = random_model("llama, untied, with biases")
    assert export_gguf(model, tmp_path / "dense", small_tokenizer()) == []
    back, _ = load_model(tmp_path / "dense", "cpu", "fp32")
    assert torch.equal(logits(back), logits(model))
    rows = export_gguf(model, tmp_path / "rounded", small_tokenizer(), linears="Q4_0")
    assert len(rows) == 14 and all(0.03 < row.lost < 0.2 for row in rows)
    stored, _ = read_gguf(tmp_path / "rounded" / BASE)
    weight = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind, blocks = stored["blk.1.ffn_up.weight"]
    assert kind == "Q4_0"
    assert (blocks.numpy() == gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)).all()
    export_gguf(model, tmp_path / "offsets", small_tokenizer(), linears="Q4_1")
    back, _ = load_model(tmp_path / "offsets", "cpu", "fp32")  # which lie on no grid of ours
    assert len(quantized_layers(back)) < 14


def test_half_precision_is_kept(tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        model = packed().to(dtype)
        export_gguf(model, tmp_path / "m", small_tokenizer())
        back, _ = load_model(tmp_path / "m", "cpu", "fp32")
        assert torch.equal(back.model.embed_tokens.weight, model.model.embed_tokens.weight.float())


@pytest.mark.parametrize("spec", [NF4Spec(), QuantSpec(4, 16), QuantSpec(8, 32)], ids=str)
def test_what_no_block_holds_is_rounded_to_q8_0_and_its_loss_is_said(spec, tmp_path):
    model = packed("llama", spec)
    rows = export_gguf(model, tmp_path / "m", small_tokenizer())
    assert {row.kind for row in rows} == {"Q8_0"} and all(0 < row.lost < 0.01 for row in rows)
    back, _ = load_model(tmp_path / "m", "cpu", "fp32")
    assert (logits(back) - logits(model)).abs().max() < 0.2


def adapted(model, **how):
    torch.manual_seed(1)
    inject_lora(model, "all", rank=4, alpha=8, **how)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("how", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_adapter_is_read_back(name, how, tmp_path):
    model = adapted(packed(name), **how)
    export_gguf(model, tmp_path / "m", small_tokenizer())
    back, _ = load_model(tmp_path / "m", "cpu", "fp32")
    assert not torch.allclose(logits(back), logits(model), atol=0.1)
    assert len(read_gguf_adapter(back, tmp_path / "m" / ADAPTER)) == 14
    assert torch.allclose(logits(back), logits(model), atol=1e-5)


def test_ranks_that_differ_are_scaled_as_llama_cpp_scales(tmp_path):
    model = packed()
    paths = list(quantized_layers(model))
    inject_lora(model, "all", rank={paths[0]: 2, paths[1]: 8}, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B["default"].data.normal_(0, 0.1)
    export_gguf(model, tmp_path / "m", small_tokenizer())
    back, _ = load_model(tmp_path / "m", "cpu", "fp32")
    read_gguf_adapter(back, tmp_path / "m" / ADAPTER)
    assert torch.allclose(logits(back), logits(model), atol=1e-5)


def test_a_merged_adapter_leaves_no_file(tmp_path):
    model = adapted(packed())
    export_gguf(model, tmp_path / "m", small_tokenizer(), merge="rtn")
    assert not (tmp_path / "m" / ADAPTER).exists() and not lora_layers(model)
    back, _ = load_model(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(back), logits(model))


def test_further_files_prove_themselves_with_it_and_a_failure_leaves_nothing(tmp_path):
    def beside(folder):
        (folder / "note").write_text("a")

    def fails(folder):
        raise OSError("a full disk")

    export_gguf(packed(), tmp_path / "m", small_tokenizer(), beside=beside)
    assert "note" in json.loads((tmp_path / "m" / "hashes.json").read_text())["files"]
    with pytest.raises(OSError, match="full disk"):
        export_gguf(packed(), tmp_path / "n", small_tokenizer(), beside=fails)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_damage_is_found(tmp_path):
    folder = tmp_path / "m"
    export_gguf(packed(), folder, small_tokenizer())
    assert is_whole(str(folder))
    whole = (folder / BASE).read_bytes()
    (folder / BASE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="base.gguf is not as it was written"):
        load_model(folder)
    write_hashes(folder)
    with pytest.raises(ValueError, match="base.gguf can't be read: .*damaged"):
        load_model(folder)
    (folder / BASE).write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    write_hashes(folder)
    with pytest.raises(ValueError, match="base.gguf holds .*'blk.1.*the model of config.json"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    write_hashes(folder)
    with pytest.raises(ValueError, match="gate_proj is .128, 64., the model of config.json has"):
        load_model(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    export_gguf(adapted(packed()), tmp_path / "m", small_tokenizer())
    with pytest.raises(ValueError, match="is no adapter of this model"):
        read_gguf_adapter(random_model("llama", num_hidden_layers=1), tmp_path / "m" / ADAPTER)
    with pytest.raises(ValueError, match="is no adapter of this model"):
        read_gguf_adapter(packed(), tmp_path / "m" / BASE)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("model, what", [
    (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2)), "GPT2LMHeadModel can't"),
    (lambda: random_model("llama", hidden_act="gelu"), "its activation is 'gelu'"),
    (lambda: random_model("mistral", sliding_window=16), "sliding_window=16: as llama"),
    (lambda: random_model("gemma2", query_pre_attn_scalar=64), "query_pre_attn_scalar=64 is not"),
    (lambda: random_model("llama", rope_parameters=YARN), "rope of type 'yarn'"),
    (lambda: adapted(packed(), use_dora=True), "q_proj: llama.cpp has no DoRA"),
    (lambda: packed(vocab_size=200), "the tokenizer has 308 tokens, the model only 200"),
    (lambda: packed(spec=QuantSpec(4, 16), hidden_size=48, head_dim=16), "q_proj has 48 inputs"),
])  # fmt: skip
def test_what_llama_cpp_has_not_is_refused_by_name(model, what, tmp_path):
    with pytest.raises(ValueError, match=what):
        export_gguf(model(), tmp_path / "m", small_tokenizer())
    assert not list(tmp_path.iterdir())


def test_bad_calls(tmp_path):
    with pytest.raises(ValueError, match="linears='Q3_K' must be None or one of Q4_0, Q4_1, Q8_0"):
        export_gguf(packed(), tmp_path / "m", small_tokenizer(), linears="Q3_K")
    with pytest.raises(ValueError, match="nothing to merge"):
        export_gguf(packed(), tmp_path / "m", small_tokenizer(), merge="rtn")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        export_gguf(packed(), tmp_path / "other", small_tokenizer())


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    from qlora_lib.models import gguf_folder

    monkeypatch.setattr(gguf_folder, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="to write GGUF takes gguf: python -m pip install gguf"):
        export_gguf(packed(), tmp_path / "m", small_tokenizer())
