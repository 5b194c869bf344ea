"""Hadamard matrices: orthogonal, with entries of one size, so that a product with one spreads what
a single channel holds over all channels alike, and undoes it by the transposed one.

    H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2)                           (Sylvester 1867)
From 1 this makes the powers of two. Other widths start from a core of another order, which a prime
q gives with chi(a) = 1 for the squares modulo q, -1 for the others and 0 for 0 (Paley 1933):
    q = 3 mod 4: order q + 1 (12, 20, 24, 44, ...);  q = 1 mod 4: order 2 (q + 1) (28, 36, 76, ...)
"""

from functools import cache

import torch
from torch import Tensor

from ..base.ranges import COUNT


def hadamard(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Hadamard matrix (n, n) of order n, divided by sqrt(n): H H^T is the identity. Sylvester's
    of the largest power of two that leaves a known core, times that core (Kronecker). Raises
    ValueError for an order that these constructions do not reach."""
    core = hadamard_core(n)
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) * len(core) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])  # (n, n) -> (2n, 2n)
    return (torch.kron(h, core) / n**0.5).to(dtype)


def hadamard_transform(x: Tensor, core: Tensor | None = None) -> Tensor:
    """x (..., n) times hadamard(n), without the matrix: log2 of n / |core| steps of sums and
    differences, and a product with the core. core: hadamard_core(n) in x's dtype, where the caller
    keeps it."""
    n = x.shape[-1]
    core = hadamard_core(n).to(x) if core is None else core
    y, step = x.unflatten(-1, (-1, len(core))) @ core, 1  # (..., n / m, m)
    while step < y.shape[-2]:
        a, b = y.unflatten(-2, (-1, 2, step)).unbind(-3)  # (..., n / (2 step m), step, m) each
        y = torch.stack([a + b, a - b], -3).flatten(-4, -2)
        step *= 2
    return y.flatten(-2) / n**0.5


def random_orthogonal(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthogonal matrix (n, n): a Hadamard matrix whose rows get random signs (Tseng et al.
    2024, arXiv 2402.04396); where none of order n is known here, the Q of a Gaussian matrix, whose
    entries are not of one size."""
    g = torch.Generator().manual_seed(seed)
    try:
        h = hadamard(n)
    except ValueError:
        q, r = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
        return (q * r.diagonal().sign()).to(dtype)
    signs = 2.0 * torch.randint(0, 2, (n, 1), generator=g) - 1
    return (signs * h).to(dtype)


@cache
def hadamard_core(n: int) -> Tensor:
    """The matrix of 1 and -1 (m, m), fp64, with which the one of order n = 2^k m begins, m being as
    small as possible; not to be changed. Raises ValueError for an order that has none here."""
    COUNT.check("n", n)
    m = n
    while m % 2 == 0:
        m //= 2
    while n % m == 0:
        if m == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        if m % 4 == 0 and _is_prime(m - 1):
            return _first_paley(m - 1)
        if m % 4 == 0 and m // 2 % 4 == 2 and _is_prime(m // 2 - 1):
            return _second_paley(m // 2 - 1)
        m *= 2
    raise ValueError(f"no Hadamard matrix of order {n} is known here: expected a power of two, or "
                     "one times 12, 20, 28, 36 and others that primes give; random_orthogonal "
                     "takes any order")  # fmt: skip


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _bordered(q: int, below: int) -> Tensor:
    """chi(i - j) (q, q) below a row of ones and beside a column of `below`: (q + 1, q + 1)."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(q) ** 2 % q] = 1
    chi[0] = 0
    i = torch.arange(q)
    s = torch.ones(q + 1, q + 1, dtype=torch.float64)
    s[0, 0], s[1:, 0], s[1:, 1:] = 0, below, chi[(i[:, None] - i) % q]
    return s


def _first_paley(q: int) -> Tensor:
    return torch.eye(q + 1, dtype=torch.float64) + _bordered(q, -1)


def _second_paley(q: int) -> Tensor:
    a = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(_bordered(q, 1), a) + torch.kron(torch.eye(q + 1, dtype=torch.float64), b)
