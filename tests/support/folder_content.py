"""What two folders hold, to be compared but for times and machines."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open

from qlora_lib.base.folders import HASHES, check_folder
from tests.support.fuzzing import plain

# What differs between two runs that are equal but for time and machine
VARIES = {"seconds", "tokens_per_second", "peak_memory", "stamp", "training", "sha256",
          "proof", "predictions.jsonl"}  # fmt: skip  (hashes of what holds times)


def put(source: Path, place: Path) -> None:
    """Make `place` a copy of `source`."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)


def content(place: Path) -> dict:
    """Return what the files below `place` hold but for times, by path; raises ValueError for a
    folder whose hashes are not those of its files."""
    found = {}
    for path in sorted(p for p in place.rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(place).as_posix()
        if path.name == HASHES:
            check_folder(path.parent)
        elif path.suffix == ".json":
            found[name] = steady(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            found[name] = [steady(json.loads(line)) for line in lines]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = {k: steady_text(v) for k, v in (file.metadata() or {}).items()
                         if k not in VARIES}  # fmt: skip
                found[name] = about, plain({n: file.get_tensor(n) for n in file.keys()})
        else:
            found[name] = path.read_bytes()
    return found


def steady(value):
    """Return a value of JSON without what VARIES."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VARIES}
    return [steady(v) for v in value] if isinstance(value, list) else value


def steady_text(text: str):
    return steady(json.loads(text)) if text.startswith("{") else text
