"""What a notebook imports, and what it can reach, told apart on a tree of a few lines."""

import json

import pytest

from benchmarks.package_size import imported, lines, module_files, reachable

FILES = {
    "qlora_lib/__init__.py": """
from importlib import import_module
_MODULE_OF = {"name": "low.lazy", "other": "low.unused"}
def __getattr__(name):
    return getattr(import_module("." + _MODULE_OF[name], __name__), name)
""",
    "qlora_lib/low/__init__.py": "",
    "qlora_lib/low/lazy.py": "def name():\n    from .later import x\n    return x\n",
    "qlora_lib/low/later.py": "x = 1\n",
    "qlora_lib/low/unused.py": "other = 2\n",
    "qlora_lib/top/__init__.py": "",
    "qlora_lib/top/used.py": "from ..low import lazy\n",
    "qlora_lib/top/shown.py": "y = 3\n",
    "notebooks/course/__init__.py": "",
    "notebooks/course/draw.py": "def draw():\n    from qlora_lib.top import shown\n",
    "experiments/__init__.py": "",
}
CELLS = [
    {"cell_type": "markdown", "source": ["import nothing"]},
    {"cell_type": "code", "source": ["%time\n", "from course.draw import draw\n", "draw\n"]},
    {"cell_type": "code", "source": ["def late():\n", "    import qlora_lib.top.used\n"]},
]


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "notebooks" / "01_it.ipynb").write_text(json.dumps({"cells": CELLS}))
    return tmp_path


def test_imported_is_what_the_notebook_s_statements_load(tree):
    files = module_files(tree)
    loaded, home = imported(tree, tree / "notebooks" / "01_it.ipynb")
    assert home["name"] == "low.lazy"
    assert loaded & set(files) == {
        "qlora_lib", "qlora_lib.low", "qlora_lib.low.lazy", "qlora_lib.top",
        "qlora_lib.top.used", "course", "course.draw",
    }  # fmt: skip


def test_reachable_is_what_their_functions_import_too(tree):
    files = module_files(tree)
    loaded, home = imported(tree, tree / "notebooks" / "01_it.ipynb")
    more = reachable(loaded, files, home) - loaded
    assert more == {"qlora_lib.low.later", "qlora_lib.top.shown"}


def test_lazy_names_lead_to_their_modules(tree):
    (tree / "notebooks/course/draw.py").write_text("from qlora_lib import other\n")
    found = reachable({"course.draw"}, module_files(tree), {"other": "low.unused"})
    assert found == {"course.draw", "qlora_lib", "qlora_lib.low", "qlora_lib.low.unused"}


def test_a_module_s_lines_are_counted(tree):
    assert lines(module_files(tree)["qlora_lib.low.lazy"]) == 3
