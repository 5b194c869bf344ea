"""How much damping: chosen from the calibration tokens, before anything is rounded.

Damping keeps GPTQ from fitting its rounding errors to few tokens. The loop leaves errors E with
E V^-1 = Z, where V^-1 is R with 1 on its diagonal and Z are the errors of rounding, independent,
of mean square s^2 / 12 for a step s. On inputs with second moments H' the expected loss is
    tr(E H' E^T) = out s^2 / 12 tr(V H' V^T).
With the H' that R was made from, this is the sum over columns of R[j, j]^2, which only falls
with less damping. With R from one half of the tokens and H' from the other it has a minimum.
"""

import torch
from torch import Tensor

from .hessian import Hessian, act_order, hessian_factor

DAMPINGS = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5  # from the usual one upwards


def expected_loss(
    seen: Tensor, unseen: Tensor, damp_percent: float, order: Tensor | None = None
) -> float:
    """The loss to be expected on `unseen` inputs of a weight that GPTQ rounded for `seen` ones, in
    units of out s^2 / 12. seen, unseen: matrices (in, in) of Hessians; order (in,): the loop's."""
    r = hessian_factor(seen, damp_percent, order)
    r = r / r.diagonal()
    if order is not None:
        unseen = unseen[order][:, order]
    # V^T V is the inverse of V^-1 V^-T, which LAPACK makes of a lower factor: hence reversed.
    inverse = torch.cholesky_inverse(r.flip(0, 1))  # (in, in), reversed
    return float((inverse * unseen.flip(0, 1)).sum())


def choose_damping(hessian: Hessian, desc_act: bool = True) -> float:
    """The damp_percent of DAMPINGS with the least expected loss, each half of the tokens once the
    seen one, once the unseen one. The sum falls and then rises: the first rise ends the search.
    The Hessian keeps the choice until its next update. Raises ValueError without halves."""
    if desc_act not in hessian.chosen:
        first, second = hessian.halves
        order = act_order(hessian.matrix) if desc_act else None
        least = float("inf")
        for damping in DAMPINGS:
            loss = expected_loss(first, second, damping, order)
            loss += expected_loss(second, first, damping, order)
            if loss >= least:
                break
            least, hessian.chosen[desc_act] = loss, damping
    return hessian.chosen[desc_act]
