"""torch, the GPU that it sees or does not, and what Triton needs to compile for it."""

import json
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

from .finding import INSTALL, SECONDS, Findings, ask, gb, note, ok, problem

TORCH_SECONDS = 60  # the first import from a cold disk takes long


def check_torch() -> Findings:
    script = Path(__file__).with_name("torch_facts.py").read_text(encoding="utf-8")
    try:
        said = ask([sys.executable, "-c", script], TORCH_SECONDS)
        facts = json.loads(said.splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:
        facts = {"error": str(error)}
    if "error" in facts:
        yield problem(f"torch can't be imported ({facts['error']}): {INSTALL}; where that does not "
                      "help, begin with a new environment")  # fmt: skip
        return
    native = "bf16 natively" if facts["cpu_bf16"] else "no bf16 of its own, so fp32"
    built = f"torch {facts['torch']}, built for {facts['built_for']}"
    yield ok(f"{built}; CPU: {facts['cpu']}, {native}")
    if "transformers_error" in facts:
        yield problem(f"transformers can't be imported ({facts['transformers_error']}): {INSTALL}")
    yield from gpu_lines(facts, nvidia_gpus())
    yield from compiler_lines(facts)


def nvidia_gpus() -> list[str]:
    """Return the GPUs that NVIDIA's driver names, as "name, driver version"; none without it."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return ask(query, SECONDS).splitlines()
    except RuntimeError:
        return []


def gpu_lines(facts: dict, driver_says: list[str]) -> Findings:
    """What torch and the driver say of GPUs. The tiny profile needs none."""
    for gpu in facts["gpus"]:
        name = f"GPU {gpu['name']}"
        if "error" in gpu:
            yield note(f"{name} can't be used ({gpu['error']}): free it, or install a torch built "
                       "for it (pytorch.org's Get started names the indexes)")  # fmt: skip
            continue
        bf16 = "bf16" if gpu["bf16"] else "no bf16, so fp16"
        yield ok(f"{name}, compute capability {gpu['capability']}, {bf16}, {gb(gpu['free'])} of "
                 f"{gb(gpu['memory'])} free")  # fmt: skip
    if facts["gpus"]:
        return
    if not driver_says:
        yield ok("no GPU, which the tiny profile does not need; llama2-7b wants one of 8 GB")
    elif facts["built_for"] == "the CPU":
        yield note(f"this torch can't use the GPU ({driver_says[0]}): make setup with PIP_ARGS="
                   '"--extra-index-url ..." of a CUDA build (pytorch.org has it)')  # fmt: skip
    else:
        yield note(f"torch does not see the GPU ({driver_says[0]}; "
                   f"{facts['warning'] or 'CUDA_VISIBLE_DEVICES may hide it'}): update the driver, "
                   "or install a torch built for the CUDA that nvidia-smi shows")  # fmt: skip


def compiler_lines(facts: dict) -> Findings:
    """Triton, and the C compiler and Python headers with which it compiles for a GPU."""
    wheels = sys.platform == "linux" and platform.machine() == "x86_64"
    if "triton" in facts:
        yield ok(f"Triton {facts['triton']}")
    elif wheels or facts["gpus"]:
        yield note(f"no Triton ({facts['triton_error']}): 4-bit layers are slower on "
                   f"a GPU, and 06 does not run its kernels: {INSTALL}")  # fmt: skip
    else:
        yield ok("no Triton, which has no wheels here: 06 does not run its kernels")
    named = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    compiler = next(filter(shutil.which, (named.split()[0], "gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    lacking = [what for what, there in (("C compiler", compiler), ("Python.h", header.is_file()))
               if not there]  # fmt: skip
    if not lacking:
        yield ok(f"C compiler {compiler} and Python.h")
    elif facts["gpus"]:
        yield note(f"no {' and no '.join(lacking)}: Triton compiles nothing, and 4-bit layers are "
                   "slower; apt install gcc python3-dev (or your system's packages)")  # fmt: skip
    else:
        yield ok(f"no {' and no '.join(lacking)}: Triton needs it on a GPU, and make interop")
