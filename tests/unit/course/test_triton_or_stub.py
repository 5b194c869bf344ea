"""Notebook 06's tools: ceilings that are measured, and a course that runs where Triton is not."""

import ast
import importlib.util
import runpy

import pytest
import torch

from course.nb06 import triton_or_stub
from course.tools.normal_form import NOTEBOOKS, read
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.tensors import normal, relative


def test_ceilings_count_operations_and_bytes(monkeypatch):
    made = []
    monkeypatch.setattr(triton_or_stub, "seconds", lambda run: made.append(run()) or 0.5)
    sizes, device = (1000, 32, torch.bfloat16), triton_or_stub.DEVICE.type
    monkeypatch.setitem(triton_or_stub.MEASURED, device, sizes)
    flops, bandwidth = triton_or_stub.ceilings()
    assert flops == 2 * 32**3 / 0.5 and bandwidth == 2 * 4000 / 0.5
    assert [t.dtype for t in made] == [torch.bfloat16, torch.float32]


def test_on_a_gpu_the_roof_is_that_of_tensor_cores_and_of_its_memory():
    # the layer's dtype there, and its size or more
    numbers, width, dtype = triton_or_stub.MEASURED["cuda"]
    assert dtype == torch.bfloat16 and width >= 4096 and 4 * numbers > 100e6  # an H100's L2: 50 MB


def test_the_least_time_is_taken_after_a_call_that_is_not_counted(monkeypatch):
    clock, calls = iter([0.0, 3.0, 10.0, 12.0]), []
    monkeypatch.setattr(triton_or_stub.time, "perf_counter", lambda: next(clock))
    assert triton_or_stub.seconds(lambda: calls.append(1), repeats=2) == 2 and len(calls) == 3


@pytest.fixture
def without_triton(monkeypatch):
    """The names of triton_or_stub where Triton can't be found."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return runpy.run_path(triton_or_stub.__file__)


def test_where_triton_is_not_kernels_can_still_be_defined(without_triton):
    assert not without_triton["HAVE_TRITON"] and not without_triton["CAN_RUN"]

    @without_triton["triton"].jit
    def kernel(x, BLOCK: without_triton["tl"].constexpr):
        return x

    assert kernel(3, 4) == 3


def test_where_triton_is_not_the_notebook_s_functions_take_the_other_way(without_triton):
    book = read(NOTEBOOKS / "06_int4_kernels.ipynb")
    wanted = {"tile_program", "by_rows", "run_by_rows", "kernel_errors", "product"}
    names = without_triton | {"torch": torch, "quantize_rtn": quantize_rtn, "seed": 0,
                              "QuantSpec": QuantSpec}  # fmt: skip
    for cell in book.cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef) and node.name in wanted:
                    exec(ast.unparse(node), names)
    assert wanted <= set(names)
    weight, x = quantize_rtn(normal(10, 32), QuantSpec(4, None)), normal(32, seed=1)
    scale, zero = weight.scale[:, 0].float(), weight.zero_point[:, 0].float()
    y = names["run_by_rows"](x, weight.codes, scale, zero, 32)
    assert relative(y, weight.dequantize() @ x) < 1e-5
    assert max(names["kernel_errors"](5, 64, 32, 2, torch.float32)) < 1e-5
