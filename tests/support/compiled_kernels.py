"""The kernels' counters when compiled for GPUs that are not there, as a script that prints JSON:

    python -m tests.support.compiled_kernels '[[90, 64, 8, "bf16"]]'   sm, group, tokens, dtype
    python -m tests.support.compiled_kernels dense                     the kernels that make dense

In a process of its own: Triton either interprets or compiles.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

from qlora_lib.base.paths import ROOT

CACHE = str(ROOT / "build" / "triton")  # what was compiled, for the next run


def counters_of(what) -> list[dict]:
    """What the script prints."""
    asked = what if isinstance(what, str) else json.dumps(what)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_kernels", asked], cwd=ROOT, text=True,
        env=os.environ | {"TRITON_CACHE_DIR": CACHE}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _dense(sm: int) -> list[dict]:
    from benchmarks import sass
    from qlora_lib.layers import triton_dense

    kind = "fp16" if sm == 75 else "bf16"
    pointers = {"w": f"*{kind}", "scale": "*fp16", "zero": "*u8", "g_idx": "*i32", "grids": "*i32",
                "levels": "*fp32", "absmax": "*fp32"}  # fmt: skip
    bytes_, words = pointers | {"codes": "*u8"}, pointers | {"codes": "*i32"}
    sizes = {"ROWS": triton_dense.ROWS, "BYTES": triton_dense.BYTES}
    return [
        asdict(sass.count(sass.compiled(*what, sm, 4, ("n", "out"))))
        for what in (
            (triton_dense._grids, bytes_, {"GROUP": 64, "BITS": 4, "INDEXED": False, **sizes}),
            (triton_dense._grids, bytes_, {"GROUP": 64, "BITS": 8, "INDEXED": True, **sizes}),
            (triton_dense._nf4, bytes_, {"BLOCK": 64, "FLAT": triton_dense.FLAT}),
            (triton_dense._fragments, words, {"GROUP": 64}),
        )
    ]


def main(asked: str) -> None:
    from benchmarks import predictions, sass

    made = []
    if asked == "dense":
        made = [row for sm in (75, 80, 90, 100) for row in _dense(sm)]
    for sm, width, tokens, kind in [] if asked == "dense" else json.loads(asked):
        kernel, warps, per_pass = predictions.product(width, tokens, sm, kind)
        found = sass.count(kernel)
        a_weight = found.a_weight(32 * warps, 64 * 64 * per_pass)
        made.append(asdict(found) | {"instructions_a_weight": a_weight})
    print(json.dumps(made))


if __name__ == "__main__":
    main(sys.argv[1])
