"""The Triton kernels against the dequantized weight, in a process of its own, as a script:

    TRITON_INTERPRET=1 python -m tests.support.triton_cases       errors of all cases, as JSON
    TRITON_INTERPRET=0 python -m tests.support.triton_cases sm90  compile for an H100, and say how

Triton reads the variable when it is imported, and other tests of a run may have imported it.
The tests on a GPU call `error` with the compiled kernels.
"""

import json
import os
import subprocess
import sys

import torch

from qlora_lib.base.paths import ROOT
from qlora_lib.quant.grid import QuantSpec, quantize_rtn
from tests.support.tensors import normal, relative

CACHE = str(ROOT / "build" / "triton")  # what was compiled, for the next run
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (out, in, group or None for one a row)
WEIGHTS = (
    (17, 96, 32), (5, 64, 32), (16, 32, 32), (7, 96, 96),
    (17, 128, 64), (16, 64, 64), (3, 320, 64), (1, 128, 64),
    (17, 256, 128), (16, 128, 128), (15, 512, 256),
    (17, 96, None), (16, 75, None), (5, 27, None), (19, 301, None), (1, 40, None),
)  # fmt: skip
TOKENS = (1, 2, 5, 17)
# 32: each weight with two of the numbers of tokens and two dtypes; of these all 12 pairs occur
CASES = tuple(
    (*weight, TOKENS[(i + j) % 4], list(DTYPES)[(i + 2 * j) % 3])
    for i, weight in enumerate(WEIGHTS)
    for j in range(2)
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


def error(kernels, case, device="cpu") -> tuple[float, float]:
    """Relative error of the product, and of the gradient of its inputs, against float64."""
    out, n, group, tokens, dtype = case
    weight = quantize_rtn(normal(out, n, std=0.1), QuantSpec(4, group, clip_search=False))
    x, g = (normal(tokens, w, seed=w).to(DTYPES[dtype]) for w in (n, out))
    dense = weight.dequantize(torch.float64)
    for name in ("codes", "scale", "zero_point"):
        setattr(weight, name, getattr(weight, name).to(device))
    y = kernels.matmul(x.to(device), weight, DTYPES[dtype])
    dx = kernels.matmul_back(g.to(device), weight)
    assert y.dtype == dx.dtype == DTYPES[dtype] and y.shape == (tokens, out) and dx.shape == x.shape
    want, want_dx = x.double() @ dense.T, g.double() @ dense
    return relative(y.cpu().double(), want), relative(dx.cpu().double(), want_dx)


def compiled_for_h100(kernels) -> dict[str, dict]:
    """What Triton makes of each kernel for sm_90, in bf16, with its first tile sizes."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"x": "*bf16", "grad": "*bf16", "dx": "*bf16", "y": "*fp32",
                "codes": "*u8", "scale": "*fp16", "zero": "*u8"}  # fmt: skip
    made = {}
    for name in ("_vector", "_matrix", "_backward"):
        tuned = getattr(kernels, name)
        config, names = tuned.configs[0], tuned.fn.arg_names
        fixed = {"WIDTH": 64, **config.kwargs} | ({"DOT": tl.bfloat16} if "DOT" in names else {})
        kinds = {a: "constexpr" if a in fixed else pointers.get(a, "i32") for a in names}
        even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names) if a in pointers}
        binary = triton.compile(
            ASTSource(tuned.fn, kinds, constexprs=fixed, attrs=even), GPUTarget("cuda", 90, 32),
            {"num_warps": config.num_warps, "num_stages": config.num_stages},
        )  # fmt: skip
        made[name] = {"tensor cores": "wgmma" in binary.asm["ptx"],
                      "bytes": len(binary.asm["cubin"]),
                      "shared": binary.metadata.shared}  # fmt: skip
    return made


if __name__ == "__main__":
    from qlora_lib.layers import triton_kernels

    if sys.argv[1:] == ["sm90"]:
        print(json.dumps(compiled_for_h100(triton_kernels)))
    else:
        assert triton_kernels.INTERPRETED
        triton_kernels.try_out(torch.device("cpu"))
        print(json.dumps([error(triton_kernels, case) for case in CASES]))
