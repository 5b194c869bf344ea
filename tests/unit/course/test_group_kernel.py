"""Notebook 06's exercises that are kernels: solutions with typical mistakes, in the interpreter.

That each registered mistake, in PyTorch, gets its own message is tested in test_exercise.py.
"""

import sys

import pytest
import torch

from course.kit import check
from course.nb06 import kernels, triton_or_stub
from course.nb06.for_h100 import for_h100, innermost_loop
from course.tools.normal_form import NOTEBOOKS, exercises, read

SOLUTIONS = {name: solution for _, name, solution in exercises(read(
    NOTEBOOKS / "06_int4_kernels.ipynb"))}  # fmt: skip
SOLUTION, DECODER = SOLUTIONS["group_kernel"], SOLUTIONS["decode_kernel"]
pytestmark = pytest.mark.skipif(not triton_or_stub.CAN_RUN, reason="Triton can't run here")


@pytest.fixture
def kernel(tmp_path):
    """A kernel of this source, from a file: there Triton finds the source to compile."""
    def make(source):
        path = tmp_path / "kernel.py"
        names = {"triton": triton_or_stub.triton, "tl": triton_or_stub.tl}
        path.write_text(source, encoding="utf-8")
        exec(compile(source, str(path), "exec"), names)
        return names.get("my_by_groups") or names["my_decode"]
    return make


def with_mistake(*changes, source=SOLUTION):
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
    ("every load that has rows", [(", mask=rows < out, other=0.0", "")]),
    ("every load that has rows", [(", mask=rows < out, other=0.0", ""),
                                  (", mask=rows < out)", ")")]),
    ("every load that has rows", [("                       mask=(rows < out)[:, None], other=0)",
                                   "                       )")]),
    ("not always 16", [("tl.arange(0, HALF)", "tl.arange(0, 16)")]),
    ("not always 4", [("tl.arange(0, BLOCK)", "tl.arange(0, 4)"), ("((BLOCK,)", "((4,)")]),
    ("nothing was stored", [("    tl.store(y + rows, total, mask=rows < out)", "")]),
])
def test_a_kernel_with_a_mistake_is_told_which(told, changes, kernel, capsys):
    mine = triton_or_stub.launched(kernel(with_mistake(*changes)))
    assert check("group_kernel", mine) is not mine
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("    diagnosis: ")]
    assert told in line


def test_a_kernel_that_decodes(kernel, capsys):
    mine = triton_or_stub.decoding(kernel(DECODER))
    assert check("decode_kernel", mine) is mine, capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("told, changes", [
    ("the low nibble (tile & 15) is the even feature",
     [("(tile & 15)", "(TILE >> 4)"), ("(tile >> 4)", "(tile & 15)"), ("TILE", "tile")]),
    ("every load needs its mask", [("mask=rows < out)[:, None]", "mask=None)[:, None]")]),
    ("every load needs its mask", [("mask=inside, other=0)", ")")]),
    ("both stores need the mask", [("- z), mask=inside)", "- z))")]),
    ("there are two stores", [
        ("    tl.store(to + 1, s * ((tile >> 4).to(tl.float32) - z), mask=inside)", "")]),
    ("the group is tl.program_id(1)", [("g = tl.program_id(1)", "g = 0")]),
    ("rows begin at tl.program_id(0)", [("tl.program_id(0) * BLOCK + ", "")]),
    ("which are neighbors", [("2 * at[None, :]", "(at + g * HALF)[None, :]"),
                             ("tl.store(to + 1", "tl.store(to + HALF")]),
    ("grids of its own", [("rows * groups + g", "0 * rows + g")]),
])
def test_a_decoder_with_a_mistake_is_told_which(told, changes, kernel, capsys):
    mine = triton_or_stub.decoding(kernel(with_mistake(*changes, source=DECODER)))
    assert check("decode_kernel", mine) is not mine
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("    diagnosis: ")]
    assert told in line


def test_what_is_read_beyond_a_tensor_is_named(kernel):
    bad = triton_or_stub.launched(kernel(with_mistake(("at = g * HALF", "at = 2 * g * HALF"))))
    codes, grid = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)
    with pytest.raises(IndexError, match="reads element 64 of x, which has 64"):
        bad(torch.zeros(64), codes, grid, grid)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler has wheels for Linux")
def test_kernels_are_compiled_for_an_h100_and_those_that_cannot_be_are_told_why(kernel):
    made = for_h100(kernels.by_groups, BLOCK=16, HALF=64)
    assert made["registers"] < 256 and 16 < made["loop"] and made["loop"] == sum(
        made["kinds"].values())
    few = for_h100(kernels.by_groups, BLOCK=4, HALF=64)
    assert few["loop"] / 4 > made["loop"] / 16  # a weight, in smaller tiles
    # The interpreter takes a tile of any size; the compiler wants powers of two.
    bad = kernel(with_mistake(("tl.arange(0, HALF)", "tl.arange(0, HALF - 1 + 1 * 0)")))
    assert "power of 2" in for_h100(bad, BLOCK=4, HALF=64)


# Kernels that pass: the folded solutions, and another way
PASSING = {
    "step 2": DECODER,
    "step 3": SOLUTION,
    "step 3, asking ahead": SOLUTION.replace("range(0, groups)",
                                             "tl.range(0, groups, num_stages=3)"),
}  # fmt: skip
assert len(set(PASSING.values())) == len(PASSING)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler has wheels for Linux")
@pytest.mark.parametrize("source", PASSING.values(), ids=PASSING)
def test_kernels_that_pass_are_compiled_for_an_a100_and_an_h100(source, kernel, capsys):
    mine = kernel(source)
    decodes = "my_decode" in source
    run = (triton_or_stub.decoding if decodes else triton_or_stub.launched)(mine)
    assert check("decode_kernel" if decodes else "group_kernel", run) is run, capsys.readouterr()
    for sm in (80, 90):
        made = for_h100(mine, sm, BLOCK=16, HALF=64)
        assert isinstance(made, dict), made
        assert made["registers"] < 256 and bool(made["loop"]) is not decodes


def test_the_innermost_loop_is_that_of_the_nearest_backward_branch():
    sass = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.U8 R0, desc[UR4][R2.64] ;
        /*0020*/              @!P0 FFMA R0, R1, R2, R3 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
"""
    assert innermost_loop(sass) == ["LDG.E.U8", "FFMA", "BRA"]
    assert innermost_loop("        /*0000*/  EXIT ;") == []


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
