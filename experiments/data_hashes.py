"""The hashes of the bundled files, data/hashes.json: `python -m experiments.data_hashes`.

Run it after a change of data/, so that `python -m qlora_lib doctor` can tell a clone that is whole
from one that is not. Left out: READMEs, expected/, which is edited by hand, and the hashes.json of
the models' own folders.
"""

from pathlib import Path

from qlora_lib.base.files import FORMAT, write_json_atomic
from qlora_lib.base.folders import HASHES
from qlora_lib.base.hashes import file_hash
from qlora_lib.base.paths import DATA

BUNDLED = ("completions.jsonl", "minigsm/*", "results/*", "tiny-*/**/*")


def data_hashes(data: Path = DATA) -> dict:
    """Return what hashes.json of data/ holds: the hashes of what is bundled, by name."""
    files = {path for pattern in BUNDLED for path in data.glob(pattern)
             if path.is_file() and path.suffix != ".md" and path.name != HASHES}  # fmt: skip
    found = {path.relative_to(data).as_posix(): file_hash(path) for path in sorted(files)}
    return {"format": FORMAT, "files": found}


if __name__ == "__main__":
    write_json_atomic(DATA / HASHES, data_hashes())
