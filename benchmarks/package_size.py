"""How much code there is to read: `python -m benchmarks.package_size [--tree FOLDER]`.

Lines of each folder of qlora_lib; and, for notebooks 01 to 05, which of its modules they load.
Two figures, as imports stand in functions too:

    imported    in sys.modules when every import statement of the notebook has run, no more
    reachable   imported, and what these import within functions, and so on: all that a run of
                the notebook can load
"""

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from qlora_lib.base.endings import ending
from qlora_lib.base.paths import given_path

PACKAGES = {"qlora_lib": "qlora_lib", "course": "notebooks/course", "experiments": "experiments"}
NOTEBOOKS = ("01", "02", "03", "04", "05")
# Runs in a process of its own, with a notebook's import statements as its argument.
LOADED = """
import json, sys
exec(sys.argv[1])
import qlora_lib
json.dump([sorted(sys.modules), qlora_lib._MODULE_OF], sys.stdout)
"""


def module_files(tree: Path) -> dict[str, Path]:
    """Path of each module of the library, the course and the experiments, by its dotted name."""
    files = {}
    for package, place in PACKAGES.items():
        for path in sorted((tree / place).rglob("*.py")):
            parts = path.relative_to(tree / place).with_suffix("").parts
            files[".".join([package, *(p for p in parts if p != "__init__")])] = path
    return files


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def import_statements(notebook: Path) -> str:
    """All import statements of a notebook's code cells, a line each."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = []
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            code = "\n".join(line for line in source.split("\n") if line[:1] not in ("%", "!"))
            found += [ast.unparse(node) for node in ast.walk(ast.parse(code))
                      if isinstance(node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    return "\n".join(found)


def imported(tree: Path, notebook: Path) -> tuple[set[str], dict[str, str]]:
    """(what is in sys.modules after the notebook's imports, the home of each lazy name)."""
    path = os.pathsep.join([str(tree), str(tree / "notebooks")])
    done = subprocess.run(
        [sys.executable, "-c", LOADED, import_statements(notebook)], cwd=tree, text=True,
        env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    modules, home = json.loads(done.stdout)
    return set(modules), home


def imports(name: str, path: Path, files: dict[str, Path], home: dict[str, str]) -> set[str]:
    """Names in `files` that a module imports, within functions too, and the packages around."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names}
            if base == "qlora_lib":
                found |= {f"qlora_lib.{home[a.name]}" for a in node.names if a.name in home}
    found &= set(files)
    return found | {n.rsplit(".", up)[0] for n in found for up in range(1, n.count(".") + 1)}


def reachable(start: set[str], files: dict[str, Path], home: dict[str, str]) -> set[str]:
    """Of `files` those in `start`, those that they import, those that these import ..."""
    seen, new = set(), start & set(files)
    while new:
        seen |= new
        new = set().union(*(imports(name, files[name], files, home) for name in new)) - seen
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=given_path, default=Path(__file__).resolve().parents[1])
    tree = parser.parse_args().tree.resolve()
    files = module_files(tree)
    size = {name: lines(path) for name, path in files.items() if name.startswith("qlora_lib")}

    folders = Counter()
    for name, count in size.items():
        inside = files[name].relative_to(tree / "qlora_lib").parts
        folders[inside[0] if len(inside) > 1 else "(flat)"] += count
    for folder, count in folders.most_common():
        print(f"{folder:12} {count:7,}")
    print(f"{'qlora_lib':12} {sum(size.values()):7,} lines in {len(size)} files\n")

    print(f"{'notebook':12} {'imported':>18} {'reachable':>18}")
    together = set(), set()
    for number in NOTEBOOKS:
        notebook = next((tree / "notebooks").glob(f"{number}_*.ipynb"))
        loaded, home = imported(tree, notebook)
        row = loaded & set(size), reachable(loaded, files, home) & set(size)
        together = tuple(all_ | these for all_, these in zip(together, row))
        print_row(number, row, size)
    print_row("together", together, size)


def print_row(label: str, row: tuple[set[str], set[str]], size: dict[str, int]) -> None:
    cells = [f"{sum(size[n] for n in names):,} in {len(names):3}" for names in row]
    print(f"{label:12} {cells[0]:>18} {cells[1]:>18}")


if __name__ == "__main__":
    sys.exit(ending(main))
