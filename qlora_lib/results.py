"""Results that can be trusted later: intervals, expected numbers, stamps, whole files.

Nothing here prints: `classroom/record.py` shows what this file knows.
"""
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
    [0, 1] and has a width at 0 of n and n of n.
    Raises ValueError unless 0 <= correct <= n and n > 0.
    """
    if n <= 0 or not 0 <= correct <= n:
        raise ValueError(f"got {correct} correct of {n}; expected 0 <= correct <= n and n > 0")
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


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
