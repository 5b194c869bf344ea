"""Rows of JSONL and JSON files."""

import pytest

from qlora_lib.data.rows import read_rows


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
