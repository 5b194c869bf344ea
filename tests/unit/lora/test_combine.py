"""Adapters made of adapters: combined, pruned, ranks shared out. test_peft_variants.py compares
combine_adapters with PEFT."""

import pytest
import torch

from qlora_lib import combine_adapters, inject_lora
from qlora_lib.lora.combine import allocate_ranks, prune_adapter
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.inject import delete_adapter
from qlora_lib.lora.layer import adapter_names, lora_layers
from tests.support.lora_models import family, logits, trained, under
from tests.support.small_models import small_model
from tests.support.tensors import bf16_autocast, relative


def update(model, path, weights):
    layer = lora_layers(model)[path]
    return sum(w * layer.delta(n) for n, w in weights.items())


# --- combine ---------------------------------------------------------------------------------


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
            prune_adapter(model, "a", 2)
            ranks = allocate_ranks(model, "b", 6000)
        layers = lora_layers(model).values()
        updates.append(([m.delta(name) for m in layers for name in ("s", "a")], ranks))
    assert all(torch.equal(a, b) for a, b in zip(updates[0][0], updates[1][0], strict=True))
    assert updates[0][1] == updates[1][1]


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
        (dict(how="svd", rank=0), "rank=0 must be at least 1"),
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


# --- prune -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_pruning_keeps_the_best_of_each_update_and_says_how_much(rslora):
    model = family("grid4", ranks=(8, 2), use_rslora=rslora)
    before = {p: m.delta("a") for p, m in lora_layers(model).items()}
    scaling = next(iter(lora_layers(model).values())).configs["a"].scaling
    kept = prune_adapter(model, "a", 3, into="low")
    assert adapter_names(model) == ["a", "b", "low"]
    for path, layer in lora_layers(model).items():
        u, s, vh = torch.linalg.svd(before[path].double())
        assert relative(layer.delta("low"), u[:, :3] * s[:3] @ vh[:3]) < 1e-5
        assert kept[path] == pytest.approx(float((s[:3] ** 2).sum() / (s**2).sum()), rel=1e-5)
        assert layer.configs["low"].scaling == pytest.approx(scaling)
        assert torch.equal(layer.delta("a"), before[path])


def test_pruning_in_place_to_the_same_rank_changes_rounding_alone():
    model = family(ranks=(4,))
    before = logits(model)
    kept = prune_adapter(model, "a", 4)
    assert min(kept.values()) > 1 - 1e-6 and adapter_names(model) == ["a"]
    assert relative(logits(model), before) < 1e-5
    assert all(p.requires_grad for m in lora_layers(model).values() for p in m.parameters_of("a"))


def test_an_untrained_adapter_loses_nothing():
    model = small_model()
    inject_lora(model, rank=4)
    assert set(prune_adapter(model, "default", 1).values()) == {1.0}
    assert torch.equal(logits(model), logits(small_model()))


def test_the_dense_product_is_never_formed():
    from tests.support.tensors import LiveMemory

    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
    inject_lora(model, ("0",), rank=8)
    trained(model, std=1)
    with LiveMemory(*model.parameters()) as memory:
        prune_adapter(model, "default", 4, into="low")
        allocate_ranks(model, "default", 10**6)
        combine_adapters(model, {"default": 1, "low": 1}, into="c", how="svd")
    assert memory.peak < 512 * 512 * 4 / 2


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(name="z"), "no adapter 'z'"),
        (dict(rank=0), r"q_proj: rank=0 must be 1 to 4, the rank of adapter 'a'"),
        (dict(rank=5), "rank=5 must be 1 to 4"),
        (dict(rank={"lm_head": 1}), r"rank names \['lm_head'\], where 'a' is not"),
        (dict(rank={}), "rank names no layers"),
        (dict(into="b"), "adapter 'b' exists"),
    ],
)
def test_bad_pruning_is_named_and_changes_nothing(given, message):
    model = family(ranks=(4, 2))
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        prune_adapter(model, **{"name": "a", "rank": 2} | given)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("call", [
    lambda m: prune_adapter(m, "default", 1),
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


# --- ranks -----------------------------------------------------------------------------------


def cost(model, ranks):
    layers = lora_layers(model)
    return sum(r * (layers[p].in_features + layers[p].out_features) for p, r in ranks.items())


def energy(model, ranks):
    """Of the updates, kept at these ranks, over all layers."""
    values = {p: torch.linalg.svdvals(m.delta("a")) for p, m in lora_layers(model).items()}
    return float(sum((values[p][:r] ** 2).sum() for p, r in ranks.items()))


def uneven():
    """Updates that matter more in some layers than in others."""
    model = family(ranks=(8,))
    for i, layer in enumerate(lora_layers(model).values()):
        layer.lora_B["a"].data *= 1 + 3 * (i % 4)
    return model


def test_ranks_by_singular_values_keep_more_than_one_rank_for_all():
    model = uneven()
    uniform = dict.fromkeys(lora_layers(model), 2)
    ranks = allocate_ranks(model, "a", cost(model, uniform))
    assert cost(model, ranks) <= cost(model, uniform) < cost(model, ranks) + 192 + 128
    assert energy(model, ranks) > 1.2 * energy(model, uniform)
    assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8 and min(ranks.values()) >= 1
    # greedy by energy a parameter: what is left out pays no better than anything taken
    values = {p: torch.linalg.svdvals(m.delta("a")) ** 2 for p, m in lora_layers(model).items()}
    pays = {p: v / cost(model, {p: 1}) for p, v in values.items()}
    worst = min(pays[p][r - 1] for p, r in ranks.items())
    left = [pays[p][ranks.get(p, 0)] for p in pays if ranks.get(p, 0) < 8]
    assert worst >= 0.99 * sorted(left)[-2]  # but for the last, which the budget may not pay for


def test_the_ranks_are_those_that_inject_and_prune_take(tmp_path):
    model = uneven()
    ranks = allocate_ranks(model, "a", 6000)
    kept = prune_adapter(model, "a", ranks, into="low")
    assert {p for p, e in kept.items() if e} == set(ranks)
    fresh = small_model()
    with pytest.raises(ValueError, match="is not among target_modules"):
        inject_lora(fresh, ("q_proj",), rank=ranks)
    assert sorted(inject_lora(fresh, "all", rank=ranks, adapter="low")) == sorted(ranks)
    for path, rank in ranks.items():
        assert lora_layers(fresh)[path].configs["low"].rank == rank
        assert lora_layers(model)[path].configs["low"].rank == rank
    # written as PEFT's rank_pattern, and read back
    save_adapter(model, tmp_path / "low", "low")
    again = small_model()
    load_adapter(again, tmp_path / "low", "low")
    assert torch.equal(logits(again), under(model, "low"))
    # in place: layers without a rank lose the adapter, and with it their wrapper
    prune_adapter(model, "low", dict(list(ranks.items())[:2]))
    delete_adapter(model, "a")
    assert set(lora_layers(model)) == set(list(ranks)[:2])


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(adapter="z"), "no adapter 'z'"),
        (dict(budget=50), "budget=50 parameters pays for no rank of adapter 'a'; one costs 96"),
    ],
)
def test_bad_budgets_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(uneven(), **{"adapter": "a", "budget": 1000} | given)


def test_no_rank_and_unknown_layers_are_named():
    path = "model.layers.0.self_attn.q_proj"
    bad = [({}, "none of them"), ({"lm_head": 2}, "lm_head"), ({path: 0}, "rank=0 must be at")]
    for rank, message in bad:
        model = small_model()
        with pytest.raises(ValueError, match=message):
            inject_lora(model, rank=rank)
        assert not lora_layers(model)
