"""Configs and tokenizers of strangers: no code of theirs runs, and no value of theirs hangs."""

import io
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lib.__main__ import main
from qlora_lib.formats.gptq_checkpoint import import_gptq
from qlora_lib.models.checkpoint import QUANTIZATION, load_quantized
from qlora_lib.models.load import load_model
from qlora_lib.models.settings import check_config, read_config, read_tokenizer
from qlora_lib.models.stored_weights import INDEX
from qlora_lib.models.stream import quantize_checkpoint
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.lora_models import rewrite
from tests.support.small_models import small_model, small_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "model"
    small_model(layers=1).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def dense(folder):
    return load_model(folder, "cpu", "fp32")


def packed(folder):
    return load_quantized(folder, "cpu", "fp32")


def gptq(folder):
    return import_gptq(folder, "cpu", "fp32")


def streamed(folder):
    return quantize_checkpoint(folder, folder.with_name("out"), NF4Spec(), None, "nf4",
                               device="cpu")  # fmt: skip


def finetuned(folder):
    status = main(["finetune", "--model", str(folder), "--folder", str(folder.with_name("run")),
                   "--max-steps", "1", "--device", "cpu"])  # fmt: skip
    raise ValueError(f"exit {status}")


def made_for(door, folder):
    """The folder, with what this door looks for first."""
    if door is packed:
        (folder / QUANTIZATION).write_text(json.dumps({"format": 1, "layers": {}}))
    if door is gptq:
        quantized = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        rewrite(folder, "config.json", lambda c: c.update(quantization_config=quantized))
        state = load_file(folder / "model.safetensors")
        state["model.layers.0.mlp.up_proj.qweight"] = torch.ones(1)
        save_file(state, folder / "model.safetensors", {"format": "pt"})


CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "stranger"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO = {"AutoConfig": "stranger.Config", "AutoModelForCausalLM": "stranger.Model"}


@pytest.mark.parametrize("where", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("door", [dense, packed, gptq, streamed, finetuned])
def test_no_code_of_a_folder_runs_even_if_all_is_answered_with_yes(
    door, where, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "y")
    made_for(door, folder)
    marker = tmp_path / "marker"
    (folder / "stranger.py").write_text(CODE.format(marker=str(marker)))
    if where == "config":
        rewrite(folder, "config.json", lambda c: c.update(model_type="stranger", auto_map=AUTO))
    if where == "model":  # whose config transformers knows, but no causal model of it
        rewrite(folder, "config.json", lambda c: c.update(model_type="clip", auto_map=AUTO))
    if where == "tokenizer":
        auto = {"AutoTokenizer": ["stranger.Tokenizer", None]}
        rewrite(folder, "tokenizer_config.json",
                lambda c: c.update(tokenizer_class="Strange", auto_map=auto))  # fmt: skip
    try:
        door(folder)
    except ValueError as error:
        said = str(error)
        if door is finetuned:
            assert said == "exit 2"
            said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "\n" not in said and len(said) < 600
        assert where != "config" or "never run here" in said
    else:  # transformers may have a class of its own that does
        assert where == "tokenizer"
    assert not marker.exists() and not asked


@pytest.mark.parametrize("door", [dense, packed])
@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"num_hidden_layers": "two"},
    {"hidden_size": -64}, {"hidden_size": "64"}, {"intermediate_size": 2.5},
    {"vocab_size": 10**15}, {"num_attention_heads": True}, {"num_attention_heads": 0},
    {"num_key_value_heads": 10**6}, {"max_position_embeddings": -1}, {"rms_norm_eps": "small"},
    {"rms_norm_eps": float("nan")}, {"hidden_act": "no such thing"}, {"dtype": "float33"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    {"model_type": 5}, {"model_type": "no such thing"}, {"architectures": 5},
    {"attn_implementation": "someone/kernel"},
])  # fmt: skip
def test_values_that_no_model_has_are_refused_before_anything_is_built(changes, door, folder):
    made_for(door, folder)
    rewrite(folder, "config.json", lambda c: c.update(changes))
    try:
        door(folder)
    except (ValueError, OSError) as error:
        said = str(error)
        assert "\n" not in said and ("config" in said or changes == {"architectures": 5})
    else:
        assert changes == {"architectures": 5}  # which few readers look at


@pytest.mark.parametrize("text", ["[]", "5", '"x"', "null", "", "{", '{"a": 1, "a": 2}',
                                  "[" * 100_000, '{"a":' * 100_000, "\x80"])  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json"])  # fmt: skip
def test_json_of_another_shape_is_an_error_that_names_the_folder(file, text, folder):
    (folder / file).write_bytes(text.encode("latin-1"))
    for door in (dense, packed):
        made_for(door, folder)
        try:
            door(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error)
        else:  # transformers passes over a key that is there twice, and does without this file
            assert text.startswith('{"a": 1') or file == "generation_config.json"


def test_sizes_are_looked_for_at_any_depth_and_the_published_ones_pass():
    deep = {"text_config": {"layers": [{"hidden_size": 64}, {"hidden_size": -1}]}}
    with pytest.raises(ValueError, match="this config: hidden_size is -1, not a number from 0"):
        check_config(deep, "this config")
    check_config({"num_hidden_layers": 126, "hidden_size": 16384, "vocab_size": 256_000,
                  "max_position_embeddings": 10_485_760, "head_dim": None, "num_layers": None,
                  "vision_feature_layer": -2, "rms_norm_eps": 1e-6,
                  "intermediate_size": [1024, 2048]}, "a config")  # fmt: skip


def test_a_folder_without_config_or_tokenizer_is_named(tmp_path):
    for read in (read_config, read_tokenizer):
        with pytest.raises((OSError, ValueError), match=str(tmp_path)):
            read(tmp_path)


# --- names of files ---------------------------------------------------------------------------


def sharded(folder, name):
    """The folder with an index that says that all is in a file of this name."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"),
                                                         name)}  # fmt: skip
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("door", [dense, gptq, streamed])
@pytest.mark.parametrize("name", ["../secret.safetensors", "/{}/secret.safetensors", "..", "",
                                  "a/../../secret.safetensors", 5])  # fmt: skip
def test_names_of_weights_never_leave_the_folder(name, door, folder, tmp_path):
    made_for(door, folder)
    (folder / "a").mkdir()
    sharded(folder, name.format(tmp_path) if isinstance(name, str) else name)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    with pytest.raises(ValueError, match="index.json names .*no file in this folder"):
        door(folder)


@pytest.mark.parametrize("door", [dense, packed, streamed])
@pytest.mark.parametrize("index", [True, False])
def test_links_do_not_leave_it_either_but_those_of_the_hub_s_cache(index, door, folder, tmp_path):
    made_for(door, folder)
    if index:
        sharded(folder, "model.safetensors")
    weights, outside = folder / "model.safetensors", tmp_path / "elsewhere.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    with pytest.raises(ValueError, match="model.safetensors is a link out of this folder"):
        door(folder)
    if door is dense:
        cache = tmp_path / "models--a--b"
        (cache / "blobs").mkdir(parents=True)
        outside.rename(cache / "blobs" / "1f")
        weights.unlink()
        snapshot = shutil.copytree(folder, cache / "snapshots" / "2e")
        (snapshot / "model.safetensors").symlink_to("../../blobs/1f")
        dense(snapshot)


@pytest.mark.parametrize("said", [[], {}, None, {"weight_map": []}, {"weight_map": {}},
                                  {"weight_map": {"model.norm.weight": "other"}},
                                  {"weight_map": {"no.such": "model.safetensors"}}])  # fmt: skip
@pytest.mark.parametrize("door", [dense, streamed])
def test_an_index_that_fits_nothing_is_named(said, door, folder):
    made_for(door, folder)
    (folder / INDEX).write_text(json.dumps(said))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises((ValueError, OSError)) as error:
        door(folder)
    assert "model" in str(error.value)
