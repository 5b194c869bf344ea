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
(the "nearest plane" of lattices: Chen et al. 2025, arXiv 2507.18553)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .damping import choose_damping
from .dense_target import dense_target
from .grid import QuantizedTensor, QuantSpec, as_float, assemble, check_weight, encode, fit_grid
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
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")
        if self.damp_percent is not None and not self.damp_percent >= 0:
            raise ValueError(f"damp_percent={self.damp_percent} must not be negative; try 0.01")

    @classmethod
    def best(cls, **changes) -> "GPTQOptions":
        """The options that measured best on tokens they had not seen, with `changes`.

        Damping is chosen from the calibration tokens (`damping.choose_damping`), so GPTQ must
        get a Hessian with halves. The defaults are the paper's, with act-order. For a whole
        model add match_dense=True. Figures: data/results/gptq-quality.json.
        """
        return cls(**dict(damp_percent=None, weigh_columns=True, refit_scales=True) | changes)

    @property
    def needs_halves(self) -> bool:
        """Whether the Hessian must be made with halves=True."""
        return self.damp_percent is None

    def changed(self) -> dict:
        """Name and value of each setting that is not the default's."""
        usual = vars(GPTQOptions())
        return {name: value for name, value in vars(self).items() if value != usual[name]}


def gptq_quantize(
    weight: Tensor,
    hessian: Hessian | Tensor,
    spec: QuantSpec,
    options: GPTQOptions = GPTQOptions(),
) -> QuantizedTensor:
    """Quantize one layer with GPTQ (Algorithm 1 of the paper).

    weight: floating point (out_features, in_features); hessian: a Hessian or its matrix
    (in, in). Works in fp32, or in fp64 when the weight is fp64. Without options.damp_percent
    the Hessian must have kept halves (`damping.choose_damping`). With options.match_dense
    the columns are those of `dense_target`; with options.refit_scales the codes get the scales
    of `refit.refit_scales`. Raises ValueError for NaN or Inf, mismatched
    shapes, no tokens, or a Hessian that damping does not mend.
    """
    check_weight(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return _quantize(as_float(weight), hessian, spec, options)


def _quantize(w: Tensor, hessian: Hessian | Tensor, spec: QuantSpec, options: GPTQOptions):
    """What `gptq_quantize` does, for w in fp32 or fp64."""
    h = hessian.matrix if isinstance(hessian, Hessian) else hessian
    out, n = w.shape
    if h.shape != (n, n):
        raise ValueError(f"weight takes {n} inputs, the Hessian is {tuple(h.shape)}")
    h, damping = h.to(w), options.damp_percent
    if (options.match_dense or damping is None) and not isinstance(hessian, Hessian):
        what = "match_dense" if options.match_dense else "damp_percent=None"
        raise ValueError(f"{what} needs a Hessian, not its matrix alone")
    if damping is None:
        damping = choose_damping(hessian, options.desc_act)
    if options.match_dense:
        w = dense_target(w, hessian, damping)
    groups, size = spec.groups(n), spec.group_size or n
    # One grid a row must be fitted before the loop: later, half the row is rounded.
    static = options.static_groups or spec.group_size is None
    order = act_order(h) if options.desc_act else torch.arange(n, device=w.device)
    back = order.argsort()
    r = hessian_factor(h, damping, order)
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
        quantized = refit_scales(w, quantized, h, damping)
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
