"""README and what it leads to: commands are accepted; targets, files and folders exist."""

import importlib.util
import re
import shlex

import pytest

from qlora_lib.__main__ import parser
from qlora_lib.base.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md",
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
CODE = [line for text in TEXTS.values()
        for block in re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()]  # fmt: skip
COMMANDS = [found[1] for line in CODE if (found := re.search(r"-m qlora_lib (.*)", line))]


def folders(text: str) -> list[str]:
    """The folders of qlora_lib in the README's tree, from the top down."""
    return re.findall(r"^  (\w+)/ ", text.partition("\nqlora_lib/")[2].partition("\nexp")[0], re.M)


def test_the_readme_is_short():
    assert len(README.encode()) <= 9000


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_takes_what_the_pages_show(command):
    parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("page", TEXTS)
def test_every_module_and_make_target_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", TEXTS[page], re.M)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in set(re.findall(r"python\s-m\s([\w.]*\w)", TEXTS[page])):
        assert importlib.util.find_spec(module), module


def test_the_tree_has_every_folder_and_imports_go_down_it():
    listed = folders(README)
    package = ROOT / "qlora_lib"
    assert sorted(listed) == sorted(p.parent.name for p in package.glob("*/__init__.py"))
    for place, folder in enumerate(listed):
        for path in (package / folder).rglob("*.py"):
            used = set(re.findall(r"^\s*from \.\.(\w+)", path.read_text(encoding="utf-8"), re.M))
            assert used <= set(listed[place:]), path


def test_the_table_has_every_notebook_and_files_that_exist():
    rows = re.findall(r"^\| \[\d\d [^]]*\]\(([^)]*)\) .* \| ([^|]*) \|$", README, re.M)
    there = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert [ROOT / notebook for notebook, _ in rows] == there
    for notebook, files in rows:
        folder = None  # a name without a folder stands in that of the name before
        for name in re.findall(r"`([\w/.]+)`", files):
            before, _, file = name.rpartition("/")
            folder = before or folder
            assert (ROOT / "qlora_lib" / folder / file).is_file(), f"{notebook}: {name}"
