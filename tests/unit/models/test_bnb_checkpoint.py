"""bitsandbytes' layout, written by hand from our NF4; test_bitsandbytes.py has the real one."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qlora_lib.base.hashes import weights_id
from qlora_lib.lora.inject import inject_lora
from qlora_lib.models.bnb_checkpoint import _nf4_tensor, load_bnb_4bit
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.models.stream import quantize_checkpoint
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec, quantize_nf4
from qlora_lib.runs.profiles import load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune
from tests.support.bnb_folder import as_bytes, layout, save_bnb
from tests.support.lora_models import logits, rewrite
from tests.support.small_models import PAIRS, small_tokenizer
from tests.support.tensors import PROPERTY, normal


@PROPERTY
@given(
    out=st.integers(1, 40),
    features=st.integers(1, 90),
    block=st.sampled_from([1, 2, 32, 64, 128]),
    double_quant=st.booleans(),
)
def test_any_weight_is_read_to_the_bit(out, features, block, double_quant):
    """Odd numbers of weights and blocks, blocks across rows, more than one nested block."""
    q = quantize_nf4(normal(out, features, seed=out), block, double_quant)
    again = _nf4_tensor(layout(q), q.shape)
    assert again.spec == q.spec and torch.equal(again.codes, q.codes)
    assert torch.equal(again.dequantize(), q.dequantize())


@pytest.fixture(params=[True, False], ids=["double", "single"])
def checkpoint(request, tmp_path):
    """A model with biases, its state and its folder in bitsandbytes' layout, tokenizer and all."""
    return *save_bnb(tmp_path, request.param), tmp_path


def test_a_folder_gives_the_model_and_its_tokenizer(checkpoint):
    model, _, folder = checkpoint
    again, tokenizer = load_bnb_4bit(folder, "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    assert tokenizer("12+30").input_ids == small_tokenizer()("12+30").input_ids
    assert not any(p.requires_grad for p in again.parameters())


def test_a_sharded_folder_gives_the_same(checkpoint):
    model, state, folder = checkpoint
    (folder / "model.safetensors").unlink()
    names, index = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2])):  # a layer's tensors are torn apart
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({n: state[n] for n in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    again, _ = load_bnb_4bit(folder, "cpu", "fp32")
    assert torch.equal(logits(again), logits(model))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors does not exist"):
        load_bnb_4bit(folder, "cpu", "fp32")


def test_load_model_and_a_profile_start_qlora_from_such_a_folder(checkpoint):
    model, _, folder = checkpoint
    loaded, tokenizer = load_model(folder, "cpu", "fp32")
    assert torch.equal(logits(loaded), logits(model))
    packed = quantized_layers(loaded)
    assert packed.keys() == quantized_layers(model).keys()
    assert all(isinstance(layer.spec, NF4Spec) for layer in packed.values())
    profile = load_profile("tiny", model=folder)
    again, tokenizer = profile.load(device="cpu")
    assert torch.equal(logits(again), logits(model))
    codes = {path: layer.codes.clone() for path, layer in quantized_layers(again).items()}
    inject_lora(again, profile.target_modules, rank=2)
    config = TrainConfig(max_steps=1, batch_size=4, lr=1e-2, compute_dtype="fp32")
    finetune(again, tokenizer, PAIRS[:4], config)
    assert not torch.equal(logits(again), logits(model))
    assert all(torch.equal(layer.codes, codes[p]) for p, layer in quantized_layers(again).items())


def test_to_quantize_it_again_is_refused_by_what_is_the_case(checkpoint, tmp_path):
    _, _, folder = checkpoint
    profile = load_profile("tiny", model=folder)
    for quantize, method in ((NF4Spec(), None), (QuantSpec(4, 16), "rtn")):
        message = "q_proj is a QuantizedLinear; the model is quantized already .NF4Spec.*use it"
        with pytest.raises(ValueError, match=message):
            profile.load(quantize, method, device="cpu")
    with pytest.raises(ValueError, match="is quantized already; name the dense model's folder"):
        quantize_checkpoint(folder, tmp_path / "out", NF4Spec(), None, "nf4", device="cpu")


def test_a_hub_id_is_downloaded_and_stands_for_itself(checkpoint, monkeypatch):
    from qlora_lib.models import load

    model, _, folder = checkpoint
    real, asked = load.read_config, []
    monkeypatch.setattr(load, "read_config", lambda name: real(
        folder if name == "someone/model-bnb-4bit" else name
    ))  # fmt: skip
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **k: asked.append((name, k)) or folder
    )
    loaded, _ = load_model("someone/model-bnb-4bit", "cpu", "fp32")
    assert torch.equal(logits(loaded), logits(model))
    [(name, how)] = asked
    assert name == "someone/model-bnb-4bit" and "*.safetensors" in how["allow_patterns"]
    assert not any("bin" in pattern for pattern in how["allow_patterns"])
    assert loaded.config._name_or_path == name == weights_id(name)


def test_its_weights_id_is_of_every_packed_byte(checkpoint):
    _, state, folder = checkpoint
    before, name = weights_id(str(folder)), "model.layers.1.mlp.up_proj.weight"
    state[name][7] ^= 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert weights_id(str(folder)) != before


def test_a_folder_without_tokenizer_or_of_8_bits_is_refused(checkpoint):
    _, _, folder = checkpoint
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="not be loaded: there is no tokenizer_config"):
        load_model(folder, "cpu", "fp32")
    rewrite(folder, "config.json", lambda c: c["quantization_config"].update(load_in_8bit=True))
    with pytest.raises(ValueError, match="LLM.int8 .* is not supported; load the dense model"):
        load_model(folder, "cpu", "fp32")


def test_what_is_packed_must_be_a_linear_layer(checkpoint):
    model, state, folder = checkpoint
    embedding = "model.embed_tokens.weight"
    weight = quantize_nf4(state.pop(embedding))
    state |= {f"{embedding}{n}": t for n, t in layout(weight).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="embed_tokens is quantized, but .* has Embedding there"):
        load_bnb_4bit(folder, "cpu", "fp32")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds no tensor .*nf4; is it a 4-bit checkpoint"):
        load_bnb_4bit(folder, "cpu", "fp32")


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "norm", "bias"])
def test_values_that_mean_nothing_are_named(part, tmp_path):
    model, state = save_bnb(tmp_path, double_quant=part == "nested_absmax")
    layer = "model.layers.1.mlp.up_proj"
    names = {"norm": "model.norm.weight", "bias": f"{layer}.bias"}
    name = names.get(part, f"{layer}.weight.{part}")
    state[name] = state[name].clone().fill_(float("nan"))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="norm.weight holds NaN" if part == "norm" else layer):
        load_bnb_4bit(tmp_path, "cpu", "fp32")


@pytest.mark.parametrize("said", [{"nested_offset": float("nan")}, {"nested_offset": "0.1"},
                                  {"shape": 5}, {"shape": None}, {"quant_type": []},
                                  {"blocksize": "64"}, {"blocksize": 10**9}])  # fmt: skip
def test_states_that_mean_nothing_are_named(said):
    q = quantize_nf4(normal(8, 64))
    tensors = layout(q)
    state = ".quant_state.bitsandbytes__nf4"
    tensors[state] = as_bytes(json.loads(bytes(tensors[state].tolist())) | said)
    with pytest.raises(ValueError):
        _nf4_tensor(tensors, q.shape)
