"""Exercises of notebook 02: one OBS step, the Hessian, the lazy update, the order undone."""
import torch
from torch import Tensor

from ..kit.exercise import Exercise, register


def _inputs(g: torch.Generator, tokens: int, features: int) -> Tensor:
    """Correlated inputs (tokens, features): neighbours share part of their noise."""
    noise = torch.randn(tokens, features + 1, generator=g)
    return noise[:, 1:] + 0.8 * noise[:, :-1]


def _hessian(g: torch.Generator, features: int) -> Tensor:
    x = _inputs(g, 4 * features, features)
    return x.T @ x / len(x)  # (features, features)


# --- 1. One step of the Optimal Brain Surgeon --------------------------------------------

def obs_step(weight: Tensor, hessian: Tensor, column: int, target: Tensor) -> Tensor:
    inverse = torch.linalg.inv(hessian)
    error = (weight[:, column] - target) / inverse[column, column]  # (out,)
    return weight - torch.outer(error, inverse[column])


def _step(sign=-1, divisor=torch.linalg.inv, row=torch.linalg.inv):
    """A step with another sign, divisor or row; both are read off a matrix made of H."""
    def wrong(weight, hessian, column, target):
        error = (weight[:, column] - target) / divisor(hessian)[column, column]
        return weight + sign * torch.outer(error, row(hessian)[column])
    return wrong


def _itself(hessian):
    return hessian


_step_sign = _step(sign=1)
_step_not_divided = _step(divisor=torch.ones_like)
_step_with_hessian = _step(divisor=_itself, row=_itself)
_step_divided_by_hessian = _step(divisor=_itself)


def _step_of_the_column_only(weight, hessian, column, target):
    moved = weight.clone()
    moved[:, column] = target
    return moved


def _step_later_columns_only(weight, hessian, column, target):
    moved = obs_step(weight, hessian, column, target)
    moved[:, :column] = weight[:, :column]
    return moved


def _step_in_place(weight, hessian, column, target):
    weight -= weight.clone() - obs_step(weight, hessian, column, target)
    return weight


def _step_not_outer(weight, hessian, column, target):
    inverse = torch.linalg.inv(hessian)
    return weight - (weight[:, column] - target) / inverse[column, column] * inverse[column]


def _step_column_left(weight, hessian, column, target):
    moved = obs_step(weight, hessian, column, target)
    moved[:, column] = weight[:, column]
    return moved


register(Exercise(
    name="obs_step",
    reference=obs_step,
    cases=[
        (lambda g: (torch.tensor([[1.4, 1.3]]), torch.tensor([[6.0, 5.0], [5.0, 6.0]]), 0,
                    torch.tensor([1.0])), "the two weights from above"),
        (lambda g: (torch.randn(3, 6, generator=g), _hessian(g, 6), 0,
                    torch.randn(3, generator=g)), "three rows, the first column"),
        (lambda g: (torch.randn(3, 6, generator=g), _hessian(g, 6), 4,
                    torch.randn(3, generator=g)), "three rows, a column in the middle"),
        (lambda g: (torch.randn(2, 4, generator=g), torch.eye(4), 2,
                    torch.randn(2, generator=g)), "inputs that are not correlated"),
    ],
    mistakes=[
        (_step_sign, "the sign: the column must move TO the target, that is by "
                     "target - weight; you went the other way"),
        (_step_not_divided, "divide by the inverse's own diagonal element: without it the column "
                            "does not land on the target"),
        (_step_with_hessian, "this uses H where the formula has H^-1: invert first"),
        (_step_divided_by_hessian, "the divisor is [H^-1]_qq, an element of the inverse, not "
                                   "H_qq"),
        (_step_of_the_column_only, "this is plain rounding: the other columns must move too"),
        (_step_later_columns_only, "one OBS step moves every other column, those on the left as "
                                   "well; only a loop that has fixed them leaves them out"),
        (_step_column_left, "the column itself must land on the target"),
        (_step_in_place, "right values, but `weight` itself was changed: subtract into a new "
                         "tensor"),
        (_step_not_outer, "errors (out,) times a row of the inverse (in,): every pair of them is "
                          "needed, an outer product (out, in)"),
        (lambda w, h, c, t: obs_step(w, h, c, t) - w, "this is the change; add it to the weights"),
    ],
))


# --- 2. The Hessian of a padded batch ----------------------------------------------------

def masked_hessian(x: Tensor, mask: Tensor) -> Tensor:
    real = x[mask.bool()].float()  # (batch, seq, in) -> (tokens, in)
    return real.T @ real / len(real)


def _real(x, mask):
    return x[mask.bool()].float()  # (batch, seq, in) -> (tokens, in)


def _moment(take=_real, count=lambda taken, mask: len(taken)):
    """A second moment of other tokens, or divided by another count."""
    def wrong(x, mask):
        taken = take(x, mask)
        return taken.T @ taken / count(taken, mask)
    return wrong


_padding_counted = _moment(take=lambda x, mask: x.flatten(0, 1).float())
_mean_over_padding = _moment(count=lambda taken, mask: mask.numel())
_summed = _moment(count=lambda taken, mask: 1)
_left_in_input_dtype = _moment(take=lambda x, mask: x[mask.bool()])
_centered = _moment(take=lambda x, mask: _real(x, mask) - _real(x, mask).mean(0))


def _doubled(x, mask):
    return 2 * masked_hessian(x, mask)


def _in_input_dtype(x, mask):
    return _left_in_input_dtype(x, mask).float()


def _indexed_by_int(x, mask):
    real = x[mask].float()
    return real.t() @ real / len(real)


def _mean_of_sequences(x, mask):
    rows = [x[i][mask[i].bool()].float() for i in range(len(x))]
    return sum(r.T @ r / len(r) for r in rows) / len(rows)


def _tokens_by_tokens(x, mask):
    real = x[mask.bool()].float()
    return real @ real.T / len(real)


def _batch(lengths, dtype=torch.float32, mask_dtype=torch.bool, features=3):
    def make(g):
        x = torch.randn(len(lengths), max(lengths), features, generator=g) + 0.5
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # (batch, seq)
        x = torch.where(mask.unsqueeze(-1), x, 5.0)  # padding is loud
        return x.to(dtype), mask.to(mask_dtype)
    return make


register(Exercise(
    name="masked_hessian",
    reference=masked_hessian,
    cases=[
        (_batch([5, 2]), "two rows, one with 3 pads"),
        (_batch([4, 4]), "no padding at all"),
        (_batch([6, 1, 3], mask_dtype=torch.int64), "a mask of 0 and 1 in int64"),
        (_batch([300, 40], dtype=torch.bfloat16), "inputs in bf16"),
    ],
    mistakes=[
        (_padding_counted, "the padding is counted: keep x[mask] only"),
        (_mean_over_padding, "the mean is over real tokens: divide by their number, not by "
                             "batch * seq"),
        (_summed, "this is the sum; divide by the number of real tokens"),
        (_doubled, "the factor 2 is the paper's second derivative; here H is the mean of x^T x "
                   "(the loop gives the same either way)"),
        (_left_in_input_dtype, "convert the inputs to fp32 before the product: a sum in bf16 "
                               "keeps 8 bits only"),
        (_in_input_dtype, "the product was summed in bf16 and converted afterwards, too late: "
                          "convert the inputs"),
        (_centered, "do not subtract the mean: the layer sees x, not x minus its mean"),
        (_indexed_by_int, "a mask of whole numbers picks rows by number: x[mask.bool()]"),
        (_mean_of_sequences, "each sequence counts the same here, however short; each token "
                             "should"),
        (_tokens_by_tokens, "this is x x^T, tokens by tokens; H is x^T x, features by features"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 3. The lazy update ------------------------------------------------------------------

def lazy_update(weight: Tensor, errors: Tensor, factor: Tensor, start: int, end: int) -> Tensor:
    moved = weight.clone()
    moved[:, end:] -= errors @ factor[start:end, end:]  # (out, block) @ (block, rest)
    return moved


def _update(sign=-1, rows=lambda start, end: slice(start, end), first=lambda start, end: end):
    """A lazy update with another sign, rows of the factor, or first column that moves."""
    def wrong(weight, errors, factor, start, end):
        moved, columns = weight.clone(), slice(first(start, end), None)
        moved[:, columns] += sign * (errors @ factor[rows(start, end), columns])
        return moved
    return wrong


def _local_rows(start, end):
    return slice(0, end - start)


_update_sign = _update(sign=1)
_update_local_rows = _update(rows=_local_rows)
_update_sign_and_local_rows = _update(sign=1, rows=_local_rows)
_update_local_columns = _update(first=lambda start, end: end - start)
_update_whole_row = _update(first=lambda start, end: start)


def _update_divided_again(weight, errors, factor, start, end):
    moved = weight.clone()
    moved[:, end:] -= (errors / factor.diagonal()[start:end]) @ factor[start:end, end:]
    return moved


def _update_nothing(weight, errors, factor, start, end):
    return weight.clone()


def _update_in_place(weight, errors, factor, start, end):
    weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _update_next_block(weight, errors, factor, start, end):
    moved, stop = weight.clone(), 2 * end - start
    moved[:, end:stop] -= errors @ factor[start:end, end:stop]
    return moved


def _blocks(out, features, start, end):
    def make(g):
        inverse = torch.linalg.inv(_hessian(g, features).double())
        factor = torch.linalg.cholesky(inverse, upper=True).float()
        return (torch.randn(out, features, generator=g),
                torch.randn(out, end - start, generator=g), factor, start, end)
    return make


register(Exercise(
    name="lazy_update",
    reference=lazy_update,
    cases=[
        (_blocks(3, 8, 0, 4), "the first block of two"),
        (_blocks(3, 12, 4, 8), "the block in the middle of three"),
        (_blocks(2, 10, 3, 6), "a last block that is longer than the others"),
        (_blocks(2, 6, 4, 6), "the last block: nothing is left to move"),
    ],
    mistakes=[
        (_update_sign, "the sign: the weights to come must take over what was lost, so the "
                       "product is subtracted"),
        (_update_local_rows, "the rows of the factor are numbered from the left end of the "
                             "matrix, not of the block: start:end, not :end - start"),
        (_update_sign_and_local_rows, "both bugs are still there: the sign, and rows :end - start "
                                      "where start:end belongs"),
        (_update_local_columns, "columns that come after the block begin at `end`; `end - start` "
                                "is a position inside the block"),
        (_update_whole_row, "the block itself is done: only the columns from `end` on move"),
        (_update_divided_again, "the errors are divided by the diagonal already, in the loop"),
        (_update_nothing, "nothing moved. Below its diagonal the factor holds zeros: take rows "
                          "start:end and columns end:"),
        (_update_in_place, "right values, but the argument was changed: clone it first"),
        (_update_next_block, "the whole rest must move, not just the next block"),
        (lambda w, e, f, start, end: lazy_update(w, e, f, start, end)[:, end:],
         "this is the rest alone; return the whole weight, the finished block as it was"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 4. The order undone -----------------------------------------------------------------

def undo_order(codes: Tensor, order: Tensor) -> Tensor:
    return codes[:, order.argsort()]


def _order_again(codes, order):
    return codes[:, order]


def _order_left(codes, order):
    return codes.clone()


def _rows_sorted(codes, order):
    return codes[order.argsort() % len(codes)]


def _order_reversed(codes, order):
    return codes[:, order.flip(0)]


def _descending(codes, order):
    return codes[:, order.argsort(descending=True)]


def _columns_sorted(codes, order):
    return codes.sort(dim=1).values


def _permuted(rows, order):
    def make(g):
        codes = torch.stack([torch.randperm(16, generator=g)[:len(order)] for _ in range(rows)])
        return codes, torch.tensor(order)  # (rows, in), (in,)
    return make


register(Exercise(
    name="undo_order",
    reference=undo_order,
    cases=[
        (_permuted(2, [1, 0, 3, 2]), "neighbors swapped"),
        (_permuted(2, [2, 0, 1, 3]), "three columns in a ring"),
        (_permuted(5, [4, 2, 0, 5, 1, 3]), "five rows, six columns"),
        (_permuted(3, [0, 1, 2]), "nothing was reordered"),
    ],
    mistakes=[
        (_order_again, "codes[:, order] permutes a second time. It works on swaps only, which "
                       "undo themselves; in general you need the inverse, order.argsort()"),
        (_order_left, "the columns are still in the order of the loop"),
        (_rows_sorted, "the order is one of columns, the second dimension"),
        (_order_reversed, "reading the order backwards is not its inverse: where did column 0 "
                          "go?"),
        (_descending, "argsort in ascending order gives the inverse of a permutation"),
        (_columns_sorted, "this sorts the codes of each row by value; columns must move as a "
                          "whole, by the order"),
    ],
))


# --- 5. The loss that inputs nobody has seen will have -------------------------------------

def foretold_loss(factor: Tensor, other: Tensor) -> Tensor:
    v = factor / factor.diagonal().unsqueeze(1)  # each row with 1 on the diagonal
    return ((v @ other) * v).sum()  # tr(V H' V^T)


def _foretold(rows):
    """The trace with something else in the place of V."""
    return lambda factor, other: (rows(factor) @ other @ rows(factor).T).trace()


register(Exercise(
    name="foretold_loss",
    reference=foretold_loss,
    cases=[
        (lambda g: (torch.tensor([[2.0, -1.0], [0.0, 0.5]]), torch.eye(2)), "two inputs"),
        (lambda g: (torch.linalg.cholesky(_hessian(g, 5).inverse(), upper=True),
                    _hessian(g, 5)), "five inputs, another H"),
        (lambda g: (3 * torch.eye(4), _hessian(g, 4)), "no repairs: round to nearest"),
    ],
    mistakes=[
        (_foretold(lambda u: u), "U as it is gives the scaled errors; divide each row by its "
                                 "diagonal element first"),
        (_foretold(lambda u: u / u.diagonal()), "this divides the columns: row j of U belongs to "
                                                "column j's error, so divide the rows"),
        (lambda u, h: foretold_loss(u, h.diagonal().diag()),
         "inputs are correlated: take all of H', not its diagonal alone"),
        (lambda u, h: u.diagonal().pow(-2).sum(), "this is section 7's sum, in which H judges "
                                                  "itself; here another H' judges"),
        (lambda u, h: (u / u.diagonal().unsqueeze(1)) @ h @ (u / u.diagonal().unsqueeze(1)).T,
         "this is the matrix V H' V^T; the loss is its trace"),
        (lambda u, h: foretold_loss(u, h) / len(h), "the sum over the columns, not the mean"),
    ],
    rtol=1e-4, atol=1e-5,
))
