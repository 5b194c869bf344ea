"""Combined adapters, DoRA and LoRA+ against PEFT's."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from qlora_lib import combine_adapters, inject_lora, save_adapter, use_adapter
from qlora_lib.base.files import read_tensors
from qlora_lib.lora.files import ADAPTER, ADAPTER_CONFIG, load_adapter
from qlora_lib.lora.inject import trainable_parameters
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.lora.lora_plus import lora_plus_groups
from tests.support.small_models import small_model
from tests.support.tensors import normal, relative

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def two(tmp_path, ranks, targets=(ALL_LINEAR, ALL_LINEAR), alphas=(16, 5), **given):
    """Our model with adapters a and b, and PEFT's with the same two."""
    model, reference = small_model(), None
    for i, name in enumerate("ab"):
        inject_lora(model, targets[i], rank=ranks[i], alpha=alphas[i], adapter=name, **given)
        for j, layer in enumerate(lora_layers(model).values()):
            if name in layer.configs:
                b = layer.lora_B[name]
                b.data = normal(*b.shape, seed=50 * i + j, std=0.1)
        save_adapter(model, tmp_path / name, name)
        if reference is None:
            reference = PeftModel.from_pretrained(small_model(), tmp_path / name, name).eval()
        else:
            reference.load_adapter(tmp_path / name, name)
    return model, reference


def theirs(reference, path, name):
    state = dict(reference.named_parameters())
    a, b = (state[f"base_model.model.{path}.lora_{part}.{name}.weight"] for part in "AB")
    layer = reference.base_model.model.get_submodule(path)
    return layer.scaling[name] * (b @ a).detach()


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": 1.0, "b": -0.5}], ids=str)
@pytest.mark.parametrize(
    "how, ranks, rank",
    [("linear", (4, 4), None), ("cat", (4, 2), None), ("svd", (4, 2), None), ("svd", (4, 4), 3)],
)
def test_combined_adapters_are_pefts(how, ranks, rank, weights, tmp_path):
    model, reference = two(tmp_path, ranks)
    combine_adapters(model, weights, into="c", how=how, rank=rank)
    reference.add_weighted_adapter(
        list(weights), list(weights.values()), "c", combination_type=how, svd_rank=rank
    )
    reference.set_adapter("c")
    for path, layer in lora_layers(model).items():
        assert relative(layer.delta("c"), theirs(reference, path, "c")) < 1e-5
    with use_adapter(model, "c"):
        got = logits(model)
    assert relative(got, logits(reference)) < 1e-5
    reference.set_adapter("a")
    assert relative(got, logits(reference)) > 0.01
    save_adapter(model, tmp_path / "c", "c")  # and PEFT reads ours
    again = PeftModel.from_pretrained(small_model(), tmp_path / "c").eval()
    assert relative(got, logits(again)) < 1e-5


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_adapters_on_other_layers_are_combined_as_pefts(how, tmp_path):
    model, reference = two(tmp_path, (4, 4), targets=(ATTENTION, ("q_proj", "up_proj")))
    combine_adapters(model, {"a": 0.5, "b": 1.5}, into="c", how=how)
    reference.add_weighted_adapter(["a", "b"], [0.5, 1.5], "c", combination_type=how)
    reference.set_adapter("c")
    with use_adapter(model, "c"):
        assert relative(logits(model), logits(reference)) < 1e-5


def test_peft_refuses_different_ranks_for_linear_as_we_do(tmp_path):
    model, reference = two(tmp_path, (4, 2))
    with pytest.raises(ValueError):
        reference.add_weighted_adapter(["a", "b"], [1, 1], "c", combination_type="linear")
    with pytest.raises(ValueError, match="of one rank"):
        combine_adapters(model, {"a": 1, "b": 1}, into="c", how="linear")


def dora_of_peft(**given):
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(ALL_LINEAR), use_dora=True,
                        task_type="CAUSAL_LM", **given)  # fmt: skip
    model = get_peft_model(small_model(), config).eval()
    for i, (name, p) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            p.data = normal(*p.shape, seed=i, std=0.05)
        elif "magnitude" in name:
            p.data *= 1 + normal(*p.shape, seed=i, std=0.05)
    return model


@pytest.mark.parametrize(
    "given", [{}, dict(use_rslora=True), dict(rank_pattern={"q_proj": 2})], ids=str
)
def test_dora_is_pefts_in_file_logits_gradients_and_merge(given, tmp_path):
    reference = dora_of_peft(**given)
    reference.save_pretrained(tmp_path / "theirs")
    model = small_model()
    load_adapter(model, tmp_path / "theirs")
    assert relative(logits(model), logits(reference)) < 1e-5
    assert relative(logits(model), logits(small_model())) > 0.01

    for p in [p for n, p in model.named_parameters() if "lora_" in n or "magnitude" in n]:
        p.requires_grad_(True)
    for m in (model, reference):
        m(input_ids=IDS, labels=IDS).loss.backward()
    state = dict(reference.named_parameters())
    names = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}
    for path, layer in lora_layers(model).items():
        for mine, peft in names.items():
            want = state[f"base_model.model.{path}.{peft}.default.weight"].grad
            assert relative(getattr(layer, mine)["default"].grad, want) < 1e-4, (path, mine)

    save_adapter(model, tmp_path / "ours")
    states = [read_tensors(tmp_path / who / ADAPTER) for who in ("ours", "theirs")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    for who in ("ours", "theirs"):
        assert json.loads((tmp_path / who / ADAPTER_CONFIG).read_text())["use_dora"] is True
    again = PeftModel.from_pretrained(small_model(), tmp_path / "ours").eval()
    assert relative(logits(again), logits(model)) < 1e-5
    merged = again.merge_and_unload()
    merge_lora(model)
    assert relative(logits(model), logits(merged)) < 1e-4


def test_dora_starts_as_pefts(tmp_path):
    model = small_model()
    inject_lora(model, ALL_LINEAR, rank=4, use_dora=True)
    config = LoraConfig(r=4, target_modules=list(ALL_LINEAR), use_dora=True)
    state = dict(get_peft_model(small_model(), config).named_parameters())
    for path, layer in lora_layers(model).items():
        want = state[f"base_model.model.{path}.lora_magnitude_vector.default.weight"]
        assert relative(layer.magnitude["default"].detach(), want.detach()) < 1e-6


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_groups_are_pefts(use_dora):
    config = LoraConfig(r=4, target_modules=list(ALL_LINEAR), use_dora=use_dora)
    optimizer = create_loraplus_optimizer(
        get_peft_model(small_model(), config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    )
    model = small_model()
    inject_lora(model, ALL_LINEAR, rank=4, use_dora=use_dora)

    def rates(groups):
        return sorted((tuple(p.shape), g["lr"]) for g in groups for p in g["params"])

    mine = lora_plus_groups(trainable_parameters(model), 1e-3, 16)
    assert rates(mine) == rates(optimizer.param_groups)
