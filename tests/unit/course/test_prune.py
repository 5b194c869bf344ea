"""Cutting an adapter to a lower rank, and sharing ranks out among its layers."""

import pytest
import torch

from course.nb07.prune import allocate_ranks, prune_adapter
from qlora_lib import inject_lora
from qlora_lib.lora.files import load_adapter, save_adapter
from qlora_lib.lora.inject import delete_adapter
from qlora_lib.lora.layer import adapter_names, lora_layers
from qlora_lib.lora.merge import merge_lora
from tests.support.lora_models import family, logits, trained, under
from tests.support.small_models import small_model
from tests.support.tensors import LiveMemory, bf16_autocast, relative


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


def test_autocast_changes_no_singular_value():
    updates = []
    for around in (torch.no_grad, bf16_autocast):
        model = family(ranks=(4, 4))
        with around():
            prune_adapter(model, "a", 2)
            ranks = allocate_ranks(model, "b", 6000)
        updates.append(([m.delta("a") for m in lora_layers(model).values()], ranks))
    assert all(torch.equal(a, b) for a, b in zip(updates[0][0], updates[1][0], strict=True))
    assert updates[0][1] == updates[1][1]


def test_the_dense_product_is_never_formed():
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False))
    inject_lora(model, ("0",), rank=8)
    trained(model, std=1)
    with LiveMemory(*model.parameters()) as memory:
        prune_adapter(model, "default", 4, into="low")
        allocate_ranks(model, "default", 10**6)
    assert memory.peak < 512 * 512 * 4 / 2


def test_an_adapter_that_holds_a_part_of_the_weight_stays():
    model = small_model()
    inject_lora(model, rank=4, init="pissa")
    before = logits(model)
    with pytest.raises(ValueError, match="part of the weight"):
        prune_adapter(model, "default", 1)
    assert torch.equal(logits(model), before)


def test_what_is_merged_or_no_product_is_not_cut():
    model = small_model()
    inject_lora(model, rank=4)
    merge_lora(model)
    with pytest.raises(ValueError, match="merged.*unmerge_lora"):
        prune_adapter(model, "default", 2)
    model = small_model()
    inject_lora(model, rank=4, use_dora=True)
    for call in (prune_adapter, allocate_ranks):
        with pytest.raises(ValueError, match="adapter 'default' uses DoRA"):
            call(model, "default", 2)
