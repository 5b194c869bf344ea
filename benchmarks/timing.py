"""Times that can be compared: warm, taken in turns, medians with their spread."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch

BUSY = 0.3  # other processes' load, in cores, from which on figures are marked


def installed(package: str) -> bool:
    """Whether a peer can be imported; says so where not."""
    if find_spec(package) is None:
        print(f"{package} is not installed: its rows are skipped (benchmarks/requirements.txt)")
        return False
    return True


def machine_load(seconds: float = 3.0) -> float | None:
    """Cores that others keep busy, over some seconds in which this process sleeps. Elsewhere than
    on Linux the load of the last minute, and None where that is not known either."""
    if not os.path.exists("/proc/stat"):
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None

    def ticks() -> tuple[int, int]:
        with open("/proc/stat") as file:
            spent = [int(n) for n in file.readline().split()[1:9]]
        return sum(spent), sum(spent) - spent[3] - spent[4]  # all, and all but idle and waiting

    before = ticks()
    time.sleep(seconds)
    all_, busy = (after - earlier for after, earlier in zip(ticks(), before))
    return round((os.cpu_count() or 1) * busy / max(all_, 1), 2)


def in_turns(runs: dict[str, Callable], rounds: int, budget: float = 1.0) -> dict[str, dict]:
    """Seconds of each of `runs`, which take the number of the call (to rotate their inputs).

    After one call that is not counted, each round times all of them in turn, so that a machine
    that slows down slows all of them. Short ones are called several times a round, for about
    `budget` seconds in all rounds together. Returns median, quartiles, least and calls by name.
    """
    calls = {}
    for name, run in runs.items():
        run(0)
        begin = time.perf_counter()
        run(1)
        once = time.perf_counter() - begin
        calls[name] = max(1, min(100, int(budget / rounds / max(once, 1e-6))))
    taken = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            for i in range(calls[name]):
                run(turn * calls[name] + i)
            taken[name].append((time.perf_counter() - begin) / calls[name])
    return {name: summary(times) for name, times in taken.items()}


def summary(times: list[float]) -> dict:
    """Median, quartiles and least of some seconds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": middle, "quartiles": [low, high], "least": min(times), "rounds": len(times)}


def spread(found: dict) -> float:
    """Half the distance of the quartiles, relative to the median."""
    low, high = found["quartiles"]
    return (high - low) / 2 / found["median"]


def show(title: str, found: dict[str, dict], against: str) -> None:
    """A line a contestant: time, spread, and how many times as fast `against` is."""
    print(f"\n{title}")
    for name, t in found.items():
        ratio = t["median"] / found[against]["median"] if against in found else float("nan")
        print(
            f"  {name:<34} {1e3 * t['median']:10.2f} ms  +-{100 * spread(t):3.0f}%"
            f"  {ratio:7.2f} x {against}"
        )


def rotating(make: Callable[[int], object], copies: Iterable[int] = range(4)) -> Callable:
    """call number -> one of several copies: together they do not fit in the cache."""
    kept = [make(i) for i in copies]
    return lambda i: kept[i % len(kept)]


def correlated(tokens: int, features: int, seed: int) -> torch.Tensor:
    """Inputs (tokens, features) as layers see them: neighbours correlate (0.9 a step), channels
    differ in size (lognormal, 0.7), and every hundredth is ten times as large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=g)
    for j in range(1, features):
        x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * x[:, j]
    sizes = torch.randn(features, generator=torch.Generator().manual_seed(99)).mul(0.7).exp()
    sizes[torch.randperm(features, generator=torch.Generator().manual_seed(98))[::100]] *= 10
    return x * sizes
