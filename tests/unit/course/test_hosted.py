"""Copies of the notebooks for machines that have neither the repository nor its packages."""
import json
import os
import subprocess
import sys

import pytest

from course.tools import hosted
from course.tools.normal_form import NOTEBOOKS, notebooks, read
from qlora_lib.base.paths import ROOT


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("hosted")
    return hosted.build(out, notebooks(["01", "13"]), "someone/a.course-2")


def test_a_copy_has_one_cell_more_and_no_outputs(made):
    for path in made:
        copy, before = read(path), read(NOTEBOOKS / path.name)
        sources = [cell.source for cell in copy.cells]
        assert sources[:1] + sources[2:] == [cell.source for cell in before.cells]
        assert "https://github.com/someone/a.course-2" in sources[1]
        assert not any(cell.get("outputs") for cell in copy.cells)


def test_badges_lead_to_the_copies(made):
    said = (made[0].parent / "README.md").read_text(encoding="utf-8")
    for path in made:
        for site in ("colab.research.google.com/github/", "kernels/welcome?src=https://github.com/"):
            assert f"{site}someone/a.course-2/blob/HEAD/hosted/{path.name})" in said


@pytest.mark.parametrize("wrong", ["", "name", "a/b/c", "a/..", "a b/c", "https://github.com/a/b",
                                   "-a/b", "a/b.git", "a/b\n", "../x"])
def test_what_is_no_repository_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="is no OWNER/NAME"):
        hosted.build(tmp_path / "out", notebooks(["13"]), wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_first_cell_gets_the_course_and_what_is_missing(made, tmp_path):
    """git and pip are stand-ins that note what they are asked; a package is hidden."""
    cell = read(made[0]).cells[1].source
    place = tmp_path / "there"
    place.mkdir()
    script = f"""
import importlib.metadata, json, os, subprocess
asked, real = [], importlib.metadata.version
def run(command, check):
    asked.append(command)
    if command[0] == "git":
        os.symlink({str(ROOT)!r}, "a.course-2")
def version(name):
    if name == "latex2mathml":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
subprocess.run, importlib.metadata.version = run, version
exec({cell!r})
import course
print(json.dumps([asked, os.getcwd(), course.__file__, "torch" in sys.modules]))
"""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=place, env=clean, check=True,
                          capture_output=True, text=True)
    (git, pip), folder, home, torch = json.loads(done.stdout)
    assert git[:2] == ["git", "clone"] and git[-1] == "https://github.com/someone/a.course-2"
    assert pip[1:5] == ["-m", "pip", "install", "--quiet"] and len(pip) == 6
    assert pip[-1].startswith("latex2mathml>=") and not torch
    assert os.path.samefile(folder, NOTEBOOKS)
    assert os.path.samefile(home, NOTEBOOKS / "course" / "__init__.py")
