"""Rows of JSONL and JSON files."""

import pytest

from qlora_lib.data.rows import LONGEST, check_text, read_rows


def test_rows_are_lines_or_a_list_and_broken_ones_are_named(tmp_path):
    file = tmp_path / "rows.json"
    for text, places in (('\ufeff{"a": 1}\n\n{"a": 2}\n', ("line 1", "line 3")),
                         ('\n[{"a": 1},\n {"a": 2}]', ("entry 1", "entry 2"))):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        assert read_rows(file) == [(f"{file}, {p}", {"a": i}) for i, p in enumerate(places, 1)]
    for text, message in (
        ('{"a": 1}\n{"a": ', "rows.json, line 2 is not JSON"),
        ('{"a": 1}\n3', "rows.json, line 2 is not a JSON object: 3"),
        ("[{}, []]", "rows.json, entry 2 is not a JSON object"),
        ("[{},", "rows.json is not JSON"),
        ("[]", "holds no entries"),
        (" \n", "holds no entries"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(file)
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_rows(file)


@pytest.mark.parametrize("content", [
    b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": 1, "a": 2}', b"\0\0", b'{"a": "\xff"}', b"5", b"[1]",
    '{"a": 1}'.encode("utf-16"),
])  # fmt: skip
def test_a_file_of_something_else_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="rows.jsonl"):
        read_rows(tmp_path / "rows.jsonl")


def test_texts_that_no_tokenizer_takes():
    check_text("a" * LONGEST)
    for text in ("a" * (LONGEST + 1), "\ud800", None, 5):
        with pytest.raises(ValueError, match="a text|expected a text"):
            check_text(text)
