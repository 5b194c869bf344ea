"""Results that can be trusted later: intervals, expected numbers, stamps, whole files.

Nothing here prints: `classroom/record.py` shows what this file knows.
"""
import hashlib
import json
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "data" / "expected"


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval (1927) for a proportion; the default z gives 95%.

    Returns (low, high) as fractions in [0, 1]. Unlike p +- z sqrt(p(1-p)/n) it stays inside
    [0, 1] and has a width at 0 of n and n of n, where it begins at exactly 0 and ends at 1.
    Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"got {correct} correct of {n}; expected 0 <= correct <= n and n > 0")
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At the ends centre and half are equal but for the rounding, which would give 2e-19.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    return low, 1.0 if correct == n else min(1.0, centre + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test (1947): the two-sided p of two models on the same questions.

    only_a, only_b: questions that only one of them has right. If neither is better, each of
    these falls to either side like a fair coin: p = 2 P(X <= min), X binomial(b + c, 1/2),
    at most 1. Computed with integers, so there is no underflow before the last division.
    Raises ValueError for negative counts.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"got the counts {only_a} and {only_b}; expected 0 or more")
    tosses = only_a + only_b
    tail = sum(math.comb(tosses, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def newcombe(
    right_a: int, n_a: int, right_b: int, n_b: int, both: int | None = None
) -> tuple[float, float]:
    """95% interval for the difference of two proportions, a - b, from their Wilson intervals.

    Unpaired (both=None): Newcombe's hybrid score interval, method 10 of Statistics in
    Medicine 17 (1998) 873-890. Paired, with `both` right in a and in b and n_a = n_b: method
    10 of 17 (1998) 2635-2650, the same with a correlation phi, its numerator corrected for
    continuity. Raises ValueError for counts that do not fit together.
    """
    a, b = right_a / n_a if n_a else 0.0, right_b / n_b if n_b else 0.0
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n_a), wilson(right_b, n_b)
    phi = 0.0
    if both is not None:
        only_a, only_b = right_a - both, right_b - both
        neither = n_a - both - only_a - only_b
        if n_a != n_b or min(both, only_a, only_b, neither) < 0:
            raise ValueError(
                f"{right_a} of {n_a} and {right_b} of {n_b} cannot have {both} questions "
                "right in both"
            )
        product = both * neither - only_a * only_b
        if product > 0:
            product = max(product - n_a / 2, 0)
        spread = right_a * (n_a - right_a) * right_b * (n_b - right_b)
        phi = product / math.sqrt(spread) if spread else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    low = a - b - distance(a - low_a, high_b - b)
    high = a - b + distance(high_a - a, b - low_b)
    return max(-1.0, low), min(1.0, high)


def content_hash(content: Any) -> str:
    """SHA-256 of what JSON writes for `content`, keys in order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Expected:
    """A number to expect. `tolerance` is absolute (0: exactly); `reason` says why that much."""

    value: float
    tolerance: float
    reason: str


def load_expected(profile: str, folder: Path = EXPECTED) -> dict[str, Expected]:
    """Read `<folder>/<profile>.json`; a profile without such a file has no expected numbers.

    Raises ValueError, naming file and entry, for an entry without value, tolerance or reason.
    """
    path = Path(folder) / f"{profile}.json"
    if not path.exists():
        return {}
    expected = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        numbers = [entry.get("value"), entry.get("tolerance")]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers) \
                or numbers[1] < 0 or not str(entry.get("reason") or "").strip():
            raise ValueError(f"{path}: '{name}' is {entry}; expected a finite \"value\", a "
                             "\"tolerance\" of 0 or more, and the \"reason\" for that tolerance")
        expected[name] = Expected(numbers[0], numbers[1], entry["reason"])
    return expected


def within(value: float, expected: Expected) -> bool:
    """Whether |value - expected.value| <= expected.tolerance; NaN and Inf never are.

    A billionth of slack keeps 0.3 inside 0.1 +- 0.2, which binary floats would put outside.
    """
    slack = 1e-9 * max(abs(expected.value), expected.tolerance) if expected.tolerance else 0.0
    return abs(value - expected.value) <= expected.tolerance + slack


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def stamp(seed: int | None = None, **extra: Any) -> dict[str, Any]:
    """What a result needs beside it to be made again; `extra` adds to it, or replaces parts."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "seed": seed,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    } | extra


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write beside `path`, then rename: a reader or a kill never meets half a file.

    Raises ValueError for NaN and Inf, which JSON does not know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
