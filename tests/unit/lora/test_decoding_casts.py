"""Adapters while text is decoded under autocast: cast once, not at each token."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lib import inject_lora, use_adapter
from qlora_lib.layers.linear import decoding_layout
from qlora_lib.lora.layer import lora_layers
from tests.support.lora_models import adapted, base_of, trained
from tests.support.small_models import small_model
from tests.support.tensors import bf16_autocast

IDS = torch.randint(3, 260, (3, 6), generator=torch.Generator().manual_seed(0))


class Casts(TorchDispatchMode):
    """Counts casts of fp32 tensors of these sizes to 16 bits."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.count = sizes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        casts = torch.ops.aten.to, torch.ops.aten._to_copy
        if func.overloadpacket in casts and args[0].dtype == torch.float32:
            self.count += tuple(sorted(args[0].shape)) in self.sizes
        return func(*args, **kwargs or {})


def decode(model, tokens: int) -> list[torch.Tensor]:
    with torch.inference_mode(), bf16_autocast():
        return [model(IDS + i).logits for i in range(tokens)]


def two_adapters(kind="dense"):
    model = adapted(base_of(kind), rank=3)
    inject_lora(model, ("q_proj", "down_proj"), rank=5, adapter="b")
    return trained(model, "b", std=0.1).eval()


def test_each_factor_is_cast_once():
    model = two_adapters()
    sizes = {tuple(sorted(t.shape)) for m in lora_layers(model).values()
             for name in m.configs for t in m.parameters_of(name)}
    with Casts(sizes) as each:
        decode(model, 3)
    with Casts(sizes) as once, decoding_layout(model):
        decode(model, 3)
        with use_adapter(model, "b"):
            decode(model, 2)
    assert each.count == 3 * 2 * 14 and once.count == 2 * 14 + 2 * 4


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("names", ["default", "b", None, ["b", None, "default"]])
def test_what_is_decoded_is_the_same_to_the_bit(kind, names):
    model = two_adapters(kind)
    with use_adapter(model, names):
        want = decode(model, 2)
        with decoding_layout(model):
            got = decode(model, 2)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_layout_within_a_layout_keeps_the_casts_and_leaves_them():
    model = two_adapters()
    with decoding_layout(model):
        decode(model, 1)
        casts = [m.casts for m in lora_layers(model).values()]
        with decoding_layout(model):
            decode(model, 1)
        after = [m.casts for m in lora_layers(model).values()]
        assert all(casts) and all(a is b for a, b in zip(casts, after))
    assert all(m.casts is None for m in lora_layers(model).values())


def test_dora_keeps_its_lengths_in_fp32():
    model = adapted(small_model(), rank=3, use_dora=True).eval()
    want = decode(model, 1)
    with decoding_layout(model):
        assert torch.equal(decode(model, 1)[0], want[0])


def test_training_within_learns_from_the_parameters_and_afterwards_nothing_is_held():
    model = two_adapters()
    with decoding_layout(model):
        decode(model, 1)
        with use_adapter(model, "b"), bf16_autocast():
            model(IDS, labels=IDS).loss.backward()
        own = [m for m in lora_layers(model).values() if "b" in m.configs]
        assert len(own) == 4 and all(m.lora_A["b"].grad.any() and m.casts for m in own)
    assert all(m.casts is None for m in lora_layers(model).values())


def test_an_adapter_that_is_put_anew_is_not_the_old_one():
    model = two_adapters()
    with decoding_layout(model):
        before = decode(model, 1)[0]
        for layer in lora_layers(model).values():
            a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
            layer.put("default", layer.configs["default"], a, 2 * b)
        after = decode(model, 1)[0]
    assert not torch.equal(before, after) and torch.equal(after, decode(model, 1)[0])
