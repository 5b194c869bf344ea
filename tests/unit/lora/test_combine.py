"""Adapters made of adapters: combined, pruned, ranks shared out. test_peft_variants.py compares
combine_adapters with PEFT."""

import pytest
import torch

from qlora_lib import combine_adapters, inject_lora
from qlora_lib.lora.inject import delete_adapter
from qlora_lib.lora.layer import adapter_names, lora_layers
from tests.support.lora_models import family, logits, trained
from tests.support.small_models import small_model
from tests.support.tensors import bf16_autocast, relative


def update(model, path, weights):
    layer = lora_layers(model)[path]
    return sum(w * layer.delta(n) for n, w in weights.items())


@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_cat_is_the_sum_of_the_updates(kind):
    model, weights = family(kind, ranks=(4, 2)), {"a": 0.7, "b": -1.5}
    paths = combine_adapters(model, weights, into="both", how="cat")
    assert len(paths) == 14 and adapter_names(model) == ["a", "b", "both"]
    for path in paths:
        layer = lora_layers(model)[path]
        assert layer.configs["both"].rank == 6 and layer.configs["both"].scaling == 1
        assert relative(layer.delta("both"), update(model, path, weights)) < 1e-6
        assert not any(p.requires_grad for p in layer.parameters_of("both"))
        assert layer.active == "a"


def test_svd_is_the_best_of_its_rank():
    model, weights = family(ranks=(4, 4)), {"a": 1.0, "b": -0.5}
    combine_adapters(model, weights, into="s", how="svd", rank=3)
    combine_adapters(model, weights, into="full", how="svd", rank=8)
    combine_adapters(model, weights, into="default", how="svd")
    for path, layer in lora_layers(model).items():
        want = update(model, path, weights)
        u, s, vh = torch.linalg.svd(want)
        best = u[:, :3] * s[:3] @ vh[:3]
        assert relative(layer.delta("s"), best) < 1e-5
        assert relative(layer.delta("full"), want) < 1e-5  # 4 + 4 holds all of it
        assert layer.configs["default"].rank == 4


def test_svd_keeps_each_layers_own_rank():
    """No rank given: the largest of the adapters' in that layer, not in any other."""
    path = "model.layers.0.self_attn.q_proj"
    model, ranks = small_model(), {path.replace("q_proj", "k_proj"): 8, path: 40}
    for i, name in enumerate("ab"):  # k_proj is 32 x 64
        inject_lora(model, "attention", rank={**ranks, path: 40 + i}, adapter=name)
        trained(model, name, seed=50 * i)
    combine_adapters(model, {"a": 0.5, "b": 0.5}, into="s", how="svd")
    found = {p: m.configs["s"].rank for p, m in lora_layers(model).items()}
    assert found == {**ranks, path: 41}


def test_autocast_changes_no_singular_value():
    updates = []
    for around in (torch.no_grad, bf16_autocast):
        model = family(ranks=(4, 4))
        with around():
            combine_adapters(model, {"a": 1.0, "b": -0.5}, into="s", how="svd")
        updates.append([m.delta("s") for m in lora_layers(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*updates, strict=True))


def test_an_average_of_factors_is_not_the_average_of_updates():
    """What federated averaging must know: mean(B) mean(A) is not mean(B A)."""
    model, mean = family(ranks=(4, 4)), {"a": 0.5, "b": 0.5}
    combine_adapters(model, mean, into="cat", how="cat")
    combine_adapters(model, mean, into="linear", how="linear")
    for path, layer in lora_layers(model).items():
        want = update(model, path, mean)
        assert relative(layer.delta("cat"), want) < 1e-6
        assert relative(layer.delta("linear"), want) > 0.5
        b, a = ((p["a"] + p["b"]).detach() / 2 for p in (layer.lora_B, layer.lora_A))
        assert relative(4 * b @ a, want) > 0.5  # alpha / r = 4
        assert relative(layer.delta("linear"), 2 * 4 * b @ a) < 1e-5
    # One adapter alone comes out as it is; two equal ones, averaged, doubled.
    combine_adapters(model, {"a": 1.0}, into="same", how="linear")
    combine_adapters(model, {"a": 0.5, "same": 0.5}, into="doubled", how="linear")
    assert relative(layer.delta("same"), layer.delta("a")) < 1e-5
    assert relative(layer.delta("doubled"), 2 * layer.delta("a")) < 1e-5


def test_layers_of_one_adapter_alone_are_in_the_sum():
    model = small_model()
    inject_lora(model, ("q_proj",), rank=2, adapter="a")
    inject_lora(model, ("up_proj",), rank=2, adapter="b")
    trained(trained(model, "a"), "b")
    for how in ("linear", "cat", "svd"):
        assert len(combine_adapters(model, {"a": 2.0, "b": -1.0}, into=how, how=how)) == 4
        for path, layer in lora_layers(model).items():
            name, weight = ("a", 2.0) if path.endswith("q_proj") else ("b", -1.0)
            assert relative(layer.delta(how), weight * layer.delta(name)) < 1e-5


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(weights={"a": 1, "z": 1}), r"no adapter 'z'; the model has \['a', 'b', 'c'\]"),
        (dict(weights={}), "weights is empty"),
        (dict(weights={"a": float("nan")}), "finite number"),
        (dict(into="b"), "adapter 'b' exists"),
        (dict(into="v1.0"), "'v1.0' must be a name without dots"),
        (dict(how="mean"), "how='mean' must be one of linear, cat, svd"),
        (dict(how="linear"), r"these have {'a': 4, 'b': 2}: take how='cat' or 'svd'"),
        (dict(rank=2), "rank=2 goes with how='svd'"),
        (dict(how="svd", rank=0), "rank=0: expected a whole number of at least 1"),
        (dict(how="svd", rank=33), r"rank=33 exceeds the rank of a layer \(32, 64\)"),
        (dict(weights={"a": 1, "b": 1, "c": 1}), r"rank=34 exceeds the rank of a layer"),
    ],
)
def test_bad_combinations_are_named_and_change_nothing(given, message):
    model = family(ranks=(4, 2, 28))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        good = {"weights": {"a": 1, "b": 1}, "into": "new", "how": "cat"}
        combine_adapters(model, **good | given)
    assert list(model.state_dict()) == before


def test_the_dense_product_is_never_formed():
    from tests.support.tensors import LiveMemory

    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
    inject_lora(model, ("0",), rank=8)
    trained(model, std=1)
    with LiveMemory(*model.parameters()) as memory:
        combine_adapters(model, {"default": 1}, into="c", how="svd", rank=4)
    assert memory.peak < 512 * 512 * 4 / 2


@pytest.mark.parametrize("call", [
    lambda m: combine_adapters(m, {"default": 1}, into="new"),
    lambda m: delete_adapter(m, "default"),
])
def test_an_adapter_that_holds_a_part_of_the_weight_stays(call):
    model = small_model()
    inject_lora(model, rank=4, init="pissa")
    before = logits(model)
    with pytest.raises(ValueError, match="part of the weight|no model by itself"):
        call(model)
    assert torch.equal(logits(model), before)


def test_no_rank_and_unknown_layers_are_named():
    path = "model.layers.0.self_attn.q_proj"
    bad = [({}, "none of them"), ({"lm_head": 2}, "lm_head"), ({path: 0}, "rank=0: expected")]
    for rank, message in bad:
        model = small_model()
        with pytest.raises(ValueError, match=message):
            inject_lora(model, rank=rank)
        assert not lora_layers(model)
