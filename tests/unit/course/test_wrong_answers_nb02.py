"""Wrong answers to the exercises of notebook 02, as learners write them."""

import torch

from course.nb02 import exercises as nb02
from tests.support.wrong_answers import assert_told, each


WRONG = {
    "masked_hessian": [
        (lambda x, mask: (real := torch.cat([row[:int(m.sum())] for row, m in zip(x, mask)])
                          .float()).T @ real / len(real), "go by the mask"),
        (lambda x, mask: sum(row[:int(m.sum())].float().T @ row[:int(m.sum())].float()
                             for row, m in zip(x, mask)) / mask.sum(), "go by the mask"),
        (lambda x, mask: torch.einsum("bsi,bsj->ij", x.float() * mask.unsqueeze(-1), x.float())
         / mask.numel(), "not by batch * seq"),
    ],
    "slow_gptq": [
        (lambda w, h, scale, zero, top: nb02.slow_gptq(w, h.diagonal().diag(), scale, zero, top),
         "this is round to nearest"),
        (lambda w, h, scale, zero, top: nb02.on_grid(w, scale, zero, top),
         "this is round to nearest"),
        (lambda w, h, *grid: nb02.slow_gptq(w, h + 0.01 * h.diagonal().mean()
                                            * torch.eye(len(h)), *grid), "no damping"),
    ],
    "upper_factor": [
        (lambda h, d: torch.linalg.cholesky(torch.linalg.inv(
            h + d * h.diagonal().mean() * torch.eye(len(h)))), "lower factor"),
        (lambda h, d: torch.linalg.cholesky(h + d * h.diagonal().mean() * torch.eye(len(h)),
                                            upper=True), "U is a factor of its inverse"),
        (lambda h, d: torch.linalg.cholesky(torch.linalg.inv(h + d * h.diagonal().mean()),
                                            upper=True), "the diagonal alone"),
        (lambda h, d: torch.linalg.solve_triangular(torch.linalg.cholesky(
            h + d * h.diagonal().mean() * torch.eye(len(h))), torch.eye(len(h), dtype=h.dtype),
            upper=False), "it is lower triangular"),
    ],
    "gptq_columns": [
        (lambda w, u, *grid: nb02.gptq_columns(w, u.diagonal().diag(), *grid),
         "its error never moves"),
        (lambda w, u, *grid: nb02.gptq_columns(w, torch.linalg.inv(u.T @ u), *grid),
         "H where U belongs"),
        (lambda w, u, *grid: ((pair := nb02.gptq_columns(w, u, *grid))[0], w - pair[0]),
         "E is not W - Q"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
