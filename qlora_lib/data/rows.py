"""Rows of JSONL and JSON files, read with errors that name the line."""

import json
from pathlib import Path

from ..base.paths import short_path


def check_text(text: str) -> None:
    """Raises ValueError for half a surrogate pair, which JSON can write and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"a text holds half a surrogate pair, {half!r}; mend it") from error


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(where, row) for each row of a JSONL file or of a JSON list; where: "FILE, line 3".

    Raises FileNotFoundError, or ValueError naming the line that is not a JSON object.
    """
    name = short_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name}; expected a file with a JSON object a line")
    where = name
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            found = [(f"{name}, entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        else:
            found = []
            # Not splitlines(): a JSON text may hold characters like U+2028 that it would split at.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    where = f"{name}, line {number}"
                    found.append((where, json.loads(line)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); convert it") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not found:
        raise ValueError(f"{name} holds no entries")
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object: {str(row):.80}")
    return found


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a JSONL file; errors as read_rows."""
    return [row for _, row in read_rows(path)]
