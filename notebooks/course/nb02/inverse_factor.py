"""The U of GPTQ's Algorithm 1, which the notebook derives; the library works with its inverse."""

import torch
from torch import Tensor

from qlora_lib.quant.hessian import hessian_factor


def inverse_factor(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """The upper triangular U (in, in) with U^T U = (H + damping)^-1.

    It is the inverse of `hessian_factor`, whose arguments and errors it has.
    """
    r = hessian_factor(h, damp_percent, order)
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, eye, upper=True)
