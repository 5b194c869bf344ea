"""GPTQ: round column by column, each time moving the error to columns not yet rounded.

Frantar et al. 2023 (arXiv 2210.17323). For one layer y = x W^T the loss of new weights
Q over the calibration inputs is
    sum |x W^T - x Q^T|^2 = tr((W - Q) H (W - Q)^T),     H = sum x^T x.
Rounding column j costs least when the columns after it take over its error (eq. 2):
    W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] * U[j, j+1:],     H^-1 = U^T U.
`backsolve` does the same with R = U^-1, which takes no inverse. H = R R^T makes the loss
|E R|^2 with E = W - Q; column j of E R is E[:, j] R[j, j] + sum_{i<j} E[:, i] R[i, j], zero at
    Q[:, j] = W[:, j] + sum_{i<j} E[:, i] R[i, j] / R[j, j],
and no later column can change it. Rounding this target is what the updates above amount to
(the "nearest plane" of lattices: Chen et al. 2025, arXiv 2507.18553).

Beside GPTQModel 7.6.0 (gptq.py and quantizer.py, 2,479 lines; here this file, hessian.py and
grid.py, 567): the same loss, damping, act-order, groups and clip search, and checkpoints that
give the same logits in both. Codes differ, as scales are rounded to fp16 before codes are
computed. Left out: group-aware act-order, convolutions and embeddings.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from .damping import choose_damping
from .dense_target import dense_target
from .float_weights import FloatSpec
from .grid import (
    PackedWeight,
    QuantSpec,
    as_float,
    assemble,
    check_flags,
    check_weight,
    check_whole,
    encode,
    fit_grid,
)
from .hessian import Hessian, act_order, hessian_factor
from .refit import refit_scales

SUB_BLOCK = 16  # columns between two updates of the rest of their block


@dataclass(frozen=True)
class GPTQOptions:
    """How the columns are gone through."""

    desc_act: bool = True  # act-order: columns with the largest inputs first
    static_groups: bool = True  # grids fixed from the original weights, before the loop
    damp_percent: float | None = 0.01  # added to H's diagonal, relative to its mean; None: chosen
    block_size: int = 128  # columns between two updates of the whole rest
    match_dense: bool = False  # aim at the dense model's outputs, not at the layer's own
    weigh_columns: bool = False  # the clip search counts what an error in a column will cost
    refit_scales: bool = False  # once the codes are known, least squares for the scales

    def __post_init__(self):
        check_whole("block_size", self.block_size)
        damp = 0 if self.damp_percent is None else self.damp_percent
        if not isinstance(damp, (int, float)) or not 0 <= damp < math.inf:
            raise ValueError(f"damp_percent={damp!r} must be a number, not negative; try 0.01")
        check_flags(self, *(f.name for f in fields(self) if f.type is bool))

    @classmethod
    def best(cls, **changes) -> "GPTQOptions":
        """The options that measured best on unseen tokens, with `changes`; they need a Hessian with
        halves. For a whole model add match_dense=True."""
        return cls(**dict(damp_percent=None, weigh_columns=True, refit_scales=True) | changes)

    @property
    def needs_halves(self) -> bool:
        """Whether the Hessian must be made with halves=True."""
        return self.damp_percent is None

    def changed(self) -> dict:
        """Name and value of each setting that is not the default's."""
        usual = vars(GPTQOptions())
        return {name: value for name, value in vars(self).items() if value != usual[name]}


def backsolve(W: Tensor, R: Tensor, grid, encode, decode, B: int, b: int) -> Tensor:
    """The loop of Algorithm 1: the codes of each column of the weight, uint8 (in, out).

    W         (in, out): a column of the weight as a row, which is contiguous, in the order in
              which they are rounded; overwritten by the errors W - Q
    R         (in, in): the factor of H with each column divided by its R[j, j]
    grid      grid(j, T) returns scale and zero-point (out,) of column j, or what else tells its
              levels; T (from j to the end of the block, out) are the columns as they would end if
              nothing else were rounded
    encode    encode(t, *grid(j, T)): the codes of the levels nearest to t (out,)
    decode    decode(codes, *grid(j, T)): these levels; it may overwrite the codes
    B, b      columns between two updates of the whole rest, and of the rest of the block
    """
    codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    E = W  # the same memory: row j is column j until it is rounded, and its error from then on
    for i in range(0, len(W), B):
        end = min(i + B, len(W))
        # The errors of all columns before the block reach it at once, in one matrix product,
        T = torch.addmm(W[i:end], R[:i, i:end].t(), E[:i])  # (block, out)
        for j in range(i, end):
            t, first = T[j - i], j - (j - i) % b  # (out,), and the first column of the sub-block
            if j > first:  # those of its own sub-block column by column,
                t.addmv_(E[first:j].t(), R[first:j, j])
            elif j > i:  # and those of one sub-block reach the rest of the block at once.
                T[j - i :].addmm_(R[j - b : j, j:end].t(), E[j - b : j])
            levels = grid(j, T[j - i :])
            codes[j] = q = encode(t, *levels)  # (out,)
            E[j] -= decode(q, *levels)  # W - Q
    return codes


@torch.no_grad()
def gptq_quantize(
    weight: Tensor, hessian: Hessian | Tensor, spec: QuantSpec | FloatSpec,
    options: GPTQOptions = GPTQOptions(), largest: float | None = None,
) -> PackedWeight:  # fmt: skip
    """The weight (out_features, in_features) quantized with GPTQ, in fp32, or fp64 as it came: a
    QuantizedTensor for a QuantSpec, an FP4Tensor or FP8Tensor for their specs.

    hessian: a Hessian, or its matrix (in, in) where match_dense and damp_percent=None are not
    asked for. largest: as for FP4Spec.fit. Raises ValueError for NaN or Inf, other shapes, a
    Hessian that has seen no tokens, one that is not positive definite after damping, and for
    options that a float format does not have (check_options).
    """
    check_weight(weight)
    check_options(spec, options)
    h, n = _matrix_of(hessian), weight.shape[1]
    if h.shape != (n, n):
        raise ValueError(f"weight takes {n} inputs, the Hessian is {tuple(h.shape)}")
    if (options.match_dense or options.needs_halves) and not isinstance(hessian, Hessian):
        what = "match_dense" if options.match_dense else "damp_percent=None"
        raise ValueError(f"{what} needs a Hessian, not its matrix alone")
    with torch.autocast(weight.device.type, enabled=False):
        w, damping = as_float(weight), options.damp_percent
        h = h.to(w)
        if options.needs_halves:
            damping = choose_damping(hessian, options.desc_act)
        if options.match_dense:
            w = dense_target(w, hessian, damping)
        order = act_order(h) if options.desc_act else torch.arange(n, device=w.device)
        place = order.argsort()  # of each column in the loop
        R = hessian_factor(h, damping, order)
        # The loss is the sum over columns of R[j, j]^2 (target - Q)^2: what an error counts.
        cost = R.diagonal().square() if options.weigh_columns else None  # (in,)
        R /= R.diagonal().clone()  # a view would change while another thread divides by it
        W = w.t()[order].contiguous()  # (in, out), a copy
        if not isinstance(spec, QuantSpec):
            fitted = spec.fit(w, largest)
            codes = _round_to_floats(W, R, spec.scales(**fitted), order, spec, options.block_size)
            return spec.assemble(codes[place].t().contiguous(), **fitted)
        # One grid a row must be fitted before the loop: later, half the row is rounded.
        static = options.static_groups or spec.group_size is None
        if static:
            scale, zero, grid = _static_grids(w, order, spec, None if cost is None else cost[place])
            B, b = options.block_size, SUB_BLOCK
        else:
            scale, zero, grid = _dynamic_grids(W, R, spec, cost)
            size = spec.group_size  # a grid needs current targets: blocks begin where groups begin
            B, b = size * max(1, options.block_size // size), math.gcd(size, SUB_BLOCK)
        codes = backsolve(W, R, grid, partial(encode, max_code=spec.max_code), _decode, B, b)
        codes = codes[place].t().contiguous()  # (out, in)
        g_idx = None if static or not options.desc_act else place // spec.group_size
        quantized = assemble(codes, scale.t().contiguous(), zero.t().contiguous(), g_idx, spec)
        return refit_scales(w, quantized, h, damping) if options.refit_scales else quantized


def check_options(spec: QuantSpec | FloatSpec, options: GPTQOptions) -> None:
    """Raises ValueError for options that rounding to a spec's levels does not have. The scales of
    float formats come from the weights' absmax before the loop: nothing clips or weighs them, and a
    scale of 8 bits has no place for what least squares would make of it."""
    if isinstance(spec, QuantSpec):
        return
    wanted = {"weigh_columns": False, "refit_scales": False, "static_groups": True}
    for name, value in wanted.items():
        if getattr(options, name) != value:
            raise ValueError(f"{name}={getattr(options, name)} is for integer grids; {spec} has "
                             "scales that are fixed before the loop")  # fmt: skip


def _decode(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return codes.sub_(zero).mul_(scale)


def _round_to_floats(W, R, scales: Tensor, order: Tensor, spec: FloatSpec, B: int) -> Tensor:
    """Codes (in, out) in the loop's order; scales (out, blocks)."""
    scales = scales.t().contiguous()  # (blocks, out), fp32 as the levels
    block = len(order) // len(scales)
    block_at = (order // block).tolist()  # plain ints: no device synchronisation in the loop

    def grid(j: int, T: Tensor) -> tuple[Tensor]:
        return (scales[block_at[j]],)

    return backsolve(W, R, grid, spec.encode, spec.decode, B, SUB_BLOCK)


def _matrix_of(hessian: Hessian | Tensor) -> Tensor:
    return hessian.matrix if isinstance(hessian, Hessian) else hessian


def _static_grids(w: Tensor, order: Tensor, spec: QuantSpec, cost: Tensor | None):
    """Scale and zero-point (groups, out) of w (out, in) as it is, and `grid` of `backsolve`."""
    groups, size = spec.groups(w.shape[1]), spec.group_size or w.shape[1]
    importance = None if cost is None else cost.view(groups, size)
    grids = fit_grid(w.unflatten(1, (groups, size)), spec, importance)  # (out, groups)
    scale, zero = (grid.t().contiguous() for grid in grids)
    group_at = (order // size).tolist()  # plain ints: no device synchronisation in the loop
    return scale, zero, lambda j, T: (scale[group_at[j]], zero[group_at[j]])


def _dynamic_grids(W: Tensor, R: Tensor, spec: QuantSpec, cost: Tensor | None):
    """The same, where each group's grid is fitted when the loop gets there."""
    groups, size = spec.groups(len(W)), spec.group_size
    scale, zero = W.new_empty(groups, W.shape[1]), W.new_empty(groups, W.shape[1])

    def grid(j: int, T: Tensor) -> tuple[Tensor, Tensor]:
        g = j // size
        if j % size == 0:
            group = slice(j, j + size)
            # The group's columns as they would end if none of them were rounded.
            free = W[group] + torch.linalg.solve_triangular(
                R[group, group].t(), T[:size] - W[group], upper=False, unitriangular=True
            )  # (size, out)
            scale[g], zero[g] = fit_grid(free.t(), spec, None if cost is None else cost[group])
        return scale[g], zero[g]

    return scale, zero, grid


def output_error(weight: Tensor, approx: Tensor, hessian: Hessian | Tensor) -> float:
    """Relative error of a layer's output, |x W^T - x Q^T| / |x W^T| over the inputs in H, of
    `approx` for `weight` (out, in): sqrt(tr(D H D^T) / tr(W H W^T))."""
    w, q = as_float(weight), as_float(approx)
    h, d = _matrix_of(hessian).to(w), w - q.to(w)
    energy = ((w @ h) * w).sum()
    return float((((d @ h) * d).sum().clamp(min=0) / energy).sqrt()) if energy > 0 else 0.0
