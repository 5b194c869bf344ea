"""Adapters on disk: to the bit, for the right base, every damage named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_lib.base.folders import HASHES
from qlora_lib.lora.files import ADAPTER, ADAPTER_CONFIG, load_adapter, save_adapter
from qlora_lib.lora.fingerprint import base_fingerprint
from qlora_lib.lora.inject import add_adapters, inject_lora, use_adapter
from qlora_lib.lora.layer import LoRAConfig, lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.peft_config import describe, read_config
from qlora_lib.lora.targets import linear_layers
from qlora_lib.models.quantize import quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.lora_models import adapted, base_of, files, logits, rewrite, trained
from tests.support.small_models import small_model
from tests.support.tensors import PROPERTY


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
@pytest.mark.parametrize("given", [{}, dict(use_rslora=True, alpha=7), dict(init="gaussian")])
def test_an_adapter_comes_back_to_the_bit(kind, given, tmp_path):
    model = adapted(base_of(kind), targets=("q_proj", "k_proj", "down_proj"), **given)
    save_adapter(model, tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {ADAPTER_CONFIG, ADAPTER, HASHES}
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


@pytest.mark.long
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
    """A folder without hashes, as others write them."""
    save_adapter(adapted(small_model()), tmp_path / "a")
    (tmp_path / "a" / HASHES).unlink()
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


@pytest.mark.long
@pytest.mark.parametrize(
    "key, value",
    [
        ("peft_type", "IA3"), ("modules_to_save", ["lm_head"]),
        ("bias", "all"), ("lora_bias", True), ("fan_in_fan_out", True),
        ("trainable_token_indices", [1, 2]), ("use_qalora", True), ("arrow_config", {"top_k": 3}),
        ("megatron_config", {"x": 1}), ("ensure_weight_tying", True), ("velora_config", {"x": 1}),
        ("monteclora_config", {"x": 1}), ("use_next_years_idea", 0.5),  # unknown here
        ("alora_invocation_tokens", [5, 6]), ("layer_replication", [[0, 2]]),
        ("target_parameters", ["experts"]), ("use_bdlora", {"x": 1}), ("kasa_config", {"x": 1}),
        # these take part of the base into the adapter: B A alone is not the trained update
        ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"), ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "mica"), ("init_lora_weights", "next_years_idea"),
    ],
)  # fmt: skip
def test_peft_settings_that_would_change_the_result_are_refused(adapter, key, value):
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update({key: value}))
    refused(adapter, r"IA3 adapter; only LORA" if key == "peft_type" else f"{key}=.*not supported")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("r", "4", "r='4' should be int"), ("rank_pattern", [4], "should be dict"),
        ("rank_pattern", {"q_proj": "4"}, "rank '4' and alpha 16 of .*q_proj must be numbers"),
        ("target_modules", 3, "should be str or list"), ("use_rslora", "no", "should be bool"),
        ("target_modules", "(q_proj", "target_modules holds '\\(q_proj', no valid regular"),
        ("rank_pattern", {"(q_proj": 4}, "rank_pattern holds .*no valid regular"),
        ("exclude_modules", "*", "exclude_modules holds .*no valid regular"),
        ("target_modules", ["c_attn"], "choose no linear layer of this model, which has"),
        ("target_modules", ["self_attn"], "choose model.layers.0.self_attn .LlamaAttention"),
        ("target_modules", ["embed_tokens"], "choose model.embed_tokens .Embedding"),
        ("exclude_modules", ["q_proj"], "config does not choose: .*q_proj"),
        ("lora_dropout", 1.5, "dropout=1.5: expected"), ("lora_alpha", None, "lacks.*lora_alpha"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_named(adapter, key, value, message):
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update({key: value}))
    refused(adapter, message)


def test_expressions_and_layer_numbers_do_not_mix(adapter):
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update(
        target_modules=".*_proj", layers_to_transform=[0]))  # fmt: skip
    refused(adapter, "layers_to_transform and layers_pattern go with a list")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_of_a_diverged_training_are_named(adapter, value):
    def spoil(state):
        state["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"][0, 3] = value

    without_base(adapter, spoil)
    refused(adapter, "layers.1.mlp.up_proj.lora_A.weight .*holds NaN, Inf")


def test_tensors_of_whole_numbers_are_named(adapter):
    def spoil(state):
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
        state[name] = state[name].int()

    without_base(adapter, spoil)
    refused(adapter, r"up_proj.lora_A.weight \(torch.int32\) holds .*no floating-point numbers")


# --- ranks, alphas and layers that differ ------------------------------------------------------


def mixed(targets=(("q_proj", 2, 16), ("v_proj", 4, 16), ("down_proj", 4, 3)), **given):
    """A model whose adapter has another rank and alpha in each kind of layer."""
    model = small_model()
    for name, rank, alpha in targets:
        inject_lora(model, (name,), rank=rank, alpha=alpha, **given)
    return trained(model, std=0.1)


@pytest.mark.parametrize("rslora", [False, True])
def test_mixed_ranks_and_alphas_come_back(rslora, tmp_path):
    model = mixed(use_rslora=rslora)
    save_adapter(model, tmp_path / "a")
    described = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    q, down = (f"model.layers.{{}}.{end}" for end in ("self_attn.q_proj", "mlp.down_proj"))
    assert described["r"] == 4 and described["lora_alpha"] == 16
    assert described["rank_pattern"] == {q.format(i): 2 for i in (0, 1)}
    assert described["alpha_pattern"] == {down.format(i): 3 for i in (0, 1)}
    again = small_model()
    load_adapter(again, tmp_path / "a")
    for path, layer in lora_layers(again).items():
        assert layer.configs == lora_layers(model)[path].configs
    assert torch.equal(logits(again), logits(model))


def test_what_pefts_file_has_one_value_for_must_not_differ(tmp_path):
    model = small_model()
    inject_lora(model, ("q_proj",), rank=2, dropout=0.1)
    inject_lora(model, ("v_proj",), rank=2)
    with pytest.raises(ValueError, match=r"the layers differ in dropout, \[0.0, 0.1\]"):
        save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_one_block_only_is_saved_by_whole_paths(tmp_path):
    model = small_model()
    paths = ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    add_adapters(model, dict.fromkeys(paths, LoRAConfig(rank=2)), "default")
    save_adapter(trained(model), tmp_path / "a")
    described = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
    assert described["target_modules"] == sorted(paths)
    again = small_model()
    assert sorted(load_adapter(again, tmp_path / "a")) == sorted(paths)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    "settings, paths",
    [
        (dict(target_modules="all-linear"), 14),
        (dict(target_modules="All-Linear", exclude_modules=["mlp.down_proj"]), 12),
        (dict(target_modules=r".*\.0\..*[qv]_proj"), 2),
        (dict(target_modules=["q_proj", "c_attn"]), 2),  # one of them is enough, as in PEFT
        (dict(target_modules=["proj"]), None),  # whole components only
        (dict(target_modules=["self_attn.q_proj", "lm_head"]), 3),
        (dict(target_modules=["q_proj"], layers_to_transform=1), 1),
        (dict(target_modules=["q_proj"], layers_to_transform=[0, 1], layers_pattern="layers"), 2),
        (dict(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["h"]), None),
        (dict(target_modules=["q_proj"], layers_to_transform=[]), 2),
        (dict(target_modules=["model.layers.0.mlp.up_proj"], layers_to_transform=[1]), 1),
        (dict(target_modules=["q_proj"], exclude_modules=r".*\.1\..*"), 1),
    ],
    ids=str,
)
def test_layers_are_chosen_as_in_peft(settings, paths):
    described = dict(peft_type="LORA", r=2, lora_alpha=2, **settings)
    model = small_model()
    if paths is None:
        with pytest.raises(ValueError, match="choose no linear layer"):
            read_config(Path("c.json"), described, model)
        return
    found = read_config(Path("c.json"), described, model)
    assert len(found) == paths
    add_adapters(model, found, "default")  # the same layers under adapters
    assert read_config(Path("c.json"), described, model) == found


def test_patterns_fit_the_end_of_a_path_and_the_first_one_counts():
    described = dict(
        peft_type="LORA", r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"],
        rank_pattern={"0.self_attn.q_proj": 4, ".*_proj": 8, "q_proj": 16, "proj": 32},
    )  # fmt: skip
    found = read_config(Path("c.json"), described, small_model())
    assert {path[13:]: config.rank for path, config in found.items()} == {
        "0.self_attn.q_proj": 4, "0.self_attn.v_proj": 8,
        "1.self_attn.q_proj": 8, "1.self_attn.v_proj": 8,
    }  # fmt: skip


@pytest.mark.long
@PROPERTY
@given(st.data())
def test_what_is_described_is_read_back(data):
    """Any choice of layers, ranks and alphas."""
    model = small_model()
    paths = data.draw(st.sets(st.sampled_from(sorted(linear_layers(model))), min_size=1))
    configs = {
        path: LoRAConfig(
            rank=data.draw(st.integers(1, 8)), alpha=data.draw(st.sampled_from([1, 8, 2.5]))
        )
        for path in sorted(paths)
    }
    described = json.loads(json.dumps(describe(model, configs)))
    assert read_config(Path("c.json"), {"peft_type": "LORA", **described}, model) == configs


@pytest.mark.parametrize("key", ["lm_head.base_layer.weight", "model.embed_tokens.weight"])
def test_copies_of_the_base_that_peft_adds_must_be_this_models(key, adapter):
    def add(state):
        state[f"base_model.model.{key}"] = small_model().lm_head.weight.detach() * scale

    for scale in (1.0, 1.001):
        without_base(adapter, add)
        if scale == 1:
            assert len(load_adapter(small_model(), adapter)) == 14
        else:
            refused(adapter, f"{key} is not the weight of this model; load the base that")


# --- what a file proves ------------------------------------------------------------------------


def test_a_changed_file_is_never_loaded(tmp_path):
    save_adapter(adapted(small_model()), tmp_path / "a")
    load_adapter(small_model(), tmp_path / "a")
    for path in sorted((tmp_path / "a").iterdir()):
        whole = path.read_bytes()
        for at in range(0, len(whole), len(whole) // 9):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            refused(tmp_path / "a", path.name)
        path.write_bytes(whole)


def negated(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.neg_()
    return model


def test_an_adapter_knows_its_base_down_to_the_linears(tmp_path):
    for kind, others in (
        ("dense", [negated(small_model())]),
        ("grid4", [base_of("grid3"), base_of("nf4")]),
    ):
        save_adapter(adapted(base_of(kind)), tmp_path / kind)
        load_adapter(base_of(kind), tmp_path / kind)
        for other in others:
            refused(tmp_path / kind, "other linear layers.*other_base=True", other)
            assert len(load_adapter(other, tmp_path / kind, other_base=True)) == 14
        wrong = small_model(seed=1)
        with pytest.raises(ValueError, match="another base model"):
            load_adapter(wrong, tmp_path / kind, other_base=True)


@pytest.mark.long
@pytest.mark.parametrize("bits", ["grid3", "nf4", "dense"])
def test_an_adapter_is_not_put_on_what_it_was_merged_into(bits, tmp_path):
    """Whichever kind the base had, and whatever was done with the merged model since."""
    model = adapted(base_of(bits))
    save_adapter(model, tmp_path / "a")
    for kind in {bits, "dense"}:  # the adapter on its own base, and on the dense one
        merged = base_of(kind)
        load_adapter(merged, tmp_path / "a")
        merge_lora(merged, unload=True)
        for other in (False, True) if kind == bits == "dense" else (False,):
            if other or bits != "dense":
                with pytest.raises(ValueError, match="was merged into this model already"):
                    load_adapter(merged, tmp_path / "a", other_base=other)
            else:
                refused(tmp_path / "a", "other linear layers", merged)
        quantize_model(merged, None, QuantSpec(4, 16), "rtn")
        with pytest.raises(ValueError, match="was merged into this model already"):
            load_adapter(merged, tmp_path / "a", other_base=True)
    for kind in ("dense", "grid2", "grid8", "nf4"):  # what was not merged, is none
        assert load_adapter(base_of(kind), tmp_path / "a", other_base=True)


def test_an_untrained_adapter_is_merged_into_nothing(tmp_path):
    model = small_model()
    inject_lora(model, rank=2)
    save_adapter(model, tmp_path / "a")
    assert load_adapter(base_of("grid4"), tmp_path / "a")


def test_equal_adapters_give_equal_bytes_wherever_their_base_came_from(tmp_path, monkeypatch):
    """The order of layers, the base's folder and what happened before do not show."""
    folders = []
    for n, name in enumerate(("a", "b")):
        model = adapted(small_model())
        model.config._name_or_path = str(tmp_path / name / "model")
        (tmp_path / name / "model").mkdir(parents=True)
        if n:
            order = list(model.model.layers[0]._modules.items())
            model.model.layers[0]._modules.clear()
            model.model.layers[0]._modules.update(reversed(order))
        save_adapter(model, tmp_path / name / "adapter")
        folders.append(tmp_path / name / "adapter")
    first, second = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert first == second
    assert json.loads(first[ADAPTER_CONFIG])["base_model_name_or_path"] == "model"


def test_an_adapter_with_nan_is_not_saved_over_a_good_one(tmp_path):
    model = adapted(small_model())
    save_adapter(model, tmp_path / "a")
    before = files(tmp_path / "a")
    lora_layers(model)["model.layers.0.mlp.up_proj"].lora_B["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="up_proj.lora_B.weight holds NaN or Inf"):
        save_adapter(model, tmp_path / "a")
    assert files(tmp_path / "a") == before


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "-Infinity", "1e300", "0", "-64", "true"])
def test_an_alpha_that_no_training_has_is_named(adapter, alpha):
    text = (adapter / ADAPTER_CONFIG).read_text().replace('alpha": 16', f'alpha": {alpha}')
    (adapter / ADAPTER_CONFIG).write_text(text)
    refused(adapter, "alpha")


@pytest.mark.parametrize("expression", [
    "(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)q\\1\\2\\3\\4", "((((.{99}){99}){99}){99})", "(" * 5000,
    "a" * 20_000,
])
def test_an_expression_that_never_ends_is_named(adapter, expression, monkeypatch):
    monkeypatch.setattr("qlora_lib.lora.peft_config.PATIENCE", 0.05)
    rewrite(adapter, ADAPTER_CONFIG, lambda d: d.update(target_modules=expression))
    refused(adapter, "too long|repeats too often|no valid regular")


def test_adapters_of_before_the_linears_were_named_are_loaded(adapter):
    state = load_file(adapter / ADAPTER)
    mark = {"format": "pt", "base": base_fingerprint(small_model())}
    save_file(state, adapter / ADAPTER, metadata=mark)
    assert len(load_adapter(negated(small_model()), adapter)) == 14
    refused(adapter, "another base model", small_model(seed=1))
