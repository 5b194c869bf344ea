"""Mutation testing: what of a file could be changed without a test of its own that notices?
`python -m tests.support.mutants qlora_lib/quant [more files or folders] [--sample 100] [--seed 0]`

A mutant is the file with one small change: an operator, a constant, a keyword, a statement or a
call left out, a piece of a regular expression. It survives where the tests of the file (of its
folder, where it has none) pass, without those marked `long`. Texts of errors, docstrings and
annotations stay as they are; a mutant that cannot be imported does not count. Each one runs in a
fork of a process that has imported torch and the like already, with a limit on its time, so
this needs a system with fork. Ctrl-C ends it with the counts so far.
"""

import argparse
import ast
import copy
import gc
import importlib
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).resolve().parents[2]
OWN = "qlora_lib", "tests", "experiments", "course"  # what each fork imports for itself
KILLED, SURVIVED, NO_MUTANT = 1, 0, 77  # exit codes of a fork; others, and signals: killed
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
TURNED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}
TWINS = "amin amax", "minimum maximum", "min max", "any all", "start end"
TWIN = {a: b for pair in TWINS for a, b in (pair.split(), pair.split()[::-1])}
# A piece of a regular expression, and what may stand in its place; the first that fits.
PIECES = [
    (r"\\[bB]|\(\?:\)", [""]), (r"\\[sdwSDW]", [str.swapcase]), (r"\\.", []),
    (r"\(\?<?[=!]", [lambda s: s[:-1] + ("=" if s[-1] == "!" else "!")]),
    (r"\(\?[a-z]:", ["(?:"]), (r"\(\?P<\w+>|\(\?\(?", []), (r"\[\^", ["["]), (r"[$^]", [""]),
    (r"\{\d+,?\d*\}", [""]), (r"[*+?]\+?", [lambda s: {"*": "+", "+": "*", "?": ""}[s[0]] + s[1:]]),
]  # fmt: skip
PIECE = re.compile("|".join(f"({piece})" for piece, _ in PIECES))


def changed_patterns(text: str) -> Iterator[str]:
    """The regular expression with one piece changed, or without one of its alternatives."""
    for found in PIECE.finditer(text):
        for new in PIECES[found.lastindex - 1][1]:
            piece = new if isinstance(new, str) else new(found[0])
            yield text[: found.start()] + piece + text[found.end() :]
    for bar in re.finditer(r"\|[^|()\[\]{}\\]+(?=[|)])|(?<=[(|])[^|()\[\]{}\\?]+\|", text):
        yield text[: bar.start()] + text[bar.end() :]


def constants(value: object, patterns: bool) -> Iterator[object]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield from (value * 1.5 + 0.1, value / 2)
    elif isinstance(value, str) and value:
        yield from (value + "x", value[:-1]) if len(value) > 1 else ("x",)
        if patterns:
            yield from changed_patterns(value)


def changes(node: ast.AST, patterns: bool, modules: set[str]) -> Iterator[ast.AST]:
    """The nodes that may stand in the place of one."""

    def like(**fields) -> ast.AST:
        new = copy.copy(node)
        vars(new).update(fields)
        return new

    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OPERATORS:
        yield like(op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.Compare):
        for table in OPERATORS, TURNED:
            if type(node.ops[0]) in table:
                yield like(ops=[table[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield like(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant):
        yield from map(ast.Constant, constants(node.value, patterns))
    if isinstance(node, ast.Attribute) and node.attr in TWIN:
        yield like(attr=TWIN[node.attr])
    if isinstance(node, ast.Slice):
        yield from (like(**{end: None}) for end in ("lower", "upper") if getattr(node, end))
    if isinstance(node, ast.Call):
        if len(node.args) > 1 and not isinstance(node.args[0], (ast.Starred, ast.Constant)):
            yield like(args=[node.args[1], node.args[0], *node.args[2:]])
        for i in range(len(node.keywords)):
            yield like(keywords=node.keywords[:i] + node.keywords[i + 1 :])
        owner = getattr(node.func, "value", None)
        if owner and not (isinstance(owner, ast.Name) and owner.id in modules):
            yield owner  # x.clamp(...) becomes x
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))
    whole = ast.Expr, ast.AugAssign, ast.Raise, ast.Break, ast.Continue
    again = False  # whether what is assigned to has a value before
    if isinstance(node, ast.Assign):
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        target = node.targets[0]
        again = isinstance(target, (ast.Subscript, ast.Attribute)) or (
            isinstance(target, ast.Name) and target.id in read
        )
    if isinstance(node, whole) or again:
        yield ast.Pass()


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index in it, node) of all that is code: no docstring, annotation, text of an
    error."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns") or isinstance(tree, ast.Raise):
            continue
        for i, node in enumerate(value if isinstance(value, list) else [value]):
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.AST) and not text:
                yield tree, field, i if isinstance(value, list) else None, node
                yield from places(node)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, what was changed to what, the source) of each mutant of a source."""
    tree = ast.parse(source)
    patterns, seen = "import re\n" in source, {clean := ast.unparse(tree)}
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import)]
    modules = {alias.asname or alias.name for n in imports for alias in n.names}
    for parent, field, i, node in [*places(tree)]:
        for new in changes(node, patterns, modules):
            ast.fix_missing_locations(ast.copy_location(new, node))
            siblings = getattr(parent, field)
            if i is None:
                setattr(parent, field, new)
            else:
                siblings[i] = new
            changed = ast.unparse(tree)
            if changed not in seen:
                seen.add(changed)
                old, now = clean.splitlines(), changed.splitlines()
                at = next(k for k, (a, b) in enumerate(zip(old, now)) if a != b)
                yield getattr(node, "lineno", 0), difference(old[at], now[at]), changed
            if i is None:
                setattr(parent, field, siblings)
            else:
                siblings[i] = node


def difference(old: str, new: str) -> str:
    """Two lines, of long ones what differs and a little around it."""
    old, new = old.strip(), new.strip()
    start = max(0, len(os.path.commonprefix([old, new])) - 30)
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    end = max(0, end - 20)
    return f"{old[start : len(old) - end]}   ->   {new[start : len(new) - end]}"


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def tests_of(path: Path) -> Path:
    folder = Path("tests/unit", *path.parent.parts[1:])
    own = folder / f"test_{path.name}"
    return own if own.exists() else folder


def run_tests(path: Path, source: str | None) -> int:
    """In this process: the exit code for the tests of a file, whose source is another."""
    if source is not None:

        class Loader(SourceFileLoader):
            def get_code(self, fullname):
                return compile(source, str(ROOT / path), "exec")

        class Finder:
            @staticmethod
            def find_spec(name, *_):
                if name == module_of(path):
                    loader = Loader(name, str(ROOT / path))
                    return spec_from_file_location(name, ROOT / path, loader=loader)

        sys.meta_path.insert(0, Finder)
        try:
            importlib.import_module(module_of(path))
        except Exception:
            return NO_MUTANT
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", "not long"]
    return SURVIVED if pytest.main([*options, str(tests_of(path))]) == 0 else KILLED


def in_fork(path: Path, source: str | None, seconds: int) -> tuple[int, float]:
    """(exit code or signal, CPU seconds) of `run_tests` in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    if not (child := os.fork()):
        code = KILLED
        try:
            signal.alarm(30 * seconds)  # for what waits without an end
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            resource.setrlimit(resource.RLIMIT_DATA, (12 << 30, 12 << 30))
            with tempfile.TemporaryFile() as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                code = run_tests(path, source)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")  # a failure is enough: it need not be made small
    files = [f for p in given.paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]
    drawn = [(f, *m) for f in files for m in mutants(f.read_text(encoding="utf-8"))]
    total = Counter(f for f, *_ in drawn)
    random.Random(given.seed).shuffle(drawn)  # so what is counted when it is stopped is a sample
    drawn = drawn[: given.sample]
    # What others have written is imported once, here; what is ours, in each fork. Some of it
    # imports Triton, which has to be the interpreter by then, as conftest.py would make it.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for tests in {tests_of(f) for f in total}:
        for test in [tests] if tests.is_file() else sorted(tests.glob("test_*.py")):
            importlib.import_module(module_of(test))
    for name in [n for n in sys.modules if n.partition(".")[0] in OWN]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()  # pytest collects garbage several times: not among all that was imported
    limits = {}
    for f in {f for f, *_ in drawn}:
        code, seconds = in_fork(f, None, 600)
        if code:
            sys.exit(f"{tests_of(f)} does not pass as it is")
        limits[f] = int(3 * seconds) + 10
    counts, began = Counter(), time.process_time()
    try:
        for f, line, change, source in drawn:
            code, _ = in_fork(f, source, limits[f])
            counts[f, code if code in (SURVIVED, NO_MUTANT) else KILLED] += 1
            print(f"{counts.total()} of {len(drawn)}", end="\r", file=sys.stderr, flush=True)
            if code == SURVIVED:
                print(f"{f}:{line}  {change}", flush=True)
    except KeyboardInterrupt:
        pass
    survived = killed = 0
    for f in files:
        lived, died = counts[f, SURVIVED], counts[f, KILLED]
        survived, killed = survived + lived, killed + died
        if lived + died:
            print(f"{f}: {died} of {lived + died} killed ({total[f]} can be made)")
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime + time.process_time() - began
    share = killed / max(1, killed + survived)
    print(f"{killed} of {killed + survived} killed, {share:.1%}; {cpu:.0f} s of CPU time")


if __name__ == "__main__":
    main()
