"""QuantizedLinear: the arithmetic of nn.Linear without a dense weight that stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from qlora_lib.layers import linear as layers_linear
from qlora_lib.layers.linear import QuantizedLinear, held_dense
from qlora_lib.lora.layer import LoRAConfig, LoRALinear
from qlora_lib.quant.fp4 import FP4Spec, quantize_fp4
from qlora_lib.quant.fp8 import FP8Spec
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support.tensors import LiveMemory, ar1, normal

OUT, IN = 48, 64
KINDS = ["grid2", "grid3", "grid4", "grid8", "g_idx", "nf4", "nf4 single", "mxfp4", "nvfp4",
         "e4m3"]  # fmt: skip


def packed(kind: str, out: int = OUT, features: int = IN):
    w = normal(out, features, seed=1, std=0.1)
    if kind.startswith("grid"):
        return quantize_rtn(w, QuantSpec(int(kind[4:]), 16))
    if kind == "g_idx":
        h = Hessian(features)
        h.update(ar1(300, features) * normal(features).exp())
        return gptq_quantize(w, h, QuantSpec(4, 16), GPTQOptions(static_groups=False))
    if kind in ("mxfp4", "nvfp4"):
        return quantize_fp4(w, FP4Spec(kind))
    if kind == "e4m3":
        return FP8Spec().quantize(w)
    return quantize_nf4(w, 32, double_quant=kind == "nf4")


def pair(kind: str, bias: bool = True, dtype=torch.float32) -> tuple[QuantizedLinear, nn.Linear]:
    """A quantized layer and nn.Linear with its dequantized weight."""
    dense = nn.Linear(IN, OUT, bias=bias)
    if bias:
        dense.bias.data = normal(OUT, seed=2)
    layer = QuantizedLinear.from_linear(dense, packed(kind))
    dense.weight.data = layer.dequantize()
    return layer.to(dtype), dense.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradient_equal_the_dense_layer(kind, dtype, tolerance, bias):
    layer, dense = pair(kind, bias, dtype)
    # in float64 the weight is dequantized in float64, where (q - z) * scale is exact in fp32 too
    a = normal(2, 5, IN, seed=3, dtype=dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    ya, yb = layer(a), dense(b)
    assert ya.dtype == dtype and ya.shape == (2, 5, OUT)
    assert (ya - yb).abs().max() < tolerance
    g = normal(2, 5, OUT, seed=4, dtype=dtype)
    ya.backward(g)
    yb.backward(g)
    assert a.grad.dtype == dtype and (a.grad - b.grad).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["grid4", "nf4"])
def test_half_precision_equals_the_dense_layer(kind, dtype):
    """Both multiply the same half-precision weights; the bias is added after rounding here,
    before it there: one more rounding, 2 ** -8 of values up to 8 in bf16."""
    layer, dense = pair(kind, dtype=dtype)
    a = normal(5, IN, seed=3).to(dtype).requires_grad_()
    b = a.detach().clone().requires_grad_()
    ya, yb = layer(a), dense(b)
    assert ya.dtype == dtype
    assert torch.allclose(ya, yb, rtol=2**-7, atol=2**-6)
    g = normal(5, OUT, seed=4).to(dtype)
    ya.backward(g)
    yb.backward(g)
    assert a.grad.dtype == dtype
    assert torch.allclose(a.grad, b.grad, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("kind", ["grid4", "nf4"])
def test_autocast_computes_in_its_dtype(kind):
    layer, dense = pair(kind)
    a = normal(5, IN, seed=3).requires_grad_()
    b = a.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ya, yb = layer(a), dense(b)
    assert ya.dtype == yb.dtype == torch.bfloat16
    assert torch.allclose(ya, yb, rtol=2**-7, atol=2**-6)
    ya.float().sum().backward()
    yb.float().sum().backward()
    assert a.grad.dtype == torch.float32  # of the input, as for any layer
    assert torch.allclose(a.grad, b.grad, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("kind", ["grid3", "g_idx", "nf4"])
def test_gradcheck_in_float64(kind):
    layer = QuantizedLinear(packed(kind, 8, 16), normal(8, dtype=torch.float64))
    x = normal(3, 16, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_only_the_input_gets_a_gradient():
    layer, _ = pair("grid4")
    assert list(layer.parameters()) == []
    assert not any(b.requires_grad for b in layer.buffers())
    assert not layer(normal(2, IN)).requires_grad  # nothing to differentiate: no graph
    assert layer(normal(2, IN).requires_grad_()).requires_grad


@pytest.mark.parametrize("make", [
    lambda w: quantize_rtn(w, QuantSpec(4, 16)),
    lambda w: quantize_rtn(w, QuantSpec(4, 16, clip_search=False)),
    lambda w: quantize_nf4(w),
    lambda w: quantize_nf4(w, double_quant=False),
])
def test_a_layer_made_of_a_trained_one_keeps_no_graph(make):
    dense = nn.Linear(IN, OUT)
    packed = make(dense.weight)
    layer = QuantizedLinear(packed, dense.bias)
    assert not any(b.requires_grad for b in layer.buffers())
    assert not layer(normal(2, IN)).requires_grad
    assert torch.equal(copy.deepcopy(layer)(normal(2, IN)), layer(normal(2, IN)))
    same = make(dense.weight.detach())
    assert torch.equal(packed.codes, same.codes) and torch.equal(layer.bias, dense.bias)


def chain(make, depth: int = 6, size: int = 256) -> nn.Sequential:
    """Layers with a trained adapter each, so that the graph runs through all of them."""
    torch.manual_seed(0)
    layers = []
    for _ in range(depth):
        layer = LoRALinear(make(size))
        layer.add("default", LoRAConfig(rank=4))
        nn.init.normal_(layer.lora_B["default"], std=0.01)
        layers.append(layer)
    return nn.Sequential(*layers)


class Careless(QuantizedLinear):
    """What not to do: autograd keeps the dequantized weight of each layer for backward."""

    def forward(self, x):
        return linear(x, self.dequantize(x.dtype))


SIZE, TOKENS = 256, 8
DENSE = SIZE * SIZE * 4  # bytes of one fp32 weight
MAKERS = {
    "grid": lambda size: QuantizedLinear(packed("grid4", size, size)),
    "nf4": lambda size: QuantizedLinear(packed("nf4", size, size)),
    "nvfp4": lambda size: QuantizedLinear(packed("nvfp4", size, size)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_autograd_saves_nothing_of_a_weights_size(kind):
    def largest_saved(model) -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            model(normal(TOKENS, SIZE).requires_grad_()).sum().backward()
        return max(saved)

    assert largest_saved(chain(MAKERS[kind])) <= SIZE * TOKENS  # activations, adapters
    careless = chain(lambda size: Careless(MAKERS[kind](size).quantized))
    assert largest_saved(careless) == SIZE * SIZE  # so the measure can tell


def peak(model) -> tuple[float, float]:
    """Growth in dense weights: at most, and between forward and backward."""
    x = normal(TOKENS, SIZE).requires_grad_()
    with LiveMemory(x, *model.parameters(), *model.buffers()) as memory:
        y = model(x).sum()
        between = memory.now()
        y.backward()
    return memory.peak / DENSE, between / DENSE


@pytest.mark.parametrize("kind", MAKERS)
def test_no_dense_weight_stays_between_layers(kind):
    """Six layers, forward and backward. One dense weight at a time, and what it is made of."""
    most, between = peak(chain(MAKERS[kind]))
    print(f"{kind}: peak {most:.2f} dense weights, between forward and backward {between:.2f}")
    assert most < 2 and between < 0.5
    careless_most, careless_between = peak(chain(lambda n: Careless(MAKERS[kind](n).quantized)))
    print(f"{kind}, saved for backward: peak {careless_most:.2f}, between {careless_between:.2f}")
    assert careless_most > 6 and careless_between > 6


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_holds_the_packed_tensors_alone(kind):
    layer, _ = pair(kind, bias=False)
    names = {
        "grid": {"codes", "scale", "zero_point"},
        "g_id": {"codes", "scale", "zero_point", "g_idx"},
        "nf4": {"codes", "absmax", "nested_absmax", "offset"},
        "nf4 ": {"codes", "absmax"},
        "mxfp": {"codes", "scale"},
        "e4m3": {"codes", "scale"},
        "nvfp": {"codes", "scale", "tensor_scale"},
    }[kind[:4]]
    state = layer.state_dict()
    assert set(state) == names
    assert sum(t.nbytes for t in state.values()) == layer.nbytes == layer.quantized.nbytes
    assert layer.nbytes < OUT * IN * 4 / 2
    # nothing is hidden beside the state
    tensors = [v for v in vars(layer).values() if isinstance(v, torch.Tensor)]
    assert not tensors
    again, _ = pair(kind, bias=False)
    again.load_state_dict(state)
    assert torch.equal(again.dequantize(), layer.dequantize())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("kind", KINDS)
def test_casting_leaves_the_packed_weight_alone(kind, cast):
    layer, _ = pair(kind)
    before, bias = copy.deepcopy(layer.quantized), layer.bias.clone()
    model = nn.Sequential(layer)
    getattr(model, cast)()
    for name, value in vars(before).items():
        now = getattr(layer.quantized, name)
        if isinstance(value, torch.Tensor):
            assert now.dtype == value.dtype and torch.equal(now, value)
        else:
            assert now == value
    want = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    assert layer.bias.dtype == want.get(cast, torch.float32)
    assert torch.equal(layer.bias, bias.to(layer.bias.dtype))
    model.to(torch.float32)
    assert torch.equal(layer.dequantize(), before.dequantize())


def test_moves_to_another_device():
    layer, _ = pair("g_idx")
    assert {b.device.type for b in layer.to("meta").buffers()} == {"meta"}
    assert layer.scale.dtype == torch.float16


def test_from_linear_checks_the_shape_and_keeps_the_bias():
    with pytest.raises(ValueError, match=r"layer is \(64, 48\), the quantized weight \(48, 64\)"):
        QuantizedLinear.from_linear(nn.Linear(48, 64), packed("grid4"))
    dense = nn.Linear(IN, OUT)
    layer = QuantizedLinear.from_linear(dense, packed("grid4"))
    assert torch.equal(layer.bias, dense.bias) and not layer.bias.requires_grad
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=False), packed("grid4")).bias is None
    assert "in_features=64" in repr(layer) and "bits=4" in repr(layer)


@pytest.mark.parametrize("kind", ["grid3", "nf4"])
def test_to_linear_is_the_dequantized_layer(kind):
    layer, dense = pair(kind)
    back = layer.to_linear()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert not back.weight.requires_grad
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16


def test_who_reads_the_weight_is_told_what_to_do():
    layer = QuantizedLinear(quantize_rtn(normal(8, 64), QuantSpec(4, 32)))
    assert not hasattr(layer, "weight")  # as code that asks first expects
    with pytest.raises(AttributeError, match=r"no dense weight; dequantize\(\) makes it"):
        layer.weight
    with pytest.raises(AttributeError, match="has no attribute 'wait'"):
        layer.wait


@pytest.mark.parametrize("kind", KINDS)
def test_held_dense_weights_give_the_same_bits_and_are_dropped_afterwards(kind):
    layer, _ = pair(kind)
    x, grad = normal(5, IN, seed=3).requires_grad_(), normal(5, OUT, seed=4)
    expected = layer(x)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    with held_dense(nn.Sequential(layer)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer.held), "pieces", None)  # nothing is decoded any more
        y = layer(x)
        (y_grad,) = torch.autograd.grad(y, x, grad)
        assert torch.equal(layer(x.detach()), expected)
    assert torch.equal(y, expected) and torch.equal(y_grad, expected_grad)
    assert layer.dense is None


def test_dense_weights_are_held_only_by_small_models_with_frozen_scales(monkeypatch):
    layer, _ = pair("grid4")
    trained = copy.deepcopy(layer)
    scale = trained.scale
    del trained.scale
    trained.scale = nn.Parameter(scale.float())
    with held_dense(nn.Sequential(layer, trained)):
        assert layer.dense is not None and trained.dense is None
        layer.to(torch.bfloat16)  # as any move does, it drops what was held
        assert layer.dense is None
    with held_dense(layer):
        with held_dense(layer):
            pass
        assert layer.dense is not None  # whoever began to hold them ends it
    monkeypatch.setattr(layers_linear, "HELD_BYTES", 4 * IN * OUT - 1)
    with held_dense(layer):
        assert layer.dense is None
