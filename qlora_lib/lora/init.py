"""Adapters that start from the base, LoftQ and PiSSA; and the best product B A of a rank.

W ~ base + B A, with B (out, r) and A (r, in) from the largest singular triplets: the base is then
a residual, and without its adapter no model that anybody trained.
"""

import torch
from torch import Tensor

from ..layers.linear import Quantized
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe

RESIDUAL_INITS = ("loftq", "pissa")
LOFTQ_STEPS = 5  # T of the paper's experiments


def pissa(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec | None = None
) -> tuple[Tensor | Quantized, Tensor, Tensor]:
    """(base, B, A) of PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2-4): B A is the principal
    part of the weight (out, in), the base W - B A, dense fp32 or quantized as `spec` says."""
    b, a = low_rank(weight.detach(), rank)
    with torch.autocast(weight.device.type, enabled=False):
        residual = weight.detach().float() - b @ a
    return residual if spec is None else Recipe(spec).quantize(residual), b, a


def loftq(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec, steps: int = LOFTQ_STEPS
) -> tuple[Quantized, Tensor, Tensor]:
    """(Q, B, A) of LoftQ (Li et al. 2023, arXiv 2310.08659, Algorithm 1) for a weight (out, in):
    Q = quantize(W - B A) and B A = low_rank(W - Q) in turn, `steps` times from B A = 0."""
    w, product = weight.detach().float(), 0
    with torch.autocast(w.device.type, enabled=False):
        for _ in range(steps):
            base = Recipe(spec).quantize(w - product)
            b, a = low_rank(w - base.dequantize(), rank)
            product = b @ a
    return base, b, a


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B A of this rank (Eckart-Young): fp32 B (out, rank) and A (rank, in)."""
    return balanced(*torch.linalg.svd(matrix.float(), full_matrices=False), rank)


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U sqrt(S) and A = sqrt(S) V^T of the largest singular values: factors of one size."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and V^T (k, in) of B A, k = min(rank, out, in), without forming it."""
    with torch.autocast(b.device.type, enabled=False):
        qb, rb = torch.linalg.qr(b.float())  # (out, k), (k, rank)
        qa, ra = torch.linalg.qr(a.float().t())  # (in, k'), (k', rank)
        u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)  # of the small core
        return qb @ u, s, vh @ qa.t()
