"""Check a folder of submissions: python -m course.tools grade FOLDER

FOLDER holds a notebook, or a folder of notebooks, for each student. Of a notebook only the cells
with an exercise are run, and before them what they need: imports, functions, values. The checks
are those that answer in the notebook.

Each notebook is run in a process of its own, in an empty folder, for a limited time and in limited
memory, so that what never ends or dies is one row of the table. That is no sandbox: a submission
can read and write what you can. Grade strangers' work in a container.
"""
import argparse
import ast
import contextlib
import io
import json
import linecache
import multiprocessing
import os
import re
import signal
import symtable
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

from IPython.core.inputtransformer2 import TransformerManager

from ..kit import exercise as checks
from .normal_form import CHECK, notebooks, read
from .normal_form import exercises as exercises_of

SECONDS = 60          # for one notebook: loading takes a few, its exercises less than one
MEMORY = 4 * 2**30    # bytes of data of one process
PASSED, UNSOLVED, WRONG, FAILED, MISSING = "passed", "not solved", "wrong", "failed", "missing"


@dataclass(frozen=True)
class Row:
    """What became of one exercise; `says` is empty, or why it has not passed."""

    student: str
    notebook: str
    exercise: str
    verdict: str
    says: str = ""


# --- in the process of the submission -----------------------------------------------------

def _names(statement: ast.stmt) -> tuple[set[str], set[str]]:
    """Names that a statement of a module binds there, and names that it looks up there."""
    table = symtable.symtable(ast.unparse(statement), "cell", "exec")
    bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    bound |= _changed(statement)
    if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
        bound.add("*")
    used, tables = {s.get_name() for s in table.get_symbols() if s.is_referenced()}, [table]
    while tables:
        inner = tables.pop().get_children()
        used |= {s.get_name() for t in inner for s in t.get_symbols() if s.is_global()}
        tables += inner
    return bound, used


def _changed(statement: ast.stmt) -> set[str]:
    """Names whose items or attributes a statement sets: `cache["one"] = 1`, `ns.one = 1`."""
    found, nodes = set(), [statement]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue  # done when it is called
        nodes += ast.iter_child_nodes(node)
        if isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            while isinstance(node, (ast.Subscript, ast.Attribute)):
                node = node.value
            found |= {node.id} if isinstance(node, ast.Name) else set()
    return found


def _python(source: str) -> str:
    """The Python that IPython makes of a cell: magics become calls of get_ipython(). Of a cell
    magic that runs its cell as it stands, what stands below it."""
    first, _, below = source.partition("\n")
    if re.match(r"%%(time|capture|prun)\b", first):
        source = below
    return TransformerManager().transform_cell(source)


class _Shell:
    """What get_ipython() gives: magics do nothing."""

    def __getattr__(self, name: str):
        return lambda *arguments, **named: None


def needed(sources: list[str]) -> ast.Module:
    """The last source, and before it the statements of the others that it needs.

    A statement is needed if it binds a name that the last source, or a needed statement, looks up,
    or if it sets an item or an attribute of one. Of an import only the needed names stay, and of
    `import *` all. `check` is left to the caller. A source that is not Python (a cell that the
    student broke) is left out, unless it is the last.
    """
    statements = []
    for source in sources[:-1]:
        with contextlib.suppress(SyntaxError):
            statements += ast.parse(_python(source)).body
    last = ast.parse(_python(sources[-1])).body
    names = [_names(s) for s in statements]
    wanted = set().union({"*"}, *(_names(s)[1] for s in last)) - {"check"}
    kept: set[int] = set()
    while new := {i for i, (bound, _) in enumerate(names) if i not in kept and bound & wanted}:
        kept |= new
        wanted |= set().union(*(names[i][1] for i in new)) - {"check"}
    body = [statements[i] for i in sorted(kept)] + last
    for statement in body[:len(kept)]:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            statement.names = [a for a in statement.names
                               if (a.asname or a.name.partition(".")[0]) in wanted]
    return ast.Module(body, type_ignores=[])


def verdict(sources: list[str], name: str) -> tuple[str, str]:
    """(verdict, why) of one exercise of a notebook whose code cells are `sources`."""
    last = max(i for i, source in enumerate(sources) if name in CHECK.findall(source))
    mine, said = [], io.StringIO()

    def collect(asked, function=None):
        if asked != name:   # an exercise before, whose result this one uses
            return checks.check(asked, function)
        mine.append(function)
        return function

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            source = ast.unparse(needed(sources[:last + 1]))
            # Where inspect finds it: on a GPU Triton compiles a kernel from its source.
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
            exec(compile(source, name, "exec"),
                 {"check": collect, "__name__": "__main__", "get_ipython": _Shell,
                  "display": lambda *shown, **named: None})
            with contextlib.redirect_stdout(said):
                passed = checks.check(name, mine[-1]) is mine[-1]
        except BaseException as error:  # sys.exit and Ctrl-C of a student's code included
            return FAILED, f"{type(error).__name__}: {error}"
    said = said.getvalue()
    if passed:
        return PASSED, ""
    if f"… {name}: not solved yet" in said:
        return UNSOLVED, ""
    problem = re.search(rf"^✗ {name}: (.*?); going on with the reference", said, re.M | re.S)
    diagnosis = re.search(r"^    (?:diagnosis|perhaps): (.*)", said, re.M)
    return WRONG, (diagnosis or problem)[1]


def _run(path: Path, names: list[str], out: Path) -> None:
    """Append a line of JSON to `out` for each exercise of the notebook."""
    import torch

    if hasattr(os, "setsid"):  # with whatever it starts, it can be killed as a group
        os.setsid()
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    os.chdir(out.parent)
    sources = code_cells(path)
    for name in names:
        line = json.dumps([name, *verdict(sources, name)])
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


# --- in the process of the teacher --------------------------------------------------------

def code_cells(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def _context():
    """Processes forked from a server that has loaded everything: a submission then costs little."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    own = f"{__package__}.grade"  # also when run as __main__
    context.set_forkserver_preload([own, *checks.exercise_modules()])
    return context


def grade_notebook(path: Path, names: list[str], seconds: float) -> dict[str, tuple[str, str]]:
    """(verdict, why) of each named exercise. One that stops the process is failed; the others
    are then run in another process."""
    results: dict[str, tuple[str, str]] = {}
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "verdicts.jsonl"
            process = _context().Process(target=_run, args=(path.resolve(), left, out))
            process.start()
            process.join(seconds)
            endless = process.is_alive()
            with contextlib.suppress(AttributeError, ProcessLookupError):  # killpg is POSIX
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        for line in lines:
            name, *result = json.loads(line)
            results[name] = tuple(result)
        left = [name for name in left if name not in results]
        if left:
            results[left.pop(0)] = FAILED, (f"no end after {seconds:g} s" if endless else
                                            f"its process died, exit code {process.exitcode}")
    return {name: results[name] for name in names}


def grade(folder: Path, course: list[list[str]], seconds: float = SECONDS) -> list[Row]:
    """The rows of all submissions in `folder`.

    course: the names of each notebook's exercises. A submission is measured by all exercises of
        the notebooks of which it has one.
    Raises FileNotFoundError where there is no folder, or nothing in it.
    """
    if not folder.is_dir() or not (entries := _visible(folder, "*")):
        raise FileNotFoundError(f"no submissions in {folder}; expected a folder with a notebook, "
                                "or a folder of notebooks, for each student")
    rows = []
    for entry in entries:
        paths = _visible(entry, "**/*.ipynb") if entry.is_dir() else [entry]
        if not paths:
            rows.append(Row(entry.name, "-", "-", FAILED, "no notebook in this folder"))
        for path in paths:
            rows += _rows(entry.stem if entry.is_file() else entry.name, path, course, seconds)
    return rows


def _visible(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern, without .ipynb_checkpoints and the like."""
    return sorted(path for path in folder.glob(pattern)
                  if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _rows(student: str, path: Path, course: list[list[str]], seconds: float) -> list[Row]:
    try:
        there = {name for source in code_cells(path) for name in CHECK.findall(source)}
    except Exception as error:  # whatever is wrong with the file, the next one is read
        return [Row(student, path.stem, "-", FAILED,
                    f"no notebook that can be read: {type(error).__name__}: {error}")]
    asked = [name for names in course if there & set(names) for name in names]
    if not asked:
        return [Row(student, path.stem, "-", FAILED, "no exercise of the course in it")]
    results = grade_notebook(path, [name for name in asked if name in there], seconds)
    return [Row(student, path.stem, name, *results.get(name, (MISSING, ""))) for name in asked]


def table(rows: list[Row], width: int = 60) -> str:
    """The rows in columns, then how many exercises each student has solved."""
    lines = [("student", "notebook", "exercise", "verdict")]
    lines += [(r.student, r.notebook, r.exercise, f"{r.verdict}: {shorten(r.says, width)}"
               if r.says else r.verdict) for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    text = ["  ".join([*(f"{cell:<{w}}" for cell, w in zip(line, widths)), line[3]])
            for line in lines]
    for student in dict.fromkeys(r.student for r in rows):
        own = [r.verdict for r in rows if r.student == student]
        text.append(f"{student}: {own.count(PASSED)} of {len(own)} passed")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools grade",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a notebook or a folder for each student")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one notebook")
    given = parser.parse_args(arguments)
    try:
        course = [[name for _, name, _ in exercises_of(read(path))] for path in notebooks()]
        print(table(grade(given.folder, course, given.seconds)))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
