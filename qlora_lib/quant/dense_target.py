"""GPTQ aimed at the outputs of the dense model, where earlier layers are already quantized."""

import torch
from torch import Tensor

from .hessian import Hessian


def dense_target(weight: Tensor, hessian: Hessian, damp_percent: float) -> Tensor:
    """The weight W' (out, in) whose outputs on the quantized model's inputs x come closest to the
    outputs of W on the dense model's inputs x~: the least squares |x~ W^T - x W'^T|^2, as of GPTAQ
    (Li et al. 2025, arXiv 2504.02692). Raises ValueError for a Hessian without `dense`.

        W' = W C H^-1,   H = sum x^T x,   C = sum x~^T x,
    here with damping, which pulls towards W: W' = W + W (C - H) (H + damping)^-1. For any Q,
    |x~ W^T - x Q^T|^2 is |x (W' - Q)^T|^2 plus a constant, so GPTQ has only to round W'.
    """
    if hessian.cross is None:
        raise ValueError("this Hessian has seen no inputs of the dense model: update(x, dense)")
    h, w = hessian.matrix.to(weight), weight
    difference = w @ (hessian.cross.to(weight) - h)  # (out, in)
    diagonal = h.diagonal()
    diagonal += damp_percent * diagonal.mean()
    diagonal += diagonal == 0  # for columns that no input excites: they stay as they are
    lower, failed = torch.linalg.cholesky_ex(h)
    if failed:
        raise ValueError("the Hessian is not positive definite; raise damp_percent (0.05, 0.1)")
    return w + torch.cholesky_solve(difference.t(), lower).t()
