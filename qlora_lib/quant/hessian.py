"""What a layer's inputs tell GPTQ: their second moments H, and the triangular factor of H."""

import torch
from torch import Tensor

from ..base.ranges import COUNT


class Hessian:
    """Second moment of a layer's inputs, H = mean of x^T x over the tokens seen, without padding.

    The mean (not the paper's sum of 2 x x^T) makes layers and token counts comparable. halves:
    keep a second matrix, of the first half of each update's tokens, for `choose_damping`.
    """

    def __init__(self, in_features: int, device=None, dtype=torch.float32, halves: bool = False):
        COUNT.check("in_features", in_features)
        self._sum = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self._first = torch.zeros_like(self._sum) if halves else None
        self._cross: Tensor | None = None
        self.tokens = self.first_tokens = 0
        self.chosen: dict[bool, float] = {}  # dampings, by desc_act

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add x (..., in_features), and for `dense_target` what the layer gets at these tokens in
        the dense model, of the same shape. Raises ValueError, and adds nothing, for another
        width, NaN or Inf, and for `dense` of another shape or given only sometimes."""
        if (dense is not None) != (self._cross is not None) and self.tokens:
            raise ValueError("give a Hessian the dense model's inputs at every update, or never")
        if dense is not None and dense.shape != x.shape:
            raise ValueError(f"dense inputs are {tuple(dense.shape)}, not {tuple(x.shape)}")
        x, dense = self._checked(x), None if dense is None else self._checked(dense)
        if dense is not None:
            if self._cross is None:
                self._cross = torch.zeros_like(self._sum)
            self._cross.addmm_(dense.t(), x)
        self._sum.addmm_(x.t(), x)
        self.tokens += x.shape[0]
        if self._first is not None:
            # Whole sequences where the update is a batch of several: neighbors are alike, and
            # a half that held every second token would know the other one.
            part = x[: x.shape[0] // 2]
            self._first.addmm_(part.t(), part)
            self.first_tokens += part.shape[0]
        self.chosen.clear()

    def _checked(self, x: Tensor) -> Tensor:
        """(tokens, in) in the dtype of the sum, never bf16."""
        if x.shape[-1] != len(self._sum):
            raise ValueError(f"inputs have {x.shape[-1]} features, this Hessian {len(self._sum)}")
        x = x.detach().reshape(-1, x.shape[-1]).to(self._sum)
        if not torch.isfinite(x).all():
            raise ValueError("calibration inputs hold NaN or Inf; check the layers before this one")
        return x

    @property
    def matrix(self) -> Tensor:
        """(in_features, in_features). Raises ValueError before the first token."""
        if not self.tokens:
            raise ValueError("this Hessian has seen no tokens; call update(x) with inputs first")
        return self._sum / self.tokens

    @property
    def cross(self) -> Tensor | None:
        """Mean of dense^T x (in_features, in_features); None where no `dense` was given."""
        return None if self._cross is None else self._cross / self.tokens

    @property
    def halves(self) -> tuple[Tensor, Tensor]:
        """The matrices (in, in) of two halves of the tokens. Raises ValueError where they were not
        kept, and for updates of one token."""
        if self._first is None:
            raise ValueError("this Hessian kept no halves; make it with Hessian(n, halves=True)")
        if not self.first_tokens:
            raise ValueError("no update had two tokens: there are no halves to compare")
        rest = self.tokens - self.first_tokens
        return self._first / self.first_tokens, (self._sum - self._first) / rest


def act_order(h: Tensor) -> Tensor:
    """The columns (in,) by the size of their inputs, largest first."""
    return h.diagonal().argsort(descending=True, stable=True)


def hessian_factor(h: Tensor, damp_percent: float, order: Tensor | None = None) -> Tensor:
    """The upper triangular R (in, in) with R R^T = H + damping; R^-1 is the U of Algorithm 1.

    order (in,): R is of H[order][:, order]. Cholesky gives a lower factor L of J H J, the rows and
    columns of H reversed, and R = J L J. Columns that no input excites (H[j, j] = 0) get the mean
    diagonal, for rounding to nearest. Raises ValueError when the damped H is not positive definite.
    """
    order = torch.arange(len(h), device=h.device) if order is None else order
    last_first = order.flip(0)
    h = h.index_select(0, last_first).index_select(1, last_first)  # a copy
    diagonal = h.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=h.dtype)
    diagonal[dead] = mean
    diagonal += damp_percent * mean  # relative: the same whatever the scale of the inputs
    lower, info = torch.linalg.cholesky_ex(h)
    if info:
        column = int(last_first[int(info) - 1])
        raise ValueError(f"the Hessian is not positive definite at column {column} with "
                         f"{damp_percent=}; raise it (0.05, 0.1), or use more calibration "
                         "tokens")  # fmt: skip
    del h  # two matrices of this size at a time, no more
    return lower.flip(0, 1)
