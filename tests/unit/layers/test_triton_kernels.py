"""The Triton kernels: in Triton's interpreter on a CPU, and on a GPU where there is one. And who
chooses them. (tests/long compiles them for an H100.)"""

import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from qlora_lib import layers
from qlora_lib.base.paths import ROOT
from qlora_lib.layers import kernels
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.quant.gptq import GPTQOptions, gptq_quantize
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from qlora_lib.quant.hessian import Hessian
from qlora_lib.quant.nf4 import quantize_nf4
from tests.support import triton_cases
from tests.support.tensors import normal, relative
from tests.support.triton_cases import CASES

# fp32: sums in another order. 16 bits: what is stored is rounded, by half a unit in the last
# place, or a whole one where it is truncated; decoded weights too, in the gradient.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-3}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no wheel here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def interpreted():
    from qlora_lib.layers import triton_kernels

    if triton_kernels.INTERPRETED:  # here too, without a GPU
        return {case: triton_cases.error(triton_kernels, case) for case in CASES}
    return dict(zip(CASES, triton_cases.in_a_process(1), strict=True))


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_interpreted_products_are_those_of_the_dequantized_weight(case, interpreted):
    forward, backward = interpreted[case]
    assert max(forward, backward) < TOLERANCE[case[-1]]


@needs_gpu
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_compiled_products_are_those_of_the_dequantized_weight(case):
    from qlora_lib.layers import triton_kernels

    assert max(triton_cases.error(triton_kernels, case, "cuda")) < TOLERANCE[case[-1]]


@pytest.fixture
def module(monkeypatch):
    """triton_kernels with what Triton would make of it left out, so that it imports anywhere."""
    source = (ROOT / "qlora_lib" / "layers" / "triton_kernels.py").read_text(encoding="utf-8")
    language = SimpleNamespace(constexpr=int)
    decorator = SimpleNamespace(
        knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=True)), language=language,
        Config=dict, jit=lambda f: f, autotune=lambda *a, **k: lambda f: f,
    )  # fmt: skip
    names = {"__name__": "qlora_lib.layers.triton_kernels", "__package__": "qlora_lib.layers"}
    monkeypatch.setitem(sys.modules, "triton", decorator)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    exec(compile(source, "triton_kernels.py", "exec"), names)
    return SimpleNamespace(**names)


def shuffled():
    h = Hessian(64)
    h.update(normal(200, 64) * normal(64, seed=2).exp())
    spec, options = QuantSpec(4, 32, clip_search=False), GPTQOptions(static_groups=False)
    return gptq_quantize(normal(16, 64), h, spec, options)


def test_what_the_kernels_serve(module):
    def grid(n=128, group=64, bits=4):
        return quantize_rtn(normal(8, n), QuantSpec(bits, group, clip_search=False))

    bf16, fp32 = torch.bfloat16, torch.float32
    assert module.serves(grid(), module.MOST_TOKENS, bf16)
    assert module.serves(grid(27, None), 1, torch.float16)
    assert module.serves(grid(), module.FEW_TOKENS, fp32)
    for weight, tokens, dtype in [
        (grid(), module.MOST_TOKENS + 1, bf16), (grid(), 0, bf16), (grid(), 1, torch.float64),
        (grid(), module.FEW_TOKENS + 1, fp32), (grid(bits=3), 1, bf16), (grid(group=16), 1, bf16),
        (grid(72, 36), 1, bf16), (shuffled(), 1, bf16), (quantize_nf4(normal(8, 64)), 1, bf16),
    ]:  # fmt: skip
        assert not module.serves(weight, tokens, dtype)
    shapes = {(384, 128): 128, (192, 64): 64, (96, 32): 32, (384, 192): 64, (192, 192): 128}
    assert all(module.unit_width(grid(*shape)) == width for shape, width in shapes.items())


def test_features_are_split_until_the_gpu_is_full(module, monkeypatch):
    gpu = SimpleNamespace(multi_processor_count=132)  # an H100's
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    splits = partial(module.splits, device=torch.device("cuda"))
    assert splits(4096, 1, 64) == 3 and splits(4096, 8, 64) == 8  # 256 and 64 tiles of rows
    assert splits(11008, 1, 64) == 1 and splits(4096, 1, 4) == 1  # rows enough; units too few


def test_on_a_gpu_a_layer_takes_the_kernels_where_they_serve(monkeypatch):
    """The choice alone: stand-ins note that they were asked, and go the dense way."""
    asked = []

    def noted(name, plain):
        return lambda *args: asked.append(name) or plain(*args)

    fused = SimpleNamespace(
        serves=lambda weight, tokens, dtype: tokens <= 2,
        matmul=noted("matmul", kernels.dense_matmul),
        matmul_back=noted("back", kernels.dense_matmul_back),
    )
    monkeypatch.setattr(kernels, "fused_kernels", lambda device: fused)
    layer = QuantizedLinear(quantize_rtn(normal(8, 64), QuantSpec(4, 32, clip_search=False)))
    w, x = layer.dequantize(), normal(2, 64)
    assert relative(layer(x), x @ w.T) < 1e-6 and asked == ["matmul"]
    x.requires_grad_()
    layer(x).sum().backward()
    assert asked == ["matmul", "matmul", "back"]
    assert relative(x.grad, torch.ones(2, 8) @ w) < 1e-6
    layer(normal(3, 64))
    assert len(asked) == 3


def test_without_a_gpu_or_without_triton_there_are_no_fused_kernels(monkeypatch):
    kernels.fused_kernels.cache_clear()
    assert kernels.fused_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels.fused_kernels(torch.device("cuda")) is None
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
