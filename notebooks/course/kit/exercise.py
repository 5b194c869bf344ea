"""Exercises that answer at once.

    round_to_nearest = check("round_to_nearest", my_round_to_nearest)

runs the exercise's cases on the learner's function beside the reference, prints one line of
verdict and, when wrong, yours beside the expected with a diagnosis. It returns the learner's
function if all cases pass, else the reference: a notebook always runs to its end.

An exercise knows its typical mistakes as wrong functions. A learner whose output equals that of
a wrong function gets the message that belongs to it, and a test can prove every message.
"""
import copy
import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Arguments = Callable[[torch.Generator], tuple]


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    cases: (make, label) pairs; make(generator) gives the arguments, always the same ones, and
        the label says in words what is special about them.
    mistakes: (wrong, message) pairs; `wrong` is what a typical mistake computes, or raises.
    rtol, atol: for floats; whole numbers must be equal. With exact_dtype a tensor must have the
        reference's dtype too; without, whole numbers must still come in a dtype of whole numbers.
    changes: of a call's arguments, afterwards: what the function shall have changed, as the
        reference does.
    """

    name: str
    reference: Callable
    cases: Sequence[tuple[Arguments, str]]
    mistakes: Sequence[tuple[Callable, str]]
    rtol: float = 1e-4
    atol: float = 1e-6
    exact_dtype: bool = True
    changes: Callable[[tuple], Any] | None = None


_EXERCISES: dict[str, Exercise] = {}


def register(exercise: Exercise) -> Exercise:
    """Make `check` know the exercise; ValueError if the name is taken or there are no cases."""
    if exercise.name in _EXERCISES:
        raise ValueError(f"an exercise named '{exercise.name}' is already registered")
    if not exercise.cases:
        raise ValueError(f"exercise '{exercise.name}' has no cases; expected at least one")
    _EXERCISES[exercise.name] = exercise
    return exercise


def registered() -> dict[str, Exercise]:
    """All exercises, those of `course/nb*/exercises.py` included."""
    _import_exercises()
    return _EXERCISES


def exercise_modules() -> list[str]:
    """Names of the modules that register exercises: one a notebook, course.nb01.exercises ..."""
    import course

    books = sorted(m.name for m in pkgutil.iter_modules(course.__path__) if m.name.startswith("nb"))
    return [f"course.{name}.exercises" for name in books]


@functools.cache
def _import_exercises() -> None:
    for name in exercise_modules():
        importlib.import_module(name)


def example(name: str, case: int = 1) -> tuple:
    """The arguments of one case (counted from 1), to try a function on: `f(*example(name))`."""
    exercise = _find(name)
    if not 1 <= case <= len(exercise.cases):
        raise ValueError(f"got case {case} of '{name}'; expected 1 to {len(exercise.cases)}")
    return exercise.cases[case - 1][0](torch.Generator().manual_seed(case))


def check(name: str, mine: Callable | None) -> Callable:
    """Print the verdict on `mine`; return it if every case passes, else the reference.

    A function that returns None or `...`, or raises NotImplementedError, is not solved yet.
    Raises ValueError for a name that no exercise has.
    """
    exercise = _find(name)
    return mine if judge(exercise, run(exercise, mine)) else exercise.reference


def run(exercise: Exercise, function: Callable | None) -> list["Result"]:
    """What the function does in each case."""
    return [_run(exercise, function, case) for case in range(1, len(exercise.cases) + 1)]


def judge(exercise: Exercise, results: list["Result"]) -> bool:
    """Print the verdict on a function that did this; returns whether it passes."""
    name = exercise.name
    if results[0].unsolved:
        print(f"… {name}: not solved yet ({results[0].unsolved}); going on with the reference")
        return False
    targets = run(exercise, exercise.reference)
    for case, (got, want) in enumerate(zip(results, targets), 1):
        if problem := _problem(exercise, got, want):
            label = exercise.cases[case - 1][1]
            print(f"✗ {name}: case {case} of {len(results)} ({label}): {problem}; "
                  "going on with the reference")
            _explain(exercise, results, case, want)
            return False
    print(f"✓ {name}: all {len(results)} cases pass; going on with yours")
    return True


@dataclass
class Result:
    """What one call did: its value or its error, and whether it wrote into its arguments."""

    value: Any = None
    error: Exception | None = None
    wrote: bool = False
    changed: Any = None  # see Exercise.changes

    @property
    def unsolved(self) -> str:
        if isinstance(self.error, NotImplementedError):
            return "it raises NotImplementedError"
        if self.error is None and (self.value is None or self.value is ...):
            return f"it returns {self.value}"
        return ""


def _find(name: str) -> Exercise:
    if name not in registered():
        raise ValueError(f"no exercise is named '{name}'; there are: {', '.join(_EXERCISES)}")
    return _EXERCISES[name]


def _run(exercise: Exercise, function: Callable | None, case: int) -> Result:
    if function is None:
        return Result()
    arguments = example(exercise.name, case)
    before = copy.deepcopy(arguments)
    with torch.random.fork_rng(devices=[]):  # the notebook's own random numbers stay as they are
        # Not torch.manual_seed: without a GPU it writes down the stack for three of them.
        torch.default_generator.manual_seed(case)
        try:
            value = function(*arguments)
        except Exception as error:
            return Result(error=error, wrote=_differ(before, arguments))
    changed = exercise.changes(arguments) if exercise.changes else None
    return Result(value, wrote=_differ(before, arguments), changed=changed)


def _differ(before: Any, after: Any) -> bool:
    """Whether a tensor or array in nested arguments changed; other objects are not looked at."""
    if type(before) is not type(after):
        return True
    if isinstance(before, (tuple, list)):
        return len(before) != len(after) or any(map(_differ, before, after))
    if isinstance(before, dict):
        return before.keys() != after.keys() or any(_differ(before[k], after[k]) for k in before)
    if isinstance(before, (torch.Tensor, np.ndarray)):
        a, b = torch.as_tensor(before), torch.as_tensor(after)
        return a.shape != b.shape or not torch.equal(a.nan_to_num(), b.nan_to_num())
    return False


def _problem(exercise: Exercise, got: Result, want: Result) -> str:
    """What is wrong with `got`, in words; empty if nothing is."""
    if got.error is not None:
        first_line = next(iter(str(got.error).splitlines()), "")
        return f"it raises {type(got.error).__name__}: {first_line}"
    if got.unsolved and want.value is not None:
        return f"{got.unsolved} here"
    if problem := _mismatch(got.value, want.value, exercise):
        return problem
    if _mismatch(got.changed, want.changed, exercise):
        return "right values, but its arguments are not changed as they should be"
    return "right values, but it wrote into its arguments" if got.wrote else ""


def _mismatch(got: Any, want: Any, exercise: Exercise) -> str:
    """The first difference between two values of any kind, in words; kind and shape first."""
    try:
        return _difference(got, want, exercise)
    except Exception:  # text in an array, a sparse tensor, one without data: there is no end of it
        return f"it returns {_kind(got)}, expected {_kind(want)}"


def _difference(got: Any, want: Any, exercise: Exercise) -> str:
    if isinstance(want, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(want):
            return f"it returns {_kind(got)}, expected {_kind(want)}"
        names = [f"value {i} of {len(want)}" for i in range(1, len(want) + 1)]
        names = getattr(want, "_fields", names)  # of a NamedTuple
        problems = ((name, _mismatch(g, w, exercise)) for name, g, w in zip(names, got, want))
        return next((f"{name}: {p}" for name, p in problems if p), "")
    if isinstance(want, (torch.Tensor, np.ndarray)):
        if not isinstance(got, (torch.Tensor, np.ndarray)):
            return f"it returns {_kind(got)}, expected {_kind(want)}"
        if isinstance(got, np.ndarray) > isinstance(want, np.ndarray):  # later cells take a Tensor
            return f"it returns {_kind(got)}, expected a Tensor: torch.as_tensor(...)"
        return _tensor_mismatch(torch.as_tensor(got), torch.as_tensor(want), exercise)
    if isinstance(want, (int, float)) and not isinstance(want, bool):
        got = got.item() if hasattr(got, "item") and np.ndim(got) == 0 else got
        if isinstance(got, bool) or not isinstance(got, (int, float)):
            return f"it returns {_kind(got)}, expected a number"
        equal = got == want if isinstance(want, int) else \
            np.isclose(got, want, rtol=exercise.rtol, atol=exercise.atol, equal_nan=True)
        return "" if equal else "wrong value"
    if type(got) is not type(want):
        return f"it returns {_kind(got)}, expected {_kind(want)}"
    return "" if got == want else "wrong value"


def _tensor_mismatch(got: torch.Tensor, want: torch.Tensor, exercise: Exercise) -> str:
    if got.shape != want.shape:
        return f"it returns shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    same = _close(got, want, exercise)
    if not same.all():
        return f"correct shape, but wrong values at {int((~same).sum())} of {same.numel()} places"
    if want.requires_grad > got.requires_grad:
        return "right values, but cut off from autograd, so that nothing can be trained by them"
    if exercise.exact_dtype and got.dtype != want.dtype:
        return f"right values, but dtype {got.dtype}, expected {want.dtype}"
    if got.is_floating_point() > want.is_floating_point():
        return f"right values, but as {got.dtype}, expected whole numbers, such as {want.dtype}"
    return ""


def _close(got: torch.Tensor, want: torch.Tensor, exercise: Exercise) -> torch.Tensor:
    if not want.is_floating_point():
        return got.double() == want.double()  # as they are, PyTorch would round both to fp16
    return torch.isclose(got.double(), want.double(), rtol=exercise.rtol, atol=exercise.atol,
                         equal_nan=True)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return f"an array of {value.dtype}"
    if isinstance(value, torch.Tensor) and (value.is_meta or value.layout != torch.strided):
        return f"a {'meta' if value.is_meta else 'sparse'} Tensor of shape {tuple(value.shape)}"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None:
        return "None"
    try:
        return f"{type(value).__name__} {value!r:.60}"
    except Exception:  # whatever its __repr__ does; an int of too many digits
        return type(value).__name__


def _explain(exercise: Exercise, results: list[Result], case: int, want: Result) -> None:
    """Print the diagnosis of a known mistake, then yours beside the expected."""
    if diagnosis := _diagnosis(exercise, results, case):
        print(f"    {diagnosis}")
    got = results[case - 1]
    if got.error is None:
        print(side_by_side(got.value, want.value))
    print(f"    try it: your_function(*example(\"{exercise.name}\", {case}))")


def _diagnosis(exercise: Exercise, results: list[Result], case: int) -> str:
    """The message of the mistake that does the same in all cases. With none such, as a guess, that
    of the mistake which does the same in the failing case and in the most others."""
    best, guess = 0, ""
    for wrong, message in exercise.mistakes:
        if not _alike(exercise, results[case - 1], _run(exercise, wrong, case)):
            continue
        same = [_alike(exercise, got, _run(exercise, wrong, n))
                for n, got in enumerate(results, 1)]
        if all(same):
            return f"diagnosis: {message}"
        if sum(same) > best:
            best, guess = sum(same), f"perhaps: {message}"
    return guess


def _alike(exercise: Exercise, a: Result, b: Result) -> bool:
    if a.error is not None or b.error is not None:
        return type(a.error) is type(b.error)
    same = not _mismatch(a.value, b.value, exercise)
    return a.wrote == b.wrote and same and not _mismatch(a.changed, b.changed, exercise)


def side_by_side(yours: Any, expected: Any, width: int = 34) -> str:
    """Two columns of text; tensors are cut to their first 4 rows and 4 columns."""
    left, right = _shown(yours, width), _shown(expected, width)
    height = max(len(left), len(right))
    left += [""] * (height - len(left))
    right += [""] * (height - len(right))
    rows = zip(["yours", *left], ["expected", *right])
    return "\n".join(f"    {a:<{width}}  {b}".rstrip() for a, b in rows)


def _lines(value: Any, width: int) -> list[str]:
    if hasattr(value, "_fields"):
        return [line for name, part in zip(value._fields, value)
                for line in [f"{name}:"[:width], *_lines(part, width)]]
    if isinstance(value, (tuple, list)):
        return [line for part in value for line in
                ([str(part)[:width]] if _is_a_row(part) else _lines(part, width))]
    if isinstance(value, (torch.Tensor, np.ndarray)) and np.ndim(value) > 0:
        corner = torch.as_tensor(value).detach()
        if corner.numel() == 0:
            return [f"no numbers, shape {tuple(corner.shape)}"[:width]]
        corner = corner.reshape(-1, corner.shape[-1])[:4, :4].tolist()
        return [" ".join((str(x) if type(x) is int else f"{x:.4g}").rjust(7) for x in row)[:width]
                for row in corner]
    return [str(value)[:width]]


def _is_a_row(value: Any) -> bool:
    """Whether a list within a list holds plain values alone, and so stands in one line."""
    return isinstance(value, (tuple, list)) and all(
        isinstance(part, (int, float, str, type(None))) for part in value)


def _shown(value: Any, width: int) -> list[str]:
    try:
        return _lines(value, width)
    except Exception:
        return [_kind(value)[:width]]
