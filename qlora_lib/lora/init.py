"""Adapters that start from the base: LoftQ and PiSSA.

Plain LoRA starts at B = 0 and leaves the base alone. These two take the dense weight W apart,
    W  ~  base + B A,      B (out, r), A (r, in), from the largest singular triplets.
The base is then a residual: without its adapter it is no model that anybody trained.
"""

import torch
from torch import Tensor

from ..layers.linear import Quantized
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from .low_rank import low_rank

RESIDUAL_INITS = ("loftq", "pissa")
LOFTQ_STEPS = 5  # T of the paper's experiments


def pissa(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec | None = None
) -> tuple[Tensor | Quantized, Tensor, Tensor]:
    """PiSSA (Meng et al. 2024, arXiv 2404.02948, eq. 2-4): B A is the principal part of W.

    weight (out, in). Returns (base, B, A): the residual W - B A, dense fp32, or quantized
    as `spec` says (QPiSSA).
    """
    b, a = low_rank(weight.detach(), rank)
    with torch.autocast(weight.device.type, enabled=False):
        residual = weight.detach().float() - b @ a
    return residual if spec is None else Recipe(spec).quantize(residual), b, a


def loftq(
    weight: Tensor, rank: int, spec: QuantSpec | NF4Spec, steps: int = LOFTQ_STEPS
) -> tuple[Quantized, Tensor, Tensor]:
    """LoftQ (Li et al. 2023, arXiv 2310.08659, Algorithm 1): B A mends what rounding breaks.

    weight (out, in). Alternates Q = quantize(W - B A) and B A = low_rank(W - Q), `steps`
    times from B A = 0. Returns (Q, B, A).
    """
    w, product = weight.detach().float(), 0
    with torch.autocast(w.device.type, enabled=False):
        for _ in range(steps):
            base = Recipe(spec).quantize(w - product)
            b, a = low_rank(w - base.dequantize(), rank)
            product = b @ a
    return base, b, a
