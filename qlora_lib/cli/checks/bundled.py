"""The bundled files, as data/hashes.json has them."""

import json
from hashlib import file_digest
from pathlib import Path

from ...base.paths import BUNDLED, DATA, short_path
from .finding import Findings, note, ok, problem


def check_data() -> Findings:
    """Whether the bundled files are there, as data/hashes.json has them."""
    listing = DATA / "hashes.json"
    if not listing.is_file():
        yield problem(f"there is no {listing}: the bundled model {BUNDLED}")
        return
    wanted = json.loads(listing.read_text(encoding="utf-8"))["files"]
    missing = [name for name in wanted if not (DATA / name).is_file()]
    changed = [n for n, was in wanted.items() if n not in missing and _sha256(DATA / n) != was]
    results = [n for n in changed if n.startswith("results/")]  # by `make experiments`, perhaps
    asked = [n for n in changed if n not in results]
    for state, what, names in ((problem, "missing", missing), (problem, "changed", asked),
                               (note, "changed", results)):  # fmt: skip
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield state(f"{what} in {short_path(DATA)}: {', '.join(names[:3])}{more}: git checkout "
                        f"-- {short_path(DATA)}, or clone again")  # fmt: skip
    if not missing and not changed:
        yield ok(f"{len(wanted)} bundled files in {short_path(DATA)}, as they were published")


def _sha256(path: Path) -> str:  # base/hashes.py needs torch
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
