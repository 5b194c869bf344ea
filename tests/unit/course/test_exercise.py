"""Checks of exercises, on a toy; then every exercise that the course registers."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from course.kit import exercise as checks
from course.kit.exercise import Exercise, check, example


def rescale(x, bits):
    return torch.round(x * 2 ** bits) / 2 ** bits


def floored(x, bits):
    return torch.floor(x * 2 ** bits) / 2 ** bits


def in_place(x, bits):
    return x.mul_(2 ** bits).round_().div_(2 ** bits)


def flattened(x, bits):
    return rescale(x, bits).flatten()


def whole(x, bits):
    return torch.round(x * 2 ** bits)


def for_positive_only(x, bits):
    return rescale(x, bits) if (x >= 0).all() else floored(x, bits)


TOY = Exercise(
    name="toy", reference=rescale,
    cases=[(lambda g: (torch.rand(2, 3, generator=g), 2), "positive numbers"),
           (lambda g: (torch.randn(2, 3, generator=g), 3), "numbers of both signs")],
    mistakes=[(floored, "floor is not rounding"), (in_place, "make a copy first"),
              (flattened, "keep the shape"), (whole, "divide again"),
              (for_positive_only, "what about negative numbers?")])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(checks, "_EXERCISES", dict(checks.registered()))
    return checks.register(TOY)


def test_a_right_answer_is_used(toy, capsys):
    def mine(x, bits):
        return (x * 2 ** bits).round() * 0.5 ** bits
    assert check("toy", mine) is mine
    assert capsys.readouterr().out == "✓ toy: all 2 cases pass; going on with yours\n"


def raising_stub(x, bits):
    raise NotImplementedError


@pytest.mark.parametrize("stub", [None, lambda x, b: None, lambda x, b: ..., raising_stub])
def test_unsolved_goes_on_with_the_reference(toy, capsys, stub):
    assert check("toy", stub) is rescale
    said = capsys.readouterr().out
    assert said.startswith("… toy: not solved yet") and said.count("\n") == 1


def test_wrong_shows_yours_beside_expected_and_how_to_try(toy, capsys):
    assert check("toy", floored) is rescale
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✗ toy: case 1 of 2 (positive numbers): correct shape, but wrong")
    assert lines[1].strip() == "diagnosis: floor is not rounding"
    assert lines[2].split() == ["yours", "expected"] and len(lines[3].split()) == 6
    assert 'example("toy", 1)' in lines[-1] and max(map(len, lines[1:])) <= 76
    x, bits = example("toy", 1)
    assert x.shape == (2, 3) and torch.equal(x, example("toy", 1)[0])


def test_a_mistake_alike_in_some_cases_is_a_guess_the_likest_of_all(monkeypatch, capsys):
    monkeypatch.setattr(checks, "_EXERCISES", dict(checks.registered()))
    checks.register(Exercise(
        name="steps", reference=lambda x: x, cases=[(lambda g, x=x: (x,), "") for x in (1, 2, 3)],
        mistakes=[(lambda x: 2 if x == 1 else 0, "once"), (lambda x: 2 * x, "twice"),
                  (lambda x: x + (x > 1), "not in the failing case")]))
    check("steps", lambda x: 2 * x if x < 3 else 4)
    assert "    perhaps: twice\n" in capsys.readouterr().out
    check("steps", lambda x: -x)
    assert "perhaps" not in capsys.readouterr().out


class Unshown:
    def __repr__(self):
        raise RuntimeError("no")


def broken_repr(x, bits):
    return Unshown()


@pytest.mark.parametrize("wrong, problem", [
    (flattened, "it returns shape (6,), expected (2, 3)"),
    (lambda x, b: rescale(x, b).double(), "right values, but dtype torch.float64"),
    (in_place, "it wrote into its arguments"),
    (lambda x, b: rescale(x, b).tolist(), "it returns a list of 2, expected a Tensor"),
    (lambda x, b: 1 / 0, "it raises ZeroDivisionError: division by zero"),
    (lambda x: x, "it raises TypeError"),
    (lambda x, b: rescale(x, b) * float("nan"), "wrong values at 6 of 6 places"),
    (lambda x, b: rescale(x, b) if b == 2 else None, "case 2 of 2"),
    (lambda x, b: torch.tensor([]), "it returns shape (0,), expected (2, 3)"),
    (lambda x, b: torch.zeros(3, 0), "it returns shape (3, 0), expected (2, 3)"),
    (lambda x, b: [torch.tensor([])], "it returns a list of 1, expected a Tensor"),
    (lambda x, b: rescale(x, b).numpy(), "it returns a ndarray of shape (2, 3), expected a Tensor"),
    (lambda x, b: np.array(["a", None]), "it returns an array of object, expected a Tensor"),
    (lambda x, b: np.array(["a", "b"]), "it returns an array of <U1, expected a Tensor"),
    (lambda x, b: rescale(x, b).to("meta"), "it returns a meta Tensor of shape (2, 3), expected"),
    (lambda x, b: rescale(x, b).to_sparse(), "it returns a sparse Tensor of shape (2, 3), expec"),
    (lambda x, b: 10 ** 5000, "it returns int, expected a Tensor"),
    (broken_repr, "it returns Unshown, expected a Tensor"),
])
def test_the_first_thing_wrong_is_said_in_words(toy, capsys, wrong, problem):
    assert check("toy", wrong) is rescale
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize("want, right, wrong", [
    (3, torch.tensor(3), 4), (0.5, np.float64(0.5), 0.6), (True, True, 1), ("a", "a", "b"),
    (None, None, 0), ((1, torch.ones(2)), [1, torch.ones(2)], (1, torch.zeros(2))),
    ((1, 2), (1, 2), (1, 2, 3)), (1.0, 1, "1"), (1, 1, True)])
def test_values_of_every_kind_are_compared(want, right, wrong):
    assert checks._mismatch(right, want, TOY) == ""
    assert checks._mismatch(wrong, want, TOY) != ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whole_numbers_are_equal_whatever_the_dtype(dtype):
    want, by_value = torch.tensor([2049]), replace(TOY, exact_dtype=False)
    assert checks._mismatch(want.int(), want, by_value) == ""
    assert "expected whole numbers" in checks._mismatch(want.double(), want, by_value)
    assert want == want.to(dtype), "as PyTorch compares: 2049 is rounded too"
    assert "wrong values at 1 of 1" in checks._mismatch(want.to(dtype), want, by_value)


def test_what_is_to_be_trained_keeps_its_graph():
    plain, trained = torch.ones(2), torch.ones(2, requires_grad=True)
    assert "cut off from autograd" in checks._mismatch(plain, trained, TOY)
    assert checks._mismatch(trained, plain, TOY) == checks._mismatch(trained, trained, TOY) == ""


def test_a_row_of_a_nested_list_stands_in_one_line():
    shown = checks.side_by_side([[1, 2], [3, 4]], [[1, 2], [3, 5]]).splitlines()
    assert [line.split("  ")[2].strip() for line in shown] == ["yours", "[1, 2]", "[3, 4]"]
    assert len(checks.side_by_side([1, 2], [1, 3]).splitlines()) == 3


def test_an_argument_made_into_something_else_is_written_into():
    before, text = [torch.ones(2)], ["text"]
    assert checks._differ(before, text) and not checks._differ(before, [torch.ones(2)])


def test_a_number_too_large_to_compare_is_wrong():
    assert checks._mismatch(10 ** 400, 0.5, TOY).startswith("it returns int 1000")


def test_a_check_leaves_the_notebooks_random_numbers_alone(toy):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check("toy", lambda x, b: x + torch.rand_like(x))
    assert torch.equal(torch.rand(1), expected)


def test_a_function_draws_the_same_random_numbers_in_each_check(toy):
    drawn = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        check("toy", lambda x, b: drawn.append(torch.rand(3)))
    assert torch.equal(drawn[0], drawn[len(TOY.cases)])


def test_names_are_unique_and_unknown_ones_are_named(toy):
    with pytest.raises(ValueError, match="'toy' is already registered"):
        checks.register(TOY)
    with pytest.raises(ValueError, match="no exercise is named 'toj'"):
        check("toj", rescale)
    with pytest.raises(ValueError, match="case 3 of 'toy'"):
        example("toy", 3)


# --- every exercise of the course, and the toy --------------------------------------------

ALL = [*checks.registered().values(), TOY]
MISTAKES = [pytest.param(e, w, m, id=f"{e.name}-{i}")
            for e in ALL for i, (w, m) in enumerate(e.mistakes, 1)]


@pytest.fixture
def all_exercises(monkeypatch):
    monkeypatch.setattr(checks, "_EXERCISES", {e.name: e for e in ALL})


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_the_reference_passes_its_own_cases(all_exercises, exercise, capsys):
    def mine(*arguments):
        return exercise.reference(*arguments)
    assert check(exercise.name, mine) is mine, capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("exercise, wrong, message", MISTAKES)
def test_each_mistake_is_told_with_its_own_message(all_exercises, exercise, wrong, message, capsys):
    assert check(exercise.name, wrong) is exercise.reference
    assert f"    diagnosis: {message}\n" in capsys.readouterr().out


@pytest.mark.parametrize("exercise", ALL, ids=lambda e: e.name)
def test_an_exercise_knows_five_mistakes_each_with_words_of_its_own(exercise):
    assert len({message for _, message in exercise.mistakes}) == len(exercise.mistakes) >= 5
