"""Check a folder of submissions: python -m course.tools grade FOLDER

FOLDER holds a notebook, or a folder of notebooks, for each student. Of a notebook only the cells
with an exercise are run, and before them what they need: imports, functions, values.

All notebooks are read before the first is run. Each exercise is run in a process of its own, which
says what the student's function returns in the exercise's cases, as JSON; compared with the
reference it is here, so that nothing passes itself. That process has limits on time, memory, files
and processes, no terminal and no reference; see submission.py. On Linux it reads no file but the
installed Python's and the library's, writes none but in an empty folder, and starts nothing; see
confined.py. There a submission fails alone, whatever it does. LEFT says what stays possible, and
LEFT_HERE what does elsewhere.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from textwrap import shorten
from unittest import mock

from qlora_lib.base.paths import given_path
from qlora_lib.base.endings import ending
from qlora_lib.base.ranges import Range
from ..kit import exercise as checks
from .confined import SIGNALS, landlock, linux, seccomp
from .normal_form import CHECK, notebooks, read
from .normal_form import exercises as exercises_of
from .plain_values import loads
from .submission import ANSWERS, work

SECONDS = 60      # for one exercise: it takes less than one
LONGEST = 86_400  # seconds that can be asked for
NOTEBOOKS = 40    # of one student
LARGEST = 2**24   # bytes of a notebook
READ = 2**22      # bytes of the answers to one exercise: what `dumps` can make of ten cases
PASSED, UNSOLVED, WRONG, FAILED, MISSING = "passed", "not solved", "wrong", "failed", "missing"
LEFT = ("copying a solution; returning what a function of qlora_lib computes; using the processor "
        "until the time is up, and the disk that holds temporary files")
LEFT_HERE = {  # where the system does not hold it back
    "reading and changing all files that you can, the references too": lambda: not landlock(),
    "starting processes, reaching the network": lambda: not seccomp(),
    "stopping processes of yours": lambda: landlock() < SIGNALS,
    "taking all memory": lambda: not linux(),
}
# A submission's: one thread, so that it starts none, and no GPU, whose kernels nothing stops.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
               "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Row:
    """What became of one exercise; `says` is empty, or why it has not passed."""

    student: str
    notebook: str
    exercise: str
    verdict: str
    says: str = ""


# --- One exercise ------------------------------------------------------------------------

def judged(exercise: checks.Exercise, answers: str | bytes) -> tuple[str, str]:
    """(verdict, why) of an exercise whose function does what the answers say."""
    if not answers:
        return FAILED, "its process ended before it had answered"
    try:
        return _judged(exercise, answers)
    except Exception as error:  # they may be anything
        return FAILED, f"no answers that can be read: {type(error).__name__}: {error}"


def _judged(exercise: checks.Exercise, answers: str | bytes) -> tuple[str, str]:
    if isinstance(failure := json.loads(answers), str):
        return FAILED, failure
    results = loads(answers)
    if len(results) != len(exercise.cases):
        raise ValueError(f"{len(results)} answers to {len(exercise.cases)} cases")
    if results[0].unsolved:
        return UNSOLVED, ""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if checks.judge(exercise, results):
            return PASSED, ""
    problem = re.search(r"^✗ \w+: (.*?); going on with the reference", said.getvalue(), re.S)
    diagnosis = re.search(r"^    (?:diagnosis|perhaps): (.*)", said.getvalue(), re.M)
    return WRONG, (diagnosis or problem)[1]


def grade_exercise(sources: list[str], name: str, seconds: float = SECONDS) -> tuple[str, str]:
    """(verdict, why) of one exercise of a notebook whose code cells are `sources`."""
    folder = tempfile.mkdtemp(prefix="submission-")
    try:
        with open(Path(folder, ANSWERS), "w+b") as file:  # this very file, whatever takes its name
            process = _started(sources, name, folder, seconds)
            try:
                process.join(seconds)
                endless = process.is_alive()
            finally:
                with contextlib.suppress(AttributeError, ProcessLookupError):  # killpg is POSIX
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
            answers = file.read(READ)
    finally:
        _remove(folder)
    if endless:
        return FAILED, f"no end after {seconds:g} s"
    if process.exitcode:
        return FAILED, f"its process died, exit code {process.exitcode}"
    return judged(checks.registered()[name], answers)


def _remove(folder: str) -> None:
    with contextlib.suppress(OSError):  # folders so deep that Python gives up; Windows has no rm
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)


def _started(*arguments) -> multiprocessing.Process:
    """A process, forked if possible from a server that has loaded everything: then it costs little.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    with mock.patch.dict(os.environ, ENVIRONMENT, PYTHONPATH=os.pathsep.join(sys.path)):
        if context.get_start_method() == "forkserver":
            context.set_forkserver_preload([f"{__package__}.server"])
            forkserver.ensure_running()  # again, if a submission has ended it
        process = context.Process(target=work, args=arguments)
        process.start()
    return process


# --- All of them -------------------------------------------------------------------------

def code_cells(path: Path) -> list[str]:
    """The sources of a notebook's code cells; some exception for what is none, or no plain file."""
    with open(path, "rb", opener=_opened) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no plain file")
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError(f"over {LARGEST / 2**20:g} MiB")
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"]
            if cell["cell_type"] == "code"]


def _opened(path: str, flags: int) -> int:
    """Without following a link, and without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def grade(folder: Path, course: list[list[str]], seconds: float = SECONDS) -> list[Row]:
    """The rows of all submissions in `folder`.

    course: the names of each notebook's exercises. A submission is measured by all exercises of
        the notebooks of which it has one.
    Raises FileNotFoundError where there is no folder, or nothing in it.
    """
    if not folder.is_dir() or not (entries := _visible(folder, "*")):
        raise FileNotFoundError(f"no submissions in {folder}; expected a folder with a notebook, "
                                "or a folder of notebooks, for each student")
    stems = Counter(entry.stem for entry in entries)
    found = [(entry.stem if stems[entry.stem] == 1 else entry.name, *notebook)
             for entry in entries for notebook in _submitted(entry)]
    return [row for submission in found for row in _rows(*submission, course, seconds)]


def _visible(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern, without .ipynb_checkpoints and the like."""
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _submitted(entry: Path) -> list[tuple[str, list[str], str]]:
    """(name, code cells, what is wrong with it) of each notebook of a student."""
    try:
        if entry.is_symlink():
            raise ValueError("it is a link")
        paths = _visible(entry, "**/*.ipynb") if entry.is_dir() else [entry]
        if not paths:
            raise ValueError("no notebook in this folder")
        if len(paths) > NOTEBOOKS:
            raise ValueError(f"{len(paths)} notebooks in this folder, expected at most {NOTEBOOKS}")
    except Exception as error:  # whatever is wrong with it, the next one is read
        return [("-", [], str(error))]
    found = []
    for path in paths:
        try:
            found.append((path.stem, code_cells(path), ""))
        except Exception as error:
            found.append((path.stem, [],
                          f"no notebook that can be read: {type(error).__name__}: {error}"))
    return found


def _rows(student: str, notebook: str, sources: list[str], problem: str, course: list[list[str]],
          seconds: float) -> list[Row]:
    if problem:
        return [Row(student, notebook, "-", FAILED, problem)]
    there = {name for source in sources for name in CHECK.findall(source)}
    asked = [name for names in course if there & set(names) for name in names]
    if not asked:
        return [Row(student, notebook, "-", FAILED, "no exercise of the course in it")]
    return [Row(student, notebook, name, *(grade_exercise(sources, name, seconds)
                                           if name in there else (MISSING, ""))) for name in asked]


def shown(text: str) -> str:
    """The text in characters that only show: a line's end or an escape sequence is spelt out."""
    return "".join(c if c.isprintable() and c != "\\" else
                   c.encode("unicode_escape").decode("ascii") for c in text)


def table(rows: list[Row], width: int = 60) -> str:
    """The rows in columns, then how many exercises each student has solved."""
    lines = [("student", "notebook", "exercise", "verdict")]
    lines += [(shown(r.student), shown(r.notebook), r.exercise,
               f"{r.verdict}: {shown(shorten(r.says, width))}" if r.says else r.verdict)
              for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(line, widths)), line[3]])
            for line in lines]
    for student in dict.fromkeys(r.student for r in rows):
        own = [r.verdict for r in rows if r.student == student]
        text.append(f"{shown(student)}: {own.count(PASSED)} of {len(own)} passed")
    return "\n".join(text)


def left() -> str:
    """What a submission can still do on this machine."""
    return "; ".join([LEFT, *(text for text, holds in LEFT_HERE.items() if holds())])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools grade",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=given_path, help="a notebook or a folder for each student")
    parser.add_argument("--seconds", type=Range(0, LONGEST, above=True), default=SECONDS,
                        help="for one exercise")
    given = parser.parse_args(arguments)
    course = [[name for _, name, _ in exercises_of(read(path))] for path in notebooks()]
    text = table(grade(given.folder, course, given.seconds))
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    print(f"What a submission can still do here: {left()}.")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
