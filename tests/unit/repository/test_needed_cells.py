"""What the browser runs of an executed notebook."""

import pytest

from course.tools.normal_form import notebooks, read
from tests.support.needed_cells import cells_of_controls, needed_cells

CELLS = [
    "import torch\nfrom math import pi",  # 0
    "weight, other = load()",  # 1
    "%matplotlib inline\ndef draw(ax, bits):\n    ax.plot(errors[bits])",  # 2
    "errors = {}",  # 3
    "slow = train(other)",  # 4: nobody looks at it
    "for bits in (2, 4):\n    errors[bits] = weight.std() * pi",  # 5: binds no name that 6 has
    "SliderPlot(draw, {'bits': [2, 4]})",  # 6
    "errors.clear()",  # 7: after the last that is wanted
]


def test_a_cell_is_needed_for_its_names_and_for_what_it_may_change():
    assert needed_cells(CELLS, [6]) == [0, 1, 2, 3, 5, 6]
    assert needed_cells(CELLS, [4]) == [1, 4]
    assert needed_cells(CELLS, []) == []


@pytest.mark.parametrize("change, needed", [
    ("other.append(slow)", True), ("fill(other)", True), ("print(pi)", False), ("x = 1", False)])
def test_what_is_mentioned_may_be_changed_unless_it_is_a_function(change, needed):
    cells = ["from math import pi", "other = []\nslow = 1", change, "show(other, pi)"]
    assert (2 in needed_cells(cells, [3])) == needed


def test_an_aside_is_left_out_unless_only_it_binds_what_is_needed():
    cells = ["x = []", "y = slow(x)\nfor b in x:\n    pass", "b = x", "SliderPlot(x, b)"]
    assert needed_cells(cells, [3]) == [0, 1, 2, 3]
    assert needed_cells(cells, [3], asides=[1]) == [0, 2, 3]
    with pytest.raises(ValueError, match="'b'"):
        needed_cells([*cells[:2], "z = x", cells[3]], [3], asides=[1])


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_no_control_of_a_notebook_needs_an_aside(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert len(cells_of_controls(cells)) <= len(cells)
