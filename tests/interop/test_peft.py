"""LoRA against PEFT: the same logits from the same weights, and one file format."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from qlora_lib.lora.files import ADAPTER_CONFIG, load_adapter, save_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_into_original, merge_lora
from qlora_lib.lora.peft_config import HARMLESS, READ, REFUSED, read_config
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from tests.support.small_models import small_model
from tests.support.tensors import PROPERTY, normal, relative

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
        r=rank, lora_alpha=alpha, use_rslora=use_rslora,
        target_modules=targets if isinstance(targets, str) else list(targets),
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
            # Scaled within a product or after it: some roundings of fp32 (6e-8) apart, a layer
            # on top of the other. Single entries near zero differ by more, relatively.
            assert relative(got, want) < 1e-5


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
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(bias="lora_only"), "bias"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (dict(alora_invocation_tokens=[5, 6]), "alora_invocation_tokens"),
        (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
        (dict(target_parameters=["up_proj.weight"]), "target_parameters"),
        (dict(init_lora_weights="mica"), "init_lora_weights"),
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
    unknown = set(LoraConfig().to_dict()) - READ - set(REFUSED) - HARMLESS
    assert not unknown, f"PEFT {peft.__version__}"
    # The defaults of a plain adapter are read, whatever key they have.
    plain = {"target_modules": ["q_proj"], **LoraConfig(target_modules=["q_proj"]).to_dict()}
    plain["target_modules"] = ["q_proj"]  # PEFT keeps a set, and writes a list
    assert len(read_config(Path("adapter_config.json"), plain, small_model())) == 2


SETTINGS = [
    dict(targets=ALL_LINEAR, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6}),
    dict(targets=ALL_LINEAR, alpha_pattern={"v_proj": 3, "model.layers.0.mlp.up_proj": 40}),
    dict(targets=ALL_LINEAR, rank_pattern={"^model.layers.0.mlp.up_proj": 7}, use_rslora=True),
    dict(targets="all-linear"),
    dict(targets=r"model\.layers\.\d+\.self_attn\.[qv]_proj"),
    dict(targets="all-linear", exclude_modules=["down_proj", "model.layers.0.mlp.up_proj"]),
    dict(targets=ALL_LINEAR, exclude_modules=r".*layers\.0\..*"),
    dict(targets=ALL_LINEAR, layers_to_transform=[1]),
    dict(targets=ALL_LINEAR, layers_to_transform=0, layers_pattern="layers"),
    dict(targets=["q_proj", "lm_head"]),
    dict(targets=ATTENTION, init_lora_weights="gaussian"),
    dict(targets=ATTENTION, init_lora_weights="orthogonal"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_we_load_what_pefts_settings_choose(settings, tmp_path):
    """PEFT's own adapter is the reference, and PEFT reads ours made of it."""
    base = None if "lm_head" not in settings["targets"] else untied()
    reference = theirs(**{"rank": 4, "alpha": 16, **settings}, base=copy.deepcopy(base))
    reference.save_pretrained(tmp_path / "a")
    model = copy.deepcopy(base) or small_model()
    load_adapter(model, tmp_path / "a")
    assert (logits(model) - logits(copy.deepcopy(base) or small_model())).abs().max() > 0.01
    assert (logits(model) - logits(reference)).abs().max() < 1e-5
    save_adapter(model, tmp_path / "b")
    again = PeftModel.from_pretrained(copy.deepcopy(base) or small_model(), tmp_path / "b").eval()
    assert (logits(model) - logits(again)).abs().max() < 1e-5
    named = {n for n, _ in reference.named_modules() if n.endswith("lora_A.default")}
    assert named == {n for n, _ in again.named_modules() if n.endswith("lora_A.default")}


def untied():
    """A small model whose head is not its embedding."""
    model = small_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def test_the_settings_as_written_by_hand_choose_the_same(tmp_path):
    """PEFT writes out the layers that it matched; a hand-made file may hold the expression."""
    reference = theirs(ALL_LINEAR, 4, 16)
    reference.save_pretrained(tmp_path / "a")
    for targets in ("all-linear", r".*(_proj)"):
        described = json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())
        described["target_modules"] = targets
        (tmp_path / "a" / ADAPTER_CONFIG).write_text(json.dumps(described))
        model = small_model()
        load_adapter(model, tmp_path / "a")
        assert (logits(model) - logits(reference)).abs().max() < 1e-5


NAMES = [n for n, _ in small_model().named_modules() if n]
SOME = st.lists(
    st.sampled_from([*ALL_LINEAR, "self_attn.q_proj", "0.mlp.up_proj", "lm_head", "proj",
                     "model.layers.1.mlp.up_proj", "layers.0.mlp.down_proj"]),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip
EXPRESSIONS = st.sampled_from(
    [r".*_proj", r".*\.1\..*_proj", r"model\.layers\.0\.self_attn\.[qk]_proj", r"q_proj",
     r".*\.(up|down)_proj", r".*layers.*mlp\..*_proj"]
)  # fmt: skip
CHOICE = st.fixed_dictionaries(
    {"target_modules": SOME},
    optional={
        "exclude_modules": SOME | EXPRESSIONS,
        "layers_to_transform": st.sampled_from([0, 1, [0], [1], [0, 1], [5], []]),
        "layers_pattern": st.sampled_from(["layers", ["h", "layers"], ["h"], []]),
    },
) | st.fixed_dictionaries(
    {"target_modules": EXPRESSIONS}, optional={"exclude_modules": SOME | EXPRESSIONS}
)
PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", "_proj", ".*_proj", "mlp.up_proj", r"layers\.0\..*", "up|down_proj",
                     "^model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"]),
    st.integers(1, 9), max_size=3,
)  # fmt: skip


@PROPERTY
@given(CHOICE, PATTERNS, PATTERNS)
def test_layers_ranks_and_alphas_are_those_of_pefts_own_rules(choice, ranks, alphas):
    described = dict(r=4, lora_alpha=16, rank_pattern=ranks, alpha_pattern=alphas, **choice)
    layers = described.get("layers_to_transform")
    if described.get("layers_pattern") and layers is None:
        layers = described["layers_to_transform"] = [1]  # PEFT refuses the pattern alone
    config = LoraConfig(**copy.deepcopy(described))
    chosen = [n for n in NAMES if check_target_module_exists(config, n)]
    want = {
        n: (ranks.get(get_pattern_key(ranks, n), 4), alphas.get(get_pattern_key(alphas, n), 16))
        for n in chosen
    }
    try:
        found = read_config(Path("c.json"), {"peft_type": "LORA", **described}, small_model())
    except ValueError as error:
        assert "choose no linear layer" in str(error)
        found = {}
    assert {n: (c.rank, c.alpha) for n, c in found.items()} == want


def test_peft_reads_our_mixed_ranks(tmp_path):
    model = small_model()
    for name, rank, alpha in (("q_proj", 2, 16), ("v_proj", 4, 16), ("down_proj", 4, 3)):
        inject_lora(model, (name,), rank=rank, alpha=alpha)
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_B["default"].data = normal(*layer.lora_B["default"].shape, seed=i, std=0.1)
    save_adapter(model, tmp_path / "a")
    reference = PeftModel.from_pretrained(small_model(), tmp_path / "a").eval()
    assert (logits(model) - logits(reference)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [QuantSpec(4, 16), NF4Spec()], ids=str)
def test_merging_into_the_original_is_pefts_merge_on_the_dense_model(kind, tmp_path):
    base = small_model()
    quantize_model(base, None, kind, "nf4" if isinstance(kind, NF4Spec) else "rtn")
    model = ours(**CONFIGS[1], base=base)
    save_adapter(model, tmp_path / "a")
    original = small_model()
    merge_into_original(model, original)
    reference = PeftModel.from_pretrained(small_model(), tmp_path / "a").merge_and_unload()
    state = reference.state_dict()
    for name, tensor in original.state_dict().items():
        # One rounding of the sum, and B A summed in another order: a few units of fp32.
        assert torch.allclose(tensor, state[name], rtol=1e-6, atol=1e-6), name
    assert (logits(original) - logits(reference)).abs().max() < 1e-5
    assert (logits(original) - logits(model)).abs().max() > 0.1  # not what was trained


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
