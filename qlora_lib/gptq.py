"""GPTQ: round column by column, each time moving the error to columns not yet rounded.

Frantar et al. 2023 (arXiv 2210.17323). For one layer y = x W^T the loss of new weights
Q over the calibration inputs is
    sum |x W^T - x Q^T|^2 = tr((W - Q) H (W - Q)^T),     H = sum x^T x,
the same H for each row of W. Rounding column j costs least when the columns after it
take over its error (eq. 2; Optimal Brain Surgeon, Hassibi & Stork 1993):
    W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] * U[j, j+1:],     H^-1 = U^T U.
Row j of the Cholesky factor U holds what column j needs of the inverse Hessian of the
columns from j on, so that H^-1 is never updated (section 3.3, step 3).

The loop below does the same with R = U^-1, which takes no inverse. H = R R^T makes the loss
|E R|^2 with E = W - Q; column j of E R is E[:, j] R[j, j] + sum_{i<j} E[:, i] R[i, j], zero at
    Q[:, j] = W[:, j] + sum_{i<j} E[:, i] R[i, j] / R[j, j],
and no later column can change it. Rounding this target is what the updates above amount to:
a triangular system solved from its first unknown to the last, each rounded as it is found
(the "nearest plane" of lattices: Chen et al. 2025, arXiv 2507.18553).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import QuantizedTensor, QuantSpec, as_float, assemble, check_weight, encode, fit_grid
from .refit import refit_scales

SUB_BLOCK = 16  # columns between two updates of the rest of their block


@dataclass(frozen=True)
class GPTQOptions:
    """How the columns are gone through."""

    desc_act: bool = True  # act-order: columns with the largest inputs first
    static_groups: bool = True  # grids fixed from the original weights, before the loop
    damp_percent: float = 0.01  # added to the diagonal of H, relative to its mean
    block_size: int = 128  # columns between two updates of the whole rest
    match_dense: bool = False  # aim at the dense model's outputs, not at the layer's own
    weigh_columns: bool = False  # the clip search counts what an error in a column will cost
    refit_scales: bool = False  # once the codes are known, least squares for the scales

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")
        if not self.damp_percent >= 0:
            raise ValueError(f"damp_percent={self.damp_percent} must not be negative; try 0.01")

    def changed(self) -> dict:
        """Name and value of each setting that is not the default's."""
        usual = vars(GPTQOptions())
        return {name: value for name, value in vars(self).items() if value != usual[name]}


class Hessian:
    """Second moment of a layer's inputs, H = mean of x^T x over the tokens seen.

    Feed it the layer's own inputs, without padding. The mean (not the paper's sum of
    2 x x^T) makes layers and token counts comparable; the loop is indifferent to it.
    """

    def __init__(self, in_features: int, device=None, dtype: torch.dtype = torch.float32):
        self._sum = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self._cross: Tensor | None = None
        self.tokens = 0

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add x (..., in_features).

        dense, of the same shape: what the layer gets at these tokens in the dense model, for
        `dense_target`; given always or never. Raises ValueError for another width, NaN or
        Inf, and where `dense` was given only sometimes.
        """
        if (dense is not None) != (self._cross is not None) and self.tokens:
            raise ValueError("give the dense model's inputs with every update of a Hessian, or never")
        x = self._checked(x)
        if dense is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            self._cross.addmm_(self._checked(dense).t(), x)
        self._sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]

    def _checked(self, x: Tensor) -> Tensor:
        """(tokens, in) in the dtype of the sum, never bf16."""
        if x.shape[-1] != self._sum.shape[0]:
            raise ValueError(
                f"inputs have {x.shape[-1]} features, this Hessian {self._sum.shape[0]}"
            )
        x = x.detach().reshape(-1, x.shape[-1]).to(self._sum)
        if not torch.isfinite(x).all():
            raise ValueError("calibration inputs hold NaN or Inf; check the layers before this one")
        return x

    @property
    def matrix(self) -> Tensor:
        """(in_features, in_features). Raises ValueError before the first token."""
        if not self.tokens:
            raise ValueError("this Hessian has seen no tokens; call update(x) with inputs first")
        return self._sum / self.tokens

    @property
    def cross(self) -> Tensor | None:
        """Mean of dense^T x (in_features, in_features); None where no `dense` was given."""
        return None if self._cross is None else self._cross / self.tokens


def dense_target(weight: Tensor, hessian: Hessian, damp_percent: float) -> Tensor:
    """The weight (out, in) that serves best on the layer's own inputs for what W did before.

    Earlier layers are quantized, so this one gets x where the dense model has x~. Its outputs
    there were x~ W^T, and least squares gives the weight that comes closest to them from x,
        W' = W C H^-1,   H = sum x^T x,   C = sum x~^T x,
    here with damping towards W: W' = W + W (C - H) (H + damping)^-1. What is left of
    |x~ W^T - x Q^T|^2 beside |x (W' - Q)^T|^2 no Q can change: rounding W' is all that remains
    for GPTQ. Asymmetric calibration (GPTAQ, Li et al. 2025, arXiv 2504.02692) has the same
    objective and solves it within the loop. Raises ValueError for a Hessian without `dense`.
    """
    if hessian.cross is None:
        raise ValueError("this Hessian has seen no inputs of the dense model: update(x, dense)")
    h, w = hessian.matrix.to(weight), weight
    difference = w @ (hessian.cross.to(weight) - h)  # (out, in)
    h.diagonal().add_(damp_percent * h.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError("the Hessian is not positive definite; raise damp_percent (0.05, 0.1)")
    return w + torch.cholesky_solve(difference.t(), lower).t()


def hessian_factor(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular R (in, in) with R R^T = H + damping: the U of eq. above is R^-1.

    order: (in,), the order in which the columns are gone through; R is of H[order][:, order].
    Cholesky gives a lower factor, H = L L^T. Of H with its rows and columns reversed it gives
    one that, reversed again, is upper: J H J = L L^T, so H = (J L J) (J L J)^T. And R R^T = H
    means R^-T R^-1 = H^-1: as Cholesky factors are unique, U = R^-1. The paper's three steps
    (factor H, invert, factor the inverse) take four times the operations and more memory.
    Columns that no input ever excites ("dead": H[j, j] = 0) get the mean diagonal, so
    they are simply rounded to nearest. Raises ValueError, naming the column, when the
    damped H is not positive definite.
    """
    order = torch.arange(len(h), device=h.device) if order is None else order
    last_first = order.flip(0)
    h = h.index_select(0, last_first).index_select(1, last_first)  # a copy
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=h.dtype)
    diagonal[dead] = mean
    diagonal += damp_percent * mean  # relative: the same whatever the scale of the inputs
    lower, info = torch.linalg.cholesky_ex(h)
    if info:
        raise ValueError(
            "the Hessian is not positive definite at column "
            f"{int(last_first[int(info) - 1])} with damp_percent={damp_percent}; "
            "raise it (0.05, 0.1), or use more calibration tokens"
        )
    del h  # two matrices of this size at a time, no more
    return lower.flip(0, 1)


def inverse_factor(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular U (in, in) with U^T U = (H + damping)^-1, as Algorithm 1 reads it.

    Arguments and errors as for `hessian_factor`, whose inverse it is.
    """
    r = hessian_factor(h, damp_percent, order)
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye, upper=True)


def gptq_quantize(
    weight: Tensor,
    hessian: Hessian | Tensor,
    spec: QuantSpec,
    options: GPTQOptions = GPTQOptions(),
) -> QuantizedTensor:
    """Quantize one layer with GPTQ (Algorithm 1 of the paper).

    weight: floating point (out_features, in_features); hessian: a Hessian or its matrix
    (in, in). Works in fp32, or in fp64 when the weight is fp64. With options.match_dense
    the columns are those of `dense_target`; with options.refit_scales the codes get the scales
    of `refit.refit_scales`. Raises ValueError for NaN or Inf, mismatched
    shapes, no tokens, or a Hessian that damping does not mend.
    """
    check_weight(weight)
    h = hessian.matrix if isinstance(hessian, Hessian) else hessian
    out, n = weight.shape
    if h.shape != (n, n):
        raise ValueError(f"weight takes {n} inputs, the Hessian is {tuple(h.shape)}")
    w = as_float(weight)
    h = h.to(w)
    if options.match_dense:
        if not isinstance(hessian, Hessian):
            raise ValueError("match_dense needs a Hessian that has seen the dense model's inputs")
        w = dense_target(w, hessian, options.damp_percent)
    groups, size = spec.groups(n), spec.group_size or n
    # One grid a row must be fitted before the loop: later, half the row is rounded.
    static = options.static_groups or spec.group_size is None
    order = torch.arange(n, device=w.device)
    if options.desc_act:
        order = h.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    r = hessian_factor(h, options.damp_percent, order)
    # The loss is the sum over columns of R[j, j]^2 (target - Q)^2: what a grid is to be good at.
    cost = r.diagonal().square() if options.weigh_columns else None  # (in,), in the loop's order
    # Columns with 1 on the diagonal, R[i, j] / R[j, j]. Divided by a view of itself, a column
    # that two threads share would be divided by 1 where the other one was there first.
    r /= r.diagonal().clone()
    if static:
        weights = None if cost is None else cost[back].view(groups, size)
        grids = fit_grid(w.unflatten(1, (groups, size)), spec, weights)  # (out, groups)
        scale, zero = (grid.t().contiguous() for grid in grids)
    else:
        scale, zero = w.new_empty(groups, out), w.new_empty(groups, out)
    # Group of each position in the loop. Static groups belong to the column, others are
    # made of the columns as the loop meets them: those need g_idx in the result.
    group_of = (order if static else torch.arange(n, device=w.device)) // size
    group_at = group_of.tolist()  # plain ints: no device synchronisation in the loop
    step, sub = options.block_size, SUB_BLOCK
    if not static:  # a grid is fitted on current targets: let blocks begin where groups begin
        step, sub = size * max(1, step // size), math.gcd(size, SUB_BLOCK)

    # A column of W is strided, a row of W^T is contiguous: the loop runs over rows of W^T.
    # Row j holds column j until it is rounded, and its error from then on.
    wt = w.t()[order].contiguous()  # (in, out), a copy
    codes = torch.empty(n, out, dtype=torch.uint8, device=w.device)
    for start in range(0, n, step):
        end = min(start + step, n)
        # The errors of all columns before the block reach it at once, in one matrix product,
        target = torch.addmm(wt[start:end], r[:start, start:end].t(), wt[:start])  # (block, out)
        for j in range(start, end):
            first = j - (j - start) % sub  # of the sub-block
            t = target[j - start]  # (out,)
            if j > first:  # those of its own sub-block column by column,
                t.addmv_(wt[first:j].t(), r[first:j, j])
            elif j > start:  # and those of one sub-block reach the rest of the block at once.
                target[j - start :].addmm_(r[j - sub : j, j:end].t(), wt[j - sub : j])
            g = group_at[j]
            if not static and j % size == 0:
                # The group's columns as they would end if none of them were rounded.
                group = slice(j, j + size)
                pull = target[j - start : j - start + size] - wt[group]  # (size, out)
                free = wt[group] + torch.linalg.solve_triangular(
                    r[group, group].t(), pull, upper=False, unitriangular=True
                )
                scale[g], zero[g] = fit_grid(free.t(), spec, None if cost is None else cost[group])
            codes[j] = q = encode(t, scale[g], zero[g], spec.max_code)  # (out,)
            wt[j] -= q.sub_(zero[g]).mul_(scale[g])  # W - Q

    g_idx = None if static or not options.desc_act else group_of[back]
    scale, zero = scale.t().contiguous(), zero.t().contiguous()
    quantized = assemble(codes[back].t().contiguous(), scale, zero, g_idx, spec)
    if options.refit_scales:
        quantized = refit_scales(w, quantized, h, options.damp_percent)
    return quantized


def output_error(weight: Tensor, approx: Tensor, hessian: Hessian | Tensor) -> float:
    """Relative error of a layer's output, |x W^T - x Q^T| / |x W^T|, over the inputs in H.

    weight, approx: (out, in). Computed from H alone: sqrt(tr(D H D^T) / tr(W H W^T)).
    """
    h = hessian.matrix if isinstance(hessian, Hessian) else hessian
    w, q = as_float(weight), as_float(approx)
    h, d = h.to(w), w - q.to(w)
    energy = ((w @ h) * w).sum()
    return float((((d @ h) * d).sum().clamp(min=0) / energy).sqrt()) if energy > 0 else 0.0
