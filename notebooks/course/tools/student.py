"""The notebooks to hand out: python -m course.tools student

Folded solutions are gone, and every stored output: what a cell answers is for the student to see.
Stubs, checks and hints stay, so the copies run like the course's own notebooks. The references
behind the checks are in the package, for whoever looks for them.
"""
import argparse
import copy
import re
import sys
from pathlib import Path

from qlora_lib.base.paths import given_path
from qlora_lib.base.endings import ending
from .execute import BUILD
from .normal_form import dumps, exercises, normal, notebooks, read, write

# "Solution", "solution of 3", and no recall question that speaks of solutions.
FOLDED = re.compile(r"<details>\s*<summary>\s*solution\b[^<]*</summary>.*?</details>\s*",
                    re.S | re.I)


def without_solutions(book):
    """A copy of the notebook with neither folded solutions nor outputs.

    Raises ValueError, naming the exercise, where a solution would stay.
    """
    book = copy.deepcopy(book)
    solutions = exercises(book)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = FOLDED.sub("", cell.source).strip()
        elif cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    left = "\n".join(cell.source for cell in book.cells)
    for _, name, solution in solutions:
        if solution.strip() in left:
            raise ValueError(f"the solution of exercise '{name}' is not folded in a <details> of "
                             "its own, or stands elsewhere too; it would be handed out")
    book.cells = [cell for cell in book.cells if cell.source]
    return book


def build(out: Path, paths: list[Path]) -> list[Path]:
    """Write the copies into `out`, under the notebooks' names; returns their paths."""
    copies = {}
    for path in paths:
        try:
            copies[out / path.name] = dumps(normal(without_solutions(read(path)), path.stem))
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error
    for path, target in zip(paths, copies):
        if target.resolve() == path.resolve():
            raise ValueError(f"{target} would be replaced by its copy without solutions; give "
                             "another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        write(path, text)
    return list(copies)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools student",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="notebooks, as 01 or 01_name; all if none")
    parser.add_argument("--out", type=given_path, default=BUILD / "student", help="folder of the copies")
    given = parser.parse_args(arguments)
    made = build(given.out, notebooks(given.names))
    print(f"{len(made)} notebooks without solutions in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
