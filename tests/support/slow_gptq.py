"""GPTQ written three times, slowly: each from another derivation of the same weights."""

import torch
from torch import Tensor

from qlora_lib.quant.grid import QuantSpec, fit_grid


def damped(h: Tensor, percent: float) -> Tensor:
    return h + percent * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def objective(w: Tensor, q: Tensor, h: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T), in float64."""
    d = (w - q).double()
    return float((d @ h.double() * d).sum())


def minmax_grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Asymmetric grid of each row of w (out, n), with the scale stored in fp16."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).half().to(w)
    return scale, (-low / scale).round()


class Grids:
    """The grid of each column: fixed from the original weights, or from the current ones.

    cost: (in,), what an error in each column costs, in the order of the loop; None: all alike.
    """

    def __init__(self, w: Tensor, order: Tensor, spec: QuantSpec, static: bool, cost=None):
        self.spec, self.static, self.n = spec, static, w.shape[1]
        self.size = spec.group_size or self.n
        self.order, self.known, self.cost = order, {}, cost
        if static or spec.group_size is None:
            self.static = True
            in_place = None if cost is None else cost[torch.argsort(order)]
            for g in range(self.n // self.size):
                columns = slice(g * self.size, (g + 1) * self.size)
                self.known[g] = self.fit(w[:, columns], None if cost is None else in_place[columns])

    def fit(self, w: Tensor, cost):
        if self.spec.clip_search:
            return fit_grid(w, self.spec, cost)
        return minmax_grid(w, self.spec.bits)

    def round(self, j: int, w: Tensor) -> Tensor:
        """Quantized column j of w, whose columns stand in the loop's order."""
        group = int(self.order[j]) // self.size if self.static else j // self.size
        if not self.static and j % self.size == 0:
            cost = None if self.cost is None else self.cost[j : j + self.size]
            self.known[group] = self.fit(w[:, j : j + self.size], cost)
        scale, zero = self.known[group]
        q = (w[:, j] / scale + zero).round().clamp(0, 2**self.spec.bits - 1)
        return scale * (q - zero)


def column_by_column(w, h, spec, options) -> Tensor:
    """The paper's update, without blocks: each column's error goes to all columns after it."""
    order = torch.arange(w.shape[1])
    if options.desc_act:
        order = torch.argsort(-h.diagonal(), stable=True)
    h = damped(h, options.damp_percent)[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h)).T  # H^-1 = U^T U
    cost = u.diagonal() ** -2 if options.weigh_columns else None
    grids = Grids(w, order, spec, options.static_groups, cost)
    w = w[:, order].clone()
    q = torch.empty_like(w)
    for j in range(w.shape[1]):
        q[:, j] = grids.round(j, w)
        w[:, j + 1 :] -= ((w[:, j] - q[:, j]) / u[j, j])[:, None] * u[j, j + 1 :]
    return q[:, torch.argsort(order)]


def optimal_brain_surgeon(w, h, spec, options) -> Tensor:
    """The inverse Hessian itself, from which each rounded column is eliminated."""
    grids = Grids(w, torch.arange(w.shape[1]), spec, options.static_groups)
    w, inverse = w.clone(), torch.linalg.inv(damped(h, options.damp_percent))
    q = torch.empty_like(w)
    for j in range(w.shape[1]):
        q[:, j] = grids.round(j, w)
        w -= ((w[:, j] - q[:, j]) / inverse[j, j])[:, None] * inverse[j]  # sets w[:, j] to q
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return q


def least_squares(w, h, spec, options) -> Tensor:
    """From the objective alone: with columns R rounded, the best free columns F are
    W_F + (W_R - Q_R) H_RF H_FF^-1."""
    grids = Grids(w, torch.arange(w.shape[1]), spec, options.static_groups)
    original, h = w, damped(h, options.damp_percent)
    w, q = w.clone(), torch.empty_like(w)
    for j in range(w.shape[1]):
        q[:, j] = grids.round(j, w)
        r, f = slice(0, j + 1), slice(j + 1, None)
        error = original[:, r] - q[:, r]
        w[:, f] = original[:, f] + torch.linalg.solve(h[f, f], (error @ h[r, f]).T).T
    return q
