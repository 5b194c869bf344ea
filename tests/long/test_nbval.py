"""Stored and executed notebooks compared by pytest --nbval."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course.tools import copies
from course.tools import execute as books
from course.tools.__main__ import main
from course.tools.normal_form import WIDGET_VIEW, read
from qlora_lib.base.paths import ROOT
from tests.support.throwaway_notebooks import PARAMETERS, save

pytestmark = pytest.mark.long

SLIDER = """\
from course.kit import SliderPlot, show
def draw(ax, bits):
    if bits == 8:
        raise ValueError("cannot draw 8")
    ax.plot([0, bits])
show(draw, alt="A line", bits=2, size=(2, 1))
SliderPlot(draw, {"bits": [2, 4, 8]}, alt="A line", size=(2, 1))"""


def nbval(path, *options):
    """(numbers of the cells that fail, all that is said) of pytest --nbval."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "conftest", "-p", "no:cacheprovider",
         "-p", "nbval", "--nbval", "--nbval-current-env", "--color=no",
         *options, path],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])})
    return [int(n) for n in re.findall(r"^FAILED \S+::Cell (\d+)", done.stdout, re.M)], done.stdout


def test_store_then_nbval(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a",
                "print('x = 0.5000')",                              # 0: noise in a float
                ("print('seconds: 1.5')", "varies"),                # 1: not compared
                "import sys\nprint('50%', file=sys.stderr)\n1 + 1;",  # 2: says nothing that counts
                ("print('loss 2.00')", "rtol=0.05"),                # 3: a wider tolerance
                "print('y = 0.5000')",                              # 4: a float that changed
                "print('4 bits')",                                  # 5: a whole number that changed
                SLIDER)                                             # 6: fails where nobody looked
    assert books.store([path]) == 0
    stored, cells = Path(path).read_text(), read(Path(path)).cells
    assert [c.execution_count for c in cells] == [1, 2, 3, 4, 5, 6, 7]
    assert cells[2].outputs == [] and WIDGET_VIEW not in stored
    assert [o.metadata["image/png"]["alt"] for o in cells[6].outputs] == ["A line", "A line"]
    assert books.mend([path]) == 0 and Path(path).read_text() == stored

    # As if the notebook had been stored on another machine, and by other code.
    for old, new in (("x = 0.5000\\n", "x = 0.5020\\n"), ("seconds: 1.5\\n", "seconds: 9.9\\n"),
                     ("loss 2.00\\n", "loss 2.08\\n"), ("y = 0.5000\\n", "y = 0.5200\\n"),
                     ("4 bits\\n", "5 bits\\n")):
        assert stored.count(old) == 1
        stored = stored.replace(old, new)
    Path(path).write_text(stored)
    failed, said = nbval(path)
    assert failed == [4, 5, 6] and "3 failed, 4 passed" in said, said
    assert "cannot draw 8" in said


def test_nbval_takes_what_a_run_with_the_grid_has_just_executed(outputs, tmp_path, capsys):
    slider = SLIDER.replace('raise ValueError("cannot draw 8")', 'ax.plot([8, 9])')
    path = Path(save(tmp_path, "01_a", PARAMETERS, "print('x = 0.5000')",
                     "ran = open('ran', 'a').write('once ')", slider, ("print(4)", "varies")))
    ran = tmp_path / "ran"
    assert books.store([str(path)]) == 0 and main(["run", "--grid", str(path)]) == 0
    assert ran.read_text() == "once once "
    # A stored output that is another is red, without a run.
    stored = path.read_text()
    path.write_text(stored.replace("x = 0.5000\\n", "x = 0.6000\\n").replace('"4\\n"', '"5\\n"'))
    failed, said = nbval(str(path), "--executed")
    assert failed == [1] and "x = 0.6000" in said and "4 passed" in said
    assert "not run again, as `make run-all` has just run them: 01_a" in said
    assert ran.read_text() == "once once "
    # Another source, and the run counts no more.
    path.write_text(stored.replace("print('x = 0.5000')", "print('x = 0.70' + '00')"))
    failed, said = nbval(str(path), "--executed")
    assert failed == [1] and "not run again" not in said and ran.read_text() == "once once once "


@pytest.mark.parametrize("grid, problem", [(True, "cannot draw 8"), (False, None)])
def test_a_copy_counts_when_every_setting_was_drawn(outputs, tmp_path, capsys, grid, problem):
    path = save(tmp_path, "01_a", PARAMETERS, SLIDER)
    assert books.run([path], "tiny", {}, grid=grid) == (problem is not None)
    assert problem is None or problem in capsys.readouterr().out
    assert copies.fresh_copy_of(Path(path)) is None
