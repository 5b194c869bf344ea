"""Compile a kernel for an H100 that need not be there: Triton's compiler and NVIDIA's assembler
are in Triton's wheel.

In a process of its own, because Triton reads TRITON_INTERPRET when it is imported: what the
notebook's process has imported can only be interpreted.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 120  # for one kernel; it takes about ten
POINTERS = {"x": "*fp32", "packed": "*u8", "scale": "*fp32", "zero": "*fp32", "y": "*fp32",
            "w": "*fp32"}


def for_h100(kernel, sm: int = 90, **sizes: int) -> dict | str | None:
    """What the compiler makes of a kernel of notebook 06 for an H100 (sm_90), or its error.

    sm: 80 for an A100, and so on. sizes: of the tile, {"BLOCK": 16, "HALF": 64}. Returns
    {"registers": of a thread, "loop": the number of instructions in the kernel's innermost loop,
    "kinds": {name: how many of them}}, what the compiler's error says, or None where Triton is not
    (it has wheels for Linux).
    """
    if sys.platform != "linux":
        return None
    source = inspect.getsource(kernel.fn)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text("import triton\nimport triton.language as tl\n\n" + source,
                        encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(path), kernel.fn.__name__, json.dumps(sizes),
             str(sm)],
            env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder,
                              "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True, text=True, timeout=SECONDS)
    if done.returncode == 0:
        return json.loads(done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    at = max((i for i, line in enumerate(lines) if "Error" in line), default=-1)
    return "\n".join(dict.fromkeys([lines[at], *lines[-3:]]))


def innermost_loop(sass: str) -> list[str]:
    """The instructions between the nearest backward branch and its target, by name."""
    names, label_at, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            label_at[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*?);",
                                line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1] == "BRA" and target and target[0] in label_at:
                loops.append((label_at[target[0]], len(names)))
    loops = [(a, b) for a, b in loops if b - a > 1]  # not the endless one behind the end
    return names[slice(*min(loops, key=lambda ab: ab[1] - ab[0]))] if loops else []


def main(path: str, name: str, sizes: str, sm: str) -> None:
    """Compile the function in the file, and print what `for_h100` returns as JSON."""
    from importlib.util import module_from_spec, spec_from_file_location

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = spec_from_file_location("kernel", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel, fixed = getattr(module, name), json.loads(sizes)
    kinds = {a: "constexpr" if a in fixed else POINTERS.get(a, "i32") for a in kernel.arg_names}
    # Triton compiles anew for numbers that 16 divides, as all of a layer of 4096 x 4096 are.
    even = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names)
            if a not in fixed}
    made = triton.compile(ASTSource(kernel, kinds, constexprs=fixed, attrs=even),
                          GPUTarget("cuda", int(sm), 32), {"num_warps": 4})
    cubin = Path(path).with_suffix(".cubin")
    cubin.write_bytes(made.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    shown = subprocess.run([tools / "nvdisasm", cubin], capture_output=True, text=True, check=True)
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True,
                           text=True, check=True)
    loop = innermost_loop(shown.stdout)
    kinds = {}
    for instruction in loop:
        short = instruction.split(".")[0]
        kinds[short] = kinds.get(short, 0) + 1
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    print(json.dumps({"registers": int(registers[1]), "loop": len(loop), "kinds": kinds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
