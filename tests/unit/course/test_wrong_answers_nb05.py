"""Wrong answers to the exercises of notebook 05, as learners write them."""

import math

from qlora_lib.data.gsm8k import to_number
from tests.support.wrong_answers import assert_told, each


def wilson(ends):
    """05's interval; `ends` is a function of (p, z^2, n, the divisor 1 + z^2 / n)."""
    z2 = 1.959963984540054 ** 2
    return lambda correct, n: ends(correct / n, z2, n, 1 + z2 / n)


def around(centre, half):
    return centre - half, centre + half


def grade(equal):
    """05's fourth; `equal` compares two texts."""
    return lambda answers, golds: (
        sum(a is not None and equal(a, g) for a, g in zip(answers, golds)), len(golds))


WRONG = {
    "grade": [
        (grade(lambda a, g: abs(float(to_number(a)) - float(to_number(g))) < 0.1),
         "perhaps: a tolerance accepts 18.0005"),
        (grade(lambda a, g: abs(to_number(a) - to_number(g)) < 0.1), "a tolerance accepts 18.0005"),
        (grade(lambda a, g: float(to_number(a)) == float(to_number(g))), "one number"),
        (grade(lambda a, g: math.isclose(to_number(a), to_number(g))), "or math.isclose"),
    ],
    "wilson_interval": [
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (z2 * (p * (1 - p) / n + z2 / (4 * n))) ** 0.5 / by)),
         "with n squared"),
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5)),
         "the half-width too is divided"),
        (wilson(lambda p, z2, n, by: around(
            p + z2 / 2 / n, (z2 * (p * (1 - p) / n + z2 / 4 / n**2)) ** 0.5 / by)),
         "the centre too is divided"),
        (wilson(lambda p, z2, n, by: around(
            (p + z2 / 2 / n) / by, (p * (1 - p) / n + z2 / 4 / n**2) ** 0.5 / by)),
         "the half-width takes z of them"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
