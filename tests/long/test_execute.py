"""Throwaway notebooks run, stored and solved by the commands."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from course.tools import execute as books
from course.tools.__main__ import main
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import ROOT
from tests.support.throwaway_notebooks import PARAMETERS, exercise_cells, save

pytestmark = pytest.mark.long


def test_run_is_strict_and_goes_on(outputs, tmp_path, capsys):
    good = save(tmp_path, "01_good", PARAMETERS, f"import os, sys\n"
                f"assert os.getcwd() == {str(tmp_path)!r} and sys.executable == {sys.executable!r}",
                "assert os.environ['IPYTHONDIR'].endswith('build/ipython')\nassert bits == 4")
    raises = save(tmp_path, "02_raises", PARAMETERS, "1 / 0", "print('not reached')")
    leaves = save(tmp_path, "03_leaves", PARAMETERS, "import sys\nsys.exit(0)", "print(1)")
    hides = save(tmp_path, "04_hides", PARAMETERS, ("1 / 0", "raises-exception"), "print(1)")
    assert books.run([good, raises, leaves, hides], "tiny", {}, jobs=1) == 1
    said = capsys.readouterr().out
    assert "[1/4] 01_good ... ok" in said and "[2/4] 02_raises ... FAILED" in said
    assert "cell 1: ZeroDivisionError: division by zero" in said
    assert "[3/4] 03_leaves ... FAILED" in said and "[4/4] 04_hides ... FAILED" in said
    assert "1 of 4 notebooks ran to their end" in said
    kept = sorted(p.name for p in outputs.iterdir())
    assert kept == ["01_good.ipynb", "02_raises.failed.ipynb", "03_leaves.failed.ipynb",
                    "04_hides.failed.ipynb", "metrics.json"]


def test_a_timeout_is_a_failure(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_hangs", PARAMETERS, "import threading\nthreading.Event().wait()")
    assert books.run([path], "tiny", {}, timeout=1) == 1
    assert "CellTimeoutError" in capsys.readouterr().out


def test_a_parameter_that_no_notebook_has_stops_the_run_before_it_starts(outputs, tmp_path, capsys):
    paths = [save(tmp_path, "01_a", PARAMETERS), save(tmp_path, "02_b", PARAMETERS)]
    assert main(["run", "--parameters", "bit=3", *paths]) == 2
    said = capsys.readouterr()
    assert "no notebook has a parameter 'bit'; there are: bits, profile" in said.err
    assert said.out == "" and not outputs.exists()


def test_run_compares_recorded_numbers_and_says_when_it_does_not(outputs, tmp_path, capsys):
    write_json_atomic(tmp_path / "tiny.json", {
        name: {"value": 0.5, "tolerance": 0.01, "reason": "sums"} for name in ("mean", "median")})
    path = save(tmp_path, "01_records", PARAMETERS, "from pathlib import Path\n"
                "from course.kit import Recorder\n"
                "record = Recorder('01_records', profile, 0, expected=Path('.'))",
                "record('mean', 0.505)\nrecord('median', bits / 10)")
    assert books.run([path], "tiny", {}) == 1
    said = capsys.readouterr().out
    assert "[1/1] 01_records ... ok" in said and "1 as expected, 1 too far off" in said
    assert "  ✓ mean: 0.505 (expected 0.5 ± 0.01)" in said
    assert "  ✗ median: 0.4 (expected 0.5 ± 0.01)" in said
    metrics = json.loads((outputs / "metrics.json").read_text())
    assert metrics["mean"]["within"] and not metrics["median"]["within"]
    # Other parameters give other numbers: nothing is compared, and nothing fails.
    assert books.run([path], "tiny", {"bits": 3}) == 0
    said = capsys.readouterr().out
    assert "with other parameters" in said and "· median: 0.3 (other parameters" in said
    assert "0 as expected, 0 too far off, 2 not compared" in said


# On the stream that the kernel was started with: under pytest ipykernel leaves 2 alone.
SPEAKS = "import os\nos.write(2, b'of no cell\\n')"
HANGS = (SPEAKS, "with open('began', 'w') as file: file.write(str(os.getpid()))",
         "import threading\nthreading.Event().wait()")


def _hear_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("kill, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130),
                                        (signal.SIGKILL, -9)])
def test_a_killed_run_ends_all_kernels_and_leaves_no_half_file(outputs, tmp_path, kill, code):
    paths, began = [], []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths.append(save(tmp_path / name, f"01_{name}", PARAMETERS, *HANGS))
        began.append(tmp_path / name / "began")
        os.mkfifo(began[-1])
    run = subprocess.Popen([sys.executable, "-m", "course.tools", "run", *paths, "--jobs", "2"],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                           start_new_session=True, preexec_fn=_hear_ctrl_c)
    kernels = [psutil.Process(int(path.read_text())) for path in began]  # when the cells ran
    run.send_signal(kill) if kill != signal.SIGINT else os.killpg(run.pid, kill)  # as Ctrl-C does
    said, problems = run.communicate(timeout=120)
    assert psutil.wait_procs(kernels, timeout=120)[1] == []
    assert run.returncode == code
    assert said == "2 notebooks, 2 side by side, one thread each: 01, 01\n"
    assert list(outputs.rglob("*.ipynb")) == [] or kill == signal.SIGKILL
    if kill != signal.SIGKILL:
        assert list(outputs.iterdir()) == []
        assert problems == "stopped; nothing runs any more, and what was not finished is gone\n"


def test_what_a_kernel_says_beyond_its_cells_is_shown_if_it_dies(outputs, tmp_path, capfd):
    lives = save(tmp_path, "01_lives", PARAMETERS, SPEAKS)
    dies = save(tmp_path, "02_dies", PARAMETERS, SPEAKS, "os._exit(3)")
    assert books.run([lives, dies], "tiny", {}, jobs=1) == 1
    said, problems = capfd.readouterr()
    assert "DeadKernelError" in said and said.count("of no cell") == 1
    assert "of no cell" not in problems


def test_store_leaves_a_failing_notebook_as_it_is(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a", "1 / 0")
    before = Path(path).read_text()
    assert main(["store", path]) == 1
    assert Path(path).read_text() == before and "FAILED, left as it was" in capsys.readouterr().out


EXERCISES = """\
from course.kit import check
from course.kit.exercise import Exercise, register
for name in ("twice", "thrice"):
    factor = {"twice": 2, "thrice": 3}[name]
    register(Exercise(name, lambda x, f=factor: f * x, [(lambda g: (5,), "five")], []))"""


def test_solved_puts_the_folded_solutions_in_place(outputs, tmp_path, capsys):
    path = save(tmp_path, "01_a", EXERCISES, *exercise_cells("twice"), *exercise_cells("thrice"),
                "assert twice(5) == 10 and thrice(5) == 15")
    before = Path(path).read_text()
    assert main(["solved", path]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 solutions pass" in said and "✗ thrice: case 1 of 1 (five): wrong value" in said
    assert Path(path).read_text() == before
