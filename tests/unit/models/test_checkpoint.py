"""Checkpoints: to the bit, nothing half written, every damage named."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_lib.base.files import read_json
from qlora_lib.base.folders import HASHES, atomic_folder, check_folder
from qlora_lib.formats.gptq_checkpoint import export_gptq, import_gptq
from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.merge import merge_lora, unmerge_lora
from qlora_lib.models import checkpoint, packed_model
from qlora_lib.models.checkpoint import QUANTIZATION, load_quantized, save_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.models.stored_weights import INDEX, WEIGHTS
from qlora_lib.models.stream import REPORT, quantize_checkpoint
from qlora_lib.quant.grid import QuantSpec
from tests.support.lora_models import adapted, base_of, files, logits, rewrite, trained
from tests.support.small_models import small_model, small_tokenizer
from tests.support.tensors import normal

KINDS = ["grid2", "grid3", "grid4", "grid8", "symmetric", "g_idx", "nf4", "nf4 single",
         "mxfp4", "nvfp4", "e4m3"]  # fmt: skip


# --- quantized models -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_comes_back_to_the_bit(kind, tmp_path):
    model = base_of(kind)
    save_quantized(model, small_tokenizer(), tmp_path / "new" / "model")
    again, tokenizer = load_quantized(tmp_path / "new" / "model", "cpu", "fp32")
    ours, theirs = quantized_layers(model), quantized_layers(again)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    for path, layer in ours.items():
        a, b = layer.state_dict(), theirs[path].state_dict()
        assert a.keys() == b.keys() and theirs[path].spec == layer.spec
        assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(logits(again), logits(model))
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert tokenizer("Ava has 12").input_ids == small_tokenizer()("Ava has 12").input_ids
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_the_file_is_small_and_has_no_pickle(tmp_path):
    model = base_of("grid4")
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    dense = sum(p.numel() * 4 for p in small_model().model.layers.parameters())
    packed = sum(layer.nbytes for layer in quantized_layers(model).values())
    assert packed < 0.2 * dense
    state = load_file(tmp_path / "m" / WEIGHTS)
    assert "lm_head.weight" not in state  # tied: stored once
    kept = sum(p.numel() * 4 for p in model.parameters())  # embeddings and norms
    assert (tmp_path / "m" / WEIGHTS).stat().st_size < packed + kept + 20_000  # and a header
    suffixes = {p.suffix for p in (tmp_path / "m").iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".txt"}


def test_untied_heads_are_stored_too(tmp_path):
    model = small_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(normal(*model.lm_head.weight.shape))
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    again, _ = load_quantized(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))


def test_biases_are_stored_too(tmp_path):
    from transformers import LlamaForCausalLM

    config = small_model().config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    for i, block in enumerate(model.model.layers):
        block.self_attn.q_proj.bias.data = normal(64, seed=i)
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    again, _ = load_quantized(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_compute_dtype_leaves_the_packed_weights_alone(name, dtype, tmp_path):
    model = base_of("nf4")
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    again, _ = load_quantized(tmp_path / "m", "cpu", name)
    assert {p.dtype for p in again.parameters()} == {dtype}
    for path, layer in quantized_layers(again).items():
        assert torch.equal(layer.dequantize(), quantized_layers(model)[path].dequantize())
    assert (logits(again).float() - logits(model)).abs().max() < 0.5


def test_adapters_stay_out_of_the_base(tmp_path):
    model = base_of("grid4")
    base = logits(model)
    adapted(model)
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    assert not any("lora" in n or "base" in n for n in load_file(tmp_path / "m" / WEIGHTS))
    again, _ = load_quantized(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), base)


def test_what_belongs_beside_a_model_is_proved_with_it(tmp_path):
    save_quantized(base_of("grid4"), small_tokenizer(), tmp_path / "m", {"recipe.json": {"a": 1}})
    assert read_json(tmp_path / "m" / "recipe.json") == {"a": 1} and check_folder(tmp_path / "m")
    (tmp_path / "m" / "recipe.json").write_text('{"a": 2}')
    with pytest.raises(ValueError, match="recipe.json is not as it was written"):
        check_folder(tmp_path / "m")


@pytest.mark.parametrize("into", ["dense", "rtn"])
def test_a_merged_model_is_saved_neither_as_base_nor_by_half(into, tmp_path):
    """To write its base would drop the adapter without a word."""
    model = base_of("grid4")
    base = logits(model)
    adapted(model, targets=("q_proj", "up_proj"))
    merge_lora(model, into=into)
    merged = logits(model)
    message = "4 layers, model.layers.0.self_attn.q_proj first, .*unmerge_lora; .*unload=True"
    with pytest.raises(ValueError, match=message):
        save_quantized(model, small_tokenizer(), tmp_path / "m")
    assert not list(tmp_path.iterdir())

    unmerge_lora(model)
    save_quantized(model, small_tokenizer(), tmp_path / "base")
    assert torch.equal(logits(load_quantized(tmp_path / "base", "cpu", "fp32")[0]), base)
    merge_lora(model, into=into, unload=True)  # dense layers among packed ones, or all packed
    save_quantized(model, small_tokenizer(), tmp_path / "merged")
    assert torch.equal(logits(load_quantized(tmp_path / "merged", "cpu", "fp32")[0]), merged)


def test_a_model_without_quantized_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no layer is quantized; call quantize_model"):
        save_quantized(small_model(), small_tokenizer(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    """As an earlier version wrote it: without hashes."""
    save_quantized(base_of("grid4"), small_tokenizer(), tmp_path / "m")
    (tmp_path / "m" / HASHES).unlink()
    return tmp_path / "m"


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_named(saved, size):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        load_quantized(saved, "cpu", "fp32")


def test_garbage_is_named(saved):
    (saved / WEIGHTS).write_bytes(b"\xff" * 4096)
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        load_quantized(saved, "cpu", "fp32")
    (saved / QUANTIZATION).write_text('{"format": 1, "lay')
    with pytest.raises(ValueError, match="quantization.json is not valid JSON"):
        load_quantized(saved, "cpu", "fp32")


@pytest.mark.parametrize("name", [WEIGHTS, QUANTIZATION])
def test_missing_files_are_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; is this the right"):
        load_quantized(saved, "cpu", "fp32")


def test_a_newer_format_is_refused(saved):
    rewrite(saved, QUANTIZATION, lambda d: d.update(format=99))
    with pytest.raises(ValueError, match="has format 99; this version reads up to 1: upgrade"):
        load_quantized(saved, "cpu", "fp32")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_missing_and_unexpected_tensors_are_named(saved, name):
    state = load_file(saved / WEIGHTS)
    whole = dict(state)
    state.pop(name)
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"missing.*{name}"):
        load_quantized(saved, "cpu", "fp32")
    save_file({**whole, "model.extra": torch.ones(2)}, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not expected.*model.extra"):
        load_quantized(saved, "cpu", "fp32")


@pytest.mark.parametrize("part", ["codes", "scale", "zero_point"])
def test_missing_parts_of_a_layer_are_named(saved, part):
    state = load_file(saved / WEIGHTS)
    state.pop(f"model.layers.1.mlp.up_proj.{part}")
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.up_proj.*{part}"):
        load_quantized(saved, "cpu", "fp32")


def test_codes_of_another_shape_are_named(saved):
    state = load_file(saved / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.codes"
    state[name] = state[name][:, :-1].contiguous()
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj"):
        load_quantized(saved, "cpu", "fp32")


# --- proofs -----------------------------------------------------------------------------------


def flip(path, where=0.5):
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("form", ["grid", "nf4", "gptq"])
def test_one_bit_of_any_file_is_noticed_before_a_value_is_used(form, tmp_path, monkeypatch):
    model, folder = base_of("nf4" if form == "nf4" else "grid4"), tmp_path / "m"
    if form == "gptq":
        export_gptq(model, folder, tokenizer=small_tokenizer())
    else:
        save_quantized(model, small_tokenizer(), folder)
    load = import_gptq if form == "gptq" else load_quantized
    load(folder, "cpu", "fp32")
    monkeypatch.setattr(packed_model, "empty_model", lambda *_: pytest.fail("built something"))
    for path in sorted(folder.iterdir()):
        before = path.read_bytes()
        for where in (0.3, 0.7):
            flip(path, where)
            with pytest.raises(ValueError):
                load(folder, "cpu", "fp32")
            path.write_bytes(before)
    for name in ("other.safetensors", INDEX):
        (folder / name).write_bytes(b"{}")
        with pytest.raises(ValueError, match=f"{name} is not among the files"):
            load(folder, "cpu", "fp32")
        (folder / name).unlink()
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS} is missing"):
        load(folder, "cpu", "fp32")


BAD = [  # by an older version, so without hashes: the change, and what names it
    (lambda s: s["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds NaN or Inf"),
    (lambda s: s["model.layers.1.mlp.up_proj.scale"][3].fill_(float("inf")), "up_proj.*scale hol"),
    (lambda s: s["model.layers.1.mlp.up_proj.zero_point"][0].fill_(16), "zero_point lies outside"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_values_that_mean_nothing_are_named_where_no_hash_is(change, message, saved):
    state = load_file(saved / WEIGHTS)
    change(state)
    save_file(state, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_quantized(saved, "cpu", "fp32")


@pytest.mark.parametrize("said", [{"kind": "grod"}, {"kind": 5}, {"bits": 4.0}, {"bits": 5},
                                  {"group_size": "16"}, {"group_size": True}, {"symmetric": "no"},
                                  {"strange": 1}, []])  # fmt: skip
def test_descriptions_that_mean_nothing_are_named_where_no_hash_is(said, saved):
    def change(described):
        layers, path = described["layers"], "model.layers.1.mlp.up_proj"
        layers[path] = layers[path] | said if said else said

    rewrite(saved, QUANTIZATION, change)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj"):
        load_quantized(saved, "cpu", "fp32")


def test_nan_is_neither_saved_nor_exported(tmp_path):
    for where in ("model.norm.weight", "model.layers.1.mlp.up_proj.scale"):
        model = base_of("grid4")
        model.state_dict()[where].view(-1)[0] = float("nan")
        for write in (lambda to: save_quantized(model, small_tokenizer(), to),
                      lambda to: export_gptq(model, to)):  # fmt: skip
            with pytest.raises(ValueError, match=f"{where} holds NaN"):
                write(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# --- heads of their own -----------------------------------------------------------------------


def own_head():
    """A model whose config ties its head to the embeddings, with an adapter merged into it."""
    model = small_model()
    inject_lora(model, ("lm_head",), rank=4)
    trained(model, std=0.5)
    merge_lora(model, unload=True)
    assert model.config.tie_word_embeddings
    return model


def tied(folder) -> bool:
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def write_ours(model, folder):
    save_quantized(model, small_tokenizer(), folder)


def write_gptq(model, folder):
    export_gptq(model, folder, tokenizer=small_tokenizer())


@pytest.mark.parametrize("write, read", [(write_ours, load_quantized), (write_gptq, import_gptq)])
def test_a_head_of_its_own_comes_back_though_the_model_says_tied(write, read, tmp_path):
    model = own_head()
    quantize_model(model, None, QuantSpec(8, 16), "rtn")
    want = logits(model)
    assert not torch.equal(want, logits(read_tied(model)))
    write(model, tmp_path / "m")
    assert not tied(tmp_path / "m")  # for readers that go by the config alone
    again, _ = read(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), want) and not again.config.tie_word_embeddings
    rewrite(tmp_path / "m", "config.json", lambda c: c.update(tie_word_embeddings=True))
    again, _ = read(tmp_path / "m", "cpu", "fp32")  # as older versions wrote it
    assert torch.equal(logits(again), want)
    write(again, tmp_path / "again")
    assert not tied(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again", "cpu", "fp32")[0]), want)


def read_tied(model):
    again = copy.deepcopy(model)
    again.lm_head.weight = again.model.embed_tokens.weight
    return again


def test_a_head_of_its_own_is_streamed_as_in_memory(tmp_path):
    model, folder, spec = own_head(), tmp_path / "m", QuantSpec(8, 16)
    model.save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    rewrite(folder, "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert "lm_head.weight" in load_file(folder / WEIGHTS)
    for name in ("own", "equal"):
        whole, _ = load_model(folder, "cpu", "fp32")
        quantize_model(whole, None, spec, "rtn")
        quantize_checkpoint(folder, tmp_path / "out", spec, None, "rtn", device="cpu")
        again, _ = load_quantized(tmp_path / "out", "cpu", "fp32")
        assert torch.equal(logits(again), logits(whole))
        assert tied(tmp_path / "out") == (name == "equal")
        state = load_file(folder / WEIGHTS)
        size = sum(t.numel() for n, t in state.items() if name == "own" or "lm_head" not in n)
        assert read_json(tmp_path / "out" / REPORT)["parameters"] == size
        # two weights of one value: one weight
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_quantized_head_is_tied_to_nothing(tmp_path):
    model = small_model()
    quantize_model(model, None, QuantSpec(8, 16), "rtn", target_modules=("lm_head", "q_proj"))
    save_quantized(model, small_tokenizer(), tmp_path / "m")
    again, _ = load_quantized(tmp_path / "m", "cpu", "fp32")
    assert torch.equal(logits(again), logits(model)) and not tied(tmp_path / "m")
    assert again.state_dict().keys() == model.state_dict().keys()


# --- saving -----------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    before = files(saved)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(base_of("grid2"), small_tokenizer(), saved)
    monkeypatch.undo()
    tokenizer = small_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", fail)  # after the weights
    with pytest.raises(OSError, match="disk full"):
        save_quantized(base_of("grid2"), tokenizer, saved)
    assert files(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["m"]  # no scratch folder either


def test_a_failed_rename_puts_the_old_checkpoint_back(saved, monkeypatch):
    before, rename = files(saved), os.rename

    def fail(src, dst, **kwargs):
        if str(src).endswith(".part"):
            raise OSError("no permission")
        return rename(src, dst, **kwargs)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no permission"):
        save_quantized(base_of("grid2"), small_tokenizer(), saved)
    monkeypatch.undo()
    assert files(saved) == before


def test_saving_again_replaces_the_whole_folder(saved):
    model = base_of("grid2")
    save_quantized(model, small_tokenizer(), saved)
    assert torch.equal(logits(load_quantized(saved, "cpu", "fp32")[0]), logits(model))
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_a_folder_with_other_files_is_not_replaced(saved, tmp_path):
    """An adapter saved over its base, or into somebody's folder, would delete what is there."""
    model, before = adapted(base_of("grid4")), files(saved)
    with pytest.raises(ValueError, match="m holds other files; give a folder of its own"):
        save_adapter(model, saved)
    assert files(saved) == before
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("dear diary")
    for save in (
        lambda: save_adapter(model, home),
        lambda: save_quantized(model, small_tokenizer(), home),
    ):
        with pytest.raises(ValueError, match="home holds other files"):
            save()
    assert files(home) == {"thesis.txt": b"dear diary"}
    (tmp_path / "empty").mkdir()
    save_adapter(model, tmp_path / "empty")  # an empty folder is fine


def test_leftovers_of_a_killed_save_do_not_matter(tmp_path):
    for name in ("m", "m.part", "m.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").write_text("half")
    with atomic_folder(tmp_path / "m", "done") as scratch:
        (scratch / "done").write_text("")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert set(files(tmp_path / "m")) == {"done", HASHES} and files(tmp_path / "m")["done"] == b""


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.9, "top_p": 0.6}, {"num_beams": 1, "early_stopping": True}]
)
def test_generation_settings_are_written_as_they_are(settings, tmp_path):
    """Many published models hold some that transformers' save_pretrained refuses."""
    model = base_of("grid4")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError):
        model.generation_config.save_pretrained(tmp_path / "refused")
    small_model().save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    rewrite(tmp_path / "dense", "generation_config.json", lambda c: c.update(settings))
    save_quantized(model, small_tokenizer(), tmp_path / "ours")
    export_gptq(model, tmp_path / "gptq")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "streamed", QuantSpec(4, 16), None, "rtn")
    for name in ("ours", "gptq", "streamed"):
        read = import_gptq if name == "gptq" else load_quantized
        again = read(tmp_path / name, "cpu")[0].generation_config.to_dict()
        assert settings.items() <= again.items()
        described = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert settings.items() <= described.items() and "eos_token_id" in described


def test_generation_settings_in_the_config_stop_nothing(tmp_path):
    """Where older models have them."""
    small_model().save_pretrained(tmp_path / "dense")
    small_tokenizer().save_pretrained(tmp_path / "dense")
    rewrite(tmp_path / "dense", "config.json", lambda c: c.update(temperature=0.9, max_length=64))
    quantize_checkpoint(tmp_path / "dense", tmp_path / "streamed", QuantSpec(4, 16), None, "rtn")
    model, tokenizer = load_model(tmp_path / "dense", "cpu", "fp32")
    quantize_model(model, None, QuantSpec(4, 16), "rtn")
    save_quantized(model, tokenizer, tmp_path / "ours")
    export_gptq(load_quantized(tmp_path / "streamed", "cpu")[0], tmp_path / "gptq")
