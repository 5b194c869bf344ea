"""The Triton kernels against the dequantized weight, in a process of its own, as a script:

    TRITON_INTERPRET=1 python -m tests.support.triton_cases   errors of all cases, as JSON

Triton reads the variable when it is imported, and other tests of a run may have imported it.
The tests on a GPU call `error` with the compiled kernels.
"""

import json
import os
import subprocess
import sys

import torch

from qlora_lib.base.paths import ROOT
from qlora_lib.layers.fragments import fragments
from qlora_lib.quant.grid import QuantizedTensor, QuantSpec, quantize_rtn
from tests.support.tensors import normal, relative

CACHE = str(ROOT / "build" / "triton")  # what was compiled, for the next run
MARGIN, NAN = 4096, 0x7E007E00  # numbers around a tensor; two NaN of fp16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# (out, in, group or None for one a row): blocks of 64 x 64 that are whole, and that stick out;
# spans of 32, 64 and 128; groups of several spans; features split between programs and not
WEIGHTS = (
    (17, 96, 32), (64, 64, 32), (70, 128, 32), (7, 96, 96), (65, 320, 160),
    (17, 128, 64), (64, 192, 64), (3, 320, 64), (1, 128, 64), (130, 64, 64),
    (17, 256, 128), (64, 128, 128), (15, 512, 256), (100, 384, 128), (2, 1024, 128),
    (17, 96, None), (64, 75, None), (5, 27, None), (19, 301, None), (1, 40, None), (66, 128, None),
)  # fmt: skip
TOKENS = (1, 2, 8, 9, 17, 33, 65, 128)
# Each weight with half of the numbers of tokens, in turns, and both dtypes: 84 shapes
CASES = tuple(
    (*weight, TOKENS[(i + 2 * j) % 8], list(DTYPES)[(i // 2 + j) % 2])
    for i, weight in enumerate(WEIGHTS)
    for j in range(4)
)


def in_a_process(interpret: int, *args: str):
    """What the script prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_cases", *args], cwd=ROOT, text=True,
        env=os.environ | {"TRITON_INTERPRET": str(interpret), "TRITON_CACHE_DIR": CACHE},
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def packed(out: int, n: int, group: int | None, bits: int = 4) -> QuantizedTensor:
    return quantize_rtn(normal(out, n, std=0.1), QuantSpec(bits, group, clip_search=False))


def to(weight, device):
    """The weight with its tensors on a device."""
    for name, value in vars(weight).items():
        if isinstance(value, torch.Tensor):
            setattr(weight, name, value.to(device))
    return weight


def amid(t: torch.Tensor, fill) -> torch.Tensor:
    """The same numbers with `fill` before and behind them in memory: who reads it, is found out."""
    around = torch.full((t.numel() + 2 * MARGIN,), fill, dtype=t.dtype)
    within = around[MARGIN : MARGIN + t.numel()].view(t.shape)
    within.copy_(t)
    return within


def error(kernels, case, device="cpu") -> float:
    """Relative error of the product against float64."""
    out, n, group, tokens, dtype = case
    weight = packed(out, n, group)
    dense = weight.dequantize(torch.float64)
    x = normal(tokens, n, seed=n).to(DTYPES[dtype])
    held = fragments(weight)
    held.op_grids = amid(held.op_grids, NAN)  # scales and zeros
    held, x = to(held, device), amid(x, float("nan"))
    assert kernels.serves(held, tokens, DTYPES[dtype])
    y = kernels.matmul(x.to(device), held, DTYPES[dtype])
    assert y.dtype == DTYPES[dtype] and y.shape == (tokens, out)
    return relative(y.cpu().double(), x.double() @ dense.T)


if __name__ == "__main__":
    from qlora_lib.layers import triton_kernels

    assert triton_kernels.INTERPRETED
    triton_kernels.try_out(torch.device("cpu"))
    print(json.dumps([error(triton_kernels, case) for case in CASES]))
