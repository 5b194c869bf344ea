"""Notebook 06's exercise that is a kernel: its solution with typical mistakes, in the interpreter.

That each registered mistake, in PyTorch, gets its own message is tested in test_exercise.py.
"""

import pytest
import torch

from course.kit import check
from course.nb06 import triton_or_stub
from course.tools.normal_form import NOTEBOOKS, exercises, read

SOLUTION = {name: solution for _, name, solution in exercises(read(
    NOTEBOOKS / "06_int4_kernels.ipynb"))}["group_kernel"]  # fmt: skip
pytestmark = pytest.mark.skipif(not triton_or_stub.CAN_RUN, reason="Triton can't run here")


@pytest.fixture
def kernel(tmp_path):
    """A kernel of this source, from a file: there Triton finds the source to compile."""
    def make(source):
        path = tmp_path / "kernel.py"
        names = {"triton": triton_or_stub.triton, "tl": triton_or_stub.tl}
        path.write_text(source, encoding="utf-8")
        exec(compile(source, str(path), "exec"), names)
        return names["my_by_groups"]
    return make


def with_mistake(*changes):
    source = SOLUTION
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return source


def test_the_solution_passes(kernel, capsys):
    mine = triton_or_stub.launched(kernel(SOLUTION))
    assert check("group_kernel", mine) is mine, capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("told, changes", [
    ("the low nibble (codes & 15) is the even feature",
     [("(tile & 15)", "(TILE >> 4)"), ("(tile >> 4)", "(tile & 15)"), ("TILE", "tile")]),
    ("of each half", [("even, odd = tl.load(x + 2 * at), tl.load(x + 2 * at + 1)",
                       "even = tl.load(x + at + g * HALF)\n"
                       "        odd = tl.load(x + at + (g + 1) * HALF)")]),
    ("where is the zero-point?", [("(sums - z * tl.sum(even + odd, axis=0))", "sums")]),
    ("its own scale and zero-point", [("rows * groups + g,", "rows * groups,")]),
    ("the grids of row 0", [("rows * groups + g,", "g + 0 * rows,")]),
    ("row r begins at byte r * row_bytes", [("rows[:, None] * row_bytes", "0 * rows[:, None]")]),
    ("not one byte", [("rows[:, None] * row_bytes", "rows[:, None]")]),
    ("begin at program_id * BLOCK", [("tl.program_id(0) * BLOCK + ", "")]),
    ("add to the total", [("total += ", "total = ")]),
    ("the loop takes all", [("range(0, groups)", "range(0, 1)")]),
    ("inputs of its own", [("even, odd = tl.load(x + 2 * at), tl.load(x + 2 * at + 1)",
                            "i = 2 * tl.arange(0, HALF)\n"
                            "        even, odd = tl.load(x + i), tl.load(x + i + 1)")]),
    ("bytes of its own", [("row_bytes + at[None, :]", "row_bytes + tl.arange(0, HALF)[None, :]")]),
    ("beyond the end of x", [("at = g * HALF", "at = 2 * g * HALF")]),
    ("give the store its mask", [("tl.store(y + rows, total, mask=rows < out)",
                                  "tl.store(y + rows, total)")]),
    ("give the store its mask", [(", mask=rows < out, other=0.0", ""),
                                 (", mask=rows < out)", ")")]),
    ("nothing was stored", [("    tl.store(y + rows, total, mask=rows < out)", "")]),
])
def test_a_kernel_with_a_mistake_is_told_which(told, changes, kernel, capsys):
    mine = triton_or_stub.launched(kernel(with_mistake(*changes)))
    assert check("group_kernel", mine) is not mine
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("    diagnosis: ")]
    assert told in line


def test_a_load_without_its_mask_does_no_harm(kernel):
    mine = triton_or_stub.launched(kernel(with_mistake((", mask=rows < out, other=0.0", ""))))
    assert check("group_kernel", mine) is mine


def test_a_stub_is_not_launched_and_nothing_is_where_triton_cannot_run(kernel, monkeypatch):
    codes, grid = torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 1)
    stub = kernel(with_mistake((SOLUTION.split("\n")[3], "    raise NotImplementedError")))
    with pytest.raises(NotImplementedError):
        triton_or_stub.launched(stub)(torch.zeros(32), codes, grid, grid)
    whole = triton_or_stub.launched(kernel(SOLUTION))
    assert torch.equal(whole(torch.zeros(32), codes, grid, grid), torch.zeros(4))
    monkeypatch.setattr(triton_or_stub, "CAN_RUN", False)
    with pytest.raises(NotImplementedError):
        whole(torch.zeros(32), codes, grid, grid)
