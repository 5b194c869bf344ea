"""Adapters on disk: to the bit, for the right base, every damage named."""

import pytest
import torch
from lora_models import adapted, base_of, logits, rewrite
from safetensors.torch import load_file, save_file
from small_models import small_model

from qlora_lib.adapters import (
    ADAPTER,
    ADAPTER_CONFIG,
    base_fingerprint,
    load_adapter,
    save_adapter,
)
from qlora_lib.grid import QuantSpec
from qlora_lib.lora import lora_layers, use_adapter
from qlora_lib.models import quantize_model
from qlora_lib.nf4 import NF4Spec


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
@pytest.mark.parametrize("given", [{}, dict(use_rslora=True, alpha=7), dict(init="gaussian")])
def test_an_adapter_comes_back_to_the_bit(kind, given, tmp_path):
    model = adapted(base_of(kind), targets=("q_proj", "k_proj", "down_proj"), **given)
    save_adapter(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [ADAPTER_CONFIG, ADAPTER]
    again = base_of(kind)
    paths = load_adapter(again, tmp_path / "a")
    assert set(paths) == set(lora_layers(model)) == set(lora_layers(again))
    assert torch.equal(logits(again), logits(model))
    for path, layer in lora_layers(again).items():
        assert layer.configs == lora_layers(model)[path].configs
        assert not layer.lora_A["default"].requires_grad


def test_an_adapter_can_take_another_name_beside_others(tmp_path):
    model = adapted(small_model())
    save_adapter(model, tmp_path / "a")
    again = adapted(small_model(), rank=2, seed=90, adapter="mine")
    mine = logits(again)
    load_adapter(again, tmp_path / "a", adapter="theirs")
    assert torch.equal(logits(again), mine)  # the default stays, and stays trainable
    assert all(m.lora_A["mine"].requires_grad for m in lora_layers(again).values())
    want = logits(model)
    with use_adapter(again, "theirs"):
        assert torch.equal(logits(again), want)


def test_an_adapter_that_is_not_there_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapter 'default' to save"):
        save_adapter(small_model(), tmp_path / "a")
    with pytest.raises(ValueError, match="no adapter 'b' to save"):
        save_adapter(adapted(small_model()), tmp_path / "a", adapter="b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["grid4", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_recognised_however_it_is_stored(kind, dtype, tmp_path):
    """An adapter trained on the 4-bit base in bf16 fits the dense one, in any dtype. The base's
    own weights are bf16, as published ones are."""
    published = small_model().bfloat16()
    for p in published.parameters():  # values that fp16 can't hold exactly are there too
        p.data[..., ::7] *= 2.0**-16
    trained_on = small_model()
    trained_on.load_state_dict(published.state_dict())
    quantize_model(
        trained_on, None, *((QuantSpec(4, 16), "rtn") if kind == "grid4" else (NF4Spec(), "nf4"))
    )
    save_adapter(adapted(trained_on.bfloat16()), tmp_path / "a")
    dense = small_model().to(dtype)
    dense.load_state_dict(published.state_dict())
    load_adapter(dense, tmp_path / "a")
    assert base_fingerprint(dense) == base_fingerprint(trained_on)


@pytest.fixture
def adapter(tmp_path):
    save_adapter(adapted(small_model()), tmp_path / "a")
    return tmp_path / "a"


def refused(folder, message, model=None, error=ValueError):
    """load_adapter says so, and leaves the model as it was."""
    model = model or small_model()
    before = {n: p.requires_grad for n, p in model.named_parameters()}, logits(model)
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before[0]
    assert torch.equal(logits(model), before[1])


def test_an_adapter_for_another_base_is_refused(adapter):
    refused(adapter, "a was trained on another base model", small_model(seed=1))
    refused(adapter, "a was trained on another base model", small_model(layers=3))


def without_base(folder, change=lambda state: None) -> None:
    """Write the tensors again as PEFT does: with no mark of the base."""
    state = load_file(folder / ADAPTER)
    change(state)
    save_file(state, folder / ADAPTER, metadata={"format": "pt"})


def test_other_ranks_shapes_and_layers_are_named(adapter):
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update(r=8))
    refused(adapter, r"q_proj.lora_A.weight should be \(8, 64\), found \(4, 64\)")
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update(r=4))
    without_base(adapter)
    refused(adapter, r"layers.2.*lora_A.weight should be .* found nothing", small_model(layers=3))
    refused(adapter, r"tensors for layers this model lacks.*layers.1", small_model(layers=1))

    def wider(state):
        name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
        state[name] = torch.zeros(130, 4)

    without_base(adapter, wider)
    refused(adapter, r"up_proj.lora_B.weight should be \(128, 4\), found \(130, 4\)")


def test_an_adapter_under_a_name_in_use_is_refused(adapter):
    refused(adapter, "adapter 'default' exists with", adapted(small_model(), rank=2, seed=5))


@pytest.mark.parametrize("size", [0, 7, -1])
def test_a_truncated_adapter_is_named(adapter, size):
    (adapter / ADAPTER).write_bytes((adapter / ADAPTER).read_bytes()[:size])
    refused(adapter, "adapter_model.safetensors is truncated or corrupt")


@pytest.mark.parametrize("name", [ADAPTER, ADAPTER_CONFIG])
def test_missing_adapter_files_are_named(adapter, name):
    (adapter / name).unlink()
    refused(adapter, f"{name} does not exist", error=FileNotFoundError)


def test_a_broken_adapter_config_is_named(adapter):
    whole = (adapter / ADAPTER_CONFIG).read_text()
    (adapter / ADAPTER_CONFIG).write_text(whole[:50])
    refused(adapter, "adapter_config.json is not valid JSON")
    for key in ("r", "lora_alpha", "target_modules"):
        (adapter / ADAPTER_CONFIG).write_text(whole)
        rewrite(adapter, ADAPTER_CONFIG, lambda d: d.pop(key))
        refused(adapter, f"adapter_config.json.*lacks.*{key}")


@pytest.mark.parametrize(
    "key, value",
    [
        ("peft_type", "IA3"), ("use_dora", True), ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}), ("modules_to_save", ["lm_head"]), ("bias", "all"),
        ("lora_bias", True), ("fan_in_fan_out", True), ("layers_to_transform", [0]),
        ("trainable_token_indices", [1, 2]), ("use_qalora", True),
        ("alora_invocation_tokens", [5, 6]), ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts"]), ("use_bdlora", {"x": 1}), ("kasa_config", {"x": 1}),
        # these take part of the base into the adapter: B A alone is not the trained update
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
    ],
)  # fmt: skip
def test_peft_settings_that_would_change_the_result_are_refused(adapter, key, value):
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update({key: value}))
    refused(adapter, r"IA3 adapter; only LORA" if key == "peft_type" else f"{key}=.*not supported")
