"""Every path of a product with a packed weight, against the dequantized weight."""

import pytest
import torch
from torch import nn

from qlora_lib.layers import kernels
from qlora_lib.layers.kernels import INT4_TOKENS, Int4Tiles, int4_tiles, tile_rows
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout
from qlora_lib.quant import grid
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support.tensors import normal, relative

BF16 = 2**-8  # one rounding to bf16, relative
needs_operator = pytest.mark.skipif(
    tile_rows() is None, reason="torch's int4 operator has another order of codes on this CPU"
)


def weight(out: int = 160, n: int = 64, bits: int = 4, group: int | None = 32):
    return quantize_rtn(normal(out, n, seed=1, std=0.1), QuantSpec(bits, group, clip_search=False))


def shuffled(out: int = 160, n: int = 64):
    h = Hessian(n)
    h.update(normal(200, n) * normal(n, seed=2).exp())
    options = GPTQOptions(static_groups=False)
    return gptq_quantize(normal(out, n), h, QuantSpec(4, 32, clip_search=False), options)


WEIGHTS = {
    **{f"{bits} bits": lambda bits=bits: weight(bits=bits) for bits in (2, 3, 4, 8)},
    "a group a row": lambda: weight(group=None),
    "ragged": lambda: weight(131, 27, 3, 9),
    "act-order": shuffled,
    "nf4": lambda: quantize_nf4(normal(160, 64)),
    "nf4, blocks across rows": lambda: quantize_nf4(normal(131, 7), 64),
    "nf4, odd blocks": lambda: quantize_nf4(normal(190, 9), 6, double_quant=False),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_pieces_make_up_the_weight_and_its_products(name, monkeypatch):
    q = WEIGHTS[name]()
    whole = q.dequantize()  # small enough for a single piece
    monkeypatch.setattr(grid, "PIECE", 1)  # the fewest rows: 64 or a little more
    pieces = list(q.pieces(torch.float32))
    assert len(pieces) == 3 and pieces[-1][0].stop == q.shape[0]
    assert torch.equal(torch.cat([w for _, w in pieces]), whole)
    assert torch.equal(q.dequantize(), whole)
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, BF16)]:
        w, layer = q.dequantize(dtype), QuantizedLinear(q)
        x = normal(3, 2, q.shape[1], seed=5).to(dtype)
        assert relative(layer(x).double(), x.double() @ w.double().T) < tolerance
        x.requires_grad_()
        g = normal(3, 2, q.shape[0], seed=6).to(dtype)
        layer(x).backward(g)
        # in bf16 three partial sums are rounded, and their sum
        assert relative(x.grad.double(), g.double() @ w.double()) < 2 * tolerance


def test_tiles_are_not_cut_where_the_rows_of_a_piece_are_odd():
    """576 features (SmolLM2's): 910 of them would fit a piece, which ends within a tile."""
    layer = QuantizedLinear(quantize_rtn(normal(1536, 576), QuantSpec(4, 64, clip_search=False)))
    want, x = layer.dequantize(), normal(40, 576).bfloat16()
    y = layer(x)
    with decoding_layout(layer):
        assert torch.equal(layer.dequantize(), want) and torch.equal(layer(x), y)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 1, 64)])
def test_any_number_of_axes_and_tokens(shape):
    layer = QuantizedLinear(weight())
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(*shape).to(dtype)
        with decoding_layout(layer):
            assert layer(x).shape == (*shape[:-1], 160)
        y = layer(x.requires_grad_())
        assert y.shape == (*shape[:-1], 160)
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("name", ["cpu without half precision", "cpu with bf16"])
def test_half_precision_is_multiplied_where_it_is_fast(name, monkeypatch):
    capability = "AVX512" if "with bf16" in name else "AVX2"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    want = torch.bfloat16 if capability == "AVX512" else torch.float32
    cpu = torch.device("cpu")
    assert kernels.work_dtype(torch.bfloat16, cpu) == want
    assert kernels.work_dtype(torch.float16, cpu) == torch.float32
    assert kernels.work_dtype(torch.float16, torch.device("cuda")) == torch.float16
    monkeypatch.setattr(grid, "PIECE", 1)
    layer = QuantizedLinear(weight())
    x = normal(5, 64).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(torch.ones_like(y))
    w, x_value = layer.dequantize(), x.detach().float()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert relative(y.detach().float(), x_value @ w.T) < BF16
    assert relative(x.grad.float(), torch.ones(5, 160) @ w) < 2 * BF16


@needs_operator
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("out", [64, 192])
def test_tiles_hold_the_same_weight(group, symmetric, out, monkeypatch):
    q = quantize_rtn(normal(out, 128, std=0.1), QuantSpec(4, group, symmetric))
    tiles = int4_tiles(q)
    monkeypatch.setattr(grid, "PIECE", 100 * 128)  # 100 rows a piece, which is no whole tile
    assert isinstance(tiles, Int4Tiles) and tiles.codes.nbytes == q.codes.nbytes
    assert torch.equal(tiles.dequantize(), q.dequantize())
    assert torch.equal(tiles.in_order().codes, q.codes) and type(tiles.in_order()) is type(q)


@needs_operator
def test_the_operator_is_used_for_few_tokens_in_bf16_alone(monkeypatch):
    layer = QuantizedLinear(weight(64), normal(64, seed=3))
    w = layer.dequantize()
    dense = []
    plain = kernels.dense_matmul
    monkeypatch.setattr(kernels, "dense_matmul", lambda *a: dense.append(1) or plain(*a))
    for tokens, dtype, by_operator in [
        (1, torch.bfloat16, True),
        (INT4_TOKENS, torch.bfloat16, True),
        (INT4_TOKENS + 1, torch.bfloat16, False),
        (1, torch.float32, False),
        (1, torch.float16, False),
    ]:
        x = normal(tokens, 64, seed=4).to(dtype)
        with decoding_layout(layer):
            dense.clear()
            y = layer(x)
            assert bool(dense) != by_operator
        assert y.dtype == dtype
        # scales and zero-points in bf16, and the output
        want = x.double() @ w.double().T + layer.bias.double()
        assert relative(y.double(), want) < (2 * BF16 if dtype != torch.float32 else 1e-6)


@needs_operator
def test_the_operator_takes_strided_inputs():
    layer, x = QuantizedLinear(weight(64)), normal(4, 3, 64).bfloat16()
    with torch.no_grad(), decoding_layout(layer):
        for part in (x[:, -1], x[:, -1:], x[0].t().contiguous().t()):  # the last token, say
            assert not part.is_contiguous() and torch.equal(layer(part), layer(part.contiguous()))


@needs_operator
def test_within_the_layout_gradients_state_and_values_are_the_same():
    layer = QuantizedLinear(weight(64))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    x = normal(3, 64).requires_grad_()
    layer(x).sum().backward()
    want, x.grad = x.grad, None
    other = QuantizedLinear(quantize_rtn(normal(64, 64, seed=9), layer.spec)).state_dict()
    with torch.inference_mode(), decoding_layout(nn.Sequential(layer)):
        assert isinstance(layer.held, Int4Tiles) and layer.codes.dim() == 3
        assert not layer.codes.is_inference()
        assert layer.held.nbytes == layer.nbytes > layer.quantized.nbytes
    with decoding_layout(layer):
        layer(x).sum().backward()
        assert torch.equal(x.grad, want)
        inside = layer.state_dict()
        assert inside.keys() == state.keys()
        assert all(torch.equal(inside[k], v) for k, v in state.items())
        assert torch.equal(layer.quantized.codes, state["codes"])
        layer.load_state_dict(other)
        assert torch.equal(layer.state_dict()["codes"], other["codes"])
        layer.load_state_dict(state)
        layer.double()  # moves and casts first put the codes back in order
        assert layer.codes.dim() == 2
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in state.items())
    assert layer.op_grids is None and set(dict(layer.named_buffers())) == set(state)


@needs_operator
def test_the_layout_may_be_nested_and_changes_with_the_outermost_block():
    inner, other = QuantizedLinear(weight(64)), QuantizedLinear(weight(64))
    want = inner.codes.clone()
    with decoding_layout(inner):
        codes = inner.codes
        with decoding_layout(nn.Sequential(inner, other)):
            assert inner.codes is codes and other.laid_out
        assert inner.codes is codes and not other.laid_out
    assert torch.equal(inner.codes, want) and not inner.laid_out


def test_what_the_operator_cannot_serve_stays_as_it_is():
    ragged = quantize_rtn(normal(48, 72), QuantSpec(4, 36))
    for q in (weight(bits=3), weight(33), ragged, shuffled(), quantize_nf4(normal(64, 64))):
        layer = QuantizedLinear(q)
        with decoding_layout(layer):
            assert torch.equal(layer.codes, q.codes) and not isinstance(layer.held, Int4Tiles)
            layer(normal(2, q.shape[1]).bfloat16())


@needs_operator
def test_another_width_is_refused():
    layer = QuantizedLinear(weight(64))
    with decoding_layout(layer), pytest.raises(ValueError, match="x has 32 features, the weight"):
        layer(normal(4, 32).bfloat16())
