"""What runs in the process of a submission: an exercise of it, and what that needs.

It yields what the student's function returns in the exercise's cases. Whether that is right is
for the process of the teacher to say (grade.py): this one holds no reference.
"""
import ast
import contextlib
import copy
import functools
import gc
import json
import linecache
import math
import os
import re
import site
import symtable
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from IPython.core.inputtransformer2 import TransformerManager

from qlora_lib.base.paths import ROOT
from ..kit import exercise as checks
from .confined import confine, linux
from .normal_form import CHECK
from .plain_values import WORDS, dumps

MEMORY = 4 * 2**30  # bytes that one process may have beside what is loaded
BYTES = 16 * 2**20  # of a file that it writes
ANSWERS = "answers"  # the file, in the folder of the process
FILE = 3             # its number there: the first behind stdin, stdout and stderr


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


class _Shell:
    """What get_ipython() gives: magics do nothing."""

    def __getattr__(self, name: str):
        return lambda *arguments, **named: None


@functools.cache
def without_references() -> dict[str, checks.Exercise]:
    """The exercises with their cases' arguments made, and with no reference and no mistakes.

    From then on this process has neither, nor what they are made of: of the modules that register
    exercises the public names stay, for the notebooks that import some.
    """
    exercises = checks.registered()
    modules = [sys.modules[name] for name in checks.exercise_modules()]
    references = {id(exercise.reference) for exercise in exercises.values()}
    for name, exercise in exercises.items():
        made = [(checks.example(name, case), label)
                for case, (_, label) in enumerate(exercise.cases, 1)]
        exercises[name] = replace(
            exercise, reference=_is_elsewhere, mistakes=(),
            cases=[(lambda g, given=given: copy.deepcopy(given), label) for given, label in made])
    for module in modules:
        for name, value in list(vars(module).items()):
            if name.startswith("_") and not name.startswith("__") or id(value) in references:
                delattr(module, name)
    gc.collect()  # classes, which hold themselves
    return exercises


def _is_elsewhere(*arguments):
    raise NotImplementedError("the reference is not in the process of a submission")


def answers(sources: list[str], exercise: checks.Exercise) -> str:
    """As JSON what a notebook's function does in the exercise's cases, or why there is none.

    sources: the notebook's code cells. The function is the one that the last call of
    `check(name, ...)` got. An exercise before, which this one may use, is the student's own too.
    """
    name, mine = exercise.name, []
    last = max(i for i, source in enumerate(sources) if name in CHECK.findall(source))

    def collect(asked, function=None):
        if asked == name:
            mine.append(function)
        return function

    try:
        source = ast.unparse(needed(sources[:last + 1]))
        # Where inspect finds it: Triton reads a kernel's source.
        linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
        exec(compile(source, name, "exec"),
             {"check": collect, "__name__": "__main__", "get_ipython": _Shell,
              "display": lambda *shown, **named: None})
        return dumps(checks.run(exercise, mine[-1]))
    except BaseException as error:  # sys.exit of a student's code included
        return json.dumps(f"{type(error).__name__}: {error}"[:WORDS])


def work(sources: list[str], name: str, folder: str, seconds: float) -> None:
    """Write `answers` to the file ANSWERS in `folder`, under all limits, and end the process."""
    exercise = without_references()[name]
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder)
    tempfile.tempdir = None
    _alone(os.open(ANSWERS, os.O_WRONLY))
    if os.name == "posix":
        _limit(seconds)
    confine(Path(folder), _readable())
    with open(FILE, "w", encoding="utf-8") as out:
        out.write(answers(sources, exercise))
    os._exit(0)


def _alone(file: int) -> None:
    """Leave the terminal, the session and every open file of the teacher's but `file`."""
    if hasattr(os, "setsid"):
        os.setsid()  # with whatever it starts, it can be killed as a group
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.dup2(file, FILE)
    os.closerange(FILE + 1, 2**16)


def _limit(seconds: float) -> None:
    import resource  # POSIX has it

    wanted = {"CPU": math.ceil(seconds) + 1, "FSIZE": BYTES, "NPROC": 0, "CORE": 0}
    if linux():  # as many addresses beside those that it has, most of them of libraries
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        wanted["AS"] = pages * resource.getpagesize() + MEMORY
    for name, limit in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(number, (limit, limit))


def _readable() -> list[Path]:
    """What Python needs, the library, and the course without its solutions."""
    course = Path(__file__).parents[1]
    own = [path for path in course.rglob("*.py") if path.name != "exercises.py"]
    system = [sys.prefix, sys.base_prefix, site.getusersitepackages(), "/usr", "/lib", "/lib64",
              "/proc", "/sys", "/dev/urandom", "/dev/zero", "/etc/ld.so.cache", "/etc/localtime",
              "/etc/passwd"]
    return [ROOT / "qlora_lib", *own, *map(Path, system)]
