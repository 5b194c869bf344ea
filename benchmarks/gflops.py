"""How fast this machine is, in one line: fp32, 2048 square, on all cores that there are.

    python -m benchmarks.gflops

Seconds of a run mean little without it: they scale with this number.
"""
import time

import torch

SIDE, REPEATS = 2048, 10


def gflops() -> float:
    """Billions of operations a second in the fastest of some products."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    seconds = []
    for _ in range(REPEATS + 1):  # the first one, slower, is never the fastest
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * SIDE**3 / min(seconds) / 1e9


if __name__ == "__main__":
    print(f"fp32, {SIDE} square, threads: {torch.get_num_threads()}: {gflops():.0f} GFLOP/s")
