"""The log of adapters: what is added is read back; the best is chosen on dev, never on test."""

import json

import pytest

from course.nb07.adapter_log import AdapterLog
from qlora_lib.base.statistics import wilson


@pytest.fixture
def log(tmp_path):
    log = AdapterLog(tmp_path / "made here" / "adapters.jsonl")
    log.add("code", "a", 50, 100)
    log.add("code", "b", 70, 100, rank=4)
    log.add("code", "a", 99, 100, split="test")
    log.add("tone", "a", 9, 10)
    return log


def test_rows_say_task_adapter_counts_interval_and_time(log):
    (row,) = log.rows("tone")
    assert (row["adapter"], row["n"], row["score"], row["split"]) == ("a", 10, 0.9, "dev")
    assert tuple(row["interval"]) == wilson(9, 10) and row["time"].endswith("Z")
    assert len(log.rows()) == 4 and len(log.rows("code", "dev")) == 2
    assert AdapterLog(log.path).rows() == log.rows()


def test_the_best_of_a_task_is_chosen_on_dev(log):
    assert (log.best("code")["adapter"], log.best("code")["rank"]) == ("b", 4)
    log.add("code", "b", 40, 100)  # measured again: the latest counts
    assert log.best("code")["adapter"] == "a"


def test_the_best_is_never_chosen_on_test(log):
    with pytest.raises(ValueError, match="chosen on dev, not on 'test'"):
        log.best("code", split="test")
    log.add("new", "a", 5, 10, split="test")
    with pytest.raises(ValueError, match="no dev score for task 'new'; it has .*code"):
        log.best("new")


def test_nothing_wrong_is_written(log):
    with pytest.raises(ValueError, match="split is 'train'"):
        log.add("code", "a", 1, 2, split="train")
    with pytest.raises(ValueError, match="3 correct of 2"):
        log.add("code", "a", 3, 2)
    with pytest.raises(ValueError, match="own fields"):
        log.add("code", "a", 1, 2, score=1.0)
    assert len(log.rows()) == 4


def test_a_torn_line_does_not_take_the_next_one_along(log):
    with open(log.path, "a") as stream:
        stream.write('{"task": "code", "ada')
    log.add("code", "c", 80, 100)
    lines = log.path.read_text().split("\n")
    assert lines[4] == '{"task": "code", "ada' and json.loads(lines[5])["adapter"] == "c"
    with pytest.raises(ValueError, match="line 5 is not JSON"):
        log.rows()
    log.path.write_text("\n".join(lines[:4] + lines[5:]))
    assert log.best("code")["adapter"] == "c" and log.path.read_text().count("\n") == 5


def test_a_broken_line_is_named(log):
    whole = log.path.read_text()
    log.path.write_text(whole + '{"task": "code", "ada')
    with pytest.raises(ValueError, match="line 5 is not JSON"):
        log.rows()
    log.path.write_text(json.dumps({"task": "code"}) + "\n")
    with pytest.raises(ValueError, match="line 1 lacks .*adapter"):
        log.rows()
    assert AdapterLog(log.path.with_name("none.jsonl")).rows() == []
