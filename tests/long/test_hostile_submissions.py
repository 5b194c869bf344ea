"""A class with every hostile submission that we could think of: each fails alone.

All of them are graded in one run, between two honest students and in a terminal of its own.
Where the system can't hold something back (grade.LEFT_HERE), what needs it is left out.
"""

import hashlib
import os
import pty
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course.tools.confined import SIGNALS, landlock, seccomp
from course.tools.grade import LARGEST, grade_exercise
from course.tools.normal_form import dumps, exercises, notebooks, read, solve
from qlora_lib.base.paths import ROOT

pytestmark = [pytest.mark.long,
              pytest.mark.skipif(os.name != "posix", reason="needs a terminal and signals")]
FILES, CALLS = bool(landlock()), seccomp()
COUNT = len(exercises(read(notebooks(["01"])[0])))  # of the notebook that is handed in
MARK = "COURSE_TEST_OF_HOSTILE_SUBMISSIONS"
RIGHT = """
def mine(a, b):
    return torch.bucketize(a, (b[1:] + b[:-1]) / 2)
"""
IN_CALL = """
def mine(a, b):
    {}
"""
ANSWER = '[["Tensor", "int64", [8], "AAAA"], null, false, null]'

# (what the exercise's cell holds before its check, what it takes to hold it back). PLACE stands
# for the folder of the submissions, TERMINAL for the teacher's, TEACHER for his process.
ATTACKS = {
    # ends before a verdict, or passes one on itself
    "ends with 0": ("os._exit(0)", True),
    "ends with 0 when called": (IN_CALL.format("os._exit(0)"), True),
    "writes the old verdict": (
        'open("verdicts.jsonl", "w").write(\'["nearest_code", "passed", ""]\'); os._exit(0)', True),
    "writes a verdict as answers": (
        'open("answers", "w").write(\'["passed", ""]\'); os._exit(0)', True),
    "writes to every open file": (
        "for fd in range(3, 200):\n"
        "    with suppress(OSError): os.write(fd, b'[[null, null, false, null]]')\n"
        "os._exit(0)", True),
    "bytes for answers": (r"os.write(3, b'\xff\xfe\x00'); os._exit(0)", True),
    "bytes for verdicts": (
        r"open('verdicts.jsonl', 'wb').write(b'\xff\xfe'); os._exit(0)", True),
    "too few answers": (f"os.write(3, b'[{ANSWER}]'); os._exit(0)", True),
    "answers of another shape": ("os.write(3, b'[[1, 2], {}, 5]'); os._exit(0)", True),
    "a huge shape": (
        "os.write(3, b'[[[\"Tensor\", \"int64\", [1e99], \"\"], null, false, null]]'); "
        "os._exit(0)", True),
    "deep answers": ("os.write(3, b'[' * 5_000_000); os._exit(0)", True),
    "a link for answers": (
        "for name in ('answers', 'verdicts.jsonl'):\n"
        "    with suppress(OSError): os.unlink(name)\n"
        "    os.symlink('/etc/passwd', name)\nos._exit(0)", True),
    "a pipe for answers": (
        "for name in ('answers', 'verdicts.jsonl'):\n"
        "    with suppress(OSError): os.unlink(name)\n"
        "    os.mkfifo(name)\nos._exit(0)", True),
    "another program": ("os.execv('/bin/true', ['true'])", True),
    # makes the check say yes
    "replaces the check": (
        "from course.kit import exercise\n"
        "exercise.check = lambda name, mine: mine\n"
        "exercise._mismatch = exercise._problem = lambda *_: ''\n"
        "exercise.judge = lambda *_: True\ndef mine(a, b):\n    return a", True),
    "replaces what runs it": (
        "from course.kit import exercise\n"
        "exercise._run = lambda *_: exercise.Result(True)\nmine = len", True),
    "is equal to everything": (
        "class Yes:\n    __eq__ = __bool__ = lambda *_: True\n    __hash__ = object.__hash__\n"
        + IN_CALL.format("return Yes()"), True),
    "calls the registered reference": (
        "from course.kit.exercise import registered\n"
        "mine = registered()['nearest_code'].reference", True),
    "imports the reference": ("from course.nb01.exercises import nearest_code as mine", True),
    "makes a mistake's reference": (
        "from course.nb01 import exercises\nmine = exercises._interleave.__globals__"
        "['nearest_code']", True),
    "looks for the reference in memory": (
        "import gc\nmine = next(f for f in gc.get_objects() if type(f) is type(suppress.__init__) "
        "and f.__qualname__ == 'nearest_code')", True),
    "reads the reference": (
        "from course.nb01 import exercises\n"
        "code = open(exercises.__file__).read().replace('..kit', 'course.kit')\n"
        "code = code.replace('register(Exercise', '(Exercise')\n"
        "space = {}\nexec(code, space)\nmine = space['nearest_code']", FILES),
    "asks for the check's result": (
        "mine = check('nearest_code', lambda a, b: None)", True),
    # takes what there is of time, memory, disk, processes
    "never ends": ("while True: pass", True),
    "sleeps through signals": (
        "import signal\nfor s in range(1, 32):\n"
        "    with suppress(OSError, ValueError): signal.signal(s, signal.SIG_IGN)\n"
        "threading.Event().wait()", True),
    "memory": (IN_CALL.format("return bytearray(8 << 30)"), True),
    "shared memory": ("import mmap\nmmap.mmap(-1, 8 << 30)\n" + RIGHT, CALLS),
    "a file without end": (
        "with open('big', 'wb') as f:\n    for _ in range(100): f.write(bytes(1 << 20))\n" + RIGHT,
        True),
    "an answer without end": (IN_CALL.format("return torch.zeros(1 << 24)"), True),
    "a list that holds itself": (
        IN_CALL.format("me = []; me.append(me); return me"), True),
    "processes": (
        "for _ in range(50):\n    if not os.fork():\n        os.setsid()\n        "
        "threading.Event().wait()\n" + RIGHT, CALLS),
    "threads": ("threading.Thread(target=threading.Event().wait).start()\n" + RIGHT, CALLS),
    "a program left behind": (
        "import subprocess\nsubprocess.Popen(['sleep', '600'], start_new_session=True)\n" + RIGHT,
        CALLS),
    "a folder that stays": (
        "os.mkdir('a')\nopen('a/b', 'w').close()\nos.chmod('a', 0)\nos.chmod('.', 0)\n" + RIGHT,
        CALLS),
    "deep folders": (
        "for _ in range(1500):\n    os.mkdir('a'); os.chdir('a')\nos._exit(0)", True),
    "code too deep": ("x = " + "(" * 50_000, True),
    # reaches for others
    "others' files": (
        "for name in os.listdir('PLACE'):\n    open(f'PLACE/{name}', 'w').write('{}')\n" + RIGHT,
        FILES),
    "others' files removed": (
        "import shutil\nshutil.rmtree('PLACE')\n" + RIGHT, FILES),
    "others' files cut": ("os.truncate('PLACE/zoe.ipynb', 0)\n" + RIGHT, landlock() >= 3),
    "others' files hidden": ("os.chmod('PLACE/zoe.ipynb', 0)\n" + RIGHT, CALLS),
    "another's solution": (
        "import json\ncells = json.load(open('PLACE/ann.ipynb'))['cells']\n"
        "space = {'torch': torch}\n"
        "exec(''.join(cells[1]['source']).split('nearest_code =')[0], space)\n"
        "mine = space['mine']", FILES),
    "the course": (
        f"open({str(ROOT / 'notebooks/course/kit/hostile.py')!r}, 'w').close()\n" + RIGHT, FILES),
    "the server": ("os.kill(os.getppid(), 9)\n" + RIGHT, True),
    "the teacher": ("os.kill(TEACHER, 9)\n" + RIGHT, landlock() >= SIGNALS),
    "the teacher's limits": (
        "import resource\nresource.prlimit(TEACHER, resource.RLIMIT_CPU, (0, 0))\n" + RIGHT,
        CALLS),
    "the teacher's memory": ("open('/proc/TEACHER/mem', 'r+b')\n" + RIGHT, FILES),
    "a socket": ("import socket\nsocket.socket(socket.AF_UNIX)\n" + RIGHT, CALLS),
    # writes to the terminal
    "prints": (
        "print('\\x1b[2J' * 9)\nos.write(1, b'\\x1b[2J')\nos.write(2, b'\\x1b[2J')\nos._exit(0)",
        True),
    "raises an escape sequence": ("raise ValueError('\\x1b[2J\\nann: 0 of 1 passed')", True),
    "returns an escape sequence": (IN_CALL.format("return '\\x1b[2J\\nann: 0 of 1 passed'"), True),
    "the terminal": (
        "for path in ('/dev/tty', 'TERMINAL', '/proc/TEACHER/fd/1'):\n"
        "    with suppress(OSError): open(path, 'w').write('\\x1b[2J')\n"
        "os._exit(0)", FILES),
}  # fmt: skip
HELD = {name: source for name, (source, held) in ATTACKS.items() if held}

# Notebooks and names. What of a name must be in the table, spelt out.
NAMES = {
    "a\nann: 0 of 1 passed.ipynb": "a\\nann: 0 of 1 passed",
    "b\x1b[2J\x9b2J.ipynb": "b\\x1b[2J\\x9b2J",
    os.fsdecode(b"c\xff.ipynb"): "c\\udcff",
    "d\u202eyna.ipynb": "d\\u202eyna",
    "e\\x1b.ipynb": "e\\\\x1b",
}


def notebook(cell: str) -> str:
    cells = ["import os, threading\nimport torch\nfrom contextlib import suppress",
             f"{cell}\nnearest_code = check('nearest_code', mine)"]  # fmt: skip
    return dumps(new_notebook(cells=[new_code_cell(source) for source in cells]))


def odd_files(place) -> dict[str, str]:
    """Make submissions that are no notebooks; name -> what the table says of it."""
    place = place.absolute()
    os.mkfifo(place / "pipe.ipynb")
    os.symlink(place / "ann.ipynb", place / "link.ipynb")
    os.symlink(place, place / "linked folder")
    (place / "a link inside").mkdir()
    os.symlink(place / "ann.ipynb", place / "a link inside" / "mine.ipynb")
    (place / "a folder.ipynb" / "x.ipynb").mkdir(parents=True)
    (place / "many").mkdir()
    for i in range(50):
        (place / "many" / f"{i}.ipynb").touch()
    (place / "bad bytes.ipynb").write_bytes(b'{"cells": [\xff\xfe]}')
    (place / "deep.ipynb").write_text("[" * 1_000_000)
    (place / "big.ipynb").write_bytes(b" " * (LARGEST + 1))
    (place / "a number.ipynb").write_text("5")
    (place / "cells.ipynb").write_text('{"cells": [{"cell_type": "code", "source": 5}]}')
    return {"pipe": "no plain file", "link": "a link", "linked folder": "a link",
            "a link inside": "OSError", "a folder": "IsADirectoryError", "many": "50 notebooks",
            "bad bytes": "UnicodeDecodeError", "deep": "RecursionError", "big": "16 MiB",
            "a number": "TypeError", "cells": "TypeError"}  # fmt: skip


def state(folder) -> dict:
    """Of each file its mode and what it holds."""
    return {path: (path.lstat().st_mode, path.is_file() and not path.is_symlink()
                   and hashlib.sha256(path.read_bytes()).hexdigest())
            for path in sorted(folder.rglob("*"))}  # fmt: skip


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """(what the terminal got, what the files were and are, what odd files must say, processes and
    temporary files that are left, the exit code) of one run over the whole class."""
    place, temporary = tmp_path_factory.mktemp("class"), tmp_path_factory.mktemp("t")
    teachers_end, terminal = pty.openpty()
    os.set_blocking(teachers_end, True)
    for name in ("ann", "zoe"):
        (place / f"{name}.ipynb").write_text(notebook(RIGHT))
    code = (f"import os, sys; from pathlib import Path\n"
            f"for path in Path({str(place)!r}).glob('*.ipynb'):\n"
            "    if path.is_file() and not path.is_symlink() and path.stat().st_size < 9**6:\n"
            "        text = path.read_bytes().replace(b'TEACHER', str(os.getpid()).encode())\n"
            "        path.write_bytes(text)\n"
            f"os.mkdir({str(temporary / 'ready')!r}); input()\n"
            "from course.tools import grade\n"
            f"sys.exit(grade.main([{str(place)!r}, '--seconds', '10']))")  # fmt: skip
    for name, source in HELD.items():
        source = source.replace("PLACE", str(place)).replace("TERMINAL", os.ttyname(terminal))
        (place / f"{name}.ipynb").write_text(notebook(source))
    for name in NAMES:
        (place / name).write_text(notebook(IN_CALL.format("return a")))
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=terminal,
                           stderr=terminal, env=environment(temporary), start_new_session=True)
    os.close(terminal)
    said = bytearray()
    reader = threading.Thread(target=_read_all, args=(teachers_end, said))
    reader.start()
    while not (temporary / "ready").exists() and run.poll() is None:
        threading.Event().wait(0.05)
    (temporary / "ready").rmdir()
    odd = odd_files(place)
    before = state(place)
    run.communicate(b"\n", timeout=900)
    reader.join(30)
    return bytes(said), (before, state(place)), odd, left_of(temporary), run.returncode


def environment(temporary) -> dict[str, str]:
    """Temporary files go to a folder of their own, but that of torch's compiler, which stays."""
    return os.environ | {MARK: "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary),
                         "TORCHINDUCTOR_CACHE_DIR": str(temporary.with_name("torch")),
                         "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'notebooks'}"}  # fmt: skip


def left_of(temporary) -> list:
    """Processes and temporary files of a run that has ended."""
    left = [p for p in psutil.process_iter() if _marked(p)]
    left = psutil.wait_procs(left, timeout=30)[1]  # the server ends when it sees that we have
    # One that has ended stays in the table until its parent, or init, has asked how it went.
    return [p for p in left if _runs(p)] + list(temporary.iterdir())


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _read_all(file: int, into: bytearray) -> None:
    try:
        while part := os.read(file, 1 << 16):
            into += part
    except OSError:  # the other side is closed
        pass


def _marked(process: psutil.Process) -> bool:
    try:
        return MARK in process.environ()
    except (psutil.Error, OSError):
        return False


def lines(graded) -> list[str]:
    return graded[0].decode().replace("\r\n", "\n").splitlines()


def test_the_class_is_graded_and_the_honest_pass(graded):
    said = lines(graded)
    assert graded[4] == 0, said
    for name in ("ann", "zoe"):
        assert sum(line.startswith(f"{name}: ") for line in said) == 1
        assert f"{name}: 1 of {COUNT} passed" in said
        assert any(line.split()[:4] == [name, name, "nearest_code", "passed"] for line in said)


@pytest.mark.parametrize("name", HELD)
def test_an_attack_does_not_pass(graded, name):
    said = [line for line in lines(graded) if line.startswith(f"{name}  ")]
    assert f"{name}: 0 of {COUNT} passed" in lines(graded), said


def test_odd_files_fail_and_names_are_spelt_out(graded):
    said = lines(graded)
    for name, why in graded[2].items():
        assert any(line.startswith(f"{name}  ") and "failed: " in line and why in line
                   for line in said), name  # fmt: skip
    for shown in NAMES.values():
        assert f"{shown}: 0 of {COUNT} passed" in said


def test_nothing_reaches_the_terminal(graded):
    assert b"\x1b" not in graded[0] and b"\x9b" not in graded[0].decode().encode("latin-1",
                                                                                "ignore")
    assert lines(graded)[-1].startswith("What a submission can still do here: copying a solution; ")


def test_no_file_is_changed_and_no_process_is_left(graded):
    before, after = graded[1]
    assert before == after
    assert not (ROOT / "notebooks/course/kit/hostile.py").exists()
    assert graded[3] == []


@pytest.mark.parametrize("kill, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_is_one_line_and_ends_what_runs(tmp_path, kill, code):
    place, temporary = tmp_path / "class", tmp_path / "t"
    place.mkdir()
    temporary.mkdir()
    began = "open('began', 'w').close()\nthreading.Event().wait()"
    (place / "eve.ipynb").write_text(notebook(began))
    run = subprocess.Popen([sys.executable, "-m", "course.tools", "grade", place], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                           env=environment(temporary), preexec_fn=_hear_ctrl_c)  # fmt: skip
    while not list(temporary.glob("submission-*/began")) and run.poll() is None:
        threading.Event().wait(0.05)
    os.killpg(run.pid, kill)
    assert run.communicate(timeout=60) == (
        "", "stopped; nothing runs any more, and what was not finished is gone\n")
    assert run.returncode == code and left_of(temporary) == []


def _hear_ctrl_c():
    """What a shell starts in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_every_solution_of_the_course_passes_under_all_limits(path):
    book = read(path)
    found = exercises(book)
    for index, _, solution in found:
        book.cells[index].source = solve(book.cells[index].source, solution)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert {name: grade_exercise(cells, name) for _, name, _ in found} == {
        name: ("passed", "") for _, name, _ in found}
