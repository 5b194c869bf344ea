"""The exercises of notebook 07 mean what the library does."""

import pytest
import torch
from torch import nn

from course.kit import check
from course.nb07 import exercises as nb07
from course.nb07.prune import allocate_ranks, prune_adapter
from qlora_lib.lora.combine import combine_adapters
from qlora_lib.lora.inject import inject_lora, use_adapter
from qlora_lib.lora.layer import lora_layers


@pytest.fixture
def model():
    """Two layers with two trained-looking adapters, of ranks 4 and 2."""
    torch.manual_seed(0)
    shapes = {"wide": (10, 8), "thin": (9, 7)}
    model = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
    for name, rank in (("a", 4), ("b", 2)):
        inject_lora(model, ("wide", "thin"), rank=rank, alpha=3, adapter=name)
    for layer in lora_layers(model).values():
        for p in layer.lora_B.values():
            nn.init.normal_(p)
    return model


def parts(layer):
    return {n: (layer.lora_A[n].detach(), layer.lora_B[n].detach(), layer.configs[n].scaling)
            for n in layer.configs}


def test_a_mixed_batch(model):
    names, x = ["b", None, "a", "b"], torch.randn(4, 10)
    with torch.no_grad(), use_adapter(model, names):
        wanted = model["wide"](x)
    mine = nb07.mixed_batch(x, model["wide"].base.weight.detach(), parts(model["wide"]), names)
    assert torch.allclose(mine, wanted, atol=1e-5)


def test_a_combination(model):
    weights = {"a": 0.5, "b": -2.0}
    combine_adapters(model, weights, "sum", "cat")
    for layer in lora_layers(model).values():
        own = parts(layer)
        b, a = nb07.combine([own[n] for n in weights], list(weights.values()))
        assert torch.allclose(b @ a, layer.delta("sum"), atol=1e-5)


def test_kept_energy(model):
    kept = prune_adapter(model, "a", 2, into="pruned")
    for path, layer in lora_layers(model).items():
        a, b, _ = parts(layer)["a"]
        assert nb07.kept_energy(b, a, 2) == pytest.approx(kept[path], rel=1e-4)


def test_a_cut(model):
    prune_adapter(model, "a", 2, into="pruned")
    for layer in lora_layers(model).values():
        a, b, scale = parts(layer)["a"]
        new_b, new_a = nb07._cut(b, a, 2)
        assert new_b.shape == (len(b), 2) and new_a.shape == (2, a.shape[1])
        assert torch.allclose(scale * new_b @ new_a, layer.delta("pruned"), atol=1e-5)


@pytest.mark.parametrize("mine", [
    lambda b, a, rank: nb07._cut_of_product(b @ a, rank),
    lambda b, a, rank: [-f for f in nb07._cut(b, a, rank)],
], ids=["of the product", "other signs"])
def test_any_factors_of_the_best_update_will_do(mine, capsys):
    whole = nb07.update_of(mine)
    assert check("cut_adapter", whole) is whole and whole.cut is mine


@pytest.mark.parametrize("budget", [16, 18, 34, 51, 100])
def test_ranks_under_a_budget(model, budget):
    layers = lora_layers(model)
    values = [torch.linalg.svdvals(layer.delta("a"))[:4].tolist() for layer in layers.values()]
    costs = [layer.in_features + layer.out_features for layer in layers.values()]
    mine = nb07.share_ranks(values, costs, budget)
    found = allocate_ranks(model, "a", budget)
    assert mine == [found.get(path, 0) for path in layers]
