"""Rows as they come, from a caller or a file, with errors that name what is wrong."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..base.files import parse_json
from ..base.paths import short_path

LONGEST = 2**20  # characters of a text: seconds of a tokenizer, longer than any context

# Fields that change what is asked or answered: where nothing writes them, a row is refused.
LOST = ("system", "system_prompt", "context", "passage", "documents", "input", "history", "tools",
        "images", "chat_template_kwargs")  # fmt: skip


def listed(given: Iterable, what: str, kind: type = object) -> list:
    """Return the items of a list, a Dataset or another iterable in order. what: the items in words.
    Raises ValueError for a text, a dict of columns or splits, a table, and items of other kinds."""
    if isinstance(given, Mapping) or hasattr(given, "columns"):
        raise ValueError(f"{what}: got a {type(given).__name__} of "
                         f"{[*getattr(given, 'columns', given)]!s:.80}; give a list with an item a "
                         "row: one split of a DatasetDict, Dataset.from_dict(...) of a dict of "
                         "columns, .to_dict('records') of a table, [row] for one row")  # fmt: skip
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(f"{what}: expected a list, got {given!r:.80}; give one as [it]")
    items = list(given)
    for i, item in enumerate(items, 1):
        if not isinstance(item, kind):
            raise ValueError(f"{what}: number {i} is {item!r:.80}, expected a "
                             f"{getattr(kind, '__name__', 'name or None')}")  # fmt: skip
    return items


def check_lost(row: Mapping, *written: str) -> None:
    """Raise ValueError for a field of LOST with content, but those that are `written`."""
    for field in LOST:
        if row.get(field) and field not in written:
            raise ValueError(f"`{field}` {row[field]!r:.60} would be lost: nothing writes it here; "
                             "write the row as prompt and completion")  # fmt: skip


def text_of(row: Mapping, field: str) -> str:
    """Return a field's text; ValueError for none, an empty one, and half a surrogate pair."""
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{field}` should be a text that is not empty, got {text!r:.80}")
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raise ValueError for what no tokenizer takes: no text, one of more than LONGEST characters,
    and half a surrogate pair, which JSON can write, and a shell."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, got {text!r:.80}")
    if len(text) > LONGEST:
        raise ValueError(f"a text has {len(text):,} characters, expected at most {LONGEST:,}: "
                         f"{text[:40]!r}...")  # fmt: skip
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"a text holds half a surrogate pair, {half!r}; mend it") from None


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """Return (where, row) for each row of a JSONL file or JSON list; where: "FILE, line 3". Raises
    FileNotFoundError, or ValueError naming the line that is not a JSON object."""
    name = where = short_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name}; expected a file with a JSON object a line")
    try:
        text, found = path.read_text(encoding="utf-8-sig"), []
        if text.lstrip().startswith("["):
            found = [(f"{name}, entry {i}", row) for i, row in enumerate(parse_json(text), 1)]
        else:
            # Not splitlines(): a JSON text may hold characters like U+2028 that it would split at.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    where = f"{name}, line {number}"
                    found.append((where, parse_json(line)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start:,}); convert it") from error
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not found:
        raise ValueError(f"{name} holds no entries")
    for where, row in found:
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object: {str(row):.80}")
    return found


def read_jsonl(path: Path) -> list[dict]:
    """Return the rows of a JSONL file; errors as read_rows."""
    return [row for _, row in read_rows(path)]
