"""Notebooks executed: strictly into outputs/, or stored, or with their exercises solved."""
import ast
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_lib.base.paths import ROOT
from ..kit import COMPARE_VARIABLE
from .normal_form import dumps, exercises, normal, notebooks, read, solve, write
from ..kit.record import line, merge, metrics_folder, outputs_folder

BUILD = ROOT / "build"
CELL_SECONDS = 900  # the bundled model; a cell that trains a real one may take
LONG_SECONDS = 48 * 3600
REAL = ["04", "05"]  # the notebooks that run a real model, when none are named
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
    for part in shlex.split(text):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"got the parameter {part!r}; expected name=value, as in \"bits=3\"")
        value = {"true": "True", "false": "False", "null": "None"}.get(value, value)
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a path is seen from here, notebooks run in theirs
            parameters[name] = str(Path(value).resolve()) if Path(value).exists() else value
    return parameters


def known_parameters(paths: list[Path], parameters: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Those of the parameters that each notebook has; ValueError for one that none has."""
    import papermill

    known = {path: set(papermill.inspect_notebook(str(path))) for path in paths}
    for name in parameters:
        if not any(name in names for names in known.values()):
            have = sorted(set().union(*known.values()))
            raise ValueError(f"no notebook has a parameter '{name}'; there are: {', '.join(have)}")
    return {path: {k: v for k, v in parameters.items() if k in known[path]} for path in paths}


def execute(path: Path, out: Path, parameters: dict[str, Any], timeout: int) -> None:
    """papermill, made strict: every cell must have run, and none may hide an error.

    `out` appears when the run is over; a failed one is kept as <name>.failed.ipynb.
    """
    import papermill

    failed = out.with_suffix(".failed.ipynb")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".run-") as folder:
        part = Path(folder) / path.name
        try:
            book = papermill.execute_notebook(
                str(path), str(part), parameters=parameters, kernel_name="python3",
                cwd=str(path.parent), progress_bar=False, execution_timeout=timeout,
                start_timeout=120)
            code = [(i, c) for i, c in enumerate(book.cells)
                    if c.cell_type == "code" and c.source.strip()]
            if unrun := [i for i, c in code if c.execution_count is None]:
                raise RuntimeError(f"cells {unrun} never ran; does one before them exit?")
            if errors := [i for i, c in code for o in c.outputs if o.output_type == "error"]:
                raise RuntimeError(f"cells {errors} hold an error")
        except Exception:
            if part.exists():
                os.replace(part, failed)
                out.unlink(missing_ok=True)
            raise
        os.replace(part, out)
        failed.unlink(missing_ok=True)


def run(names: list[str], profile: str, parameters: dict[str, Any],
        timeout: int | None = None) -> int:
    """Run notebooks, report, and return 0 if all ran and no recorded number is too far off.

    With no names: all of them on the tiny profile, REAL on the others.
    """
    paths = notebooks(names or (REAL if profile != "tiny" else []))
    wanted = parameters | ({"profile": profile} if profile != "tiny" else {})
    parts = known_parameters(paths, wanted)
    timeout = timeout or (CELL_SECONDS if profile == "tiny" else LONG_SECONDS)
    os.environ[COMPARE_VARIABLE] = "0" if parameters else "1"
    isolate_kernels()
    folder = outputs_folder(profile)
    folder.mkdir(parents=True, exist_ok=True)
    if not names:  # all of them: forget the numbers of notebooks that are gone
        for path in metrics_folder(profile).glob("*.json"):
            path.unlink()
    failures, begin = [], time.monotonic()
    for number, path in enumerate(paths, 1):
        (metrics_folder(profile) / f"{path.stem}.json").unlink(missing_ok=True)
        print(f"[{number}/{len(paths)}] {path.stem} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            execute(path, folder / path.name, parts[path], timeout)
            print(f"ok {time.monotonic() - start:.1f} s", flush=True)
        except Exception as error:  # whatever stopped this notebook, the next one is run
            failures.append(path.stem)
            print(f"FAILED {time.monotonic() - start:.1f} s", flush=True)
            print(_reason(error, folder / f"{path.stem}.failed.ipynb"), flush=True)
    too_far = _summary(profile, {p.stem for p in paths}, bool(parameters))
    print(f"{len(paths) - len(failures)} of {len(paths)} notebooks ran to their end, "
          f"{time.monotonic() - begin:.0f} s; executed copies: {_short(folder)}")
    return 1 if failures or too_far else 0


def _reason(error: Exception, kept: Path) -> str:
    if hasattr(error, "ename"):  # papermill's own, which knows the cell
        text = f"cell {error.cell_index}: {error.ename}: {error.evalue}"
    else:
        text = f"{type(error).__name__}: {error}"
    text = text.strip()[:600].replace("\n", "\n    ")
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
