"""The one form in which notebooks are committed, and what they say about themselves.

Two runs of the same notebook give the same file, so a diff shows what somebody changed. Dropped
is what a run cannot help changing: times, widget state, stderr, the name of a kernel.
"""
import ast
import copy
import re
from pathlib import Path

import nbformat

from qlora_lib.base.files import whole_file
from qlora_lib.base.paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
CHECK = re.compile(r"^[^#\n]*\bcheck\(\s*[\"'](\w+)[\"']", re.M)
SOLUTION = re.compile(r"<summary>[^<]*solution[^<]*</summary>\s*```python\n(.*?)```", re.S | re.I)


def notebooks(names: list[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks, or those of the given names ("01", "01_quantization_math" or a path).

    Raises FileNotFoundError for a name that fits none, or where there are no notebooks.
    """
    numbered = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not names and not numbered:
        raise FileNotFoundError(f"no notebook like 01_name.ipynb in {folder}")
    found = [] if names else numbered
    for name in names:
        fits = [p for p in numbered if p.stem == name or p.stem.startswith(f"{name}_")]
        fits = fits or [p for p in [Path(name)] if p.is_file()]
        if not fits:
            raise FileNotFoundError(f"no notebook '{name}'; there are: "
                                    + ", ".join(p.stem for p in numbered))
        found += fits
    return found


def read(path: Path):
    """The notebook in a file; ValueError, with its name, for one that holds none."""
    try:
        return nbformat.read(path, as_version=4)
    except OSError:
        raise
    except Exception as error:  # nbformat and its validator raise many kinds
        said = str(error).splitlines()[0] if isinstance(error, ValueError) else "another shape"
        raise ValueError(f"{path} holds no notebook that can be read ({said:.200})") from error


def write(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def dumps(book) -> str:
    return nbformat.writes(book, version=4).rstrip("\n") + "\n"


def normal(book, stem: str):
    """A copy of the notebook in normal form; `stem` names the cells that have no id yet."""
    book = copy.deepcopy(book)
    book.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    book.nbformat, book.nbformat_minor = 4, 5
    count, ids = 0, set()
    for index, cell in enumerate(book.cells):
        if not cell.get("id") or cell.id in ids:
            cell.id = f"{stem[:2]}-{index:03d}"
        ids.add(cell.id)
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": list(tags)} if tags else {})
        cell.pop("attachments", None)
        if cell.cell_type == "code":
            ran = cell.execution_count is not None
            count += ran
            cell.execution_count = count if ran else None
            cell.outputs = _normal_outputs(cell)
    return book


def _normal_outputs(cell) -> list:
    kept = []
    for output in cell.outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        if "execution_count" in output:
            output.execution_count = cell.execution_count
        if "data" in output:
            output.data.pop(WIDGET_VIEW, None)
            alt = output.metadata.get("image/png", {}).get("alt")
            output.metadata = nbformat.from_dict({"image/png": {"alt": alt}} if alt else {})
        kept.append(output)
    return kept


def tagged(book, tag: str) -> list:
    return [cell for cell in book.cells if tag in cell.metadata.get("tags", [])]


def exercises(book) -> list[tuple[int, str, str]]:
    """(cell index, name, solution) of each cell tagged `exercise`.

    Such a cell holds the stub and one `check("name", ...)`. Its solution is the ```python block
    folded under a <summary> with the word "solution", before the next code cell.
    Raises ValueError, naming the cell, where either is missing.
    """
    found = []
    for index, cell in enumerate(book.cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        names = CHECK.findall(cell.source)
        if len(names) != 1:
            raise ValueError(f"cell {index} is tagged exercise and has {len(names)} calls like "
                             "check(\"name\", function); expected one")
        text = ""
        for later in book.cells[index + 1:]:
            if later.cell_type == "code":
                break
            text += later.source + "\n"
        solutions = SOLUTION.findall(text)
        if len(solutions) != 1:
            raise ValueError(f"cell {index}, exercise '{names[0]}': {len(solutions)} folded "
                             "solutions before the next code cell; expected one, a ```python "
                             "block right after <summary>Solution</summary>")
        found.append((index, names[0], solutions[0]))
    return found


def solve(source: str, solution: str) -> str:
    """The source of an exercise cell with the solution put before the statement that checks it."""
    for statement in ast.parse(source).body:
        if CHECK.search(ast.get_source_segment(source, statement) or ""):
            lines = source.splitlines()
            at = statement.lineno - 1
            return "\n".join([*lines[:at], solution.strip("\n"), *lines[at:]])
    raise ValueError(f"no statement calls check(\"name\", function) in:\n{source}")


def definitions(book) -> str:
    """The imports, functions and classes of a notebook's code cells, as one source.

    Enough to run an exercise's solution without running the notebook.
    """
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    parts = [ast.unparse(node) for cell in book.cells if cell.cell_type == "code"
             for node in ast.parse(cell.source).body if isinstance(node, kinds)]
    return "\n".join(parts)
