"""LoRA: injection, dtypes and gradients. test_peft.py compares with PEFT."""

import math

import pytest
import torch
from torch import nn

from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.layer import LoRAConfig, LoRALinear, lora_layers
from qlora_lib.lora.targets import ALL_LINEAR, find_linears, replace_module
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support.lora_models import IDS, base_of, logits, trained
from tests.support.small_models import small_model
from tests.support.tensors import LiveMemory, default_dtype, normal

# --- injection ----------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("kind", ["dense", "grid4", "nf4"])
def test_output_is_unchanged_at_step_0_to_the_bit(kind, init):
    """On grouped-query shapes too: k_proj is 32 x 64. The pretrained weight stays in place."""
    model = base_of(kind)
    before, weight = logits(model), model.get_submodule("model.layers.1.mlp.up_proj")
    names = inject_lora(model, ALL_LINEAR, rank=4, dropout=0.1, init=init)
    assert len(names) == 14
    assert lora_layers(model)["model.layers.1.mlp.up_proj"].base is weight
    assert torch.equal(logits(model), before)
    model.train()  # dropout acts on the adapter's input alone, and B is 0
    assert torch.equal(logits(model), before)


def test_forward_is_the_paper_s_equation():
    layer = LoRALinear(nn.Linear(64, 32))
    layer.add("default", LoRAConfig(rank=4, alpha=24))
    layer.lora_B["default"].data = normal(32, 4)
    x, a, b = normal(2, 5, 64, seed=1), layer.lora_A["default"], layer.lora_B["default"]
    want = layer.base(x) + 24 / 4 * (x @ (b @ a).T)
    assert (layer(x) - want).abs().max() < 1e-5
    assert torch.allclose(layer.delta("default"), 6 * (b @ a))


def test_the_dense_update_is_never_formed():
    """(x A^T) B^T, not x (B A)^T: nothing of the weight's size is made, back or forth."""
    layer = LoRALinear(nn.Linear(256, 256, bias=False))
    layer.add("default", LoRAConfig(rank=4))
    x = normal(4, 256)
    with LiveMemory(x, *layer.parameters()) as memory:
        layer(x).sum().backward()
    assert memory.peak < 256 * 256 * 4 / 2


@pytest.mark.parametrize("rslora, scaling", [(False, 16 / 4), (True, 16 / 2)])
def test_scaling(rslora, scaling):
    assert LoRAConfig(4, 16, use_rslora=rslora).scaling == scaling


def test_init_distributions():
    """kaiming: U(-1/sqrt(in), 1/sqrt(in)); gaussian: N(0, 1/r); B = 0; both fp32."""
    torch.manual_seed(0)
    base = nn.Linear(1024, 256).bfloat16()
    bound = 1 / math.sqrt(1024)
    layer = LoRALinear(base)
    layer.add("k", LoRAConfig(rank=64))
    layer.add("g", LoRAConfig(rank=64, init="gaussian"))
    k, g = layer.lora_A["k"], layer.lora_A["g"]
    # 65,536 draws: the sample's deviations are within 1.5% of the distribution's
    assert 0.99 * bound < k.abs().max() <= bound
    assert abs(k.std() / (bound / math.sqrt(3)) - 1) < 0.015 and abs(k.mean()) < 0.015 * bound
    assert abs(g.std() * 64 - 1) < 0.015 and g.abs().max() > 3.5 / 64
    for name in ("k", "g"):
        assert not layer.lora_B[name].any()
        assert layer.lora_A[name].dtype == layer.lora_B[name].dtype == torch.float32


def test_the_same_seed_gives_the_same_adapter():
    found = []
    for seed in (1, 1, 2):
        model = small_model()
        torch.manual_seed(seed)
        inject_lora(model)
        layers = lora_layers(model).values()
        found.append(torch.cat([m.lora_A["default"].flatten() for m in layers]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_targets_match_the_last_path_component_as_a_whole():
    model = nn.ModuleDict(
        {"k_proj": nn.Linear(8, 8), "block_proj": nn.Linear(8, 8), "k_proj_x": nn.Linear(8, 8),
         "inner": nn.ModuleDict({"k_proj": nn.Linear(8, 8)}), "norm": nn.LayerNorm(8)}
    )
    assert sorted(find_linears(model, ("k_proj",))) == ["inner.k_proj", "k_proj"]
    assert sorted(find_linears(model, "k_proj")) == ["inner.k_proj", "k_proj"]
    assert sorted(inject_lora(model, ("k_proj",), rank=2)) == ["inner.k_proj", "k_proj"]
    assert isinstance(model["block_proj"], nn.Linear) and isinstance(model["k_proj_x"], nn.Linear)


@pytest.mark.parametrize("targets", [("query",), ("q_proj", "query"), (), ("norm",), "proj"])
def test_targets_that_match_nothing_are_named(targets):
    model = small_model()
    with pytest.raises(ValueError, match=r"match no linear layer; this model has \['down_proj'"):
        inject_lora(model, targets)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_injecting_twice_changes_nothing():
    model = small_model()
    names = inject_lora(model, rank=4)
    trained(model)
    before, state = logits(model), list(model.state_dict())
    assert inject_lora(model, rank=4) == names
    assert torch.equal(logits(model), before) and list(model.state_dict()) == state
    assert not any(isinstance(m.base, LoRALinear) for m in lora_layers(model).values())


def test_an_adapter_of_several_calls_is_trained_in_all_its_layers():
    model = small_model()
    inject_lora(model, ("q_proj",), rank=4, adapter="other")
    names = inject_lora(model, ("q_proj",), rank=4)
    names += inject_lora(model, ("v_proj", "up_proj"), rank=2, alpha=8)
    want = {f"{n}.lora_{part}.default" for n in names for part in "AB"}
    assert len(names) == 6 and set(trainable_parameters(model)) == want


def test_another_configuration_under_the_same_name_is_refused():
    model = small_model()
    inject_lora(model, rank=4)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"adapter 'default' exists with .*rank=4.* not .*rank=8"):
        inject_lora(model, ALL_LINEAR, rank=8)
    # and the refusal leaves the model as it was, the layers that would have been new too
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    assert len(lora_layers(model)) == 8


def test_a_rank_above_the_layers_own_is_refused():
    model = small_model()  # k_proj is 32 x 64
    with pytest.raises(ValueError, match=r"rank=33 exceeds the rank of a layer \(32, 64\)"):
        inject_lora(model, rank=33)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    inject_lora(model, rank=32)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(rank=0), "rank=0: expected a whole number of at least 1"),
        (dict(rank=-3), "rank=-3: expected a whole number"),
        (dict(dropout=1.0), "dropout=1.0: expected a number of at least 0, below 1"),
        (dict(init="zeros"), "init='zeros' is not one of"),
        (dict(adapter="v1.0"), "adapter='v1.0' must be a name without dots"),
        (dict(adapter="half"), "adapter='half' is the name of a method"),
    ],
)
def test_bad_configurations_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        inject_lora(small_model(), **given)


@pytest.mark.parametrize("kind", ["dense", "grid4"])
def test_everything_but_the_adapter_is_frozen(kind):
    model = base_of(kind)
    names = inject_lora(model, ("q_proj", "v_proj"), rank=4)
    found = trainable_parameters(model)
    assert set(found) == {f"{n}.lora_{part}.default" for n in names for part in "AB"}
    # r (in + out) a module: q 64 + 64, v 64 + 32, in two blocks
    assert sum(p.numel() for p in found.values()) == 2 * 4 * (128 + 96)
    trained(model)
    model(IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():  # embeddings, norms and head: no gradient
        assert (p.grad is not None and p.grad.any()) if name in found else p.grad is None


# --- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda: nn.Linear(64, 32).bfloat16(),
    lambda: QuantizedLinear(quantize_rtn(normal(32, 64), QuantSpec(4, 16))),
    lambda: QuantizedLinear(quantize_nf4(normal(32, 64))),
])
def test_a_bf16_input_goes_through_an_fp32_adapter_and_comes_out_bf16(make):
    layer = LoRALinear(make())
    layer.add("default", LoRAConfig(rank=4))
    layer.lora_B["default"].data = normal(32, 4)
    x = normal(3, 64).bfloat16().requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16
    want = layer.base(x).float() + layer.configs["default"].scaling * (
        x.float() @ layer.lora_A["default"].T @ layer.lora_B["default"].T
    )
    assert torch.allclose(y.float(), want, rtol=2**-6, atol=2**-5)
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and layer.lora_A["default"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_is_fp32_whatever_the_default_dtype(dtype):
    layer = LoRALinear(nn.Linear(64, 32))
    with default_dtype(dtype):
        layer.add("default", LoRAConfig(rank=4, use_dora=True))
    assert {p.dtype for p in layer.parameters_of("default")} == {torch.float32}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("base", [
    lambda: nn.Linear(64, 32),
    lambda: QuantizedLinear(quantize_rtn(normal(32, 64), QuantSpec(4, 16))),
])
def test_inputs_of_any_number_of_axes(base, dora):
    layer = LoRALinear(base())
    layer.add("default", LoRAConfig(rank=4, use_dora=dora))
    layer.lora_B["default"].data = normal(32, 4)
    x = normal(2, 3, 64)
    y = layer(x)
    assert y.shape == (2, 3, 32)
    one = layer(x[1, 2])  # without an axis of tokens
    assert one.shape == (32,) and torch.allclose(one, y[1, 2], atol=1e-5)
    assert layer(x[:0]).shape == (0, 3, 32)


def test_gradient_reaches_the_adapter_below_through_packed_layers():
    model = base_of("grid4")
    inject_lora(model, ALL_LINEAR, rank=2)
    trained(model)
    model(IDS, labels=IDS).loss.backward()
    dense = base_of("grid4")
    for path, layer in quantized_layers(dense).items():
        replace_module(dense, path, layer.to_linear())
    inject_lora(dense, ALL_LINEAR, rank=2)
    dense.load_state_dict({n: p for n, p in model.named_parameters() if "lora_" in n}, strict=False)
    dense(IDS, labels=IDS).loss.backward()
    theirs = trainable_parameters(dense)
    for name, p in trainable_parameters(model).items():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-3, atol=1e-6), name
