"""What a Triton kernel becomes for a GPU that need not be there: Triton's compiler and NVIDIA's
assembler and disassembler come with Triton's package.

Import this before anything of `qlora_lib` that imports Triton: it turns the interpreter off, since
what is interpreted can't be compiled.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import re  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
from collections import Counter  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([A-Z0-9_.]*)(.*?);"
)


@dataclass(frozen=True)
class Counters:
    """Of one compiled kernel. A pass is one of its main loop, the longest without one in it."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread in memory
    shared: int  # bytes of a program
    instructions: int  # of the whole kernel, each once
    a_pass: int  # instructions of a pass
    kinds: dict[str, int]  # those of a pass, by name
    copies: int  # of a thread into shared memory, in a pass (cp.async)
    stages: int  # passes whose bytes are under way or in use at a time; 1: the loop waits for each
    tensor_cores: bool

    def a_weight(self, threads: int, weights: int) -> float:
        """Instructions of a thread for each weight, where a pass of all threads takes `weights`."""
        return self.a_pass * threads / weights


def compiled(kernel, kinds: dict, constants: dict, sm: int, warps: int, even: tuple = ()):
    """Triton's compiled kernel for sm_<sm>. kinds: types of pointers by argument ("*bf16"), others
    are i32; `even`: numbers that 16 divides, as Triton notes them where a launch has such."""
    names = kernel.arg_names
    types = {a: "constexpr" if a in constants else kinds.get(a, "i32") for a in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(names)
               if types[a].startswith("*") or a in even}  # fmt: skip
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    return triton.compile(source, GPUTarget("cuda", sm, 32), {"num_warps": warps})


def loops(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """All instructions' names, and (first, end) of each loop, a branch back."""
    names, label_at, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            label_at[label[1]] = len(names)
        elif match := INSTRUCTION.search(line):
            names.append(match[1])
            target = re.search(r"\.L_x_\d+", match[3])
            if match[1] == "BRA" and target and target[0] in label_at:
                found.append((label_at[target[0]], len(names)))
    return names, [(a, b) for a, b in found if b - a > 1]  # not the endless one behind the end


def count(made) -> Counters:
    """The counters of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        sass = _run("nvdisasm", cubin)
        usage = _run("cuobjdump", "-res-usage", cubin)
    names, found = loops(sass)
    within = lambda c, d, a, b: a <= c and d <= b and (c, d) != (a, b)  # noqa: E731
    inner = [ab for ab in found if not any(within(*other, *ab) for other in found)]
    first, end = max(inner, key=lambda ab: ab[1] - ab[0], default=(0, 0))
    in_loop, before = names[first:end], names[:first]
    copies = in_loop.count("LDGSTS")
    return Counters(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=4 * max(names.count("STL"), names.count("LDL")),
        shared=made.metadata.shared, instructions=len(names), a_pass=end - first,
        kinds=dict(Counter(in_loop).most_common()), copies=copies,
        stages=1 + before.count("LDGSTS") // copies if copies else 1,
        tensor_cores=any(n in ("HMMA", "HGMMA", "UTCHMMA") for n in names),
    )  # fmt: skip


def _run(tool: str, *args) -> str:
    done = subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
