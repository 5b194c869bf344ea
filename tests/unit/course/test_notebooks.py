"""What every numbered notebook keeps to, seen without running it; its exercises are run alone."""
import re

import pytest

from course.kit import exercise as checks
from course.kit.expected import load_expected
from course.kit.record import LINE
from course.nb06 import triton_or_stub
from course.tools.normal_form import (
    NOTEBOOKS,
    definitions,
    dumps,
    exercises,
    normal,
    read,
    solve,
    tagged,
)

PATHS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
BOOKS = {path.stem: read(path) for path in PATHS}
TRAPS = ("interact(", "interactive(", "interactive_output(", "clear_output(", "sys.exit(",
         "tqdm.auto", "tqdm.notebook", "%timeit", "!pip", "%pip", "pyplot", "plt.", "input(")
ABSOLUTE = re.compile(r"(?<![\w.~:/-])/(home|root|tmp|work|Users|mnt|usr|opt|private|var)/\w"
                      r"|\b[A-Z]:\\\w")

book_of = pytest.mark.parametrize("stem", BOOKS)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def words(cells):
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def printed(book):
    """The lines that the notebook's cells printed, outputs of other kinds as their text."""
    for cell in code(book):
        for output in cell.outputs:
            yield from output.get("text", output.get("data", {}).get("text/plain", "")).split("\n")


def test_the_course_has_its_notebooks():
    numbers = [path.name[:2] for path in PATHS]
    assert numbers == sorted(set(numbers)) and {"01", "02"} <= set(numbers)


@book_of
def test_normal_form(stem):
    path = NOTEBOOKS / f"{stem}.ipynb"
    assert path.read_text(encoding="utf-8") == dumps(normal(BOOKS[stem], stem)), "run: make normal"
    assert path.stat().st_size < 400_000


@book_of
def test_it_ran_whole_in_order_and_without_errors(stem):
    cells = code(BOOKS[stem])
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all(c.source.strip() for c in cells), "an empty cell"
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert not [line for line in printed(BOOKS[stem]) if line.startswith("✗")]


@book_of
def test_one_parameters_cell_and_one_recorder(stem):
    book = BOOKS[stem]
    (cell,) = tagged(book, "parameters")
    assert re.search(r'^profile = "tiny"', cell.source, re.M)
    assert sum(c.source.count(f'Recorder("{stem}", profile') for c in code(book)) == 1
    assert sum(c.source.count("Recorder(") for c in code(book)) == 1


@book_of
def test_no_traps_and_no_absolute_paths(stem):
    book = BOOKS[stem]
    source = "\n".join(c.source for c in code(book))
    assert [trap for trap in TRAPS if re.search(rf"(?<!\w){re.escape(trap)}", source)] == []
    text = [c.source for c in book.cells] + list(printed(book))
    assert [m.group() for t in text if (m := ABSOLUTE.search(t))] == []


@book_of
def test_cells_stay_small(stem):
    book = BOOKS[stem]
    assert len(book.cells) <= 110
    lines = [(i, c.source.split("\n")) for i, c in enumerate(book.cells) if c.cell_type == "code"]
    assert [i for i, source in lines if len(source) > 30] == [], "cells of more than 30 lines"
    assert [(i, line) for i, source in lines for line in source if len(line) > 76] == []


@book_of
def test_a_cell_that_varies_also_records_or_asserts(stem):
    idle = [c.source for c in tagged(BOOKS[stem], "varies")
            if not re.search(r"\b(record\(|Recorder\(|assert )", c.source)]
    assert idle == []


@book_of
def test_pictures_have_words(stem):
    pictures = [o for c in code(BOOKS[stem]) for o in c.outputs
                if "image/png" in o.get("data", {})]
    assert [o for o in pictures if not o.metadata.get("image/png", {}).get("alt")] == []


@book_of
def test_the_anatomy_of_a_notebook(stem):
    book = BOOKS[stem]
    opening = words(book.cells[:4])
    assert [w for w in ("You will build", "You need", "You know already") if w not in opening] == []
    ending = re.split(r"^#+ What you built", words(book.cells), flags=re.M)
    assert len(ending) == 2, "one section 'What you built'"
    assert 5 <= ending[1].count("<details>") <= 8, "recall questions with folded answers"
    source = "\n".join(c.source for c in code(book))
    assert source.count("SliderPlot(") >= 2 and len(exercises(book)) >= 3


@book_of
def test_every_check_stands_in_an_exercise_cell(stem):
    book = BOOKS[stem]
    called = [c.source for c in code(book) if re.search(r"\bcheck\(\s*[\"']", c.source)]
    assert called == [c.source for c in tagged(book, "exercise")]


def test_each_registered_exercise_stands_in_one_notebook():
    asked = [name for book in BOOKS.values() for _, name, _ in exercises(book)]
    assert sorted(asked) == sorted(checks.registered())


@pytest.mark.long
@book_of
def test_each_stub_is_unsolved_and_each_folded_solution_passes(stem, capsys):
    book, before = BOOKS[stem], []  # an exercise may use what those before it gave
    for index, name, solution in exercises(book):
        stub = book.cells[index].source
        unsolved, passes = f"… {name}: not solved yet", f"✓ {name}: all"
        if name == "group_kernel" and not triton_or_stub.CAN_RUN:  # a Triton kernel
            passes = unsolved
        for source, verdict in ((stub, unsolved), (solve(stub, solution), passes)):
            names = {}
            for earlier in (definitions(book), *before):
                exec(earlier, names)
            capsys.readouterr()
            exec(source, names)
            said = capsys.readouterr().out
            assert said.startswith(verdict) and said.count("\n") == 1, said
        before.append(solve(stub, solution))


def test_recorded_and_expected_numbers_are_the_same_set():
    lines = [line for book in BOOKS.values() for line in printed(book)]
    recorded = [m["name"] for line in lines if (m := LINE.fullmatch(line))]
    assert [line for line in lines if line.startswith("· ")] == [], "recorded, not expected"
    assert len(recorded) == len(set(recorded)), "a number is recorded twice"
    assert sorted(recorded) == sorted(load_expected("tiny"))
