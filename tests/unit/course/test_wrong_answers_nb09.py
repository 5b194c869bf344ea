"""Wrong answers to the exercises of notebook 09, as learners write them."""

import torch

from course.nb09 import exercises as nb09
from tests.support.wrong_answers import assert_told, each


WRONG = {
    "nearest_plane": [
        (lambda b, y: torch.linalg.solve(b.T @ b, b.T @ y).round(), "each alone"),
        (lambda b, y: (torch.linalg.qr(b)[0].T @ y / torch.linalg.qr(b)[1].diagonal()).round(),
         "begin with the LAST"),
    ],
    "refit_row": [
        (lambda x, w, n, size: nb09.refit_row(x, w, n, size).abs(), "below 0 stays below 0"),
        (lambda x, w, n, size: nb09.refit_row(x, w, n, size).relu(), "may give a scale below 0"),
    ],
    "refit_rows": [
        (lambda h, w, n, size: torch.stack([torch.linalg.solve(
            (m := torch.block_diag(*row.split(size))) @ h @ m.T, m @ h @ own).abs()
            for own, row in zip(w, n)]), "below 0 stays below 0"),
        (lambda h, w, n, size: nb09.refit_rows(h, w, n, size).relu(), "may give a scale below 0"),
        (lambda h, w, n, size: torch.stack([(row @ h @ own / (row @ h @ row)).expand(
            len(h) // size) for own, row in zip(w, n)]), "one scale for a whole row"),
        (lambda h, w, n, size: torch.stack([torch.linalg.solve(
            (m := torch.block_diag(*row.split(size))) @ m.T, m @ own)
            for own, row in zip(w, n)]), "H is missing"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
