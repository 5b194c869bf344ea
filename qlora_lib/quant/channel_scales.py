"""Factors for the input channels of a layer: y = (x / s) (W s)^T is y = x W^T, but neither x / s
nor W s is rounded as x and W are.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, eq. 4) moves range from inputs to weights, so that
both can be rounded:  s_j = max|x_j|^alpha / max|W_j|^(1 - alpha).
AWQ (Lin et al. 2023, arXiv 2306.00978, eq. 4 and 5) rounds weights alone. Columns that meet large
inputs are made larger, for the grid's step to be finer beside them:  s_j = size(x_j)^alpha, with
the alpha in [0, 1] that changes the layer's output least.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .grid import QuantSpec, as_float, encode, fit_grid


def smoothing_scales(input_absmax: Tensor, weight_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's factors (channels,), by which inputs are to be divided and columns multiplied.

    input_absmax, weight_absmax: the largest |x| and |W| of each channel (channels,). alpha: which
    part of the range goes to the weights, 0.5 leaves both with the same. A channel without inputs
    or weights keeps 1. Raises ValueError for an alpha outside of 0 to 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must lie between 0 and 1")
    x, w = as_float(input_absmax), as_float(weight_absmax).to(input_absmax.device)
    return torch.where((x > 0) & (w > 0), x**alpha / w ** (1 - alpha), 1.0)


@torch.no_grad()
def awq_search(
    weights: list[Tensor], hessian: Tensor, spec: QuantSpec, sizes: Tensor | None = None,
    steps: int = 20,
) -> tuple[Tensor, float, list[float]]:  # fmt: skip
    """AWQ's factors (in,) for weights (out, in) that share an input, their exponent alpha, and the
    relative error of the outputs at each of the exponents 0, 1 / steps, ..., 1 (0: no factors).

    hessian: the mean of x^T x (in, in). sizes: what is raised to alpha (in,); None: the root mean
    square of each input (the paper takes the mean of |x|). As there, weights are rounded to nearest
    without a clip search, and factors are divided by the root of their largest times their least.
    """
    hessian = as_float(hessian)
    sizes = hessian.diagonal().clamp(min=0).sqrt() if sizes is None else sizes.to(hessian)
    least = sizes[sizes > 0].min() if (sizes > 0).any() else sizes.new_ones(())
    sizes, plain = sizes.clamp(min=float(least)), replace(spec, clip_search=False)
    weights = [as_float(w).to(hessian) for w in weights]
    energy = sum(float(((w @ hessian) * w).sum()) for w in weights)
    errors, found = [], []
    for step in range(steps + 1):
        s = sizes ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        lost = 0.0
        for w in weights:
            d = rounded(w * s, plain) / s - w  # (out, in)
            lost += float(((d @ hessian) * d).sum().clamp(min=0))
        errors.append((lost / energy) ** 0.5 if energy > 0 else 0.0)
        found.append(s)
    best = errors.index(min(errors))
    return found[best], best / steps, errors


def rounded(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight (out, in) rounded to nearest and not packed: quantize_rtn(...).dequantize()."""
    groups = weight.unflatten(1, (spec.groups(weight.shape[1]), -1))  # (out, groups, size)
    scale, zero = (grid.unsqueeze(-1) for grid in fit_grid(groups, spec))
    return encode(groups, scale, zero, spec.max_code).sub_(zero).mul_(scale).flatten(1)
