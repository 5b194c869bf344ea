"""The best matrix of a rank, as two factors B A: singular values, the largest ones kept."""

import torch
from torch import Tensor


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B A of this rank (Eckart-Young): fp32 B (out, rank) and A (rank, in)."""
    return balanced(*torch.linalg.svd(matrix.float(), full_matrices=False), rank)


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U sqrt(S) and A = sqrt(S) V^T of the largest singular values: factors of one size."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and V^T (k, in) of B A, k = min(rank, out, in).

    Two thin QR decompositions leave a core (k, k); no dense (out, in) product is formed.
    """
    with torch.autocast(b.device.type, enabled=False):
        qb, rb = torch.linalg.qr(b.float())  # (out, k), (k, rank)
        qa, ra = torch.linalg.qr(a.float().t())  # (in, k'), (k', rank)
        u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)  # of the small core
        return qb @ u, s, vh @ qa.t()
