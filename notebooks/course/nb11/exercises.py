"""Exercises of notebook 11: the weighed loss, the best product of a rank, what it leaves, codes
that move, the gradient of rounding, zero-points that hold an update."""
import torch
from torch import Tensor

from ..kit.exercise import Exercise, register


def _hessian(g: torch.Generator, features: int) -> Tensor:
    noise = torch.randn(4 * features, features + 1, generator=g)
    x = noise[:, 1:] + 0.8 * noise[:, :-1]  # neighbors share part of their noise
    x = x * torch.linspace(0.5, 2, features)
    return x.T @ x / len(x)  # (features, features)


def _lost(out: int, features: int):
    return lambda g: (torch.randn(out, features, generator=g), _hessian(g, features))


# --- 1. The loss of a lost part ------------------------------------------------------------

def weighed_loss(lost: Tensor, h: Tensor) -> float:
    return ((lost @ h) * lost).sum().item()  # tr(D H D^T)


register(Exercise(
    name="weighed_loss",
    reference=weighed_loss,
    cases=[
        (lambda g: (torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])),
         "one output, two inputs"),
        (_lost(3, 5), "three outputs, five inputs"),
        (_lost(5, 3), "five outputs, three inputs"),
        (lambda g: (torch.randn(2, 4, generator=g), torch.eye(4)), "inputs alike: H = I"),
    ],
    mistakes=[
        (lambda d, h: d.square().sum().item(), "H is missing: this is the loss where all inputs "
                                               "are alike"),
        (lambda d, h: (d.square() * h.diagonal()).sum().item(),
         "this takes H's diagonal alone, but inputs are correlated"),
        (lambda d, h: d @ h @ d.T, "this is the matrix D H D^T; the loss is its trace"),
        (lambda d, h: (d @ h @ d.T).sum().item(),
         "this sums the whole matrix; the trace is the sum of its diagonal"),
        (lambda d, h: weighed_loss(d, h) ** 0.5, "the loss itself, not its root"),
        (lambda d, h: weighed_loss(d, h) / len(d), "the sum over the outputs, not the mean"),
        (lambda d, h: weighed_loss(d, h) / d.numel(), "no mean over the weights: the trace alone"),
        (lambda d, h: (d @ h).sum().item(), "D stands twice, on both sides of H"),
        (lambda d, h: (d @ h).square().sum().item(), "this has H twice: tr(D H H^T D^T)"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 2. The best product of a rank ---------------------------------------------------------

def best_product(lost: Tensor, h: Tensor, rank: int) -> Tensor:
    r = torch.linalg.cholesky(h)
    u, s, vh = torch.linalg.svd(lost @ r, full_matrices=False)
    nearest = u[:, :rank] * s[:rank] @ vh[:rank]  # of D R
    return torch.linalg.solve_triangular(r, nearest, upper=False, left=False)


def _product(factor=torch.linalg.cholesky, back=lambda near, r: near @ torch.linalg.inv(r),
             keep=lambda s, rank: s * (torch.arange(len(s)) < rank), left=False):
    """Another factor of H, other singular values, or another way back."""
    def wrong(lost, h, rank):
        r = factor(h)
        u, s, vh = torch.linalg.svd(r @ lost.T if left else lost @ r, full_matrices=False)
        return back(u * keep(s, rank) @ vh, r)
    return wrong


def _ranked(out, features, rank):
    return lambda g: (*_lost(out, features)(g), rank)


register(Exercise(
    name="best_product",
    reference=best_product,
    cases=[
        (_ranked(3, 4, 1), "three outputs, four inputs, rank 1"),
        (_ranked(6, 5, 2), "six outputs, five inputs, rank 2"),
        (_ranked(4, 8, 3), "four outputs, eight inputs, rank 3"),
        (lambda g: (torch.randn(4, 3, generator=g), torch.eye(3), 1), "inputs alike: H = I"),
    ],
    mistakes=[
        (_product(lambda h: torch.eye(len(h))), "H is missing: this is the largest part of D "
                                                "itself, init svd"),
        (_product(lambda h: h.diagonal().sqrt().diag()),
         "this weighs by H's diagonal alone, init qera"),
        (_product(back=lambda near, r: near), "this is B A R, the best part of D R; R has to come "
                                              "off again"),
        (_product(back=lambda near, r: near @ r), "multiply by the INVERSE of R in the end"),
        (_product(back=lambda near, r: near @ r.T),
         "the end needs the inverse of R, not its transpose"),
        (_product(factor=lambda h: torch.linalg.cholesky(h).T),
         "R R^T must be H: this R is the transpose of that, and R^T R is H"),
        (_product(factor=lambda h: h), "D H instead of D R: R is a root of H"),
        (_product(keep=lambda s, rank: s), "this is D itself: keep the largest `rank` singular "
                                           "values only"),
        (_product(keep=lambda s, rank: s * (torch.arange(len(s)) >= rank)),
         "this is what is left, of the small singular values; the largest go into the product"),
        (_product(keep=lambda s, rank: (torch.arange(len(s)) < rank).to(s)),
         "the singular values are missing: U S V^T"),
        (_product(back=lambda near, r: near @ torch.linalg.inv(r).T),
         "this multiplies by the transpose of R's inverse"),
    ],
    rtol=1e-3, atol=1e-4,
))


# --- 3. What is left at each rank ----------------------------------------------------------

def left_at_rank(lost: Tensor, h: Tensor) -> Tensor:
    s = torch.linalg.svdvals(lost @ torch.linalg.cholesky(h)).square()
    left = s.flip(0).cumsum(0).flip(0)  # from each singular value to the last
    return torch.cat([left, left.new_zeros(1)]) / left[0]


def _left(values):
    """A function of the singular values of D R, and of those of D."""
    return lambda lost, h: values(torch.linalg.svdvals(lost @ torch.linalg.cholesky(h)),
                                  torch.linalg.svdvals(lost))


def _tail(s: Tensor) -> Tensor:
    left = s.flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)]) / left[0]


register(Exercise(
    name="left_at_rank",
    reference=left_at_rank,
    cases=[
        (lambda g: (torch.diag(torch.tensor([2.0, 1.0])), torch.eye(2)), "D = diag(2, 1), H = I"),
        (_lost(3, 5), "three outputs, five inputs"),
        (_lost(6, 4), "six outputs, four inputs"),
    ],
    mistakes=[
        (_left(lambda s, d: _tail(s)), "the loss is a sum of squares: square the singular values"),
        (_left(lambda s, d: _tail(d.square())), "these are D's singular values; the loss has H in "
                                                "it, so take those of D R"),
        (_left(lambda s, d: 1 - _tail(s.square())),
         "this is what the adapter mends; what is left is asked"),
        (_left(lambda s, d: _tail(s.square())[1:]),
         "rank 0 is missing: without an adapter all is left, 1"),
        (_left(lambda s, d: _tail(s.square())[:-1]),
         "the last rank is missing: with all of them nothing is left, 0"),
        (_left(lambda s, d: _tail(s.square()) * s.square().sum()),
         "a share: divide by the loss without an adapter"),
        (_left(lambda s, d: _tail(s.square()).sqrt()), "the share of the loss, not its root"),
        (_left(lambda s, d: torch.cat([s.square(), s.new_zeros(1)]) / s.square().sum()),
         "this is what each rank adds; sum up what is left"),
        (_left(lambda s, d: _tail(s.square().flip(0))),
         "the largest singular values go first into the adapter: what is left are the small ones"),
    ],
    rtol=1e-3, atol=1e-5,
))


# --- 4. Codes that move --------------------------------------------------------------------

def moved_codes(codes: Tensor, update: Tensor, scale: Tensor, max_code: int) -> Tensor:
    return (codes + update / scale).round().clamp(0, max_code)


def _codes(out: int, features: int, size: float, bits: int = 4):
    def make(g):
        codes = torch.randint(2**bits, (out, features), generator=g).float()
        scale = 0.05 + 0.1 * torch.rand(out, 1, generator=g)
        return codes, size * scale * torch.randn(out, features, generator=g), scale, 2**bits - 1
    return make


register(Exercise(
    name="moved_codes",
    reference=moved_codes,
    cases=[
        (lambda g: (torch.tensor([[3.0, 3.0, 3.0]]), torch.tensor([[0.04, 0.06, -0.16]]),
                    torch.tensor([[0.1]]), 15), "three weights, a step of 0.1"),
        (_codes(3, 8, 1.0), "three rows, updates of a step"),
        (_codes(4, 16, 6.0), "updates of six steps: some leave the grid"),
        (_codes(2, 32, 2.0, bits=2), "2 bits"),
    ],
    mistakes=[
        (lambda q, u, s, m: q + (u / s).round().clamp(0, m),
         "clamp the sum, not the change: codes lie between 0 and max_code"),
        (lambda q, u, s, m: (q + u / s).round(), "a code beyond 0 or max_code has no place in "
                                                 "the file: clamp"),
        (lambda q, u, s, m: (q + u).round().clamp(0, m),
         "the update is in the weight's units; divide it by the scale"),
        (lambda q, u, s, m: (q + u * s).round().clamp(0, m), "divide by the scale, not multiply"),
        (lambda q, u, s, m: (q + u / s).clamp(0, m), "codes are whole numbers: round"),
        (lambda q, u, s, m: (q + u / s).floor().clamp(0, m), "round to the nearest, not down"),
        (lambda q, u, s, m: (q + (u / s).trunc()).clamp(0, m),
         "round to the nearest; this cuts the change off towards 0"),
        (lambda q, u, s, m: s * (q + u / s).round().clamp(0, m),
         "the codes are asked for, not the weights"),
        (lambda q, u, s, m: (q + u / s).round().clamp(0, m + 1),
         "the last code is max_code itself"),
        (lambda q, u, s, m: (q - u / s).round().clamp(0, m), "the update is added"),
    ],
    rtol=0, atol=0,
))


# --- 5. The gradient that rounding does not have -------------------------------------------

def straight_through(grad: Tensor, wanted: Tensor, max_code: int, b: Tensor,
                     a: Tensor) -> tuple[Tensor, Tensor]:
    codes = wanted.round()
    passed = grad * ((codes >= 0) & (codes <= max_code))  # (out, in)
    return passed @ a.T, b.T @ passed


def _through(passes=lambda w, m: (w.round() >= 0) & (w.round() <= m),
             grads=lambda g, b, a: (g @ a.T, b.T @ g)):
    """Another mask, or other products."""
    return lambda grad, wanted, m, b, a: grads(grad * passes(wanted, m), b, a)


def _step(out, features, rank, bits):
    def make(g):
        wanted = 2**bits * (1.4 * torch.rand(out, features, generator=g) - 0.2)
        return (torch.randn(out, features, generator=g), wanted, 2**bits - 1,
                torch.randn(out, rank, generator=g), torch.randn(rank, features, generator=g))
    return make


register(Exercise(
    name="straight_through",
    reference=straight_through,
    cases=[
        (lambda g: (torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[-0.4, 7.4, -0.6, 7.6]]),
                    7, torch.tensor([[1.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0]])),
         "at the ends of the grid"),
        (_step(3, 6, 2, 4), "rank 2, 4 bits"),
        (_step(4, 4, 1, 2), "as many outputs as inputs, 2 bits"),
    ],
    mistakes=[
        (_through(lambda w, m: torch.zeros_like(w)),
         "this is rounding's own gradient, 0 everywhere: nothing would be learned"),
        (_through(lambda w, m: torch.ones_like(w)),
         "a weight beyond the ends of the grid is clamped: it has no gradient"),
        (_through(lambda w, m: (w >= 0) & (w <= m)),
         "look at the rounded code: -0.4 rounds to 0, which is on the grid"),
        (_through(lambda w, m: (w.round() < 0) | (w.round() > m)),
         "the other way round: what lies on the grid has a gradient"),
        (_through(lambda w, m: (w.round() > 0) & (w.round() < m)),
         "codes 0 and max_code are on the grid too"),
        (_through(lambda w, m: (w.round() >= 0) & (w.round() <= m + 1)),
         "the last code is max_code itself"),
        (_through(lambda w, m: w.round() >= 0), "the grid has an upper end too, max_code"),
        (_through(lambda w, m: w.round() <= m), "the grid has a lower end too, 0"),
        (_through(grads=lambda g, b, a: (b.T @ g, g @ a.T)),
         "B's gradient first, then A's"),
        (_through(grads=lambda g, b, a: ((g @ a.T) / len(g), (b.T @ g) / len(g))),
         "the chain rule sums; no mean"),
    ],
    rtol=1e-4, atol=1e-5,
))


# --- 6. Zero-points that hold an update ----------------------------------------------------

def merged_zeros(zero: Tensor, scale: Tensor, b: Tensor, a: Tensor) -> Tensor:
    return zero - b @ a / scale


def _zeros(out: int, groups: int, rank: int):
    def make(g):
        zero = torch.randint(16, (out, groups), generator=g).float()
        scale = 0.05 + 0.1 * torch.rand(out, groups, generator=g)
        return (zero, scale, 0.1 * torch.randn(out, rank, generator=g),
                torch.randn(rank, groups, generator=g))
    return make


register(Exercise(
    name="merged_zeros",
    reference=merged_zeros,
    cases=[
        (lambda g: (torch.tensor([[8.0]]), torch.tensor([[0.1]]), torch.tensor([[0.5]]),
                    torch.tensor([[0.5]])), "one group, rank 1"),
        (_zeros(3, 4, 2), "three outputs, four groups, rank 2"),
        (_zeros(4, 4, 1), "as many outputs as groups"),
    ],
    mistakes=[
        (lambda z, s, b, a: z + b @ a / s, "the zero-point is subtracted: a larger weight needs a "
                                           "smaller one"),
        (lambda z, s, b, a: z - b @ a, "the update is in the weight's units; divide by the scale"),
        (lambda z, s, b, a: z - b @ a * s, "divide by the scale, not multiply"),
        (lambda z, s, b, a: (z - b @ a / s).round(), "rounded zero-points lose the update again: "
                                                     "they stay real numbers here"),
        (lambda z, s, b, a: (z - b @ a / s).clamp(0, 15),
         "no clamp: real zero-points may lie beyond the codes"),
        (lambda z, s, b, a: s * (z - b @ a / s), "the zero-point, not scale times zero-point"),
        (lambda z, s, b, a: -b @ a / s, "this is the change; the new zero-points are asked for"),
        (lambda z, s, b, a: (z - b @ a / s).T, "one row an output: (out, groups)"),
    ],
    rtol=1e-4, atol=1e-5,
))
