"""Executed copies of the notebooks: made strictly, and found again by what they were made from."""
import hashlib
import json
import os
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from qlora_lib.base.paths import ROOT
from ..kit import OUTPUTS_VARIABLE
from .normal_form import dumps, read, write

SOURCES = ("qlora_lib", "notebooks/course", "experiments", "data")  # what a notebook may read


def execute(path: Path, out: Path, scratch: Path, parameters: dict[str, Any], timeout: int,
            made_from: dict[str, Any]) -> str | None:
    """Run a notebook with papermill, made strict: every cell must run, and none may hide an error.

    Returns None, or what went wrong. `out` appears when the run is over, with `made_from` in its
    metadata; a failed run is kept beside it as <name>.failed.ipynb. `scratch` is an existing
    folder on the same disk.
    """
    import papermill

    part, failed = scratch / path.name, out.with_suffix(".failed.ipynb")
    said = scratch / f"{path.stem}.stderr"
    try:
        book = papermill.execute_notebook(
            str(path), str(part), parameters=parameters, kernel_name="python3",
            cwd=str(path.parent), progress_bar=False, execution_timeout=timeout,
            start_timeout=120, kernel_manager_class=_manager(said))
        code = [(i, c) for i, c in enumerate(book.cells)
                if c.cell_type == "code" and c.source.strip()]
        if unrun := [i for i, c in code if c.execution_count is None]:
            raise RuntimeError(f"cells {unrun} never ran; does one before them exit?")
        if errors := [i for i, c in code for o in c.outputs if o.output_type == "error"]:
            raise RuntimeError(f"cells {errors} hold an error")
    except Exception as error:
        if part.exists():
            os.replace(part, failed)
        out.unlink(missing_ok=True)
        if hasattr(error, "ename"):  # papermill's own, which knows the cell
            return f"cell {error.cell_index}: {error.ename}: {error.evalue}"
        last = said.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]
        return "\n".join([f"{type(error).__name__}: {error}", *last])
    book.metadata.course = made_from
    write(part, dumps(book))
    os.replace(part, out)
    failed.unlink(missing_ok=True)
    return None


def _manager(said: Path):
    """The class of kernels that write to the file `said` what belongs to no cell: what they say
    when they start, crash or are ended. On our own stderr it would stand among our messages."""
    from jupyter_client.manager import AsyncKernelManager

    said.touch()

    class Manager(AsyncKernelManager):
        async def start_kernel(self, **options):
            with open(said, "ab") as stderr:
                await super().start_kernel(stderr=stderr, **options)

    return Manager


def fingerprint(path: Path, root: Path = ROOT) -> str:
    """A hash of all that a run of the notebook depends on: the sources and tags of its cells,
    SOURCES, the installed packages and this Python."""
    found = hashlib.sha256(sys.version.encode())
    cells = [(c.cell_type, c.source, c.metadata.get("tags")) for c in read(path).cells]
    # A set: an editable install may be found twice, depending on where Python was started.
    installed = sorted({f"{d.name}=={d.version}" for d in distributions()})
    found.update(json.dumps([cells, installed]).encode())
    for folder in SOURCES:
        for file in sorted((root / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                found.update(f"\n{file.relative_to(root)}\n".encode())
                found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def copy_of(path: Path, profile: str = "tiny"):
    """The notebook as it was last run on a profile without an error, or None."""
    # Not record's outputs_folder: a process for each notebook would wait for torch.
    copy = Path(os.environ.get(OUTPUTS_VARIABLE) or ROOT / "outputs") / profile / path.name
    return read(copy) if copy.is_file() else None


def fresh_copy_of(path: Path):
    """The notebook as `run` has executed it with its defaults, if that says as much as to
    execute it once more: nothing that it depends on has changed, and each slider's whole grid was
    drawn. Else None."""
    copy = copy_of(path)
    made_from = copy.metadata.get("course", {}) if copy else {}
    return copy if made_from == {"fingerprint": fingerprint(path), "grid": True} else None
