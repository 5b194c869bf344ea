"""Exercises of notebook 02: one OBS step; GPTQ in three steps, slow, by a factor, in a fast loop;
the Hessian, the lazy update, the order undone."""
import torch
from torch import Tensor

from ..kit.exercise import Exercise, register
from .inverse_factor import inverse_factor


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


def _step_others_wrong_way(weight, hessian, column, target):
    moved = 2 * weight - obs_step(weight, hessian, column, target)
    moved[:, column] = target
    return moved


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
        (_step_divided_by_hessian, "the divisor is [H^-1]_jj, an element of the inverse, not "
                                   "H_jj"),
        (_step_of_the_column_only, "this is plain rounding: the other columns must move too"),
        (_step_later_columns_only, "one OBS step moves every other column, those on the left as "
                                   "well; only a loop that has fixed them leaves them out"),
        (_step_column_left, "the column itself must land on the target"),
        (_step_in_place, "right values, but `weight` itself was changed: subtract into a new "
                         "tensor"),
        (_step_not_outer, "errors (out,) times a row of the inverse (in,): every pair of them is "
                          "needed, an outer product (out, in)"),
        (lambda w, h, c, t: obs_step(w, h, c, t) - w, "this is the change; add it to the weights"),
        (_step_others_wrong_way, "the column is on its target, but the others go the wrong way: "
                                 "subtract from the whole row"),
        (lambda w, h, c, t: obs_step(w, h, c, 0 * t), "this brings the column to 0: the numerator "
                                                      "is weight - target"),
    ],
))


# --- 2. GPTQ itself: slowly, the factor, the loop ------------------------------------------

def on_grid(w: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """The value on the grid that is nearest to each weight; all tensors of one shape."""
    return ((w / scale + zero).round().clamp(0, max_code) - zero) * scale


def slow_gptq(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor,
              max_code: int) -> Tensor:
    w = weight.clone()
    for j in range(w.shape[1]):
        value = on_grid(w[:, j], scale[:, j], zero[:, j], max_code)
        w[:, j:] = obs_step(w[:, j:], hessian[j:, j:], 0, value)
    return w


def _slow(inverse_at=lambda h, j: torch.linalg.inv(h[j:, j:]), sign=-1,
          divisor=lambda inverse: inverse[0, 0], grid=on_grid):
    """Slow GPTQ with another inverse at column j, another sign, divisor or way onto the grid."""
    def wrong(weight, hessian, scale, zero, max_code):
        w = weight.clone()
        for j in range(w.shape[1]):
            inverse = inverse_at(hessian, j)
            value = grid(w[:, j], scale[:, j], zero[:, j], max_code)
            error = (w[:, j] - value) / divisor(inverse)
            w[:, j:] += sign * torch.outer(error, inverse[0])
        return w
    return wrong


def _slow_nearest(weight, hessian, scale, zero, max_code):
    return on_grid(weight, scale, zero, max_code)


def _slow_whole_row(weight, hessian, scale, zero, max_code):
    w = weight.clone()
    for j in range(w.shape[1]):
        w = obs_step(w, hessian, j, on_grid(w[:, j], scale[:, j], zero[:, j], max_code))
    return w


def _slow_backwards(weight, hessian, scale, zero, max_code):
    flipped = (t.flip(1) for t in (scale, zero))
    return slow_gptq(weight.flip(1), hessian.flip(0, 1), *flipped, max_code).flip(1)


def _slow_put(sign=-1, divisor=lambda inverse: inverse[0, 0]):
    """Column j is put on its value, the columns after it move with another sign or divisor."""
    def wrong(weight, hessian, scale, zero, max_code):
        w = weight.clone()
        for j in range(w.shape[1]):
            inverse = torch.linalg.inv(hessian[j:, j:])
            value = on_grid(w[:, j], scale[:, j], zero[:, j], max_code)
            error = (w[:, j] - value) / divisor(inverse)
            w[:, j + 1:] += sign * torch.outer(error, inverse[0, 1:])
            w[:, j] = value
        return w
    return wrong


def _slow_cheapest_first(weight, hessian, scale, zero, max_code):
    w = weight.clone()
    for row in range(len(w)):
        left = list(range(w.shape[1]))
        while left:
            inverse = torch.linalg.inv(hessian[left][:, left])
            error = w[row, left] - on_grid(w[row, left], scale[row, left], zero[row, left],
                                           max_code)
            k = (error.square() / inverse.diagonal()).argmin().item()
            w[row, left] -= error[k] / inverse[k, k] * inverse[k]
            del left[k]
    return w


def _slow_codes(weight, hessian, scale, zero, max_code):
    return (slow_gptq(weight, hessian, scale, zero, max_code) / scale + zero).round()


def _slow_in_place(weight, hessian, scale, zero, max_code):
    weight.copy_(slow_gptq(weight, hessian, scale, zero, max_code))
    return weight


def _slow_first_grid(weight, hessian, scale, zero, max_code):
    first = (t[:, :1].expand_as(t) for t in (scale, zero))
    return slow_gptq(weight, hessian, *first, max_code)


def _slow_wrong_place(weight, hessian, scale, zero, max_code):
    inverse = torch.linalg.inv(hessian[1:, 1:])
    return weight - inverse[len(inverse), len(inverse)]


def _without_clamp(w, scale, zero, max_code):
    return ((w / scale + zero).round() - zero) * scale


def _without_zero(w, scale, zero, max_code):
    return (w / scale).round().clamp(0, max_code) * scale


def _zero_kept(w, scale, zero, max_code):
    return (w / scale + zero).round().clamp(0, max_code) * scale


def _grids(g: torch.Generator, out: int, features: int, bits: int, size: int, reach: float):
    """Weights (out, in) and the grids of their groups, as long as `reach` of their range."""
    weight = torch.randn(out, features, generator=g)
    groups = weight.unflatten(1, (-1, size))
    low, high = (reach * end for end in (groups.amin(-1), groups.amax(-1)))
    scale = (high.clamp(min=0) - low.clamp(max=0)) / (2**bits - 1)
    zero = (-low.clamp(max=0) / scale).round()
    scale, zero = (t.repeat_interleave(size, 1) for t in (scale, zero))  # (out, in)
    return weight, scale, zero, 2**bits - 1


def _layer(out, features, bits, size, reach=1.0, hessian=_hessian):
    def make(g):
        weight, scale, zero, top = _grids(g, out, features, bits, size, reach)
        return weight, hessian(g, features), scale, zero, top
    return make


def _uncorrelated(g: torch.Generator, features: int) -> Tensor:
    return torch.rand(features, generator=g).add(0.5).diag()


def _alike(g: torch.Generator, features: int) -> Tensor:
    """A Hessian that even a little damping changes: each input is nearly the one before it."""
    place = torch.arange(features)
    return 0.98 ** (place - place.unsqueeze(1)).abs()


def _two(g):
    one = torch.ones(1, 2)
    return torch.tensor([[1.4, 1.3]]), torch.tensor([[6.0, 5.0], [5.0, 6.0]]), one, 0 * one, 15


_LAYERS = [
    (_two, "the two weights from above"),
    (_layer(3, 6, 3, 6), "three rows, a grid each"),
    (_layer(4, 8, 3, 4), "two groups, each with its own grid"),
    (_layer(3, 6, 2, 6, reach=0.6), "2 bits and a grid that clips"),
    (_layer(2, 5, 3, 5, hessian=_uncorrelated), "inputs that are not correlated"),
]

register(Exercise(
    name="slow_gptq",
    reference=slow_gptq,
    cases=_LAYERS + [(_layer(8, 16, 4, 16, hessian=_alike), "inputs that are much alike")],
    mistakes=[
        (_slow(lambda h, j: torch.linalg.inv(h)[j:, j:]),
         "this cuts the inverse of the whole H, as if the columns before j could still move: cut H "
         "first, H[j:, j:], then invert"),
        (_slow_whole_row, "columns that are rounded already moved again, off their grid: one step "
                          "may change the columns from j on only"),
        (_slow_nearest, "this is round to nearest: nothing moved between the columns (use the "
                        "whole first row of the inverse), or the ORIGINAL columns were rounded, "
                        "not those that had moved"),
        (_slow(sign=1), "the sign: the error is subtracted, so that column j lands on its value"),
        (_slow(divisor=lambda inverse: 1), "divide by the first diagonal element of the inverse, "
                                           "else column j misses its value"),
        (_slow(lambda h, j: h[j:, j:]), "this uses H where the step has H^-1: invert H[j:, j:]"),
        (_slow(grid=_without_clamp), "codes must stay within 0 and max_code: on_grid clamps them"),
        (_slow(grid=_without_zero), "the zero-point is missing: on_grid adds it, and takes it off "
                                    "again"),
        (_slow(grid=_zero_kept), "the zero-point is added, but not taken off again before the "
                                 "value is scaled"),
        (_slow_first_grid, "every column has its own grid: scale[:, j] and zero[:, j]"),
        (_slow_backwards, "this goes from the last column to the first; begin at column 0"),
        (_slow_codes, "these are the codes; return the values on the grid"),
        (_slow_wrong_place, "an index is off: after cutting, column j is column 0 of H[j:, j:]"),
        (lambda w, h, *grid: slow_gptq(w, _damped(h, 0.01), *grid),
         "H is taken as it is here, no damping: that comes in step 2"),
        (_slow_put(divisor=lambda inverse: 1), "the columns after j move by the error as it is: "
                                               "divide it by the inverse's first diagonal element"),
        (_slow_put(sign=1), "column j is on its value, but those after it go the wrong way: "
                            "subtract"),
        (_slow_cheapest_first, "this takes each row's cheapest column next, as OBQ does; here the "
                               "columns come from left to right"),
        (_slow_in_place, "right values, but `weight` itself was changed: clone it first"),
    ],
    rtol=1e-4, atol=1e-5,
))


def upper_factor(h: Tensor, damp_percent: float) -> Tensor:
    return inverse_factor(h, damp_percent)


def _damped(h, damp_percent):
    return h + damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def _factor(damped=_damped, of=torch.linalg.inv, upper=True):
    def wrong(h, damp_percent):
        return torch.linalg.cholesky(of(damped(h, damp_percent)), upper=upper)
    return wrong


def _factor_of_other_product(h, damp_percent):
    return torch.linalg.inv(torch.linalg.cholesky(_damped(h, damp_percent), upper=True))


def _factor_by_qr(h, damp_percent):
    root = torch.linalg.inv(torch.linalg.cholesky(_damped(h, damp_percent)))
    return torch.linalg.qr(root)[1]


def _factor_rows_over_diagonal(h, damp_percent):
    u = upper_factor(h, damp_percent)
    return u / u.diagonal().unsqueeze(1)


def _factor_in_place(h, damp_percent):
    h.diagonal().add_(damp_percent * h.diagonal().mean())
    return upper_factor(h, 0.0)


def _factor_of_damped_inverse(h, damp_percent):
    inverse = torch.linalg.inv(h)
    return torch.linalg.cholesky(inverse + damp_percent * inverse.diagonal().mean()
                                 * torch.eye(len(h)), upper=True)


register(Exercise(
    name="upper_factor",
    reference=upper_factor,
    cases=[
        (lambda g: (torch.tensor([[6.0, 5.0], [5.0, 6.0]]), 0.0), "two inputs, no damping"),
        (lambda g: (_hessian(g, 5), 0.0), "five inputs, no damping"),
        (lambda g: (_hessian(g, 6), 0.1), "six inputs, damping 0.1"),
        (lambda g: (100 * _hessian(g, 6), 0.01), "loud inputs"),
        (lambda g: (_hessian(g, 4).double(), 0.5), "in float64"),
    ],
    mistakes=[
        (_factor(upper=False), "this is the lower factor of H^-1; its transpose is U"),
        (_factor(of=lambda h: h), "this factors H; U is a factor of its inverse"),
        (_factor_of_other_product, "this is upper triangular, but U U^T = H^-1; asked is "
                                   "U^T U = H^-1. Invert H first, then factor"),
        (lambda h, d: torch.linalg.inv(_damped(h, d)), "this is H^-1 itself; now its upper "
                                                       "Cholesky factor"),
        (_factor(damped=lambda h, d: h + d * torch.eye(len(h))),
         "the damping is relative: damp_percent times the MEAN of H's diagonal"),
        (_factor(damped=lambda h, d: h), "the damping is missing"),
        (_factor(damped=lambda h, d: h + d * h.diagonal().mean()),
         "the damping goes to the diagonal alone, not to every element: times torch.eye(len(h))"),
        (_factor(damped=lambda h, d: h + d * h.diagonal().diag()),
         "every diagonal element gets the same damping, a part of their mean, not of its own"),
        (_factor(damped=lambda h, d: h + d * h.trace() * torch.eye(len(h))),
         "take the mean of the diagonal, not its sum"),
        (_factor(damped=lambda h, d: h + d * h.diagonal().max() * torch.eye(len(h))),
         "take the mean of the diagonal, not its largest element"),
        (_factor(damped=lambda h, d: h + d * h.mean() * torch.eye(len(h))),
         "take the mean of the diagonal, not of the whole matrix"),
        (_factor(damped=lambda h, d: _damped(h, d / 100)),
         "damp_percent is a fraction, whatever its name says: 0.01 is one percent"),
        (lambda h, d: torch.linalg.inv(torch.linalg.cholesky(_damped(h, d))),
         "its U^T U is right, but it is lower triangular: each error would go to the columns on "
         "the left. Invert H first, then factor with upper=True"),
        (_factor_by_qr, "its U^T U is right and so is its shape, but the diagonal of U is "
                        "positive: turn the signs of the rows where it is not"),
        (lambda h, d: -upper_factor(h, d), "this is -U: its diagonal is positive"),
        (_factor_of_damped_inverse, "damp H, before it is inverted, not its inverse"),
        (_factor_rows_over_diagonal, "the rows are divided by their diagonal elements; leave "
                                     "Cholesky's factor as it is"),
        (_factor_in_place, "right values, but `h` itself was changed: damp a copy"),
    ],
    rtol=1e-4, atol=1e-6,
))


def gptq_columns(weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor,
                 max_code: int) -> tuple[Tensor, Tensor]:
    w, errors = weight.clone(), torch.empty_like(weight)
    for j in range(w.shape[1]):
        value = on_grid(w[:, j], scale[:, j], zero[:, j], max_code)  # (out,)
        errors[:, j] = (w[:, j] - value) / factor[j, j]
        w[:, j:] -= torch.outer(errors[:, j], factor[j, j:])
    return w, errors


def _loop(sign=-1, row=lambda u, j: u[j, j:], divisor=lambda u, j: u[j, j], grid=on_grid,
          original=False, spread=True):
    """The loop with another sign, row, divisor or way onto the grid."""
    def wrong(weight, factor, scale, zero, max_code):
        w, errors = weight.clone(), torch.empty_like(weight)
        for j in range(w.shape[1]):
            value = grid((weight if original else w)[:, j], scale[:, j], zero[:, j], max_code)
            errors[:, j] = (w[:, j] - value) / divisor(factor, j)
            if spread:
                w[:, j:] += sign * torch.outer(errors[:, j], row(factor, j))
            else:
                w[:, j] = value
        return w, errors
    return wrong


def _loop_then(change):
    """The right loop, its two results changed afterwards; change(q, e, all arguments)."""
    return lambda *given: change(*gptq_columns(*given), *given)


def _loop_errors_of_the_original(weight, factor, scale, zero, max_code):
    q, _ = gptq_columns(weight, factor, scale, zero, max_code)
    return q, (weight - q) / factor.diagonal()


def _loop_with_inverse(weight, factor, scale, zero, max_code):
    return gptq_columns(weight, factor.T @ factor, scale, zero, max_code)


def _loop_column_left(weight, factor, scale, zero, max_code):
    w, errors = weight.clone(), torch.empty_like(weight)
    for j in range(w.shape[1]):
        value = on_grid(w[:, j], scale[:, j], zero[:, j], max_code)
        errors[:, j] = (w[:, j] - value) / factor[j, j]
        w[:, j + 1:] -= torch.outer(errors[:, j], factor[j, j + 1:])
    return w, errors


def _loop_put(change):
    """Column j is put on its value; change(e, u, j): how much the columns after it move."""
    def wrong(weight, factor, scale, zero, max_code):
        w, errors = weight.clone(), torch.empty_like(weight)
        for j in range(w.shape[1]):
            value = on_grid(w[:, j], scale[:, j], zero[:, j], max_code)
            errors[:, j] = (w[:, j] - value) / factor[j, j]
            w[:, j + 1:] += change(errors[:, j], factor, j)
            w[:, j] = value
        return w, errors
    return wrong


def _loop_in_place(weight, factor, scale, zero, max_code):
    q, errors = gptq_columns(weight, factor, scale, zero, max_code)
    return weight.copy_(q), errors


def _loop_first_grid(weight, factor, scale, zero, max_code):
    first = (t[:, :1].expand_as(t) for t in (scale, zero))
    return gptq_columns(weight, factor, *first, max_code)


def _loop_next_only(weight, factor, scale, zero, max_code):
    return gptq_columns(weight, factor.tril(1), scale, zero, max_code)


def _with_factor(layer):
    def make(g):
        weight, h, *grid = layer(g)
        return weight, upper_factor(h, 0.01), *grid
    return make


register(Exercise(
    name="gptq_columns",
    reference=gptq_columns,
    cases=[(_with_factor(layer), label) for layer, label in _LAYERS],
    mistakes=[
        (_loop(spread=False), "every column is rounded, but its error never moves: this is round "
                              "to nearest. What column j passes on stands in ROW j, U[j, j:]"),
        (_loop(original=True), "round the column as it is NOW, w[:, j], not the original weight"),
        (_loop(sign=1), "the sign: outer(e_j, U[j, j:]) is subtracted, so that column j lands on "
                        "its value"),
        (_loop(divisor=lambda u, j: 1), "the error is not divided by U[j, j]: without it column j "
                                        "misses its value"),
        (_loop(divisor=lambda u, j: u[j, j] ** 2), "divide by U[j, j] once: its square belongs to "
                                                   "H^-1, not to its factor"),
        (_loop(row=lambda u, j: u[0, :u.shape[1] - j]), "always the first row: column j's is "
                                                        "U[j, j:]"),
        (_loop_with_inverse, "this uses H^-1 where its factor U belongs"),
        (lambda w, u, *grid: gptq_columns(w, torch.linalg.inv(u.T @ u), *grid),
         "this uses H where U belongs"),
        (_loop_next_only, "only the next column moves: take the whole rest of the row, U[j, j:]"),
        (_loop_column_left, "column j itself is not on its grid: let the update include it, or "
                            "write the value into it"),
        (_loop(grid=_without_clamp), "codes must stay within 0 and max_code: on_grid clamps them"),
        (_loop(grid=_without_zero), "the zero-point is missing: on_grid adds it, and takes it off "
                                    "again"),
        (_loop(grid=_zero_kept), "the zero-point is added, but not taken off again before the "
                                 "value is scaled"),
        (_loop_first_grid, "every column has its own grid: scale[:, j] and zero[:, j]"),
        (_loop_errors_of_the_original, "right weights, but E holds what the column had become "
                                       "when it was rounded, w - q, not the original weight - q"),
        (_loop_then(lambda q, e, w, u, *grid: (q, e * u.diagonal())),
         "right weights, but E holds the errors DIVIDED by U[j, j]"),
        (_loop_then(lambda q, e, w, u, *grid: (q, -e)),
         "right weights, but the sign of E: the weight minus its rounded value"),
        (_loop_then(lambda q, e, w, u, *grid: (q, w - q)),
         "right weights, but E is not W - Q: it is the errors at the moment of rounding, divided "
         "by U[j, j]"),
        (_loop_then(lambda q, e, *given: (e, q)), "the weights first, then the errors"),
        (_loop_then(lambda q, e, w, u, scale, zero, top: ((q / scale + zero).round(), e)),
         "these are the codes; return the values on the grid"),
        (_loop_put(lambda e, u, j: torch.outer(e, u[j, j + 1:])),
         "column j is on its value, but those after it go the wrong way: subtract"),
        (_loop_put(lambda e, u, j: -torch.outer(e * u[j, j], u[j, j + 1:])),
         "the columns after j move by the error as it is: it is e_j, divided by U[j, j], that "
         "spreads"),
        (_loop_put(lambda e, u, j: -torch.outer(e / u[j, j], u[j, j + 1:])),
         "the columns after j move by an error that is divided twice: e_j has its U[j, j] already"),
        (_loop_in_place, "right values, but `weight` itself was changed: clone it first"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 3. The Hessian of a padded batch ----------------------------------------------------

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


def _first_places(x, mask):
    return torch.cat([row[:int(m.sum())].float() for row, m in zip(x, mask)])


def _last_places(x, mask):
    return torch.cat([row[len(m) - int(m.sum()):].float() for row, m in zip(x, mask)])


def _first_to_last(x, mask):
    places = [m.bool().nonzero()[:, 0] for m in mask]
    return torch.cat([row[p[0]:p[-1] + 1].float() for row, p in zip(x, places)])


def _batch(lengths, dtype=torch.float32, mask_dtype=torch.bool, features=3,
           arrange=lambda mask: mask):
    def make(g):
        x = torch.randn(len(lengths), max(lengths), features, generator=g) + 0.5
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # (batch, seq)
        mask = arrange(mask)
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
        (_batch([5, 2, 1], arrange=lambda mask: mask.flip(1)), "padded on the left"),
        (_batch([7, 6], arrange=lambda mask: mask & (torch.arange(7) != 2)), "a gap in the middle"),
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
        (_moment(take=_first_places), "the first tokens of each row are taken; padding may also "
                                      "stand on the left, or in between: go by the mask"),
        (_moment(take=_last_places), "the last tokens of each row are taken; padding may stand on "
                                     "the right, or in between: go by the mask"),
        (_moment(take=_first_to_last), "all from the first real token to the last is taken: a mask "
                                       "may have gaps"),
        (_moment(count=lambda taken, mask: len(taken) - 1), "the mean divides by the number of "
                                                            "tokens, not by one less"),
        (_moment(count=lambda taken, mask: len(mask)), "divide by the number of real tokens, "
                                                       "not by the number of rows"),
        (lambda x, mask: torch.cov(_real(x, mask).T), "torch.cov subtracts the mean and divides by "
                                                      "one less; H is the plain mean of x^T x"),
        (_moment(take=lambda x, mask: x[~mask.bool()].float()),
         "the mask is 1 where a token is real; this takes the padding"),
        (_tokens_by_tokens, "this is x x^T, tokens by tokens; H is x^T x, features by features"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 4. The lazy update ------------------------------------------------------------------

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
        (lambda w, e, f, start, end: lazy_update(w, e, f.T @ f, start, end),
         "this uses H^-1 = U^T U; the errors spread by the rows of U itself"),
        (lambda w, e, f, start, end: lazy_update(w, e * f.diagonal()[start:end], f, start, end),
         "E as it is spreads, D = E U: do not multiply the diagonal back"),
        (lambda w, e, f, start, end: lazy_update(w, e, f, start, end)[:, end:],
         "this is the rest alone; return the whole weight, the finished block as it was"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 5. The order undone -----------------------------------------------------------------

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
