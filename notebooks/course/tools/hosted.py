"""The notebooks for Colab and Kaggle, of your own copy of the repository on GitHub:

    python -m course.tools badges OWNER/NAME

They are written to hosted/, with a first cell that gets the repository and installs what is
missing there, and hosted/README.md has a badge for each. Commit the folder; the address in a badge
is that of the default branch.
"""
import argparse
import copy
import re
import sys
from pathlib import Path

from nbformat.v4 import new_code_cell

from qlora_lib.base.endings import ending
from qlora_lib.base.paths import ROOT, given_path
from .normal_form import dumps, normal, notebooks, read, write

NAME = re.compile(r"[A-Za-z0-9][\w-]{0,38}/[\w.-]{1,100}")
# In a kernel that has torch, and perhaps an older JupyterLab than the course's: what is missing is
# installed, and nothing that is there is changed.
FIRST_CELL = """\
# Gets the course, and installs those packages that are missing here.
import os
import subprocess
import sys

if not os.path.isdir("{name}"):
    subprocess.run(["git", "clone", "--quiet", "--depth", "1",
                    "https://github.com/{repo}"], check=True)
os.chdir("{name}/notebooks")
sys.path[:0] = [os.getcwd(), os.path.dirname(os.getcwd())]

from qlora_lib.cli.checks.packages import missing_packages

if missing := missing_packages():
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet",
                    *missing], check=True)"""
BADGES = {
    "Colab": "https://colab.research.google.com/github/{repo}/blob/HEAD/{file}",
    "Kaggle": "https://kaggle.com/kernels/welcome?src=https://github.com/{repo}/blob/HEAD/{file}",
}


def hosted(book, stem: str, repo: str):
    """A copy of a notebook, without outputs, whose first cell makes it run elsewhere."""
    book = copy.deepcopy(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    source = FIRST_CELL.format(repo=repo, name=repo.partition("/")[2])
    book.cells.insert(1, new_code_cell(source, id=f"{stem[:2]}-hosted"))
    return normal(book, stem)


def build(out: Path, paths: list[Path], repo: str) -> list[Path]:
    """Write the copies and a README with the badges into `out`; returns the copies' paths. Raises
    ValueError for what can't be OWNER/NAME of a repository."""
    if not NAME.fullmatch(repo) or repo.endswith((".git", "/.", "/..")):
        raise ValueError(f"{repo!r:.120} is no OWNER/NAME of a repository on GitHub")
    copies = {out / path.name: dumps(hosted(read(path), path.stem, repo)) for path in paths}
    lines = ["# In the browser", "", "| notebook | " + " | ".join(BADGES) + " |",
             "|---" * (len(BADGES) + 1) + "|"]
    for path in paths:
        links = [f"[Open in {where}]({address.format(repo=repo, file=f'hosted/{path.name}')})"
                 for where, address in BADGES.items()]
        lines.append(" | ".join(["", f"[{path.stem}]({path.name})", *links, ""]).strip())
    out.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        write(path, text)
    write(out / "README.md", "\n".join(lines) + "\n")
    return list(copies)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m course.tools badges",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("repo", metavar="OWNER/NAME", help="your repository on GitHub")
    parser.add_argument("--out", type=given_path, default=ROOT / "hosted",
                        help="folder of the copies")
    given = parser.parse_args(arguments)
    made = build(given.out, notebooks(), given.repo)
    print(f"{len(made)} notebooks with badges in {given.out}: commit them")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
