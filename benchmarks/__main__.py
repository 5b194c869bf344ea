"""Times us and the peers side by side on a CPU: python -m benchmarks, an hour or more where bf16 is not native.

    python -m benchmarks [--only solver layers step] [--quick] [--rounds 3] [--out data/results/bench-cpu.json]

Writes the JSON and, beside it, a PNG of the ratios. For an idle machine: it says when the
machine is not. Peers that are not installed are skipped, and named.
"""

import argparse
import platform
import sys

import torch

from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import ROOT, given_path
from qlora_lib.base.ranges import COUNT
from qlora_lib.base.stamp import stamp

from . import layers, solver, step, timing


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("solver", "layers", "step"))
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--rounds", type=COUNT, help="of each part (default: 5, 9 and 3)")
    parser.add_argument("--out", type=given_path, default=ROOT / "data" / "results" / "bench-cpu.json")
    args = parser.parse_args()
    parts, load = args.only or ("solver", "layers", "step"), timing.machine_load()
    busy = load is not None and load > timing.BUSY
    machine = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{platform.processor() or platform.machine()}, {machine}; load {load}")
    if busy:
        print(f"THE MACHINE IS BUSY (load {load:.1f}): these figures are marked and not to be used")
    result = stamp(
        seed=0, machine=machine, load_at_start=load, busy=busy, threads=torch.get_num_threads()
    )
    def settings(sizes: tuple, rounds: int) -> tuple:
        return (sizes[:1], 3) if args.quick else (sizes, args.rounds or rounds)

    measure = {
        "solver": lambda: solver.run(*settings(solver.SIZES, 5)),
        "layers": lambda: layers.run(*settings(layers.SHAPES, 9)),
        "step": lambda: step.run(1 if args.quick else args.rounds or 3),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        result[part] = measure[part]()
        write_json_atomic(args.out, result)  # what is measured stays, whatever comes after
    try:
        from . import plots

        plots.draw(result, args.out.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: no plots")
    wide = [
        f"{row['out']} x {row['in']}: {name}"
        for part in ("solver", "layers") for row in result.get(part, [])
        for name, t in row["seconds"].items() if timing.spread(t) > 0.15
    ]
    if wide:
        print(f"\nspread above 15%, something else was running: {len(wide)} rows, e.g. {wide[:3]}")
    print(f"\n{args.out}")


if __name__ == "__main__":
    sys.exit(ending(main))
