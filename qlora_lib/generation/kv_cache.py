"""A cache of keys and values in 8, 4 or 2 bits, for transformers' `generate`.

Old tokens are stored as codes, in groups that share a scale and a lowest value. Following KIVI
(Liu et al. 2024, arXiv 2402.02750), a key's group is one channel of `group_size` tokens, since a
few channels are large in every token, and a value's is `group_size` channels of one token. A
forward pass attends to its own tokens exactly, and dequantizes the others, a layer at a time.
Padding shares the groups of real tokens; a sliding window does not bound the memory.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ..base.ranges import COUNT, FROM_ZERO, check_fields
from ..models.settings import head_dim
from ..quant.packing import check_bits, pack, packed_width, unpack

STORED = torch.float16  # scale and lowest value of a group


@dataclass(frozen=True)
class CacheSpec:
    """How keys and values are stored."""

    bits: int = 4  # 8, 4 or 2
    group_size: int = 32  # numbers that share a scale, and the tokens stored at a time
    recent: int = 32  # at least so many of the newest tokens stay as they came
    keys: str = "channel"  # "channel": a group is one channel of several tokens; "token":
    values: str = "token"  # several channels of one token

    def __post_init__(self):
        check_bits(self.bits)
        check_fields(self, group_size=COUNT, recent=FROM_ZERO)
        if self.bits == 3 or self.group_size % 8:
            raise ValueError(f"bits={self.bits}, group_size={self.group_size}: expected 8, 4 or 2 "
                             "bits, and groups of a multiple of 8")  # fmt: skip
        if not all(by in ("channel", "token") for by in (self.keys, self.values)):
            raise ValueError(f"keys={self.keys!r}, values={self.values!r}: expected channel, token")

    def stored_tokens(self, tokens: int) -> int:
        """Return how many of these tokens are codes: whole groups, without the newest `recent`."""
        return max(0, tokens - self.recent) // self.group_size * self.group_size


@dataclass
class PackedStates:
    """Keys or values of some tokens, packed."""

    codes: Tensor  # uint8; by "channel" (batch, heads, head_dim, tokens * bits / 8),
    # by "token" (batch, heads, tokens, head_dim * bits / 8)
    scale: Tensor  # fp16, a number a group, in the same order
    low: Tensor  # fp16, the value of code 0
    by: str
    bits: int
    size: int  # numbers that share a scale

    @classmethod
    def of(cls, x: Tensor, spec: CacheSpec, by: str) -> "PackedStates":
        """Return x (batch, heads, tokens, head_dim), rounded to nearest; by "channel" the tokens
        are whole groups. Raises ValueError for what fp16 does not hold."""
        rows = x.float().transpose(2, 3) if by == "channel" else x.float()
        size = spec.group_size if by == "channel" else math.gcd(spec.group_size, rows.shape[-1])
        groups = rows.unflatten(-1, (-1, size))  # (batch, heads, rows, groups, size)
        low = groups.amin(-1).to(STORED)
        scale = ((groups.amax(-1) - low.float()) / (2**spec.bits - 1)).to(STORED)
        if not (low.isfinite().all() and scale.isfinite().all()):
            raise ValueError(f"keys or values are NaN, Inf or beyond what {STORED} holds")
        scale = torch.where(scale > 0, scale, 1)  # a constant group: code 0, whatever the scale
        # Scale and low as they are stored, so that codes make up for their rounding.
        q = (groups - low.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
        q = q.round_().clamp_(0, 2**spec.bits - 1).to(torch.uint8)
        return cls(pack(q.flatten(-2), spec.bits), scale, low, by, spec.bits, size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return (batch, heads, tokens, head_dim) in `dtype`."""
        # The last byte of a row may not be full.
        shape = (*self.codes.shape[:-1], self.scale.shape[-1] * self.size)
        q = unpack(self.codes, self.bits, shape).float().unflatten(-1, (-1, self.size))
        x = q.mul_(self.scale.float().unsqueeze(-1)).add_(self.low.float().unsqueeze(-1))
        x = x.flatten(-2).to(dtype)
        return x.transpose(2, 3) if self.by == "channel" else x

    def append(self, other: "PackedStates") -> "PackedStates":
        axis = -1 if self.by == "channel" else -2  # of the tokens
        return self.each(lambda mine, new: torch.cat([mine, new], axis), other)

    def each(self, change, *others: "PackedStates") -> "PackedStates":
        """Return the states with `change` applied to codes, scale and low."""
        parts = zip(*((p.codes, p.scale, p.low) for p in (self, *others)))
        return PackedStates(*(change(*part) for part in parts), self.by, self.bits, self.size)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes


class PackedLayer(DynamicLayer):
    """One decoder layer's cache: new tokens in `keys` and `values`, the others in `old`."""

    is_croppable = False

    def __init__(self, spec: CacheSpec):
        super().__init__()
        self.spec, self.stored = spec, 0  # tokens in old
        self.old: list[PackedStates] = []  # keys and values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Add states (batch, heads, new tokens, head_dim); return those of all tokens."""
        recent = whole = super().update(key_states, value_states)
        if self.old:
            pairs = zip(self.old, recent)
            whole = tuple(torch.cat([old.dequantize(x.dtype), x], dim=2) for old, x in pairs)
        n = self.spec.stored_tokens(self.stored + recent[0].shape[2]) - self.stored
        if n > 0:
            kinds = zip(recent, (self.spec.keys, self.spec.values))
            new = [PackedStates.of(x[:, :, :n], self.spec, by) for x, by in kinds]
            self.old = [old.append(x) for old, x in zip(self.old, new)] if self.old else new
            self.stored += n
            # Copies: a view would keep all of it alive.
            self.keys, self.values = (x[:, :, n:].clone() for x in recent)
        return whole

    def get_seq_length(self) -> int:
        return self.stored + (self.keys.shape[2] if self._holds_states() else 0)

    def _holds_states(self) -> bool:
        return self.is_initialized and self.keys.dim() == 4  # before the first update: (0,)

    def reset(self) -> None:
        self.keys, self.values, self.is_initialized = None, None, False  # older ones zero them
        super().reset()
        self.old, self.stored = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a packed cache keeps its tokens; decode without an assistant")

    def _choose(self, change) -> None:
        """Apply `change`, along the batch, to all that is stored."""
        if self._holds_states():
            self.keys, self.values = change(self.keys), change(self.values)
        self.old = [states.each(change) for states in self.old]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._choose(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(lambda t: t[indices, ...])

    @property
    def nbytes(self) -> int:
        recent = [self.keys, self.values] if self.is_initialized else []
        return sum(states.nbytes for states in [*recent, *self.old])


class PackedCache(Cache):
    """The cache of one batch of sequences, for `model(..., past_key_values=...)` or generate."""

    def __init__(self, spec: CacheSpec = CacheSpec()):
        if not isinstance(spec, CacheSpec):
            raise ValueError(f"expected a CacheSpec, got {spec!r:.60}")
        super().__init__(layer_class_to_replicate=partial(PackedLayer, spec))

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def cache_bytes(config, tokens: int, spec: CacheSpec | None = None, batch: int = 1, size: int = 2):
    """Return the bytes of the cache of `batch` sequences of so many tokens, of a Llama's config.
    spec None: nothing is quantized. size: bytes of a number that stays as it came (bf16: 2)."""
    if not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"expected the config of a decoder, got {config!r:.60}")
    for name, count in {"tokens": tokens, "batch": batch, "size": size}.items():
        FROM_ZERO.check(name, count)
    head = head_dim(config)
    old = 0 if spec is None else spec.stored_tokens(tokens)
    total = 2 * (tokens - old) * head * size  # of one head in one layer
    for by in (spec.keys, spec.values) if old else ():
        rows, wide = (head, old) if by == "channel" else (old, head)
        group = spec.group_size if by == "channel" else math.gcd(spec.group_size, head)
        total += rows * (packed_width(wide, spec.bits) + wide // group * 2 * STORED.itemsize)
    return batch * config.num_hidden_layers * config.num_key_value_heads * total
