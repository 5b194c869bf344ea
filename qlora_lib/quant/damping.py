"""How much damping: chosen from the calibration tokens, before anything is rounded.

GPTQ fits its rounding errors to the tokens it has seen, and with few of them it overfits.
Damping holds it back; how much is right depends on the layer. The loop leaves errors E with
E V^-1 = Z, where V^-1 is R with 1 on its diagonal and Z are the errors of rounding, spread
evenly over a step s of the grid: mean square s^2 / 12, none of them knowing the others. On
inputs with second moments H' the loss to be expected is therefore
    tr(E H' E^T) = out s^2 / 12 tr(V H' V^T).
With the H' that R was made from, this is the sum over columns of R[j, j]^2, which only falls
with less damping. With R from one half of the tokens and H' from the other it has a minimum:
cross-validation, without a weight and without a bit.
"""

import torch
from torch import Tensor

from .hessian import Hessian, act_order, hessian_factor

DAMPINGS = 0.01, 0.02, 0.05, 0.1, 0.2, 0.5  # from the usual one upwards


def expected_loss(
    seen: Tensor, unseen: Tensor, damp_percent: float, order: Tensor | None = None
) -> float:
    """Loss on `unseen` inputs of GPTQ that knows `seen`, in units of out s^2 / 12.

    seen, unseen: (in, in), matrices of Hessians; order: (in,), that of the loop. Rounding to
    nearest has unseen's trace. Raises ValueError where damping leaves `seen` not positive
    definite.
    """
    r = hessian_factor(seen, damp_percent, order)
    r = r / r.diagonal()
    if order is not None:
        unseen = unseen[order][:, order]
    # V^T V is the inverse of V^-1 V^-T. LAPACK inverts from a lower factor: an upper one
    # is that of the reversed matrix.
    inverse = torch.cholesky_inverse(r.flip(0, 1))  # (in, in), reversed
    return float((inverse * unseen.flip(0, 1)).sum())


def choose_damping(hessian: Hessian, desc_act: bool = True) -> float:
    """The damp_percent of DAMPINGS that serves unseen tokens best.

    Each half of the tokens stands in once for those that GPTQ has seen. The sum of both losses
    falls with damping and then rises, so the first rise ends the search. desc_act: as in
    GPTQOptions. Raises ValueError for a Hessian without halves. What was chosen is kept until
    the next token: q, k and v share a Hessian.
    """
    if desc_act not in hessian.chosen:
        first, second = hessian.halves
        order = act_order(hessian.matrix) if desc_act else None
        best = None
        for damping in DAMPINGS:
            loss = expected_loss(first, second, damping, order)
            loss += expected_loss(second, first, damping, order)
            if best is not None and loss >= best[0]:
                break
            best = loss, damping
        hessian.chosen[desc_act] = best[1]
    return hessian.chosen[desc_act]
