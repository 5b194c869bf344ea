"""Python, and whether the packages that pyproject.toml asks for are here."""

import platform
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec

from ...base.paths import ROOT
from .finding import INSTALL, Findings, note, ok, problem


def check_python() -> Findings:
    yield ok(f"Python {platform.python_version()}, {sys.executable}")


def check_packages() -> Findings:
    """Whether what pyproject.toml asks for is installed, in versions within its bounds."""
    try:
        fine, lacking = _packages()
    except ImportError:
        yield problem(f"the package `packaging` is missing, and probably all others: {INSTALL}")
        return
    yield ok(f"{fine} packages within the bounds of pyproject.toml")
    for state, wanted, what in ((problem, True, "that the course needs"),
                                (note, False, "for GPU, hub, GGUF or tests")):  # fmt: skip
        named = [f"{text} ({version or 'not installed'})" for text, version, is_needed in lacking
                 if is_needed == wanted]  # fmt: skip
        if named:
            yield state(f"packages {what}: {', '.join(named)}: {INSTALL}")
    if not all(find_spec(name) for name in ("course", "experiments")):
        yield problem("the course itself is not installed: in a clone, make setup, or "
                      "python -m pip install --no-deps -e .")  # fmt: skip


def missing_packages() -> list[str]:
    """Return the requirements of the bundled course that are not met here, as pip takes them."""
    return [text for text, _, is_needed in _packages()[1] if is_needed]


def _packages() -> tuple[int, list[tuple[str, str | None, bool]]]:
    """Return how many requirements are met, and of the others text, version here, and whether the
    notebooks of the tiny profile need them."""
    from packaging.requirements import Requirement

    fine, lacking = 0, []
    for text, is_needed in _asked():
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = installed(wanted.name)
        if version and wanted.specifier.contains(version, prereleases=True):
            fine += 1
        else:
            lacking.append((f"{wanted.name}{wanted.specifier}", version, is_needed))
    return fine, lacking


def _asked() -> list[tuple[str, bool]]:
    """Return the requirements, and whether the notebooks of the tiny profile need them."""
    if not (ROOT / "pyproject.toml").is_file():  # a wheel: pip saw to its bounds
        return []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [(text, True) for text in project["dependencies"]]
    for extra, texts in extras.items():
        needed += [(t, extra == "notebooks" and not t.startswith("triton")) for t in texts]
    return needed


def installed(name: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
