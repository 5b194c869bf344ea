"""Counters of the compiled kernels, and what they let one expect: python -m benchmarks.predictions

Without a GPU: the kernels for a few tokens are compiled for an A100 (sm_80) and an H100 and H200
(sm_90), and their machine code is counted. Writes data/results/int4-counters.json. The times are
PREDICTIONS from the counters and the data sheets, not measurements; benchmarks/gpu.py measures.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from . import sass  # first: it turns Triton's interpreter off

import triton.language as tl  # noqa: E402

from qlora_lib.base.endings import ending  # noqa: E402
from qlora_lib.base.files import write_json_atomic  # noqa: E402
from qlora_lib.base.paths import ROOT, given_path  # noqa: E402
from qlora_lib.base.stamp import stamp  # noqa: E402
from qlora_lib.layers import triton_product  # noqa: E402

OUT = ROOT / "data" / "results" / "int4-counters.json"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # LLaMA-2-7B's, (out, in)
TOKENS = (1, 8, 16, 32, 64, 128)
COPY = 0.9  # share of the data sheet's bandwidth that a copy reaches
HALF_RATE = {"LOP3", "SHF", "PRMT", "SEL", "ISETP", "IADD3", "LEA", "VIADD", "IMAD"}
LATENCY = 0.8e-6  # seconds from asking for bytes of memory until they are there, under load
START = 1.5e-6  # to start a kernel in a CUDA graph, and to end it
MEETING = 1.5e-6  # the last program of a tile waits for the others' sums, and reads them


@dataclass(frozen=True)
class GPU:
    """From NVIDIA's data sheets and the CUDA programming guide's table of instruction rates."""

    name: str
    sm: int
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    fp32_rate: int  # cycles in which a quarter of a multiprocessor begins 32 multiply-adds
    tensor_cycles: float  # of one mma.m16n8k16 there


GPUS = (
    GPU("A100-SXM-80GB", 80, 108, 1.41e9, 2.04e12, 2, 8.0),
    GPU("H100-SXM", 90, 132, 1.755e9, 3.35e12, 1, 3.2),
    GPU("H200-SXM", 90, 132, 1.755e9, 4.8e12, 1, 3.2),
)


def product(width: int, tokens: int, sm: int, kind: str = "bf16"):
    """The compiled kernel for groups of `width` and tiles of `tokens`: (made, warps, PASS)."""
    warps, blocks, stages = triton_product.SIZES[tokens]
    dtype = {"bf16": tl.bfloat16, "fp16": tl.float16}[kind]
    span = triton_product.kernel_span(width, tokens)
    per_pass = max(blocks, span // 64)
    constants = {"GROUP": width, "SPAN": span, "RAGGED": False, "KIND": dtype, "DOT": dtype,
                 "TOKENS": tokens, "PASS": per_pass, "STAGES": stages}  # fmt: skip
    pointers = {"x": f"*{kind}", "y": f"*{kind}", "codes": "*i32", "grids": "*i32",
                "sums": "*fp32", "arrived": "*i32"}  # fmt: skip
    made = sass.compiled(triton_product._product, pointers, constants, sm, warps, ("n", "out"))
    return made, warps, per_pass


def resident(counters: sass.Counters, warps: int) -> int:
    """Programs that a multiprocessor holds at a time: registers, shared memory and slots."""
    registers = -(-counters.registers * 32 // 256) * 256 * warps
    return min(32, 64 // warps, 65536 // registers, 164 * 1024 // max(1, counters.shared + 1024))


def predict(gpu: GPU, counters: sass.Counters, warps: int, per_pass: int, width: int, tokens: int,
            out: int, n: int) -> dict:  # fmt: skip
    """Seconds of one product by what limits them, and the share of a copy's bytes a second."""
    size = triton_product.tile_tokens(tokens)
    tiles, token_tiles, blocks = -(-out // 64), -(-tokens // size), -(-n // 64)
    passes = -(-blocks // per_pass)
    parts = triton_product.splits(tiles * token_tiles, passes, gpu.processors)
    weight_bytes = out * n // 2 + 4 * out * n // width
    memory = weight_bytes + 2 * tokens * (n + out)
    rounds = -(-passes // parts) * tiles * token_tiles * parts  # passes of all programs
    lanes = gpu.processors * 4 * gpu.clock  # instructions of a warp that can begin a second
    kinds = counters.kinds
    slow = sum(kinds.get(name, 0) for name in HALF_RATE)
    fp32 = sum(kinds.get(name, 0) for name in ("FFMA", "FADD", "FMUL"))
    cycles = {
        "issue": counters.a_pass, "integers": 2 * slow, "fp32": gpu.fp32_rate * fp32,
        "tensor cores": gpu.tensor_cycles * kinds.get("HMMA", 0),
    }  # fmt: skip
    once = (counters.instructions - counters.a_pass) * tiles * token_tiles * parts * warps / lanes
    programs = tiles * token_tiles * parts
    at_once = min(programs, resident(counters, warps) * gpu.processors)
    in_flight = at_once * per_pass * 64 * 32 * max(1, min(counters.stages - 1, -(-passes // parts)))
    seconds = {"bytes": memory / (COPY * gpu.bandwidth),
               "latency": weight_bytes * token_tiles / in_flight * LATENCY}  # fmt: skip
    seconds |= {name: rounds * warps * c / lanes + once for name, c in cycles.items()}
    limit = max(seconds, key=seconds.get)
    total = seconds[limit] + START + LATENCY + (MEETING if parts > 1 else 0)
    return {"gpu": gpu.name, "shape": [out, n], "tokens": tokens, "microseconds": 1e6 * total,
            "limit": limit, "splits": parts, "waves": programs / (resident(counters, warps) *
            gpu.processors), "of_copy": memory / (COPY * gpu.bandwidth) / total,
            "of_copy_without_start": memory / (COPY * gpu.bandwidth) / seconds[limit]}  # fmt: skip


def rows() -> tuple[list[dict], list[dict]]:
    """Counters of each kernel, and the predictions for LLaMA-2-7B's linears in groups of 64."""
    counted, predicted = [], []
    for sm in (80, 90):
        for width in (32, 64, 128):
            for tokens in triton_product.SIZES:
                made, warps, per_pass = product(width, tokens, sm)
                found = sass.count(made)
                a_weight = found.a_weight(32 * warps, 64 * 64 * per_pass)
                counted.append({"sm": sm, "group": width, "tokens": tokens, "warps": warps,
                                "instructions_a_weight": a_weight, "launches": 1,
                                "programs_resident": resident(found, warps), **asdict(found)})
                print(f"sm_{sm}, groups of {width:>3}, tiles of {tokens:>2} tokens: {a_weight:.2f} "
                      f"instructions a weight, {found.stages} stages, {found.registers} registers, "
                      f"{found.spilled} bytes spilled, {found.shared} shared", flush=True)
                if width != 64:
                    continue
                for gpu in (g for g in GPUS if g.sm == sm):
                    for t in TOKENS:
                        if triton_product.tile_tokens(t) == tokens:
                            predicted += [predict(gpu, found, warps, per_pass, width, t, *shape)
                                          for shape in SHAPES]  # fmt: skip
    return counted, predicted


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.predictions", description=__doc__)
    parser.add_argument("--out", type=given_path, default=OUT)
    args = parser.parse_args()
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    counted, predicted = rows()
    write_json_atomic(args.out, {
        "what": "counters of compiled kernels, and times PREDICTED from them: nothing was measured",
        **{name: known[name] for name in ("before_is", "before") if name in known},  # not made anew
        "kernels": counted, "predictions": predicted,
        "stamp": stamp(seed=0, triton=sass.triton.__version__),
    })  # fmt: skip
    for row in predicted:
        print(f"{row['gpu']:<14} {row['shape'][0]:>5} x {row['shape'][1]:<5} {row['tokens']:>3} "
              f"tokens: {row['microseconds']:6.1f} us, limit {row['limit']}, {row['of_copy']:.0%} "
              f"of a copy ({row['of_copy_without_start']:.0%} without start and end)")  # fmt: skip
    print(args.out)


if __name__ == "__main__":
    sys.exit(ending(main))
