"""The mutants of a source: small changes of what it does, none of what it says."""

import ast
import os
import re
import subprocess
import sys

import pytest

from tests.support.mutants import ROOT, mutants

SOURCE = '''"""Words with 1 number."""
import re

def clamp(x: int, least=2, *, most: float = 8.5) -> "int":
    """Words of 3."""
    if x < least and x:
        raise ValueError(f"{x} is under 4")
    x = max(x, least)
    x += sorted([x, 5], reverse=True)[0]
    return min(x, most)

WORD = re.compile(r"a+|(?<=b)c", re.I)
'''
EXPECTED = {
    "least=3", "least=1", "most: float=4.25", "x <= least", "x > least", "if x < least or x:",
    "if not (x < least and x):", "max(least, x)", "x -= sorted", "sorted([x, 6]", "reverse=False",
    "sorted([x, 5])[0]", "[1]", "return None", "min(most, x)", "a*|(?<=b)c", "a+|(?<!b)c",
}  # fmt: skip


def test_each_is_one_change_of_the_code():
    clean, found = ast.unparse(ast.parse(SOURCE)), [m[2] for m in mutants(SOURCE)]
    assert len(set(found)) == len(found) and clean not in found
    for change in EXPECTED:
        assert change not in clean and any(change in m for m in found), change
    assert any("pass" in m and "raise" not in m for m in found)
    for source in found:
        ast.parse(source)
        assert all(word in source for word in ("Words with 1 number.", "Words of 3.", "'int'"))
        assert "is under 4" in source or "raise" not in source
        changed = [a for a, b in zip(source.splitlines(), clean.splitlines()) if a != b]
        assert len(changed) == 1


def test_line_and_change_are_named():
    change = "if x < least and x:   ->   if x <= least and x:"
    assert (6, change) in [mutant[:2] for mutant in mutants(SOURCE)]


@pytest.mark.long
def test_command_counts_what_the_tests_of_a_file_notice():
    """Of damping.py: its tests import Triton, which must be ready for them in every fork."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.mutants", "--sample", "3"]
    ran = subprocess.run(
        [*command, "qlora_lib/quant/damping.py"], cwd=ROOT, capture_output=True, text=True,
        env=env | {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^[0-3] of [1-3] killed", ran.stdout, re.M), ran.stdout
