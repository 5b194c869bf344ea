"""Notebooks executed: strictly into outputs/, or stored, or with their exercises solved."""
import ast
import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from qlora_lib.base.paths import ROOT
from ..kit import BESIDE_VARIABLE, COMPARE_VARIABLE, GRID_VARIABLE
from ..kit.record import line, merge, metrics_folder, outputs_folder
from .copies import execute, fingerprint
from .normal_form import dumps, exercises, normal, notebooks, read, solve, write
from .side_by_side import how_many, longest_first, side_by_side

BUILD = ROOT / "build"
CELL_SECONDS = 900  # the bundled model; a cell that trains a real one may take
LONG_SECONDS = 48 * 3600
REAL = ["04", "05"]  # the notebooks that run a real model, when none are named
AFTER = {"05": "04"}  # where both run, 05 evaluates the adapter that 04 has just trained
IPYTHON_CONFIG = """\
c = get_config()
c.IPKernelApp.log_level = 40               # no chatter on stderr at each start
c.HistoryManager.hist_file = ":memory:"    # the user's history stays the user's
"""


def isolate_kernels() -> None:
    """Kernels started from here on run this very Python, without the user's IPython settings."""
    config = BUILD / "ipython" / "profile_default" / "ipython_kernel_config.py"
    spec = BUILD / "jupyter" / "kernels" / "python3" / "kernel.json"
    for path, text in ((config, IPYTHON_CONFIG), (spec, json.dumps({
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "Python 3 (ipykernel)", "language": "python"}))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text)
    os.environ["IPYTHONDIR"] = str(BUILD / "ipython")
    os.environ["JUPYTER_PATH"] = str(BUILD / "jupyter")  # searched before every other place
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ.pop("MPLBACKEND", None)


def parse_parameters(text: str) -> dict[str, Any]:
    """'bits=3 group_size=None name=x' -> {"bits": 3, "group_size": None, "name": "x"}."""
    parameters = {}
    if not text.replace("\n", " ").isprintable():
        raise ValueError(f"the parameters {text!r:.80} hold characters that can't be shown")
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"the parameters {text!r:.80} can't be read: {error}") from None
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"got the parameter {part!r:.80}; expected name=value, as in "
                             "\"bits=3\"")
        if name in parameters:
            raise ValueError(f"the parameter {name!r} is there twice")
        value = {"true": "True", "false": "False", "null": "None"}.get(value, value)
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            # A path is seen from here, notebooks run in theirs.
            parameters[name] = os.path.abspath(value) if os.path.exists(value) else value
    return parameters


def known_parameters(paths: list[Path], parameters: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Those of the parameters that each notebook has; ValueError for one that none has."""
    import papermill

    known = {path: papermill.inspect_notebook(str(path)) for path in paths}
    for name in parameters:
        if not any(name in names for names in known.values()):
            have = sorted(set().union(*known.values()))
            raise ValueError(f"no notebook has a parameter '{name}'; there are: {', '.join(have)}")
    for path, own in known.items():
        for name in own.keys() & parameters.keys():
            _check_kind(name, parameters[name], own[name]["default"], path.stem)
    return {path: {k: v for k, v in parameters.items() if k in known[path]} for path in paths}


def _check_kind(name: str, value: Any, default: str, stem: str) -> None:
    """Raise ValueError for a value of another kind than a notebook's default, as its source has
    it; None goes with all, and a whole number with a float."""
    try:
        usual = ast.literal_eval(default)
    except (ValueError, SyntaxError):  # it is computed
        return
    like = (int, float) if isinstance(usual, float) else type(usual)
    if not (usual is None or value is None or isinstance(value, like)) \
            or isinstance(value, bool) != isinstance(usual, bool) and None not in (usual, value) \
            or isinstance(value, (int, float)) and not abs(value) < 2**63:
        raise ValueError(f"the parameter {name}={value!r:.60} does not go with {stem}, where it is "
                         f"{usual!r:.60}")


def run(names: list[str], profile: str, parameters: dict[str, Any],
        timeout: int | None = None, jobs: int | None = None, grid: bool = False) -> int:
    """Run notebooks, report, and return 0 if all ran and no recorded number is too far off.

    names: with none, all of them on the tiny profile, REAL on the others.
    jobs: how many side by side, with one thread each. None: on the tiny profile as many as there
    are cores and memory for, else one. One alone takes the threads that it finds.
    grid: each SliderPlot draws its whole grid, as it does for nbval.
    """
    if "profile" in parameters:
        raise ValueError("the profile is an option of its own: --profile (make: PROFILE=)")
    paths = notebooks(names or (REAL if profile != "tiny" else []))
    wanted = parameters | ({"profile": profile} if profile != "tiny" else {})
    parts = known_parameters(paths, wanted)
    jobs = min(jobs or (how_many() if profile == "tiny" else 1), len(paths))
    timeout = timeout or (CELL_SECONDS if profile == "tiny" else LONG_SECONDS)
    os.environ[COMPARE_VARIABLE] = "0" if parameters else "1"
    os.environ[GRID_VARIABLE] = str(int(grid))
    os.environ[BESIDE_VARIABLE] = str(jobs - 1)
    if jobs > 1:  # threads of two processes on the same cores would wait for each other
        os.environ["OMP_NUM_THREADS"] = "1"
        paths = longest_first(paths, profile)
    isolate_kernels()
    folder = outputs_folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    gone = metrics_folder(profile).glob("*.json") if not names else [
        metrics_folder(profile) / f"{path.stem}.json" for path in paths]
    for path in gone:  # all of them: also the numbers of notebooks that are no more
        path.unlink(missing_ok=True)
    how = f"{jobs} side by side, one thread each" if jobs > 1 else "one at a time"
    print(f"{len(paths)} notebook{'s' * (len(paths) > 1)}, {how}: "
          + ", ".join(path.stem.split("_")[0] for path in paths), flush=True)
    failures, begin = [], time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder, prefix=".run-") as scratch:
        tasks = {path.stem: (path, folder / path.name, Path(scratch), parts[path], timeout,
                             {} if wanted else {"fingerprint": fingerprint(path), "grid": grid})
                 for path in paths}
        after = {stem: first for stem in tasks for first in tasks
                 if AFTER.get(stem[:2]) == first[:2]}
        with closing(side_by_side(execute, tasks, jobs, after)) as ended:
            for number, (stem, problem, seconds) in enumerate(ended, 1):
                print(f"[{number}/{len(paths)}] {stem} ... {'FAILED' if problem else 'ok'} "
                      f"{seconds:.1f} s", flush=True)
                if problem:
                    failures.append(stem)
                    print(_indented(problem, folder / f"{stem}.failed.ipynb"), flush=True)
    too_far = _summary(profile, {p.stem for p in paths}, bool(parameters))
    print(f"{len(paths) - len(failures)} of {len(paths)} notebooks ran to their end, "
          f"{time.monotonic() - begin:.0f} s; executed copies: {_short(folder)}")
    return 1 if failures or too_far else 0


def _indented(problem: str, kept: Path) -> str:
    text = problem.strip()[:600].replace("\n", "\n    ")
    return f"    {text}" + (f"\n    see {_short(kept)}" if kept.exists() else "")


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _summary(profile: str, stems: set[str], other_parameters: bool) -> int:
    """Print what these notebooks recorded; returns how many numbers are too far off."""
    numbers = {k: e for k, e in merge(profile).items() if e["notebook"] in stems}
    print(f"\nRecorded numbers, profile {profile}"
          + (", with other parameters: not compared with the expected" * other_parameters))
    for name, entry in numbers.items():
        print(f"  {line(name, entry)}")
    verdicts = [entry.get("within") for entry in numbers.values()]
    print(f"{verdicts.count(True)} as expected, {verdicts.count(False)} too far off, "
          f"{verdicts.count(None)} not compared")
    return verdicts.count(False)


def _run_in_memory(path: Path, book, timeout: int) -> None:
    from nbclient import NotebookClient

    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(book, timeout=timeout, kernel_name="python3", store_widget_state=False,
                   resources={"metadata": {"path": str(path.parent)}}).execute()


def store(names: list[str], timeout: int = CELL_SECONDS) -> int:
    """Run with the defaults and keep the outputs; a notebook that fails stays as it is."""
    isolate_kernels()
    os.environ.pop(COMPARE_VARIABLE, None)
    failed = 0
    for path in notebooks(names):
        book, start = read(path), time.monotonic()
        print(f"{path.stem} ...", end=" ", flush=True)
        try:
            _run_in_memory(path, book, timeout)
        except Exception as error:
            failed += 1
            print(f"FAILED, left as it was\n    {type(error).__name__}: {error}", flush=True)
            continue
        write(path, dumps(normal(book, path.stem)))
        print(f"stored, {path.stat().st_size / 1000:.0f} kB, "
              f"{time.monotonic() - start:.1f} s", flush=True)
    return int(failed > 0)


def mend(names: list[str]) -> int:
    """Rewrite in normal form the notebooks that are not."""
    for path in notebooks(names):
        text = dumps(normal(read(path), path.stem))
        if text != path.read_text(encoding="utf-8"):
            write(path, text)
            print(f"{path.stem}: brought to normal form")
    return 0


def solved(names: list[str], timeout: int = CELL_SECONDS) -> int:
    """Run with the folded solutions in place; every check must say so."""
    isolate_kernels()
    os.environ.pop(COMPARE_VARIABLE, None)
    failed = 0
    for path in notebooks(names):
        book = read(path)
        found = exercises(book)
        for index, _, solution in found:
            book.cells[index].source = solve(book.cells[index].source, solution)
        print(f"{path.stem} ...", end=" ", flush=True)
        try:
            _run_in_memory(path, book, timeout)
        except Exception as error:
            failed += 1
            print(f"FAILED\n    {type(error).__name__}: {error}", flush=True)
            continue
        said = {name: "".join(o.get("text", "") for o in book.cells[index].outputs)
                for index, name, _ in found}
        wrong = [name for name, text in said.items() if f"✓ {name}:" not in text]
        failed += bool(wrong)
        print(f"{len(found) - len(wrong)} of {len(found)} solutions pass"
              + "".join(f"\n    {said[name]}" for name in wrong), flush=True)
    return int(failed > 0)
