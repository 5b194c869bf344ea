"""A LoRALinear to who expects a Linear: its weight, bias and sizes."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lib import inject_lora, merge_lora, unmerge_lora, use_adapter
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import set_adapter, trainable_parameters
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support import families
from tests.support.lora_models import trained
from tests.support.tensors import normal, relative

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


def layer(bias=True, **given) -> nn.Sequential:
    """One adapted layer, at [0], with adapters "default" and "plain"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=bias))
    inject_lora(model, ("0",), rank=3, alpha=6, **given)
    if given.get("init") != "pissa":
        inject_lora(model, ("0",), rank=2, adapter="plain")
    for p in model[0].parameters_of("default"):  # which the second one froze
        p.requires_grad_(True)
    return trained(model, std=0.3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [{}, {"use_dora": True}, {"use_rslora": True}, {"init": "pissa"}])
def test_the_weight_gives_the_layers_outputs_and_gradients(given, bias):
    model = layer(bias, **given)
    own, x, g = model[0], normal(5, 12), normal(5, 8)
    assert (own.in_features, own.out_features) == (12, 8) and own.weight.shape == (8, 12)
    assert (own.bias is None) == (not bias)
    grads = []
    for call in (model, lambda x: linear(x, own.weight, own.bias)):
        model.zero_grad()
        y = call(x)
        y.backward(g)
        grads.append([y.detach(), *(p.grad for p in own.parameters_of("default"))])
    assert len(grads[0]) == (4 if given.get("use_dora") else 3)
    assert all(relative(b, a) < 1e-5 for a, b in zip(*grads, strict=True))


def test_the_weight_is_that_of_the_call():
    model = layer()
    own, x = model[0], normal(5, 12)
    with use_adapter(model, None):
        assert own.weight is own.base.weight
    with use_adapter(model, "plain"):
        assert relative(linear(x, own.weight, own.bias), model(x)) < 1e-6
    with use_adapter(model, ["default", "plain", None, None, None]):
        assert not hasattr(own, "weight")
    set_adapter(model, "plain")
    assert relative(linear(x, own.weight, own.bias), model(x)) < 1e-6
    merge_lora(model)
    assert own.weight is own.merged.weight and torch.equal(own.bias, own.merged.bias)
    unmerge_lora(model)
    assert own.weight.dtype == torch.float32
    assert model.bfloat16()[0].weight.dtype == torch.bfloat16


def test_neither_state_nor_parameters_know_of_it():
    model = layer()
    model[0].weight.sum().backward()
    names = {"0.base.weight", "0.base.bias"} | {
        f"0.lora_{part}.{name}" for part in "AB" for name in ("default", "plain")}
    assert set(model.state_dict()) == set(dict(model.named_parameters())) == names
    assert sum(p.numel() for p in model.parameters()) == 8 * 13 + 5 * 20


def test_beside_a_packed_weight_there_is_none_and_who_asks_is_told_why():
    model = nn.Sequential(QuantizedLinear(quantize_rtn(normal(8, 64), QuantSpec(4, 32))))
    inject_lora(model, ("0",), rank=2)
    assert model[0].bias is None and not hasattr(model[0], "weight")
    with pytest.raises(AttributeError, match="keeps no dense weight"):
        model[0].weight


@pytest.mark.parametrize("training", [False, True])
def test_gemma_3n_which_reads_a_weight_takes_adapters_on_all_its_linears(training):
    """In training its forward reads `correction_coefs.weight`: the adapter must be in it."""
    model = families.build("gemma3n")
    want = model(IDS).logits
    inject_lora(model, "all", rank=1)
    model.train(training)
    assert relative(model(IDS).logits, want) < 1e-5
    trained(model, std=0.1)
    model(IDS, labels=IDS).loss.backward()
    unreached = {n for n, p in trainable_parameters(model).items() if p.grad is None}
    assert not {n for n in unreached if "correction_coefs" in n}
