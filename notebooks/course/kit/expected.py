"""Expected numbers: value, tolerance, and the reason for that tolerance."""

import math
from dataclasses import dataclass
from pathlib import Path

from qlora_lib.base.files import read_json
from qlora_lib.base.paths import ROOT, plain_name

EXPECTED = ROOT / "data" / "expected"


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
    path = Path(folder) / f"{plain_name(profile, 'the profile')}.json"
    if not path.exists():
        return {}
    expected = {}
    for name, entry in read_json(path).items():
        entry = entry if isinstance(entry, dict) else {"value": entry}
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
