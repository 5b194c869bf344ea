"""Names and parameters that the tools are given, before anything runs."""

import json
from pathlib import Path

import nbformat
import pytest

from course.kit import OUTPUTS_VARIABLE
from course.kit.record import Recorder, outputs_folder
from course.tools import execute as books
from course.tools.__main__ import PROFILES, main
from course.tools.normal_form import KERNEL
from course.tools.student import build
from qlora_lib.runs.profiles import load_profile
from tests.support.throwaway_notebooks import PARAMETERS, save


def test_the_profiles_are_those_of_the_library():
    assert [load_profile(name).name for name in PROFILES] == list(PROFILES)
    with pytest.raises(ValueError, match=", ".join(PROFILES)):
        load_profile("nothing")


@pytest.mark.parametrize("profile", ["../../x", "/tmp/x", "", ".", "..", "a\0b", "nothing"])
def test_a_profile_that_leads_elsewhere_deletes_and_writes_nothing(profile, tmp_path, monkeypatch, capsys):
    (tmp_path / "x" / "metrics").mkdir(parents=True)
    mine = tmp_path / "x" / "metrics" / "mine.json"
    mine.write_text("{}")
    monkeypatch.setenv(OUTPUTS_VARIABLE, str(tmp_path / "a" / "b"))
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--profile", profile])
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    if profile != "nothing":
        for call in (lambda: outputs_folder(profile), lambda: Recorder("a", profile),
                     lambda: Recorder(profile, "tiny")):  # fmt: skip
            with pytest.raises(ValueError, match="can't name a file"):
                call()
    assert mine.is_file() and not (tmp_path / "a").exists()


@pytest.mark.parametrize("text", [
    "bits='", "bits", "=3", "1=2", "bits=3 bits=4", "bits=four", "bits=1e400", "bits=nan", "name=5",
    "bits=" + "x" * 300, "bits=" + "(" * 10_000, "bits=" + "x/" * 3000, "bits=\0", "bits=\ud800", "other=1",
    "flag=1", "bits=True", "bits=" + "9" * 30,
])  # fmt: skip
def test_parameters_that_no_notebook_takes(text, tmp_path):
    book = nbformat.v4.new_notebook(metadata={"kernelspec": KERNEL})
    cell = nbformat.v4.new_code_cell('bits = 4\nrate = 0.5\nname = "a"\nflag = False\nany = None')
    cell.metadata["tags"] = ["parameters"]
    book.cells = [cell]
    path = tmp_path / "01_one.ipynb"
    nbformat.write(book, path)
    assert books.known_parameters([path], books.parse_parameters("bits=3 rate=1 any=x flag=true"))
    with pytest.raises(ValueError):
        books.known_parameters([path], books.parse_parameters(text))


@pytest.mark.parametrize("content", [b"[]", b"5", b"", b"\xff", b"[" * 100_000, b"{}", b"null"])
def test_what_is_no_notebook_is_named(content, tmp_path, capsys):
    path = tmp_path / "broken.ipynb"
    path.write_bytes(content)
    for command in (["normal"], ["student", "--out", str(tmp_path / "out")]):
        assert main([command[0], str(path), *command[1:]]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and "broken.ipynb" in err and err.count("\n") == 1


def test_handing_out_does_not_replace_the_notebooks_themselves(tmp_path):
    path = tmp_path / "01_one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(), path)
    before = json.loads(path.read_text())
    with pytest.raises(ValueError, match="without solutions"):
        build(tmp_path, [path])
    assert json.loads(path.read_text()) == before


def test_a_parameter_goes_to_the_notebooks_that_have_it(tmp_path):
    has = Path(save(tmp_path, "01_a", PARAMETERS))
    lacks = Path(save(tmp_path, "02_b", ('profile = "tiny"', "parameters")))
    parts = books.known_parameters([has, lacks], {"bits": 3, "profile": "smollm2"})
    assert parts == {has: {"bits": 3, "profile": "smollm2"}, lacks: {"profile": "smollm2"}}


def test_parameters_keep_their_types():
    given = "bits=3 rate=1e-3 group_size=None fast=true name=llama path='a b' layers=[1,2]"
    assert books.parse_parameters(given) == {
        "bits": 3, "rate": 1e-3, "group_size": None, "fast": True, "name": "llama",
        "path": "a b", "layers": [1, 2]}
    assert books.parse_parameters("") == {}
    for wrong in ("bits", "=3", "a-b=3"):
        with pytest.raises(ValueError, match="expected name=value"):
            books.parse_parameters(wrong)
