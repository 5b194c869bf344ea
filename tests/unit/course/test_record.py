"""Expected numbers, and what `record` shows and keeps."""
import json
import math

import numpy as np
import pytest
import torch

from course.kit import COMPARE_VARIABLE, OUTPUTS_VARIABLE
from course.kit.expected import Expected, load_expected, within
from course.kit.record import LINE, Recorder, merge
from qlora_lib.base.files import write_json_atomic


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "outputs"))
    monkeypatch.delenv(COMPARE_VARIABLE, raising=False)
    write_json_atomic(tmp_path / "tiny.json", {
        "error": {"value": 0.091, "tolerance": 0.0005, "reason": "fp32 sums"},
        "count": {"value": 4096, "tolerance": 0, "reason": "a count"}})
    return tmp_path


# --- expected numbers ----------------------------------------------------------------------

def test_within_is_absolute_and_never_true_for_nan():
    assert within(0.3, Expected(0.1, 0.2, "")) and not within(0.301, Expected(0.1, 0.2, ""))
    assert within(7, Expected(7, 0, "")) and not within(7.0000001, Expected(7, 0, ""))
    assert not within(math.nan, Expected(1, 9, "")) and not within(math.inf, Expected(1, 9, ""))


def test_a_profile_without_expectations_has_none(tmp_path):
    assert load_expected("nothing", tmp_path) == {}


@pytest.mark.parametrize("entry", [
    {"value": 1, "tolerance": 0}, {"value": 1, "tolerance": -1, "reason": "x"},
    {"value": "1", "tolerance": 0, "reason": "x"}, {"value": 1, "tolerance": 0, "reason": " "}])
def test_an_incomplete_expectation_is_named(tmp_path, entry):
    write_json_atomic(tmp_path / "p.json", {"mean": entry})
    with pytest.raises(ValueError, match="p.json: 'mean' is"):
        load_expected("p", tmp_path)


# --- record.py ----------------------------------------------------------------------------

def test_the_header_line_says_where_the_numbers_come_from(outputs, capsys):
    Recorder("01_a", "tiny", 7, expected=outputs)
    said = capsys.readouterr().out
    assert torch.__version__ in said and "seed 7" in said and "profile tiny" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("beside, said", [
    ("0", " thread"), ("1", ", up to 1 other notebook beside it |"),
    ("3", ", up to 3 other notebooks beside it |")])
def test_the_header_line_says_what_runs_beside_it(outputs, capsys, monkeypatch, beside, said):
    monkeypatch.setenv("COURSE_BESIDE", beside)
    Recorder("01_a", "tiny", 7, expected=outputs)
    line = capsys.readouterr().out
    assert said in line and ("beside" in line) == (beside != "0")


def test_a_number_beside_the_expected_one(outputs, capsys):
    record = Recorder("01_a", "tiny", expected=outputs)
    capsys.readouterr()
    record("error", torch.tensor(0.0912, dtype=torch.float64))
    record("count", np.int64(4096))
    record("new", 1 / 3)
    assert capsys.readouterr().out.splitlines() == [
        "✓ error: 0.0912 (expected 0.091 ± 0.0005)",
        "✓ count: 4096 (expected 4096, exactly)",
        "· new: 0.333333 (nothing to compare with)"]


def test_a_number_too_far_off_is_shown_not_raised(outputs, capsys):
    record = Recorder("01_a", "tiny", expected=outputs)
    capsys.readouterr()
    record("error", 0.2)
    record("error", math.nan)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "✗ error: 0.2 (expected 0.091 ± 0.0005)" and "fp32 sums" in lines[1]
    assert lines[2].startswith("✗ error: nan")
    assert merge("tiny")["error"] == {"value": "nan", "expected": 0.091, "tolerance": 0.0005,
                                      "within": False, "notebook": "01_a"}


def test_what_compares_is_printed_in_the_form_that_nbval_reads(outputs, capsys):
    record = Recorder("01_a", "tiny", expected=outputs)
    capsys.readouterr()
    record("error", 0.0912)
    record("count", 4097)
    lines = capsys.readouterr().out.splitlines()
    assert LINE.fullmatch(lines[0])["tolerance"] == "0.0005"
    assert LINE.fullmatch(lines[1])["mark"] == "✗"


def test_other_parameters_compare_nothing_and_say_so(outputs, capsys, monkeypatch):
    monkeypatch.setenv(COMPARE_VARIABLE, "0")
    record = Recorder("01_a", "tiny", expected=outputs)
    record("error", 9.0)
    assert "· error: 9 (other parameters: not compared)" in capsys.readouterr().out
    assert "within" not in merge("tiny")["error"]


def test_notebooks_write_files_of_their_own_and_a_rerun_forgets_its_last(outputs):
    first, second = (Recorder(n, "tiny", 0, expected=outputs) for n in ("01_a", "02_b"))
    first("error", 0.091)
    second("count", 4096)
    assert set(merge("tiny")) == {"error", "count"}
    Recorder("01_a", "tiny", expected=outputs)
    assert set(merge("tiny")) == {"count"}
    assert set(json.loads((outputs / "outputs/tiny/metrics.json").read_text())) == {"count"}
    kept = json.loads((outputs / "outputs/tiny/metrics/02_b.json").read_text())
    assert kept["stamp"]["seed"] == 0 and kept["numbers"]["count"]["within"]


def test_two_notebooks_may_not_use_one_name(outputs):
    for notebook in ("01_a", "02_b"):
        Recorder(notebook, "tiny", expected=outputs)("error", 0.091)
    with pytest.raises(ValueError, match="01_a and 02_b both record 'error'"):
        merge("tiny")


@pytest.mark.parametrize("name, value", [("x", "1"), ("x", None), ("a: b", 1.0)])
def test_only_one_number_under_a_plain_name(outputs, name, value):
    with pytest.raises(ValueError, match="expected a name without a colon"):
        Recorder("01_a", "tiny", expected=outputs)(name, value)


def test_numbers_that_were_changed_or_are_another_notebook_s_are_refused(outputs):
    record = Recorder("01_a", "tiny", 0, expected=outputs)
    record("error", 0.091)
    kept = outputs / "outputs" / "tiny" / "metrics" / "01_a.json"
    kept.with_name("02_b.json").write_bytes(kept.read_bytes())
    with pytest.raises(ValueError, match="02_b.json holds what 01_a recorded"):
        merge("tiny")
    kept.with_name("02_b.json").unlink()
    kept.write_text(kept.read_text().replace("0.091", "0.092", 1))
    with pytest.raises(ValueError, match="01_a.json is not as it was written"):
        merge("tiny")
