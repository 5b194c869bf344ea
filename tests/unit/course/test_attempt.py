"""What a test says about a function, in the words that notebook 13 prints."""

import pytest

from course.nb13.attempt import attempt


@pytest.mark.parametrize("function, said", [
    (lambda: 1, "passes: one is one\n"),
    (lambda: 2, "fails: one is one (it is 2)\n"),
    (lambda: [][0], "fails: one is one (list index out of range)\n"),
])  # fmt: skip
def test_it_passes_or_fails_and_says_so(function, said, capsys):
    def test_one_is_one(f):
        assert f() == 1, f"it is {f()}"

    assert attempt(test_one_is_one, function) is said.startswith("passes")
    assert capsys.readouterr().out == said
