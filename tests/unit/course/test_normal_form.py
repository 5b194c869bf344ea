"""The form in which notebooks are committed, and what is found in them."""

from pathlib import Path

import pytest
from nbformat.v4 import new_output

from course.tools.normal_form import (
    WIDGET_VIEW,
    definitions,
    dumps,
    exercises,
    normal,
    notebooks,
    solve,
    tagged,
)
from tests.support.throwaway_notebooks import SOLVED, book, exercise_cells, save


def test_an_exercise_is_found_with_its_solution():
    made = book("import math\nx = 1", *exercise_cells("twice"), "class A:\n    y = 2")
    (index, name, solution), = exercises(made)
    assert (index, name) == (1, "twice") and solution == "def mine(x):\n    return 2 * x\n"
    source = solve(made.cells[index].source, solution)
    assert source.index("...") < source.index("return 2 * x") < source.index("check(")
    assert "import math" in definitions(made) and "class A" in definitions(made)
    assert "x = 1" not in definitions(made) and tagged(made, "exercise") == [made.cells[1]]


@pytest.mark.parametrize("cells, problem", [
    ([("x = 1", "exercise")], "has 0 calls"),
    ([("check('a', f)\ncheck('b', f)", "exercise")], "has 2 calls"),
    ([("# check('a', f)\ncheck('b', f)", "exercise"), "x = 1", SOLVED], "'b': 0 folded solutions"),
    ([("check('a', f)", "exercise"), SOLVED, SOLVED], "'a': 2 folded solutions"),
])
def test_an_exercise_that_is_not_whole_is_named(cells, problem):
    with pytest.raises(ValueError, match=problem):
        exercises(book(*cells))


def test_normal_form_keeps_what_counts_and_is_a_fixed_point():
    made = book("a", ("b", "varies"), "c")
    made.metadata = {"kernelspec": {"name": "mine"}, "widgets": {"state": {}}}
    made.cells[0].execution_count, made.cells[2].execution_count = 7, 9
    made.cells[0].metadata = {"papermill": {"duration": 1}, "tags": []}
    made.cells[0].outputs = [
        new_output("stream", name="stdout", text="x"),
        new_output("stream", name="stderr", text="e"),
        new_output("stream", name="stdout", text="y"),
        new_output("execute_result", execution_count=7,
                   metadata={"image/png": {"alt": "z", "w": 1}},
                   data={"text/plain": "z", "image/png": "aa", WIDGET_VIEW: {"model_id": "1"}})]
    made.cells[1].id = made.cells[2].id
    once = normal(made, "01_a")
    assert dumps(normal(once, "01_a")) == dumps(once)
    assert set(once.metadata) == {"kernelspec", "language_info"}
    assert once.metadata.kernelspec.name == "python3"
    first, second, third = once.cells
    assert (first.execution_count, second.execution_count, third.execution_count) == (1, None, 2)
    assert first.id == made.cells[0].id and second.id != third.id
    assert first.metadata == {} and second.metadata == {"tags": ["varies"]}
    assert [o.get("text") for o in first.outputs] == ["xy", None]
    assert set(first.outputs[1].data) == {"text/plain", "image/png"}
    assert first.outputs[1].metadata == {"image/png": {"alt": "z"}}
    assert first.outputs[1].execution_count == 1


def test_notebooks_are_found_by_number_name_or_path(tmp_path):
    paths = [Path(save(tmp_path, stem, "1")) for stem in ("01_a", "02_b", "scratch")]
    assert notebooks(folder=tmp_path) == paths[:2]
    assert notebooks(["02", "01_a", str(paths[2])], tmp_path) == [paths[1], paths[0], paths[2]]
    with pytest.raises(FileNotFoundError, match="no notebook '03'; there are: 01_a, 02_b"):
        notebooks(["03"], tmp_path)
    with pytest.raises(FileNotFoundError, match="no notebook like"):
        notebooks(folder=tmp_path / "nowhere")
