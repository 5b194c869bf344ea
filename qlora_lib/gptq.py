"""GPTQ: round column by column, each time moving the error to columns not yet rounded.

Frantar et al. 2023 (arXiv 2210.17323). For one layer y = x W^T the loss of new weights
Q over the calibration inputs is
    sum |x W^T - x Q^T|^2 = tr((W - Q) H (W - Q)^T),     H = sum x^T x,
the same H for each row of W. Rounding column j costs least when the columns after it
take over its error (eq. 2; Optimal Brain Surgeon, Hassibi & Stork 1993):
    W[:, j+1:] -= (W[:, j] - Q[:, j]) / U[j, j] * U[j, j+1:],     H^-1 = U^T U.
Row j of the Cholesky factor U holds what column j needs of the inverse Hessian of the
columns from j on, so that H^-1 is never updated (section 3.3, step 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import QuantizedTensor, QuantSpec, as_float, assemble, check_weight, encode, fit_grid


@dataclass(frozen=True)
class GPTQOptions:
    """How the columns are gone through."""

    desc_act: bool = True  # act-order: columns with the largest inputs first
    static_groups: bool = True  # grids fixed from the original weights, before the loop
    damp_percent: float = 0.01  # added to the diagonal of H, relative to its mean
    block_size: int = 128  # columns between two updates of the whole rest

    def __post_init__(self):
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")
        if not self.damp_percent >= 0:
            raise ValueError(f"damp_percent={self.damp_percent} must not be negative; try 0.01")


class Hessian:
    """Second moment of a layer's inputs, H = mean of x^T x over the tokens seen.

    Feed it the layer's own inputs, without padding. The mean (not the paper's sum of
    2 x x^T) makes layers and token counts comparable; the loop is indifferent to it.
    """

    def __init__(self, in_features: int, device=None, dtype: torch.dtype = torch.float32):
        self._sum = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add x (..., in_features). Raises ValueError for another width, NaN or Inf."""
        if x.shape[-1] != self._sum.shape[0]:
            raise ValueError(
                f"inputs have {x.shape[-1]} features, this Hessian {self._sum.shape[0]}"
            )
        x = x.detach().reshape(-1, x.shape[-1]).to(self._sum)  # (tokens, in); never a bf16 sum
        if not torch.isfinite(x).all():
            raise ValueError("calibration inputs hold NaN or Inf; check the layers before this one")
        self._sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]

    @property
    def matrix(self) -> Tensor:
        """(in_features, in_features). Raises ValueError before the first token."""
        if not self.tokens:
            raise ValueError("this Hessian has seen no tokens; call update(x) with inputs first")
        return self._sum / self.tokens


def inverse_factor(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular U (in, in) with U^T U = (H + damping)^-1.

    order: (in,), the order in which the columns are gone through; U is of H[order][:, order].
    Columns that no input ever excites ("dead": H[j, j] = 0) get the mean diagonal, so
    they are simply rounded to nearest. Raises ValueError, naming the column, when the
    damped H is not positive definite.
    """
    order = torch.arange(len(h), device=h.device) if order is None else order
    h = h[order][:, order]  # a copy
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=h.dtype)
    diagonal[dead] = mean
    diagonal += damp_percent * mean  # relative: the same whatever the scale of the inputs
    lower, info = torch.linalg.cholesky_ex(h)
    if not info:
        # Three factorizations where the paper's text has one: H = L L^T gives a stable
        # inverse, and the factor of that inverse is what the loop reads.
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if info:
        raise ValueError(
            f"the Hessian is not positive definite at column {int(order[int(info) - 1])} with "
            f"damp_percent={damp_percent}; raise it (0.05, 0.1), or use more calibration tokens"
        )
    return upper


def gptq_quantize(
    weight: Tensor,
    hessian: Hessian | Tensor,
    spec: QuantSpec,
    options: GPTQOptions = GPTQOptions(),
) -> QuantizedTensor:
    """Quantize one layer with GPTQ (Algorithm 1 of the paper).

    weight: floating point (out_features, in_features); hessian: a Hessian or its matrix
    (in, in). Works in fp32, or in fp64 when the weight is fp64. Raises ValueError for
    NaN or Inf, mismatched shapes, no tokens, or a Hessian that damping does not mend.
    """
    check_weight(weight)
    h = hessian.matrix if isinstance(hessian, Hessian) else hessian
    out, n = weight.shape
    if h.shape != (n, n):
        raise ValueError(f"weight takes {n} inputs, the Hessian is {tuple(h.shape)}")
    w = as_float(weight)
    h = h.to(w)
    groups, size = spec.groups(n), spec.group_size or n
    # One grid a row must be fitted before the loop: later, half the row is rounded.
    static = options.static_groups or spec.group_size is None
    if static:
        scale, zero = fit_grid(w.unflatten(1, (groups, size)), spec)  # (out, groups)
    else:
        scale, zero = w.new_empty(out, groups), w.new_empty(out, groups)

    order = torch.arange(n, device=w.device)
    if options.desc_act:
        order = h.diagonal().argsort(descending=True, stable=True)
    # Group of each position in the loop. Static groups belong to the column, others are
    # made of the columns as the loop meets them: those need g_idx in the result.
    group_of = (order if static else torch.arange(n, device=w.device)) // size
    group_at = group_of.tolist()  # plain ints: no device synchronisation in the loop
    step = options.block_size
    if not static:  # let blocks end where groups end: a grid is then fitted on current weights
        step = size * max(1, step // size)

    u = inverse_factor(h, options.damp_percent, order)
    # A column of W is strided, a row of W^T is contiguous: the loop runs over rows of W^T.
    wt = w.t()[order].contiguous()  # (in, out), a copy
    codes = torch.empty_like(wt)
    for start in range(0, n, step):
        end = min(start + step, n)
        block, u_block = wt[start:end], u[start:end, start:end]  # views
        errors = torch.empty_like(block)  # (block, out)
        for j in range(end - start):
            g = group_at[start + j]
            if not static and (start + j) % size == 0:
                scale[:, g], zero[:, g] = fit_grid(block[j : j + size].t(), spec)
            q = encode(block[j], scale[:, g], zero[:, g], spec.max_code)  # (out,)
            codes[start + j] = q
            errors[j] = (block[j] - (q - zero[:, g]) * scale[:, g]) / u_block[j, j]
            block[j + 1 :].addr_(u_block[j, j + 1 :], errors[j], alpha=-1)
        # The lazy update: everything right of the block, once, as one matrix product.
        wt[end:].addmm_(u[start:end, end:].t(), errors, alpha=-1)

    back = order.argsort()
    g_idx = None if static or not options.desc_act else group_of[back]
    return assemble(codes[back].t(), scale, zero, g_idx, spec)


def output_error(weight: Tensor, approx: Tensor, hessian: Hessian | Tensor) -> float:
    """Relative error of a layer's output, |x W^T - x Q^T| / |x W^T|, over the inputs in H.

    weight, approx: (out, in). Computed from H alone: sqrt(tr(D H D^T) / tr(W H W^T)).
    """
    h = hessian.matrix if isinstance(hessian, Hessian) else hessian
    w, q = as_float(weight), as_float(approx)
    h, d = h.to(w), w - q.to(w)
    energy = ((w @ h) * w).sum()
    return float((((d @ h) * d).sum().clamp(min=0) / energy).sqrt()) if energy > 0 else 0.0
