"""Which adapter a call uses, by layer: a context variable, so that threads and asyncio tasks do
not see each other's choice."""

from collections.abc import Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

DEFAULT = object()  # no choice: the layer's own
_chosen: ContextVar[dict] = ContextVar("chosen adapters", default={})


class Rows:
    """An adapter a row of the batch: `names[i]` for row i (None: the base alone).

    groups  (name, its rows) by name: a slice where they lie together, else indices
    back    for each row of the batch, where it lies once the groups are joined; None: in order
    """

    def __init__(self, names: Sequence[str | None], device: torch.device):
        self.count, found = len(names), {}
        for row, name in enumerate(names):
            found.setdefault(name, []).append(row)
        joined = [row for rows in found.values() for row in rows]
        self.groups = [(name, _rows(rows, device)) for name, rows in found.items()]
        in_order = joined == sorted(joined)
        self.back = None if in_order else torch.tensor(joined, device=device).argsort()

    def check(self, x: Tensor) -> None:
        """Raises ValueError when the batch has not one row a name."""
        if x.dim() < 2 or x.shape[0] != self.count:
            raise ValueError(f"use_adapter was given {self.count} names, one a row, and the batch "
                             f"has {x.shape[0]} rows; for generate(num_return_sequences=k) repeat "
                             "each name k times: [n for n in names for _ in range(k)]")  # fmt: skip

    def join(self, parts: list[Tensor]) -> Tensor:
        """The groups' rows, one batch again."""
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined if self.back is None else joined[self.back.to(joined.device)]


def _rows(rows: list[int], device: torch.device) -> slice | Tensor:
    """Rows that lie together as a slice: indexing by it copies no activations."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def chosen(layer):
    """The choice that this call makes for a layer: a name, None, Rows, or DEFAULT."""
    return _chosen.get().get(layer, DEFAULT)


@contextmanager
def choose(choices: dict, only: bool = False):
    """Within the block, calls of these layers use these choices; only: and no others."""
    token = _chosen.set(choices if only else _chosen.get() | choices)
    try:
        yield
    finally:
        _chosen.reset(token)


def keep_choice(checkpoint):
    """A checkpoint function like the given one, recomputing with the adapter of the forward pass:
    backward comes after `use_adapter` has ended, or in a thread without its context variable."""
    if getattr(checkpoint, "keeps_choice", False):
        return checkpoint

    def checkpointed(function, *args, **kwargs):
        kept = _chosen.get()  # at the forward pass

        def run(*args, **kwargs):
            with choose(kept, only=True):
                return function(*args, **kwargs)

        return checkpoint(run, *args, **kwargs)

    checkpointed.keeps_choice = True
    return checkpointed
