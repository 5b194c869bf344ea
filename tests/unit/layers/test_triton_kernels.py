"""The Triton kernels: in Triton's interpreter on a CPU, and on a GPU where there is one. And who
chooses them. (tests/long compiles them for GPUs that are not there.)"""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qlora_lib import layers
from qlora_lib.layers import kernels
from qlora_lib.layers.fragments import Fragments, fragments
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support import triton_cases
from tests.support.tensors import normal, relative
from tests.support.triton_cases import CASES, packed

# What is stored is rounded, by half a unit in the last place, or a whole one where the interpreter
# cuts bf16; decoded weights too, where there are more than 32 tokens.
TOLERANCE = {"bf16": 1e-2, "fp16": 1e-3}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FEW = CASES[2::21]  # enough to see at once that something is broken


@pytest.fixture(scope="module")
def interpreted():
    from qlora_lib.layers import triton_kernels

    if triton_kernels.INTERPRETED:  # here too, without a GPU
        return lambda case: triton_cases.error(triton_kernels, case)
    return dict(zip(CASES, triton_cases.in_a_process(1), strict=True)).__getitem__


@needs_triton
@pytest.mark.parametrize("case", [
    pytest.param(case, marks=() if case in FEW else pytest.mark.long, id="-".join(map(str, case)))
    for case in CASES
])  # fmt: skip
def test_interpreted_products_are_those_of_the_dequantized_weight(case, interpreted):
    assert interpreted(case) < TOLERANCE[case[-1]]


@needs_gpu
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_compiled_products_are_those_of_the_dequantized_weight(case):
    from qlora_lib.layers import triton_kernels

    assert triton_cases.error(triton_kernels, case, "cuda") < TOLERANCE[case[-1]]


def shuffled():
    h = Hessian(64)
    h.update(normal(200, 64) * normal(64, seed=2).exp())
    spec, options = QuantSpec(4, 32, clip_search=False), GPTQOptions(static_groups=False)
    return gptq_quantize(normal(16, 64), h, spec, options)


DENSE = {
    "groups of 64": lambda: packed(33, 128, 64),
    "groups of 9": lambda: packed(20, 27, 9),
    "a group a row": lambda: packed(70, 300, None),
    "8 bits": lambda: packed(17, 200, 40, bits=8),
    "act-order": shuffled,
    "nf4": lambda: quantize_nf4(normal(31, 67)),
    "nf4, odd blocks": lambda: quantize_nf4(normal(40, 9), 6, double_quant=False),
    "fragments": lambda: fragments(packed(70, 192, 96)),
    "ragged fragments": lambda: fragments(packed(5, 100, None)),
}


@needs_triton
@pytest.mark.parametrize("name", DENSE)
def test_a_weight_is_made_dense_as_dequantize_makes_it(name):
    from qlora_lib.layers import triton_kernels

    device = "cpu" if triton_kernels.INTERPRETED else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("another test has imported Triton to compile")
    weight = triton_cases.to(DENSE[name](), device)
    for dtype in (torch.float32, torch.float16):
        assert triton_kernels.makes_dense(weight, dtype)
        assert torch.equal(triton_kernels.dense(weight, dtype), weight.dequantize(dtype))
    got, want = triton_kernels.dense(weight, torch.bfloat16), weight.dequantize(torch.bfloat16)
    assert relative(got.float(), want.float()) < 2**-7  # the interpreter cuts, torch rounds


@needs_triton
def test_what_the_kernels_serve():
    from qlora_lib.layers import triton_kernels as module
    from qlora_lib.layers.triton_product import MOST_TOKENS

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    held = fragments(packed(8, 128, 64))
    for tokens, dtype in [(1, bf16), (MOST_TOKENS, fp16)]:
        assert module.serves(held, tokens, dtype)
    for tokens, dtype in [(0, bf16), (MOST_TOKENS + 1, bf16), (1, fp32)]:
        assert not module.serves(held, tokens, dtype)
    assert not module.serves(packed(8, 128, 64), 1, bf16)  # in our own order
    assert not module.makes_dense(packed(8, 64, 32), torch.float64)
    assert not module.makes_dense(packed(8, 64, 32, bits=3), fp32)


@needs_triton
def test_programs_fill_the_gpu_and_share_the_features():
    from qlora_lib.layers.triton_product import PROGRAMS, plan, splits, tile_tokens

    assert [tile_tokens(t) for t in (1, 8, 9, 16, 17, 64, 128)] == [8, 8, 16, 16, 32, 64, 64]
    assert splits(64, 32, 132) == -(-PROGRAMS * 132 // 64)  # an H100's 132 multiprocessors
    assert splits(5000, 32, 132) == 1 and splits(1, 4, 132) == 4
    held = fragments(packed(70, 320, 64))  # 2 tiles of rows, 5 blocks
    for tokens in (1, 20, 100):
        (programs, parts), numbers, sizes = plan(held, tokens, 4)
        assert programs == 2 * numbers["token_tiles"] and numbers["token_tiles"] <= 2
        assert numbers["token_tiles"] * sizes["TOKENS"] >= tokens
        assert (parts - 1) * numbers["per_split"] < 5 <= parts * numbers["per_split"]
        assert numbers["per_split"] % sizes["PASS"] == 0  # a pass lies in one split


@needs_triton
def test_programs_that_counted_themselves_leave_zeros_behind():
    from qlora_lib.layers import triton_kernels, triton_product

    if not triton_kernels.INTERPRETED:
        pytest.skip("another test has imported Triton to compile")
    held, x = fragments(packed(4, 512, 64)), normal(1, 512).bfloat16()
    y = triton_kernels.matmul(x, held, torch.bfloat16)
    assert triton_product.plan(held, 1, 4)[0][1] > 1  # several share the features
    assert not any(counts.any() for counts in triton_product._arrived.values())
    assert torch.equal(triton_kernels.matmul(x, held, torch.bfloat16), y)


@pytest.fixture
def asked(monkeypatch):
    """As on a GPU: stand-ins note which kernel was asked, and go the dense way."""
    names = []

    def noted(name, plain):
        return lambda *args: names.append(name) or plain(*args)

    fused = SimpleNamespace(
        serves=lambda weight, tokens, dtype: isinstance(weight, Fragments) and tokens <= 2,
        matmul=noted("matmul", lambda x, weight, dtype: x @ weight.dequantize(dtype).T),
        makes_dense=lambda weight, dtype: True,
        dense=noted("dense", lambda weight, dtype: weight.dequantize(dtype)),
    )
    monkeypatch.setattr(kernels, "fused_kernels", lambda device: fused)
    monkeypatch.setattr(kernels, "int4_tiles", fragments)
    return names


@pytest.mark.parametrize("name", ["8 bits", "act-order", "nf4"])
def test_what_no_kernel_multiplies_is_made_dense_within_the_layout_too(name, asked):
    weight = DENSE[name]()
    assert (weight.g_idx is not None) if name == "act-order" else True
    layer, x = QuantizedLinear(weight), normal(1, weight.shape[1]).requires_grad_()
    with decoding_layout(nn.Sequential(layer)):
        y = layer(x)
        y.sum().backward()
    w = weight.dequantize()
    assert asked == ["dense", "dense"]  # forward and backward
    assert relative(y, x @ w.T) < 1e-6 and relative(x.grad, w.sum(0, keepdim=True)) < 1e-6


def test_act_order_with_static_groups_is_laid_out():
    """GPTQ's default here: columns are quantized in the order of their weight, groups stay."""
    h = Hessian(64)
    h.update(normal(200, 64) * normal(64, seed=2).exp())
    assert GPTQOptions().desc_act and GPTQOptions().static_groups
    made = gptq_quantize(normal(16, 64), h, QuantSpec(4, 32, clip_search=False), GPTQOptions())
    assert made.g_idx is None and isinstance(fragments(made), Fragments)


def test_on_a_gpu_a_layer_takes_the_kernels_where_they_serve(asked):
    layer = QuantizedLinear(packed(8, 64, 32))
    w, x = layer.dequantize(), normal(2, 64)
    codes = layer.codes.clone()
    assert relative(layer(x), x @ w.T) < 1e-6 and asked == ["dense"]
    with decoding_layout(nn.Sequential(layer)):
        assert isinstance(layer.held, Fragments) and layer.codes.dtype == torch.int32
        assert relative(layer(x), x @ w.T) < 1e-6 and asked == ["dense", "matmul"]
        assert relative(layer(normal(3, 64)), normal(3, 64) @ w.T) < 1e-6
        assert asked == ["dense", "matmul", "dense"]
        assert torch.equal(layer.state_dict()["codes"], codes)
        x.requires_grad_()
        layer(x).sum().backward()
        assert asked == ["dense", "matmul", "dense", "matmul", "dense"]
        assert relative(x.grad, torch.ones(2, 8) @ w) < 1e-6
    assert torch.equal(layer.codes, codes) and layer.op_grids is None


def test_without_a_gpu_or_without_triton_there_are_no_fused_kernels(monkeypatch, recwarn):
    kernels.fused_kernels.cache_clear()
    assert kernels.fused_kernels(torch.device("cpu")) is None and not recwarn
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    for _ in range(3):
        assert kernels.fused_kernels(torch.device("cuda")) is None
    assert len(recwarn) == 1 and "pip install triton" in str(recwarn[0].message)
    kernels.fused_kernels.cache_clear()


@needs_gpu
@needs_triton
def test_the_trial_kernel_runs_on_a_gpu():
    assert kernels.fused_kernels(torch.device("cuda")) is not None


def test_without_a_c_compiler_one_warning_says_so_and_the_dense_way_is_taken(monkeypatch):
    """Triton compiles at the first launch: that it is installed says nothing."""
    asked = []

    def try_out(device):
        asked.append(device)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    broken = SimpleNamespace(try_out=try_out)  # without matmul: whoever took it would fail
    monkeypatch.setitem(sys.modules, "qlora_lib.layers.triton_kernels", broken)
    monkeypatch.setattr(layers, "triton_kernels", broken, raising=False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    cuda, real = torch.device("cuda"), kernels.fused_kernels
    monkeypatch.setattr(kernels, "fused_kernels", lambda device: real(cuda))
    real.cache_clear()
    layer = QuantizedLinear(quantize_rtn(normal(8, 64), QuantSpec(4, 32, clip_search=False)))
    x = normal(2, 64).requires_grad_()
    with pytest.warns(UserWarning, match="Failed to find C compiler.*apt install gcc") as caught:
        for _ in range(3):
            layer(x).sum().backward()
    assert len(caught) == 1 and asked == [cuda]
    assert relative(layer(x), x @ layer.dequantize().T) < 1e-6
    real.cache_clear()
