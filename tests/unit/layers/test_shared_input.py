"""Layers that read the same input are multiplied at once, and give what they give alone."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from qlora_lib.layers import kernels, linear
from qlora_lib.layers.fragments import Fragments, fragments
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout
from qlora_lib.layers.shared_input import fused
from qlora_lib.models.quantize import quantize_model, quantized_layers
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.lora_models import adapted
from tests.support.small_models import small_model
from tests.support.tensors import bf16_autocast, normal, relative
from tests.support.triton_cases import packed

SPEC = QuantSpec(4, 32, clip_search=False)
IDS = torch.randint(3, 260, (2, 3), generator=torch.Generator().manual_seed(0))


def test_groups_are_of_one_parent():
    paths = ["a.q_proj", "a.o_proj", "a.v_proj", "b.q_proj", "b.gate_proj", "b.up_proj", "up_proj"]
    assert fused(paths) == [["a.q_proj", "a.v_proj"], ["b.gate_proj", "b.up_proj"]]
    assert fused([]) == []


@pytest.fixture
def launches(monkeypatch):
    """As on a GPU, in Triton's interpreter: the rows of each launch."""
    if find_spec("triton") is None:
        pytest.skip("Triton has no wheel here")
    from qlora_lib.layers import triton_kernels

    if not triton_kernels.INTERPRETED:
        pytest.skip("another test has imported Triton to compile")
    rows, product = [], triton_kernels.matmul
    noted = lambda x, w, dtype: rows.append(w.shape[0]) or product(x, w, dtype)  # noqa: E731
    monkeypatch.setattr(triton_kernels, "matmul", noted)
    monkeypatch.setattr(kernels, "fused_kernels", lambda device: triton_kernels)
    monkeypatch.setattr(kernels, "int4_tiles", fragments)
    return rows


@torch.no_grad()
def logits(model):
    with bf16_autocast(), decoding_layout(model):
        return model(IDS).logits


def grids(out=(96, 32, 32), n=64) -> nn.ModuleDict:
    names = ("q_proj", "k_proj", "v_proj")
    weights = [quantize_rtn(normal(rows, n, seed=rows + i, std=0.1), SPEC)
               for i, rows in enumerate(out)]  # fmt: skip
    return nn.ModuleDict({name: QuantizedLinear(w) for name, w in zip(names, weights)})


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_block_takes_four_launches_and_the_same_values(launches, monkeypatch, adapters):
    model = small_model(layers=1)
    quantize_model(model, None, SPEC, "rtn")
    model = adapted(model) if adapters else model
    got = logits(model)
    # q 64, k and v 32, each rounded up to a tile of 64 rows; o; gate and up; down
    assert launches == [64 * 3, 64, 256, 64]
    monkeypatch.setattr(linear, "share_inputs", lambda layers: None)
    launches.clear()
    assert torch.equal(got, logits(model)) and len(launches) == 7
    assert all(layer.shared is None for layer in quantized_layers(model).values())


@torch.no_grad()
def test_the_layers_codes_are_views_while_the_layout_lasts(launches):
    layers = grids()
    before = {name: layer.codes.clone() for name, layer in layers.items()}
    with decoding_layout(layers):
        parts = [layer.codes for layer in layers.values()]
        assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
        assert sum(part.nbytes for part in parts) == parts[0].untyped_storage().nbytes()
        shared = layers["q_proj"].shared
        with decoding_layout(layers):
            assert layers["k_proj"].shared is shared  # nested: nothing changes
        for name, layer in layers.items():
            assert type(layer.held) is Fragments
            assert torch.equal(layer.quantized.codes, before[name])
            assert torch.equal(layer.state_dict()["codes"], before[name])
    for name, layer in layers.items():
        assert layer.shared is None and torch.equal(layer.codes, before[name])
        assert layer.codes.untyped_storage().nbytes() == layer.codes.nbytes


@torch.no_grad()
def test_a_layer_that_reads_something_else_multiplies_for_itself(launches):
    layers = grids()
    x, other = normal(2, 64).bfloat16(), normal(2, 64, seed=1).bfloat16()
    want = {name: [t.float() @ layer.dequantize().T for t in (x, other)]
            for name, layer in layers.items()}  # fmt: skip
    with decoding_layout(layers):
        for _ in range(2):
            for name, given in (("q_proj", 0), ("k_proj", 1), ("v_proj", 1)):
                y = layers[name]((x, other)[given])
                assert relative(y.float(), want[name][given]) < 1e-2
    assert launches == [128 + 64 + 64, 32, 32, 96, 32, 32]  # one was for nothing, and no more


@torch.no_grad()
def test_what_changed_in_place_is_multiplied_anew(launches):
    layers, x = grids(), normal(2, 64).bfloat16()
    with decoding_layout(layers):
        layers["q_proj"](x)
        x.mul_(2)
        y = layers["k_proj"](x)
    assert relative(y.float(), x.float() @ layers["k_proj"].dequantize().T) < 1e-2


@torch.no_grad()
def test_many_tokens_and_fp32_go_each_their_way(launches):
    layers = grids()
    with decoding_layout(layers):
        for x in (normal(2, 64), normal(200, 64).bfloat16()):
            for layer in layers.values():
                assert relative(layer(x).float(), x.float() @ layer.dequantize().T) < 1e-2
    assert launches == []


def test_gradients_within_the_layout(launches):
    layers, x = grids(), normal(2, 64).bfloat16().requires_grad_()
    with decoding_layout(layers):
        layers["v_proj"](x).sum().backward()
    want = layers["v_proj"].dequantize().sum(0).expand(2, -1)
    assert relative(x.grad.float(), want) < 1e-2


def test_other_groups_are_not_shared(launches):
    layers = grids()
    layers["k_proj"] = QuantizedLinear(packed(32, 64, 64))
    with decoding_layout(layers):
        assert all(layer.shared is None for layer in layers.values())
