"""Submissions of every kind, graded in processes of their own; what of a notebook is run for it."""
import ast
import sys

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course.kit.exercise import registered
from course.tools import grade
from course.tools.__main__ import main
from course.tools.normal_form import dumps, write
from course.tools.submission import MEMORY, answers, needed

COURSE = [["nearest_code", "unpack_nibbles", "fit_row"], ["weighted_vote"]]
IMPORTS = "import torch\nfrom course.kit import SliderPlot, check"
HELPER = "def middle(x):\n    return (x[:-1] + x[1:]) / TWO"
TWO = "TWO = 2  # after the function that needs it"


def exercise(name, body, head="def mine(a, b):"):
    return f"{head}\n    {body}\n\n{name} = check(\"{name}\", mine)"


STUBS = [exercise(name, "raise NotImplementedError") for name in COURSE[0]]
NEAREST = exercise("nearest_code", "return torch.bucketize(a, middle(b))")
UNPACK = exercise("unpack_nibbles",
                  "return torch.stack([a & 15, a >> 4], -1).flatten(-2)[..., :b]")
NO_MASK = exercise("unpack_nibbles",
                   "return torch.stack([a, a >> 4], -1).flatten(-2)[..., :b]")


def save(path, *sources):
    path.parent.mkdir(exist_ok=True)
    write(path, dumps(new_notebook(cells=[new_code_cell(s) for s in sources])))


def verdict(sources, name):
    """What a notebook's exercise gets, without a process of its own."""
    return grade.judged(registered()[name], answers(sources, registered()[name]))


@pytest.mark.long
def test_every_kind_of_submission_is_a_row(tmp_path, capfd):
    save(tmp_path / "ann" / "mine.ipynb", IMPORTS, "1 / 0", "%matplotlib inline", HELPER, TWO,
         NEAREST, UNPACK, STUBS[2])
    save(tmp_path / "ann" / ".ipynb_checkpoints" / "mine.ipynb", IMPORTS, *STUBS)
    save(tmp_path / "bob.ipynb", IMPORTS, "def mine(:", *STUBS[:1], NO_MASK,
         "print(check('fit_row', 0))")
    save(tmp_path / "cyd.ipynb", IMPORTS, exercise("nearest_code", "import os; os._exit(3)"),
         exercise("unpack_nibbles", "return a", "print('✓ unpack_nibbles: all 4 cases pass')\n"
                                                "def mine(a, b):"),
         "import sys\nsys.exit(0)\ncheck('fit_row', None)")
    save(tmp_path / "dot.ipynb", "print('nothing of the course')")
    write(tmp_path / "eve.ipynb", "{ no notebook")
    (tmp_path / "fay").mkdir()
    too_much = f"bytearray({2 * MEMORY})"
    save(tmp_path / "gus.ipynb", IMPORTS, exercise("weighted_vote", too_much))
    rows = grade.grade(tmp_path, COURSE)
    got = {(r.student, r.exercise): f"{r.verdict}: {r.says}" for r in rows}
    assert len(got) == len(rows) == 13 and {r.notebook for r in rows[:3]} == {"mine"}
    assert [got["ann", name] for name in COURSE[0]] == ["passed: ", "passed: ", "not solved: "]
    assert got["bob", "nearest_code"] == "not solved: "
    assert got["bob", "unpack_nibbles"].startswith("wrong: the low nibble needs its mask")
    assert got["bob", "fit_row"].startswith("wrong: case 1 of ")
    assert got["cyd", "nearest_code"] == "failed: its process died, exit code 3"
    assert got["cyd", "unpack_nibbles"].startswith("wrong: case 1 of ")
    assert got["cyd", "fit_row"] == "failed: SystemExit: 0"
    assert got["dot", "-"] == "failed: no exercise of the course in it"
    assert got["eve", "-"].startswith("failed: no notebook that can be read: ")
    assert got["fay", "-"] == "failed: no notebook in this folder"
    if sys.platform == "linux":
        assert got["gus", "weighted_vote"].startswith("wrong: case 1 of ")
        assert "MemoryError" in got["gus", "weighted_vote"]
    assert capfd.readouterr().out == ""
    lines = grade.table(rows).splitlines()
    assert lines[1].split() == ["ann", "mine", "nearest_code", "passed"]
    assert "bob: 0 of 3 passed" in lines and max(map(len, lines)) < 110


def test_what_never_ends_is_stopped_and_said():
    cells = [IMPORTS, exercise("nearest_code", "import threading; threading.Event().wait()")]
    assert grade.grade_exercise(cells, "nearest_code", seconds=0.5) == (
        "failed", "no end after 0.5 s")


def test_an_exercise_that_is_gone_is_missing(tmp_path, monkeypatch):
    save(tmp_path / "a.ipynb", IMPORTS, STUBS[0])
    monkeypatch.setattr(grade, "grade_exercise", lambda sources, name, seconds: ("passed", ""))
    assert [(r.exercise, r.verdict) for r in grade.grade(tmp_path, COURSE)] == [
        ("nearest_code", "passed"), ("unpack_nibbles", "missing"), ("fit_row", "missing")]


def test_only_what_an_exercise_needs_is_run():
    module = needed([
        "import os, torch as t\nfrom math import pi, tau\nmodel = load()\nx = 1",
        "broken(", "def area(r):\n    x = pi * r\n    return x * K", "K = size = 3\nK += 1",
        "before = check('before', area)\nunused = os", "y = before(t)"])
    assert ast.unparse(module).replace("\n\n", "\n").split("\n") == [
        "import torch as t", "from math import pi", "def area(r):", "    x = pi * r",
        "    return x * K", "K = size = 3", "K += 1", "before = check('before', area)",
        "y = before(t)"]


def test_what_changes_a_needed_object_is_run():
    module = needed([
        "from math import *\nfrom time import time", "cache = {}\nother = {}",
        "cache['one'] = load.one = 1\nother['x'] = 1", "def fill():\n    cache['two'] = 2",
        "%load_ext autoreload\nns = object()\n%time x = 1\nns.inner.y[0] = sqrt(4)\n!ls",
        "%%time\nK = cache['one'] + ns.z"])
    assert ast.unparse(module).split("\n") == [
        "from math import *", "cache = {}", "cache['one'] = load.one = 1", "ns = object()",
        "ns.inner.y[0] = sqrt(4)", "K = cache['one'] + ns.z"]


def test_a_cell_with_what_ipython_adds_to_python_passes():
    cell = "%matplotlib inline\nimport torch\n" + exercise(
        "nearest_code", "return torch.bucketize(a, (b[1:] + b[:-1]) / 2)")
    for source in (cell, "%%time\n" + cell.partition("\n")[2] + "\ndisplay(mine)\n!ls"):
        assert verdict([IMPORTS, source], "nearest_code") == ("passed", "")


def test_an_answer_shown_in_several_lines_is_wrong_in_words():
    cell = exercise("nearest_code", "return {'x': torch.eye(3)}")
    got, says = verdict([IMPORTS, cell], "nearest_code")
    assert got == "wrong" and "it returns dict {'x': tensor([[1., 0., 0.],\n" in says


def test_the_last_attempt_counts_and_earlier_exercises_serve_it():
    cells = [IMPORTS, UNPACK, STUBS[0], exercise("nearest_code", "return 0"),
             exercise("nearest_code", "unpack_nibbles(a.byte()[None], 1)\n"
                      "    return torch.bucketize(a, (b[1:] + b[:-1]) / 2)")]
    assert verdict(cells, "nearest_code") == ("passed", "")
    assert verdict(cells[:4], "nearest_code")[0] == "wrong"
    assert verdict([*cells, "check('nearest_code', 1) +"], "nearest_code")[1].startswith(
        "SyntaxError")


def test_an_exercise_is_found_by_inspect_as_triton_needs_it():
    source = exercise("nearest_code", "import inspect\n"
                      "    assert 'bucketize' in inspect.getsource(mine)\n"
                      "    return torch.bucketize(a, (b[1:] + b[:-1]) / 2)")
    assert verdict([IMPORTS, source], "nearest_code") == ("passed", "")


def test_a_folder_without_submissions_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no submissions in .*expected a folder with"):
            grade.grade(folder, COURSE)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9", "a minute"])
def test_seconds_are_a_number_that_can_be_waited_for(tmp_path, seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["grade", str(tmp_path), "--seconds", seconds])
    assert f"expected a number above 0, at most 86400, got '{seconds}'" in capsys.readouterr().err


def test_what_cannot_be_graded_is_one_line(tmp_path, capsys, monkeypatch):
    assert main(["grade", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no submissions in ")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grade, "grade", stop)
    assert main(["grade", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "stopped; nothing runs any more, and what was not finished is gone"]


def test_a_folder_and_a_file_of_one_name_are_two_students(tmp_path):
    for path in (tmp_path / "ann" / "mine.ipynb", tmp_path / "ann.ipynb"):
        save(path, "1")
    assert [row.student for row in grade.grade(tmp_path, COURSE)] == ["ann", "ann.ipynb"]


def test_what_a_submission_says_is_spelt_out_in_the_table():
    row = grade.Row("a\nb", "c\x1b[2J", "vote", "failed", "d\x1b[0m\ne \u202e \\n")
    assert grade.table([row]).splitlines()[1:] == [
        r"a\nb     c\x1b[2J  vote      failed: d\x1b[0m e \u202e \\n", r"a\nb: 0 of 1 passed"]
