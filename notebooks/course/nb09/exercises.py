"""Exercises of notebook 09: the loss of unseen tokens, the nearest plane, the scales refitted in
three steps, the weight that aims at the dense model."""
import torch
from torch import Tensor

from ..kit.exercise import Exercise, register


def _hessian(g: torch.Generator, features: int) -> Tensor:
    noise = torch.randn(4 * features, features + 1, generator=g)
    x = noise[:, 1:] + 0.8 * noise[:, :-1]  # neighbors share part of their noise
    return x.T @ x / len(x)  # (features, features)


# --- 1. The loss that inputs nobody has seen will have -------------------------------------

def foretold_loss(factor: Tensor, other: Tensor) -> float:
    v = factor / factor.diagonal().unsqueeze(1)  # each row with 1 on the diagonal
    return ((v @ other) * v).sum().item()  # tr(V H' V^T)


def _foretold(rows):
    """The trace with something else in the place of V."""
    return lambda factor, other: (rows(factor) @ other @ rows(factor).T).trace().item()


def _scaled(factor):
    return factor / factor.diagonal().unsqueeze(1)


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
        (lambda u, h: u.diagonal().pow(-2).sum().item(),
         "this is the sum of 1 / U_jj^2, in which H judges itself; here another H' judges"),
        (lambda u, h: _scaled(u) @ h @ _scaled(u).T,
         "this is the matrix V H' V^T; the loss is its trace"),
        (lambda u, h: foretold_loss(u, h) / len(h), "the sum over the columns, not the mean"),
        (lambda u, h: (_scaled(u) @ h @ _scaled(u).T).sum().item(),
         "this sums the whole matrix; the trace is the sum of its diagonal"),
        (_foretold(lambda u: _scaled(u).T), "V and its transpose have changed places: V H' V^T"),
        (lambda u, h: (_scaled(u) @ h).trace().item(), "V stands twice, on both sides of H'"),
        (lambda u, h: foretold_loss(u, h) ** 0.5, "the loss is the trace itself, not its root"),
        (_foretold(lambda u: u * u.diagonal().unsqueeze(1)),
         "divide the rows by the diagonal; this multiplies them"),
        (lambda u, h: foretold_loss(u, h) / 12, "the trace alone is asked, without s^2 / 12"),
        (_foretold(lambda u: _scaled(u) / u.diagonal().unsqueeze(1)),
         "divide each row by its diagonal element once, not by its square"),
        (_foretold(lambda u: torch.linalg.inv(_scaled(u))), "V is U with its rows divided; no "
                                                            "inverse is needed"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 2. The nearest plane ------------------------------------------------------------------

def nearest_plane(vectors: Tensor, y: Tensor) -> Tensor:
    q, r = torch.linalg.qr(vectors)
    rest, numbers = y.clone(), torch.empty_like(r[0])
    for j in reversed(range(len(numbers))):
        numbers[j] = (q[:, j] @ rest / r[j, j]).round()
        rest -= numbers[j] * vectors[:, j]
    return numbers


def _plane(number=lambda q, r, j, rest, b: q[:, j] @ rest / r[j, j], subtract=True,
           whole=torch.round, change=lambda numbers: numbers):
    """Babai's method with another number, or nothing subtracted."""
    def wrong(vectors, y):
        q, r = torch.linalg.qr(vectors)
        rest, numbers = y.clone(), torch.empty_like(r[0])
        for j in reversed(range(len(numbers))):
            numbers[j] = whole(number(q, r, j, rest, vectors))
            if subtract:
                rest -= numbers[j] * vectors[:, j]
        return change(numbers)
    return wrong


def _plane_onto_b(q, r, j, rest, b):
    return b[:, j] @ rest / (b[:, j] @ b[:, j])


def _plane_least_squares(vectors, y):
    return torch.linalg.lstsq(vectors, y.unsqueeze(1)).solution[:, 0].round()


def _plane_best(vectors, y):
    start = nearest_plane(vectors, y)
    around = torch.cartesian_prod(*len(start) * [torch.arange(-2.0, 3)]).to(start) + start
    return around[(around @ vectors.T - y).square().sum(1).argmin()]


def _plane_from_y(vectors, y):
    q, r = torch.linalg.qr(vectors)
    numbers = torch.zeros_like(r[0])
    for j in reversed(range(len(numbers))):
        last = vectors[:, j + 1:j + 2] @ numbers[j + 1:j + 2]
        numbers[j] = (q[:, j] @ (y - last) / r[j, j]).round()
    return numbers


def _vectors(tokens, features, rho, reach):
    def make(g):
        x = torch.randn(tokens, features, generator=g)
        for j in range(1, features):
            x[:, j] = rho * x[:, j - 1] + (1 - rho**2) ** 0.5 * x[:, j]
        x = x.double()
        return x, x @ (reach * torch.randn(features, generator=g).double())
    return make


register(Exercise(
    name="nearest_plane",
    reference=nearest_plane,
    cases=[
        (lambda g: (torch.tensor([[2.0, 1.0], [0.0, 1.0]]).double(),
                    torch.tensor([2.3, 1.4]).double()), "two vectors by hand"),
        (_vectors(20, 4, 0.97, 5), "four vectors that are alike"),
        (_vectors(40, 6, 0.97, 5), "six vectors that are alike"),
        (_vectors(30, 4, 0.0, 5), "four vectors that are not"),
    ],
    mistakes=[
        (_plane_least_squares, "this rounds the numbers of the exact solution, each alone: it is "
                               "round to nearest. Subtract n_j b_j before the next number"),
        (_plane(subtract=False), "no number takes note of those before it: begin with the LAST "
                                 "vector, and subtract n_j b_j (not q_j) once n_j is known"),
        (_plane(_plane_onto_b), "the distance of planes is the part of b_j that is orthogonal to "
                                "the vectors before it, |r_jj|; b_j itself is longer"),
        (_plane(lambda q, r, j, rest, b: q[:, j] @ rest), "divide by r_jj, the distance of two "
                                                          "neighboring planes"),
        (_plane(lambda q, r, j, rest, b: q[:, j] @ rest / r[j, j].abs()),
         "divide by r_jj with its sign: q_j may point away from b_j"),
        (_plane(whole=torch.floor), "this rounds down; take the NEAREST plane"),
        (_plane(lambda q, r, j, rest, b: q[:, j] @ rest / r[j, j] ** 2),
         "divide by r_jj, not by its square: q_j already has length 1"),
        (_plane(change=lambda n: n.flip(0)), "number j belongs to vector j; yours stand in the "
                                             "order of the loop"),
        (_plane_best, "this searches all points nearby for the very nearest; asked is the cheap "
                      "guess, plane by plane"),
        (lambda b, y: nearest_plane(b.flip(1), y).flip(0),
         "this begins with the first vector; begin with the last one"),
        (_plane_from_y, "n_j b_j is subtracted from y anew each time: keep the rest, which has "
                        "lost those before it too"),
        (_plane(whole=torch.trunc), "this rounds towards 0; take the NEAREST plane"),
        (lambda b, y: b @ nearest_plane(b, y), "this is the lattice point; return its whole "
                                               "numbers"),
        (_plane(whole=lambda t: t), "the numbers of a lattice point are whole: round"),
    ],
    exact_dtype=False,
))


# --- 3. The scales, once the codes are known, in three steps -------------------------------

def group_outputs(x: Tensor, numbers: Tensor, group_size: int) -> Tensor:
    return (x * numbers).unflatten(1, (-1, group_size)).sum(2)  # (tokens, groups)


def refit_row(x: Tensor, weight: Tensor, numbers: Tensor, group_size: int) -> Tensor:
    parts = group_outputs(x, numbers, group_size)  # (tokens, groups)
    return torch.linalg.lstsq(parts, (x @ weight).unsqueeze(1)).solution[:, 0]


def refit_rows(h: Tensor, weight: Tensor, numbers: Tensor, group_size: int) -> Tensor:
    groups = len(h) // group_size
    scales = torch.empty(len(weight), groups, dtype=weight.dtype)
    for row in range(len(weight)):
        apart = torch.zeros(groups, len(h), dtype=h.dtype)  # a row a group, zero elsewhere
        for g in range(groups):
            own = slice(g * group_size, (g + 1) * group_size)
            apart[g, own] = numbers[row, own].to(h)
        scales[row] = torch.linalg.solve(apart @ h @ apart.T, apart @ h @ weight[row])
    return scales


def _rows(h, weight, numbers, group_size, left=lambda a, h: a @ h @ a.T,
          right=lambda a, h, w: a @ h @ w):
    """The scales from other normal equations."""
    groups = len(h) // group_size
    member = torch.arange(len(h)) // group_size == torch.arange(groups).unsqueeze(1)
    apart = member * numbers.unsqueeze(1)  # (out, groups, in)
    return torch.stack([torch.linalg.solve(left(a, h), right(a, h, w))
                        for a, w in zip(apart, weight)])


def _damped(h):
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h))


def _scales(**changed):
    return lambda *given: _rows(*given, **changed)


def _group_by_stride(x, numbers, group_size):
    return (x * numbers).unflatten(1, (group_size, -1)).sum(1)


def _numbers(g: torch.Generator, tokens: int, out: int, features: int, group_size: int):
    x = torch.randn(tokens, features + 1, generator=g)
    x = x[:, 1:] + 0.8 * x[:, :-1]
    weight = torch.randn(out, features, generator=g)
    step = weight.unflatten(1, (-1, group_size)).abs().amax(2) / 3
    step = step.repeat_interleave(group_size, 1)
    return x, weight, (weight / step).round()


def _outputs_case(tokens, features, group_size):
    def make(g):
        x, _, numbers = _numbers(g, tokens, 1, features, group_size)
        return x, numbers[0], group_size
    return make


def _row_case(tokens, features, group_size, first=1):
    def make(g):
        x, weight, numbers = _numbers(g, tokens, 1, features, group_size)
        numbers[:, :group_size] *= first
        return x, weight[0], numbers[0], group_size
    return make


def _rows_case(out, features, group_size, first=1):
    def make(g):
        x, weight, numbers = _numbers(g, 6 * features, out, features, group_size)
        numbers[:, :group_size] *= first
        return x.T @ x / len(x), weight, numbers, group_size
    return make


def _one_scale(x, weight, numbers, group_size):
    whole = refit_row(x, weight, numbers, len(numbers))
    return whole.expand(len(numbers) // group_size).clone()


register(Exercise(
    name="group_outputs",
    reference=group_outputs,
    cases=[
        (lambda g: (torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([1.0, -1.0, 0.0, 2.0]), 2),
         "one token, two groups"),
        (_outputs_case(5, 6, 2), "five tokens, three groups"),
        (_outputs_case(3, 12, 4), "three groups of four"),
        (_outputs_case(2, 4, 4), "one group"),
    ],
    mistakes=[
        (_group_by_stride, "a group is group_size NEIGHBORING columns: unflatten(1, (-1, "
                           "group_size)), and sum over the last"),
        (lambda x, n, size: (x * n).sum(1), "this is the output of the whole row; keep the groups "
                                            "apart"),
        (lambda x, n, size: x.unflatten(1, (-1, size)).sum(2), "the whole numbers are missing"),
        (lambda x, n, size: group_outputs(x, n, size).T, "tokens are rows, groups are columns"),
        (lambda x, n, size: group_outputs(x, n, size) / size, "the sum over a group, not the mean"),
        (lambda x, n, size: (x * n).unflatten(1, (-1, size)), "sum over the columns of a group"),
        (lambda x, n, size: group_outputs(x, n.abs(), size), "the numbers keep their signs"),
        (lambda x, n, size: group_outputs(x.abs(), n, size), "the inputs keep their signs"),
        (lambda x, n, size: (x * n).unflatten(1, (-1, size)).sum(1),
         "this sums over the groups; sum inside each of them, the last dimension"),
        (lambda x, n, size: (x * n)[:, ::size], "this takes one column of each group; sum them"),
    ],
))
register(Exercise(
    name="refit_row",
    reference=refit_row,
    cases=[
        (_row_case(40, 8, 4), "two groups"),
        (_row_case(60, 12, 3), "four groups"),
        (_row_case(30, 6, 6), "one group"),
        (_row_case(40, 8, 4, first=-1), "numbers of the wrong sign: a scale below 0"),
    ],
    mistakes=[
        (lambda x, w, n, size: (w * n).unflatten(0, (-1, size)).sum(1)
         / n.square().unflatten(0, (-1, size)).sum(1),
         "this fits the weights; fit the outputs, x @ weight"),
        (lambda x, w, n, size: torch.linalg.lstsq(
            (x @ w).unsqueeze(1), group_outputs(x, n, size)).solution[0],
         "the arguments of lstsq have changed places: what shall be fitted comes second"),
        (lambda x, w, n, size: (group_outputs(x, n, size) * (x @ w)[:, None]).sum(0)
         / group_outputs(x, n, size).square().sum(0),
         "each group is fitted alone, as if the others put out nothing: solve for all at once"),
        (lambda x, w, n, size: refit_row(x, n, n, size),
         "this fits the whole numbers' own outputs; the target is x @ weight"),
        (lambda x, w, n, size: torch.linalg.lstsq(
            group_outputs(x, n, size), (x @ w).unsqueeze(1)).solution,
         "lstsq takes and gives columns: take [:, 0] of its solution"),
        (lambda x, w, n, size: refit_row(x, w, n, size).repeat_interleave(size),
         "a scale a group, not a column"),
        (_one_scale, "this is one scale for the whole row; each group has its own"),
        (lambda x, w, n, size: refit_row(x, w, n, size).clamp(min=0),
         "least squares may give a scale below 0: leave it as it is"),
        (lambda x, w, n, size: refit_row(x, w, n, size).abs(),
         "a scale below 0 stays below 0: no abs()"),
        (lambda x, w, n, size: torch.linalg.lstsq(x, (x @ w).unsqueeze(1)).solution[:, 0],
         "this solves for weights; the unknowns are the scales, one a group"),
    ],
    rtol=1e-3, atol=1e-4,
))
register(Exercise(
    name="refit_rows",
    reference=refit_rows,
    cases=[
        (_rows_case(1, 8, 4), "one row, two groups"),
        (_rows_case(3, 8, 2), "three rows, four groups"),
        (_rows_case(2, 12, 4), "two rows, three groups"),
        (_rows_case(2, 5, 5), "one grid a row"),
        (_rows_case(2, 8, 4, first=-1), "numbers of the wrong sign: scales below 0"),
    ],
    mistakes=[
        (_scales(left=lambda a, h: (a @ h @ a.T).diagonal().diag()),
         "each group is fitted alone: N H N^T has the products of different groups too"),
        (_scales(left=lambda a, h: a @ a.T, right=lambda a, h, w: a @ w),
         "H is missing: this brings the weights closest, not the outputs"),
        (_scales(right=lambda a, h, w: a @ w), "the right side needs H too: N H w"),
        (_scales(left=lambda a, h: a @ a.T), "the left side needs H too: N H N^T"),
        (_scales(left=lambda a, h: a @ h.diagonal().diag() @ a.T,
                 right=lambda a, h, w: a @ (h.diagonal() * w)),
         "this takes H's diagonal alone, but inputs are correlated"),
        (lambda h, w, n, size: _rows(h, w[:1].expand_as(w), n, size),
         "every row has its own weights"),
        (lambda h, w, n, size: _rows(h, w, n[:1].expand_as(n), size),
         "every row has its own whole numbers"),
        (lambda h, w, n, size: _rows(h, w, n, size).repeat_interleave(size, 1),
         "a scale a group, not a column"),
        (lambda h, w, n, size: _rows(h, w, n, len(h)).repeat(1, len(h) // size),
         "this is one scale for a whole row; each group has its own"),
        (lambda h, w, n, size: _rows(_damped(h), w, n, size),
         "H is taken as it is here, no damping: that is the library's"),
        (lambda h, w, n, size: _rows(h, w, n, size).clamp(min=0),
         "least squares may give a scale below 0: leave it as it is"),
        (lambda h, w, n, size: _rows(h, w, n, size).abs(),
         "a scale below 0 stays below 0: no abs()"),
        (lambda h, w, n, size: _rows(h, w, n, size).T, "rows are outputs: (out, groups)"),
        (lambda h, w, n, size: _rows(h, w - n, n, size), "this is the change of scales that were "
                                                         "1: the right side has w, not w - n"),
    ],
    rtol=1e-3, atol=1e-4,
))


# --- 4. The weight that aims at the dense model's outputs ----------------------------------

def dense_weight(weight: Tensor, h: Tensor, cross: Tensor) -> Tensor:
    return torch.linalg.solve(h, (weight @ cross).T).T


def _moments(g: torch.Generator, features: int, tokens: int = 0):
    tokens = tokens or 6 * features
    dense = torch.randn(tokens, features + 1, generator=g)
    dense = dense[:, 1:] + 0.8 * dense[:, :-1]
    x = dense + 0.3 * torch.randn(tokens, features, generator=g)
    return x.T @ x / tokens, dense.T @ x / tokens


def _dense_case(out, features):
    return lambda g: (torch.randn(out, features, generator=g), *_moments(g, features))


register(Exercise(
    name="dense_weight",
    reference=dense_weight,
    cases=[
        (_dense_case(1, 3), "one output"),
        (_dense_case(4, 6), "four outputs, six inputs"),
        (_dense_case(7, 3), "more outputs than inputs"),
        (lambda g: (torch.randn(2, 4, generator=g), *2 * [_hessian(g, 4)]),
         "nothing was quantized before: C = H"),
    ],
    mistakes=[
        (lambda w, h, c: w @ c.T @ torch.linalg.inv(h), "C, not its transpose: its rows belong to "
                                                        "the dense inputs, which meet W"),
        (lambda w, h, c: w @ torch.linalg.inv(h) @ c, "the order: W C first, then H^-1"),
        (lambda w, h, c: w @ h @ torch.linalg.inv(c), "H and C have changed places"),
        (lambda w, h, c: w @ c, "H^-1 is missing"),
        (lambda w, h, c: w @ torch.linalg.inv(h), "C is missing"),
        (lambda w, h, c: w.clone(), "this is W itself, which aims at the layer's own outputs"),
        (lambda w, h, c: dense_weight(w, h, c) - w, "this is the change; W' is asked for"),
        (lambda w, h, c: dense_weight(w, _damped(h), c),
         "H is taken as it is here, no damping: that comes with the call"),
        (lambda w, h, c: w @ c @ h, "multiply by the INVERSE of H"),
        (lambda w, h, c: torch.linalg.solve(h, (w @ c).T), "transpose back: W' is (out, in)"),
        (lambda w, h, c: w @ c / h.diagonal(), "dividing by H's diagonal inverts it only where "
                                               "inputs are not correlated"),
    ],
    rtol=1e-3, atol=1e-4,
))
