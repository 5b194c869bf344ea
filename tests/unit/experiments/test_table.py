"""Rows that are kept as they are measured, and the options that the experiments share."""

import json

import pytest

from experiments.table import Table, asked_rows, command_line


def test_a_row_is_stored_at_once_with_its_stamp_in_the_given_order(tmp_path):
    path = tmp_path / "table.json"
    table = Table(path, seed=3, order=["a", "b"])
    for name, n in (("b", 1), ("a", 2), ("b", 3)):
        table.keep(name, {"n": n})
        assert json.loads(path.read_text())[name]["n"] == n
    rows = json.loads(path.read_text())
    assert list(rows) == ["a", "b"] and rows["a"]["stamp"]["seed"] == 3


def test_stored_rows_are_read_again_unless_all_are_to_be_measured(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"old": {}, "b": {"n": 1}}))
    assert Table(path, 0).rows["b"] == {"n": 1}
    Table(path, 0).keep("a", {})
    assert list(json.loads(path.read_text())) == ["old", "b", "a"]  # as they were measured
    Table(path, 0, order=["a", "b"]).keep("b", {})
    assert list(json.loads(path.read_text())) == ["a", "b"]
    Table(path, 0, force=True).keep("a", {})
    assert list(json.loads(path.read_text())) == ["a"]


def test_rows_that_there_are_not_end_the_command(tmp_path, capsys):
    parser = command_line("What it measures.\n\nMore.", tmp_path, "--rows")
    assert parser.description == "What it measures." and parser.parse_args([]).out == tmp_path
    args = parser.parse_args(["--rows", "b"])
    assert asked_rows(parser, args.rows, ["a", "b"]) == ["b"]
    assert asked_rows(parser, None, {"a": 1, "b": 2}) == ["a", "b"]
    with pytest.raises(SystemExit):
        asked_rows(parser, ["c"], ["a", "b"])
    assert "no rows ['c']; expected some of a, b" in capsys.readouterr().err


def test_a_row_that_was_changed_is_refused_by_name(tmp_path):
    path = tmp_path / "table.json"
    for name in "ab":
        Table(path, 0).keep(name, {"n": 1})
    rows = json.loads(path.read_text())
    for change in ({"b": rows["b"] | {"n": 2}}, {"b": rows["a"]}, {"b": {"n": 1}}):
        path.write_text(json.dumps(rows | change))
        with pytest.raises(ValueError, match="row 'b' is not as it was measured"):
            Table(path, 0)
