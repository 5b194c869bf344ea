"""One JSON file for an evaluation: what was asked, of which model, each verdict, and who says so.

Rows of two people can be compared where their protocols are one: the same questions and prompts,
decoded, chosen and scored alike. `protocol_hash` names all of that in 16 digits.
"""

from pathlib import Path

from ..base.files import read_proved_json, write_proved_json
from ..base.hashes import content_hash, file_hash
from ..base.paths import short_path
from ..base.statistics import wilson
from . import extraction
from .evaluate import ANSWERS, EvalReport

# Of a report's facts: what was asked and how. The rest says of whom, where and when.
ASKED = ("problems_hash", "prompts_hash", "split", "few_shot", "vote", "score")
SPEED = ("batch_size",)  # of the decoding: what is computed at once
OF_MODEL = ("model", "revision", "weights", "adapter", "compute_dtype")
OF_PLACE = ("device", "threads", "python", "torch", "transformers", "seed", "date", "command")
VERDICTS = {"strict": "right", "flexible": "right_flexible"}  # mode to the key of its verdicts


def result_row(folder: Path | str, run: dict | None = None) -> dict:
    """The row of a finished evaluation, as JSON takes it: protocol and its hash, model, the run's
    settings, counts with 95% intervals (Wilson), a verdict ("0" or "1") a question in `right` and
    `right_flexible`, the hash of the answers, and where it was measured.

    folder: of the evaluation. run: what run.json says of the training, where there was one. Raises
    what EvalReport.load raises, and ValueError for an evaluation that does not say what it asked.
    """
    report, path = EvalReport.load(folder), Path(folder)
    info = report.info
    if missing := [name for name in ("problems_hash", "decoding", "weights") if not info.get(name)]:
        raise ValueError(f"{short_path(path)} does not say its {', '.join(missing)}: an older "
                         "version wrote it; evaluate anew (--restart)")  # fmt: skip
    decoding = {k: v for k, v in info["decoding"].items() if k not in SPEED}
    asked = {name: info.get(name) for name in ASKED} | {"decoding": decoding}
    # Verdicts are the extraction's too: another version of it is another protocol.
    asked |= {"n": report.n, "extraction": file_hash(Path(extraction.__file__))}
    row = {
        "protocol_hash": protocol_hash(asked),
        "protocol": asked,
        "model": {name: info.get(name) for name in OF_MODEL},
        "run": run,
        "answers": file_hash(path / ANSWERS),  # so that they can be shown later, as they were
        "n": report.n,
    }
    for mode, verdicts in VERDICTS.items():
        row |= _score(mode, "".join(str(int(p[mode])) for p in report.predictions))
    row |= {name: getattr(report, name) for name in ("format_rate", "truncation_rate", "tokens")}
    return row | {"stamp": {name: info.get(name) for name in OF_PLACE}}


def protocol_hash(asked: dict) -> str:
    """16 hexadecimal digits, the same for evaluations whose rows can be compared."""
    return content_hash(asked)[:16]


def _score(mode: str, right: str) -> dict:
    correct = right.count("1")
    return {f"{mode}_correct": correct, mode: correct / len(right),
            f"{mode}_interval": list(wilson(correct, len(right))), VERDICTS[mode]: right}  # fmt: skip


def write_row(path: Path | str, row: dict) -> None:
    """Writes a row of `result_row`, whole or not at all, with its hash."""
    write_proved_json(path, row)


def read_row(path: Path | str) -> dict:
    """The row in a file. Raises FileNotFoundError, and ValueError for one that was changed, or
    whose counts, intervals or protocol's hash are not those of what it holds."""
    path = Path(path)
    row = read_proved_json(path)
    try:
        made = {}
        for mode, verdicts in VERDICTS.items():
            made |= _score(mode, row[verdicts])
        said = {name: row[name] for name in made}
        sizes = {row["n"], *(len(row[verdicts]) for verdicts in VERDICTS.values())}
        only = set("".join(row[verdicts] for verdicts in VERDICTS.values())) <= {"0", "1"}
        fits = only and len(sizes) == 1 and said == made
        fits = fits and row["protocol_hash"] == protocol_hash(row["protocol"])
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{short_path(path)} is no row of an evaluation: {error!r}") from None
    if not fits:
        raise ValueError(f"{short_path(path)}: its counts, intervals or protocol are not those of "
                         "its verdicts; make it anew with python -m qlora_lib report")  # fmt: skip
    return row
