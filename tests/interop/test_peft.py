"""LoRA against PEFT: the same logits from the same weights, and one file format."""

import copy
import json

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qlora_lib.adapters import ADAPTER_CONFIG, load_adapter, save_adapter
from qlora_lib.grid import QuantSpec
from qlora_lib.lora import ALL_LINEAR, ATTENTION, inject_lora, lora_layers
from qlora_lib.merge import merge_lora
from qlora_lib.models import dequantize_model, quantize_model
from tests.helpers import normal
from tests.unit.small_models import small_model

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIGS = [
    dict(targets=ATTENTION, rank=4, alpha=16),
    dict(targets=ALL_LINEAR, rank=8, alpha=5),
    dict(targets=ALL_LINEAR, rank=8, alpha=16, use_rslora=True),
]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def ours(targets, rank, alpha, use_rslora=False, base=None):
    model = base or small_model()
    inject_lora(model, targets, rank=rank, alpha=alpha, use_rslora=use_rslora)
    for i, layer in enumerate(lora_layers(model).values()):
        b = layer.lora_B["default"]
        b.data = normal(*b.shape, seed=i, std=0.1)
    return model


def theirs(targets, rank, alpha, use_rslora=False, base=None, **given):
    """A PEFT model; its B is random, as after training."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), use_rslora=use_rslora,
        task_type="CAUSAL_LM", **given,
    )  # fmt: skip
    model = get_peft_model(base or small_model(), config).eval()
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data = normal(*p.shape, seed=i, std=0.1)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_weights_give_the_same_logits(config):
    model, reference = ours(**config), theirs(**config)
    state = dict(reference.named_parameters())
    for path, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            p = state[f"base_model.model.{path}.{part}.default.weight"]
            p.data = getattr(layer, part)["default"].data.clone()
    assert (logits(model) - logits(small_model())).abs().max() > 0.1
    assert (logits(model) - logits(reference)).abs().max() < 1e-5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_are_the_same(config):
    model, reference = ours(**config), theirs(**config)
    state = dict(reference.named_parameters())
    for path, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            key = f"base_model.model.{path}.{part}.default.weight"
            state[key].data = getattr(layer, part)["default"].data.clone()
    for m in (model, reference):
        m(input_ids=IDS, labels=IDS).loss.backward()
    for path, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            got = getattr(layer, part)["default"].grad
            want = state[f"base_model.model.{path}.{part}.default.weight"].grad
            assert torch.allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_peft_loads_our_adapter(config, tmp_path):
    model = ours(**config)
    save_adapter(model, tmp_path / "a")
    reference = PeftModel.from_pretrained(small_model(), tmp_path / "a").eval()
    assert (logits(model) - logits(reference)).abs().max() < 1e-5
    loaded = reference.peft_config["default"]
    assert (loaded.r, loaded.lora_alpha, loaded.use_rslora) == (
        config["rank"], config["alpha"], config.get("use_rslora", False),
    )  # fmt: skip
    merged = reference.merge_and_unload()
    merge_lora(model)
    assert (logits(model) - logits(merged)).abs().max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_we_load_pefts_adapter(config, tmp_path):
    reference = theirs(**config)
    reference.save_pretrained(tmp_path / "a")
    model = small_model()
    paths = load_adapter(model, tmp_path / "a")
    assert len(paths) == 2 * len(config["targets"])
    assert (logits(model) - logits(reference)).abs().max() < 1e-5


def test_an_adapter_goes_there_and_back_to_the_bit(tmp_path):
    model = ours(**CONFIGS[1])
    save_adapter(model, tmp_path / "a")
    PeftModel.from_pretrained(small_model(), tmp_path / "a").save_pretrained(tmp_path / "b")
    again = small_model()
    load_adapter(again, tmp_path / "b")
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_trained_on_our_4_bit_base_serves_pefts_dense_one(tmp_path):
    base = small_model()
    quantize_model(base, None, QuantSpec(4, 16), "rtn")
    dense = copy.deepcopy(base)
    dequantize_model(dense)
    model = ours(**CONFIGS[0], base=base)
    save_adapter(model, tmp_path / "a")
    reference = PeftModel.from_pretrained(dense, tmp_path / "a").eval()
    assert (logits(model) - logits(reference)).abs().max() < 1e-5


def test_init_has_pefts_distribution():
    """A: the same bounds and deviation, in 65,536 draws; B: zeros in both."""
    layer = torch.nn.Sequential(torch.nn.Linear(1024, 256))
    for init, name in (("kaiming", True), ("gaussian", "gaussian")):
        torch.manual_seed(0)
        config = LoraConfig(r=64, target_modules=["0"], init_lora_weights=name)
        a_theirs = get_peft_model(copy.deepcopy(layer), config).base_model.model[0].lora_A
        mine = copy.deepcopy(layer)
        inject_lora(mine, ("0",), rank=64, init=init)
        a, b = mine[0].lora_A["default"].data, a_theirs["default"].weight.data
        assert a.shape == b.shape and abs(a.std() / b.std() - 1) < 0.02
        assert abs(a.abs().max() / b.abs().max() - 1) < (0.01 if init == "kaiming" else 0.2)


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(use_dora=True), "use_dora"),
        (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (dict(layers_to_transform=[0]), "layers_to_transform"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(bias="lora_only"), "bias"),
        (dict(init_lora_weights="pissa"), "init_lora_weights"),
        (dict(init_lora_weights="olora"), "init_lora_weights"),
    ],
)
def test_what_peft_wrote_and_we_do_not_have_is_refused(given, named, tmp_path):
    reference = theirs(ATTENTION, 4, 16, **given)
    reference.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=f"{named}=.*not supported"):
        load_adapter(small_model(), tmp_path / "a")


def test_every_setting_that_pefts_adapters_carry_is_known():
    """A new version of PEFT brings new settings: each must be read, refused or harmless."""
    read = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights",
            "peft_type"}
    refused = {"use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "bias",
               "fan_in_fan_out", "layers_to_transform", "trainable_token_indices",
               "layer_replication", "target_parameters", "alora_invocation_tokens",
               "arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora",
               "velora_config"}
    # named where they come from, or of use only together with one of the above
    harmless = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
                "inference_mode", "exclude_modules", "layers_pattern", "megatron_config",
                "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
                "qalora_group_size", "runtime_config", "ensure_weight_tying"}
    unknown = set(LoraConfig().to_dict()) - read - refused - harmless
    assert not unknown, f"PEFT {peft.__version__}"


def test_our_config_is_what_peft_writes(tmp_path):
    config = CONFIGS[2]
    save_adapter(ours(**config), tmp_path / "ours")
    theirs(**config).save_pretrained(tmp_path / "theirs")
    mine, reference = (
        json.loads((tmp_path / who / ADAPTER_CONFIG).read_text()) for who in ("ours", "theirs")
    )
    for key, value in mine.items():
        if key in ("target_modules", "base_model_name_or_path"):
            assert sorted(value) == sorted(reference[key] or "")
        else:
            assert value == reference[key], key
