"""`record(name, value)`: show a number beside the expected one, and keep it.

Each notebook writes a file of its own, outputs/<profile>/metrics/<notebook>.json, so that
notebooks may run at the same time; `merge` makes one outputs/<profile>/metrics.json of them.
"""
import math
import os
import re
from pathlib import Path
from typing import Any

from qlora_lib.base.files import read_entry, write_json_atomic, write_proved_json
from qlora_lib.base.paths import ROOT, plain_name
from qlora_lib.base.stamp import stamp

from . import BESIDE_VARIABLE, COMPARE_VARIABLE, OUTPUTS_VARIABLE
from .expected import EXPECTED, load_expected, within

# A line that compares; `tools/compare.py` holds such a line to the tolerance that it states.
LINE = re.compile(r"(?P<mark>[✓✗]) (?P<name>[^:\n]+): (?P<value>\S+)"
                  r" \(expected (?P<expected>\S+?)(?:, exactly| ± (?P<tolerance>\S+))\)")


def line(name: str, entry: dict[str, Any]) -> str:
    """The line that `record` prints for an entry of metrics.json."""
    if "within" not in entry:
        return f"· {name}: {_text(entry['value'])} ({entry['not_compared']})"
    mark = "✓" if entry["within"] else "✗"
    spread = f" ± {_text(entry['tolerance'])}" if entry["tolerance"] else ", exactly"
    return f"{mark} {name}: {_text(entry['value'])} (expected {_text(entry['expected'])}{spread})"


class Recorder:
    """`record = Recorder("01_quantization_math", profile, seed)`, then `record("name", value)`.

    Making one prints the notebook's header line (device, threads, versions, seed, profile) and forgets
    what the notebook recorded in an earlier run.
    """

    def __init__(self, notebook: str, profile: str, seed: int | None = None, *,
                 expected: Path = EXPECTED):
        self.comparing = os.environ.get(COMPARE_VARIABLE) != "0"
        self.expected = load_expected(profile, expected)
        self.path = metrics_folder(profile) / f"{plain_name(notebook, 'the notebook')}.json"
        self.path.unlink(missing_ok=True)
        self.stamp = stamp(seed, command=notebook, profile=profile)
        self.numbers: dict[str, dict[str, Any]] = {}
        s = self.stamp
        threads = f"{s['threads']} thread{'s' if s['threads'] > 1 else ''}"
        beside = os.environ.get(BESIDE_VARIABLE, "0")
        if beside != "0":  # what is timed here is timed on a busy machine
            threads += f", up to {beside} other notebook{'s' if beside != '1' else ''} beside it"
        print(f"{s['device']}, {threads} | Python {s['python']} | torch {s['torch']} | "
              f"transformers {s['transformers']} | seed {seed} | profile {profile}")

    def __call__(self, name: str, value: float) -> None:
        """Print `value` beside the expected one and keep it; too far off is shown, not raised.

        Raises ValueError for what is not a number, and for a name with a colon.
        """
        value = value.item() if hasattr(value, "item") else value
        if not isinstance(value, (int, float)) or not isinstance(name, str) or not name.strip() \
                or ":" in name:
            raise ValueError(f"got record({name!r}, {value!r}); expected a name without a colon "
                             "and one number")
        expected = self.expected.get(name)
        entry: dict[str, Any] = {"value": value if math.isfinite(value) else str(value)}
        if not self.comparing:
            entry["not_compared"] = "other parameters: not compared"
        elif expected is None:
            entry["not_compared"] = "nothing to compare with"
        else:
            entry |= {"expected": expected.value, "tolerance": expected.tolerance,
                      "within": within(value, expected)}
        print(line(name, entry))
        if entry.get("within") is False:
            print(f"  the tolerance allows for: {expected.reason}")
        self.numbers[name] = entry
        write_proved_json(self.path, {"stamp": self.stamp, "numbers": self.numbers})


def outputs_folder(profile: str) -> Path:
    """The folder of what the notebooks of a profile make: outputs/<profile>, or elsewhere."""
    return Path(os.environ.get(OUTPUTS_VARIABLE) or ROOT / "outputs") / plain_name(
        profile, "the profile")


def metrics_folder(profile: str) -> Path:
    """The folder of the files that the notebooks record their numbers in."""
    return outputs_folder(profile) / "metrics"


def merge(profile: str) -> dict[str, dict[str, Any]]:
    """All notebooks' numbers as {name: entry with "notebook"}, also written to metrics.json.

    Raises ValueError if two notebooks record under the same name, and for a file that was changed
    or is damaged.
    """
    folder, merged = metrics_folder(profile), {}
    for path in sorted(folder.glob("[!.]*.json")):
        if (of := read_entry(path, "stamp").get("command")) != path.stem:
            raise ValueError(f"{path} holds what {of} recorded; run {path.stem} again")
        for name, entry in read_entry(path, "numbers").items():
            if name in merged:
                raise ValueError(f"{merged[name]['notebook']} and {path.stem} both record "
                                 f"'{name}'; give one of them another name")
            merged[name] = entry | {"notebook": path.stem}
    write_json_atomic(folder.parent / "metrics.json", merged)
    return merged


def _text(value: float | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
