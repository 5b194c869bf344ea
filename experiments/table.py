"""What the experiments share: rows that are kept as they are measured, and a command line."""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_lib.base.files import read_json, whole_file, write_json_atomic
from qlora_lib.base.hashes import content_hash
from qlora_lib.base.paths import given_path
from qlora_lib.base.stamp import stamp

PROOF = "sha256"  # in a row's stamp: the hash of all else in the row, and of its name
OPTIONS = {
    "--out": {"type": given_path, "help": "another place than data/results, for a trial"},
    "--force": {"action": "store_true", "help": "measure stored rows again"},
    "--rows": {"nargs": "*", "metavar": "ROW", "help": "only these rows"},
    "--model": {"help": "other weights: a folder, a hub id or a GGUF file"},
    "--data": {"help": "other problems: a folder with {split}.jsonl"},
}


def command_line(doc: str, out: Path, *options: str) -> argparse.ArgumentParser:
    """A parser for --out and those of OPTIONS that are named, described by the first line of a
    module's docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    for option in ("--out", *options):
        parser.add_argument(option, **OPTIONS[option])
    parser.set_defaults(out=out)
    return parser


def asked_rows(parser: argparse.ArgumentParser, asked: Sequence[str] | None, names) -> list[str]:
    """The rows asked for by --rows, all of `names` without it; an unknown one ends the command."""
    unknown = set(asked or ()) - set(names)
    if unknown:
        parser.error(f"no rows {sorted(unknown)}; expected some of {', '.join(names)}")
    return list(asked or names)


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write a line of JSON a row, whole or not at all."""
    with whole_file(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Table:
    """Rows by name in a JSON file, each stored with its stamp as soon as it is measured.

    order: the names of the rows in the file's order, others are dropped; without it they stand as
    they were measured. force: begin with no rows, and replace the file at the first one. Raises
    ValueError for a row that was changed or is damaged; files of older versions prove nothing.
    """

    def __init__(
        self, path: Path, seed: int, order: Sequence[str] | None = None, force: bool = False
    ):
        self.path, self.seed, self.order = path, seed, order
        self.rows: dict[str, dict] = {}
        if path.exists() and not force:  # a folder, say, is refused
            self.rows = read_json(path)
        if odd := [name for name, row in self.rows.items() if not isinstance(row, dict)]:
            raise ValueError(f"{path}: row {odd[0]!r} is no object; --force replaces the file")
        proofs = {name: row.get("stamp", {}).get(PROOF) for name, row in self.rows.items()}
        for name, proof in proofs.items() if any(proofs.values()) else ():
            if proof != _hash(name, self.rows[name]):
                raise ValueError(f"{path}: row {name!r} is not as it was measured: it was changed "
                                 "or is damaged; get the file again, or delete it")  # fmt: skip

    def keep(self, name: str, row: dict) -> None:
        """Store a row in the place of what was there under its name."""
        self.rows[name] = json.loads(json.dumps(row | {"stamp": stamp(self.seed)}))  # as it is read
        for key, kept in self.rows.items():
            kept["stamp"] = kept.get("stamp", {}) | {PROOF: _hash(key, kept)}
        rows = {n: self.rows[n] for n in self.order or self.rows if n in self.rows}
        write_json_atomic(self.path, rows)


def _hash(name: str, row: dict) -> str:
    said = {k: v for k, v in row.get("stamp", {}).items() if k != PROOF}
    return content_hash([name, {k: v for k, v in row.items() if k != "stamp"}, said])
