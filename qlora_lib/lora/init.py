"""Adapters that start from the weights: W ~ base + B A, with B (out, r) and A (r, in).

LoftQ and PiSSA choose the base for its adapter: a residual, and without it no model that anybody
trained. "svd", "qera" and "cloq" leave a quantized base Q as it is and start from what rounding
lost, D = W - Q. On inputs x with second moments H = R R^T the outputs are then off by
    mean |x (D - B A)^T|^2 = tr((D - B A) H (D - B A)^T) = |(D - B A) R|^2,
least (Eckart-Young) where B A R holds the largest singular triplets of D R.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..layers.linear import Quantized
from ..quant.damping import choose_damping
from ..quant.grid import as_float, check_weight
from ..quant.hessian import Hessian, hessian_factor
from ..quant.recipe import Recipe, Spec

RESIDUAL_INITS = ("loftq", "pissa")
LOST_INITS = ("svd", "qera", "cloq")
LOFTQ_STEPS = 5  # T of the paper's experiments


def pissa(
    weight: Tensor, rank: int, spec: Spec | None = None
) -> tuple[Tensor | Quantized, Tensor, Tensor]:
    """(base, B, A) of PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2-4): B A is the principal
    part of the weight (out, in), the base W - B A, dense fp32 or quantized as `spec` says."""
    b, a = low_rank(weight.detach(), rank)
    with torch.autocast(weight.device.type, enabled=False):
        residual = weight.detach().float() - b @ a
    return residual if spec is None else Recipe(spec).quantize(residual), b, a


def loftq(
    weight: Tensor, rank: int, spec: Spec, steps: int = LOFTQ_STEPS
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


@torch.no_grad()
def lost_part(
    difference: Tensor, rank: int, init: str = "cloq", hessian: Hessian | Tensor | None = None,
    damp_percent: float | None = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The B (out, rank) and A (rank, in) that best stand for what rounding lost, D (out, in); fp32,
    or fp64 as it came. What differs is which part of H = E[x^T x] counts:

        "svd"   none: the largest part of D itself, as LoftQ's first step has it
        "qera"  the diagonal (QERA's approximate form, Zhang et al. 2024, arXiv 2410.06040)
        "cloq"  all of H, by its triangular factor R (CLoQ, Deng et al. 2025, arXiv 2501.18475,
                section 3). QERA's exact form has H's symmetric root in the place of R; one is
                the other times a rotation, the product B A the same: hence one name for both.

    hessian: a Hessian, or its matrix (in, in). damp_percent: as of GPTQ; None: chosen from the
    Hessian's halves (quant/damping.py). B and A are of one size, so that neither depends on the
    units of the inputs. Raises ValueError for an unknown init, NaN or Inf, a rank above D's, and a
    Hessian that is missing, of another size, or not positive definite after damping.
    """
    check_lost(init, hessian)
    check_weight(difference)
    d = as_float(difference)
    if rank > min(d.shape):
        raise ValueError(f"rank={rank} exceeds that of a difference {tuple(d.shape)}")
    if init == "svd":
        return low_rank(d, rank)
    with torch.autocast(d.device.type, enabled=False):
        r = lost_factor(hessian, init, damp_percent, d)
        b, a = low_rank(d @ r, rank)  # B, and A R
        a = torch.linalg.solve_triangular(r, a, upper=True, left=False)
    return balanced(*product_svd(b, a), rank)


def check_lost(init: str, hessian: Hessian | Tensor | None) -> None:
    """Raises ValueError for an init that is none of LOST_INITS, and for one without its Hessian."""
    if init not in LOST_INITS:
        raise ValueError(f"init={init!r} is not one of {LOST_INITS}")
    if init != "svd" and hessian is None:
        raise ValueError(f"init={init!r} weighs errors by the layer's inputs and needs its Hessian "
                         "(input_hessians); without one, take init='svd'")  # fmt: skip


def lost_factor(
    hessian: Hessian | Tensor, init: str, damp_percent: float | None, like: Tensor
) -> Tensor:
    """The R (in, in) that errors `like` (out, in) are weighed by."""
    if damp_percent is None:
        if not isinstance(hessian, Hessian):
            raise ValueError("damp_percent=None needs a Hessian with halves, not its matrix alone")
        damp_percent = choose_damping(hessian)
    h = (hessian.matrix if isinstance(hessian, Hessian) else hessian).to(like)
    n = like.shape[1]
    if h.shape != (n, n):
        raise ValueError(f"the layer takes {n} inputs, the Hessian is {tuple(h.shape)}")
    if not torch.isfinite(h).all():
        raise ValueError("the Hessian holds NaN or Inf; check the inputs that it was made from")
    return hessian_factor(h if init == "cloq" else h.diagonal().diag(), damp_percent)


@torch.no_grad()
def alternate(
    weight: Tensor, rank: int, quantize: Callable[[Tensor], Quantized], init: str = "cloq",
    hessian: Hessian | Tensor | None = None, damp_percent: float | None = 0.01, steps: int = 5,
) -> tuple[Quantized, Tensor, Tensor, list[float]]:  # fmt: skip
    """(Q, B, A, errors): LoftQ's loop, Q = quantize(W - B A) and B A = lost_part(W - Q) in turn,
    for as long as it helps, at most `steps` times; with one, Q is quantize(W).

    weight: (out, in). errors: |(W - Q - B A) R| / |W R| after each step, the last of which may be
    one that no longer helped; Q, B and A are those of the least. Raises as lost_part and quantize.
    """
    w, product, best, errors = as_float(weight.detach()), 0, None, []
    check_lost(init, hessian)
    r = None if init == "svd" else lost_factor(hessian, init, damp_percent, w)
    size = (w if r is None else w @ r).norm()
    for _ in range(steps):
        base = quantize(w - product)
        lost = w - base.dequantize().to(w)
        b, a = lost_part(lost, rank, init, hessian, damp_percent)
        product = b @ a
        left = lost - product
        errors.append(float((left if r is None else left @ r).norm() / size))
        if errors[-1] > min(errors):
            break
        best = base, b, a
    return *best, errors


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best B A of this rank (Eckart-Young): B (out, rank) and A (rank, in), fp32, or fp64 as
    the matrix came."""
    return balanced(*torch.linalg.svd(as_float(matrix), full_matrices=False), rank)


def balanced(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U sqrt(S) and A = sqrt(S) V^T of the largest singular values: factors of one size."""
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), S (k,) and V^T (k, in) of B A, k = min(rank, out, in), without forming it."""
    with torch.autocast(b.device.type, enabled=False):
        qb, rb = torch.linalg.qr(as_float(b))  # (out, k), (k, rank)
        qa, ra = torch.linalg.qr(as_float(a).t())  # (in, k'), (k', rank)
        u, s, vh = torch.linalg.svd(rb @ ra.t(), full_matrices=False)  # of the small core
        return qb @ u, s, vh @ qa.t()
