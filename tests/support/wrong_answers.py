"""Wrong answers as learners write them: each is told what is wrong with it, by the message meant.

That each registered mistake gets its own message is tested in test_exercise.py. In the files
test_wrong_answers_nb01.py and so on the same mistakes are made another way, in the words of the
notebooks' solutions; here is how they are tried.
"""

import pytest

from course.kit import check


def each(wrong):
    """Parameters (name, mine, told) of a table, {exercise: [(wrong function, words told), ...]}."""
    return pytest.mark.parametrize("name, mine, told", [
        pytest.param(name, mine, told, id=f"{name}-{i}")
        for name, answers in wrong.items() for i, (mine, told) in enumerate(answers, 1)])


def assert_told(name, mine, told, capsys):
    """Check that the exercise refuses the function and says these words of it."""
    assert check(name, mine) is not mine
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(("    diagnosis: ", "    perhaps: ")) and told in line
