"""Scales fitted again once the codes are known: least squares on the layer's outputs.

A row w ~ sum_g s_g q_g (q_g: the whole numbers code - zero_point of group g, zero elsewhere) is
linear in its scales, and its loss over the inputs, |x w - sum_g s_g x q_g|^2, is least squares
with one unknown a group. From scales s with errors e = w - s q, the step d to the best ones is
    A d = b,     A[g, k] = q_g^T H q_k,     b[g] = q_g^T H e,     H = sum x^T x,
and the loss changes by d A d - 2 b d. (Kim et al. 2026, arXiv 2602.02126, take groups in turn.)
"""

from dataclasses import replace

import torch
from torch import Tensor

from .grid import SCALE_DTYPE, QuantizedTensor, as_float, by_group

ROWS = 512  # of the weight at a time: (ROWS, groups, groups) fits in memory


def refit_scales(
    weight: Tensor, quantized: QuantizedTensor, h: Tensor, damp_percent: float = 0.01
) -> QuantizedTensor:
    """The same codes with the scales that bring the layer's outputs closest to the weight's.

    quantized: any rounding of the weight (out, in); h (in, in): the matrix of a Hessian, whose
    damping pulls towards the weight. A row whose damped loss would not fall, with scales in fp16,
    keeps its own. Raises ValueError for other shapes and groups of different sizes.
    """
    w = as_float(weight.detach())
    if w.shape != quantized.shape or h.shape != (w.shape[1], w.shape[1]):
        shapes = [tuple(s) for s in (quantized.shape, w.shape, h.shape)]
        raise ValueError("quantized is {}, weight {}, h {}".format(*shapes))
    h = h.to(w, copy=True)
    h.diagonal().add_(damp_percent * h.diagonal().mean())
    columns = None  # in which a group's are side by side
    if quantized.g_idx is not None:
        columns = by_group(quantized.g_idx, quantized.scale.shape[1])
        h = h[columns][:, columns]
    scale = torch.empty_like(quantized.scale)
    for start in range(0, len(w), ROWS):
        rows = slice(start, start + ROWS)
        part, q = w[rows], quantized.unpacked(rows).to(w)  # (rows, in)
        if columns is not None:
            part, q = part[:, columns], q[:, columns]
        q = q.unflatten(1, (scale.shape[1], -1))  # (rows, groups, group_size)
        q -= quantized.zero_point[rows].unsqueeze(2)
        with torch.autocast(w.device.type, enabled=False):  # all in the dtype of w
            scale[rows] = _least_squares(part, q, quantized.scale[rows].to(w), h)
    return replace(quantized, scale=scale)


def _least_squares(w: Tensor, q: Tensor, scale: Tensor, h: Tensor) -> Tensor:
    """w (rows, in), q (rows, groups, group_size), scale (rows, groups), h damped (in, in)."""
    rows, groups, size = q.shape
    error = w - (q * scale.unsqueeze(2)).flatten(1)  # (rows, in)
    b = ((error @ h).view_as(q) * q).sum(2)  # (rows, groups)
    a = q.new_empty(rows, groups, groups)
    for g in range(groups):  # A is symmetric: groups from g on are enough
        product = q[:, g] @ h[g * size : (g + 1) * size, g * size :]  # (rows, in from g on)
        a[:, g, g:] = a[:, g:, g] = (product.view(rows, -1, size) * q[:, g:]).sum(2)
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += diagonal == 0  # a group of zeros: its scale does not matter, and stays
    lower, failed = torch.linalg.cholesky_ex(a)
    step = torch.cholesky_solve(b.unsqueeze(2), lower).squeeze(2)  # (rows, groups)
    new = (scale + step).to(SCALE_DTYPE).to(scale)
    new = torch.where((new > 0) & new.isfinite(), new, scale)
    step = new - scale
    change = (step * ((a @ step.unsqueeze(2)).squeeze(2) - 2 * b)).sum(1)  # (rows,)
    falls = (change < 0) & (failed == 0)
    return torch.where(falls.unsqueeze(1), new, scale)
