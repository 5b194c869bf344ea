"""JupyterLab: here, another environment's on PATH, and the kernel that is offered to it."""

import json
import shutil
import sys
from pathlib import Path

from .finding import SECONDS, Findings, ask, note, ok
from .packages import installed


def check_jupyter() -> Findings:
    """The versions here, the JupyterLab on PATH where it is another environment's, and the kernel
    that `make kernel` offers to it."""
    here = [f"{name} {installed(name) or 'missing'}" for name in ("jupyterlab", "ipywidgets")]
    state = note if "missing" in " ".join(here) else ok  # whether it may be, check_packages says
    yield state(f"in this environment: {', '.join(here)}")
    other = shutil.which("jupyter")
    python = python_of(Path(other)) if other else None
    elsewhere = bool(other) and not same_environment(python)
    if elsewhere and python is None:
        yield note(f"another jupyter, {other}, whose Python can't be told: sliders need "
                   "jupyterlab_widgets in its environment (pip list there)")  # fmt: skip
    elif elsewhere:
        yield from server_lines(python)
    yield from kernel_lines(kernel_python(), elsewhere)


def python_of(script: Path) -> Path | None:
    """Return the Python that runs an installed script: by its first line, or beside it (Windows);
    None where that can't be told."""
    with open(script, "rb") as file:
        first = file.readline(500).decode(errors="replace").strip()
    words = first[2:].split() if first.startswith("#!") else []
    beside = [script.parent / "python.exe", script.parent.parent / "python.exe"]
    candidates = [Path(w) for w in words[:1] if "python" in Path(w).name] + beside
    return next((p for p in candidates if p.is_file()), None)


def same_environment(python: Path | None) -> bool:
    """Return whether a Python is this one. (Those of two environments may be links to one file.)"""
    return python is not None and python.parent.resolve() == Path(sys.executable).parent.resolve()


def server_lines(python: Path) -> Findings:
    """Whether another environment's JupyterLab can show the sliders."""
    script = ("import importlib.metadata as m, json\nfound = {d.name.lower().replace('-', '_'): "
              "d.version for d in m.distributions()}\nprint(json.dumps({n: found.get(n) for n in "
              "('jupyterlab', 'jupyterlab_widgets')}))")  # fmt: skip
    try:
        lab, widgets = json.loads(ask([str(python), "-c", script], SECONDS)).values()
    except (RuntimeError, ValueError) as error:
        yield note(f"another jupyter, run by {python}, does not answer ({error}): make lab starts "
                   "this environment's")  # fmt: skip
        return
    if lab is None:
        yield ok(f"{python} has a jupyter without JupyterLab; make lab starts this environment's")
    elif widgets is None or not widgets.startswith("3."):
        yield note(f"the JupyterLab {lab} of {python} shows no sliders (jupyterlab_widgets "
                   f"{widgets or 'missing'}): {python} -m pip install 'jupyterlab_widgets>=3,<4', "
                   "and start it again; or make lab")  # fmt: skip
    else:
        yield ok(f"another JupyterLab {lab}, of {python}, with jupyterlab_widgets {widgets}")


def kernel_python() -> Path | None:
    """Return the Python that the kernel qlora-course starts; None where there is no such kernel."""
    try:
        from jupyter_core.paths import jupyter_path
    except ImportError:
        return None
    for folder in map(Path, jupyter_path("kernels")):
        if (spec := folder / "qlora-course/kernel.json").is_file():
            return Path(json.loads(spec.read_text(encoding="utf-8"))["argv"][0])
    return None


def kernel_lines(python: Path | None, other_server: bool) -> Findings:
    remedy = "make kernel, or python -m ipykernel install --user --name qlora-course"
    if python is None:
        if other_server:
            yield note(f"no kernel qlora-course for that other jupyter: {remedy}")
    elif not shutil.which(python):
        yield note(f"the kernel qlora-course starts {python}, which is gone: {remedy}")
    elif not same_environment(Path(shutil.which(python))):
        yield note(f"the kernel qlora-course starts {python}, another environment: {remedy}")
    else:
        yield ok("the kernel qlora-course starts this Python")
