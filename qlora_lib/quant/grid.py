"""Affine integer grids and round to nearest.

A group of weights shares one grid of 2**bits evenly spaced values,
    w  ~  scale * (q - zero_point),     q in {0, ..., 2**bits - 1},
with an integer zero_point, so that 0.0 is always on the grid and decodes exactly.
(Jacob et al. 2018, arXiv 1712.05877, eq. 1.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.finite import check_finite
from .packing import check_bits, pack, packed_width, unpack

SCALE_DTYPE = torch.float16  # the dtype in which scales are stored
CLIP_RATIOS = 1 - torch.arange(0, 60, dtype=torch.float32) / 80  # 1.00 down to 0.26 of the range
CLIP_NORM = 2.4  # |error|**2.4: a little more weight on large errors than MSE
PIECE = 1 << 20  # weights that are made dense at once on a CPU: what its cache holds
SEARCH_AT_ONCE = 1 << 18, 1 << 24  # weights searched at once: what a CPU caches; elsewhere


def check_whole(name: str, value, what: str = "positive", *others) -> None:
    """Raises ValueError unless a setting is a whole number above 0, or one of `others`."""
    if value not in others and (not isinstance(value, int) or value is True or value < 1):
        raise ValueError(f"{name}={value!r} must be {what}")


def check_flags(settings, *names: str) -> None:
    """Raises ValueError unless these fields are True or False."""
    for name in names:
        if not isinstance(value := getattr(settings, name), bool):
            raise ValueError(f"{name}={value!r} must be True or False")


@dataclass(frozen=True)
class QuantSpec:
    """How a weight matrix is put on integer grids."""

    bits: int = 4  # 2, 3, 4 or 8
    group_size: int | None = 64  # input features that share a grid; None: one group a row
    symmetric: bool = False  # True: zero_point fixed in the middle of the grid
    clip_search: bool = True  # shrink the range where that lowers the error

    def __post_init__(self):
        check_bits(self.bits)
        check_whole("group_size", self.group_size, "positive, or None for a row", None)
        check_flags(self, "symmetric", "clip_search")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def groups(self, in_features: int) -> int:
        """Groups in a row. Raises ValueError when group_size does not divide it."""
        size = self.group_size or in_features
        if in_features % size:
            raise ValueError(f"group_size={size} does not divide in_features={in_features}; "
                             "choose a divisor, or None for one group a row")  # fmt: skip
        return in_features // size


class PackedWeight:
    """What the kinds of packed weights (dataclasses with `pieces`) share."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense weights (out, in) in `dtype`."""
        dense = None
        for rows, w in self.pieces(dtype):
            if len(w) == self.shape[0]:
                return w
            dense = w.new_empty(self.shape) if dense is None else dense
            dense[rows] = w
        return dense

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.shape.numel()


@dataclass
class QuantizedTensor(PackedWeight):
    """A weight matrix on integer grids, packed.

    codes       uint8 (out, ceil(in * bits / 8)), packed along the input features
    scale       fp16 (out, groups)
    zero_point  uint8 (out, groups)
    g_idx       int32 (in,), the group of each input feature; None: in order
    shape       (out_features, in_features)
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    g_idx: Tensor | None
    shape: torch.Size
    spec: QuantSpec

    def check(self) -> None:
        """Raises ValueError unless all tensors are as described above, and their values mean
        something: finite scales, zero-points and groups that there are."""
        (out, n), spec = self.shape, self.spec
        grids = (out, spec.groups(n))
        check_tensor("codes", self.codes, (out, packed_width(n, spec.bits)), torch.uint8)
        check_tensor("scale", self.scale, grids)
        check_tensor("zero_point", self.zero_point, grids, torch.uint8)
        check_range("zero_point", self.zero_point, spec.max_code)
        if self.g_idx is not None:
            check_tensor("g_idx", self.g_idx, (n,), torch.int32)
            check_range("g_idx", self.g_idx, grids[1] - 1)

    def unpacked(self, rows: slice) -> Tensor:
        """uint8 (rows, in): the codes of some rows."""
        codes = self.codes[rows]
        return unpack(codes, self.spec.bits, (codes.shape[0], self.shape[1]))

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows in order, each with its dense weights (rows, in) in `dtype`."""
        # Half precision has no fast arithmetic on a CPU, and q - z is exact in fp32.
        work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        scale, zero = self.scale.to(work), self.zero_point.to(work)  # (out, groups)
        g_idx = None if self.g_idx is None else self.g_idx.long()
        for rows in row_slices(self.shape, self.scale.device):
            w, s, z = self.unpacked(rows).to(work), scale[rows], zero[rows]
            if g_idx is not None:
                w.sub_(z[:, g_idx]).mul_(s[:, g_idx])
            else:
                grouped = w.unflatten(1, (scale.shape[1], -1))  # (rows, groups, group_size)
                grouped.sub_(z.unsqueeze(-1)).mul_(s.unsqueeze(-1))  # in w's own memory
            yield rows, w.to(dtype)


def row_slices(shape: torch.Size, device: torch.device, unit: int = 1) -> list[slice]:
    """Slices of rows that are made dense one after the other: of about PIECE weights on a CPU, all
    rows elsewhere. Each but the last has a multiple of `unit` rows and of 64, an int4 tile's."""
    out, in_features = shape
    if device.type != "cpu":
        return [slice(0, out)]
    unit = math.lcm(unit, 64)
    count = -(-max(1, PIECE // max(1, in_features)) // unit) * unit
    return [slice(i, min(i + count, out)) for i in range(0, max(1, out), count)]


def check_tensor(name: str, t: Tensor, shape: tuple, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless a part of a packed weight has this shape and dtype (None: one of
    floating point) and is finite."""
    if t is None or tuple(t.shape) != shape or t.dtype != (dtype or t.dtype):
        got = "missing" if t is None else f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"{name} is {got}, should be {dtype or 'floating point'} {shape}")
    if dtype is None and not t.is_floating_point():
        raise ValueError(f"{name} is {t.dtype}, should be floating point")
    check_finite([(name, t)], "a packed weight")


def check_range(name: str, t: Tensor, most: int) -> None:
    """Raises ValueError unless all of these integers lie between 0 and `most`."""
    if not t.is_meta and t.numel() and (t.min() < 0 or t.max() > most):
        raise ValueError(f"{name} lies outside 0 to {most}: {int(t.min())} to {int(t.max())}")


def check_weight(weight: Tensor) -> None:
    """Raises ValueError unless `weight` is a finite floating-point matrix."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError("a weight must be a floating-point matrix (out_features, in_features), "
                         f"got {weight.dtype} {tuple(weight.shape)}")  # fmt: skip
    if bad := int((~torch.isfinite(weight)).sum()):
        raise ValueError(f"the weight holds {bad} NaN or Inf; mend the checkpoint first")


def as_float(x: Tensor) -> Tensor:
    """fp32, or fp64 where it came in as fp64 (the tests' reference precision)."""
    return x if x.dtype == torch.float64 else x.float()


def encode(w: Tensor, scale: Tensor, zero_point: Tensor, max_code: int) -> Tensor:
    """Nearest codes, ties to even, in the dtype of `w`. Scale and zero-point broadcast over it."""
    return (w / scale).add_(zero_point).round_().clamp_(0, max_code)


def _grid_of_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of the grid that spans [low, high], with low <= 0 <= high."""
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = (high - low) / spec.max_code
    # Codes are computed with the scale that will be stored, so the two can't disagree.
    stored = scale.to(SCALE_DTYPE).to(low.dtype)
    # Below 6e-5 fp16 is subnormal and coarse; a scale rounded down there would clip.
    stored = torch.where(stored < scale * (1 - 2**-10), stored + 2.0**-24, stored)
    scale = torch.where(stored > 0, stored, 1)  # all zeros: any scale decodes to 0
    if spec.symmetric:
        return scale, torch.full_like(scale, 2 ** (spec.bits - 1))
    return scale, (-low / scale).round().clamp(0, spec.max_code)


def fit_grid(w: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of each group, (...) in the dtype of w, the scale rounded to fp16.

    w: (..., group_size). The range always includes 0. With `clip_search` it is shrunk step by step,
    and the grid with the least sum of importance * |error|**2.4 is kept (GPTQModel's `mse`).
    importance: as the last axes of w, (group_size,) or (groups, group_size); None: all ones.
    Raises ValueError for a range that no fp16 scale can span.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)  # (...)
    span = 2 * torch.maximum(high, -low) if spec.symmetric else high - low
    if span.numel() and span.max() > spec.max_code * torch.finfo(SCALE_DTYPE).max:
        raise ValueError(f"weights span {float(span.max()):.3g}, more than an fp16 scale can hold "
                         f"in {spec.max_code} steps; rescale the layer")  # fmt: skip
    if not spec.clip_search:
        return _grid_of_range(low, high, spec)
    size = w.shape[-1]
    importance = w.new_ones(1, size) if importance is None else importance.reshape(-1, size)
    count = max(1, SEARCH_AT_ONCE[w.device.type != "cpu"] // importance.numel())
    importance = importance.repeat(count, 1)  # (groups searched at once, size)
    groups = w.reshape(-1, size).split(len(importance))
    found = [_search(part, importance[: len(part)], spec) for part in groups]
    return tuple(torch.cat(parts).view(low.shape) for parts in zip(*found))


def _search(w: Tensor, importance: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero-point (groups,) of the best grids; w and importance (groups, group_size)."""
    (least, first), (most, last) = w.min(-1), w.max(-1)  # (groups,)
    # What an error at either end of a group counts at least.
    ends = importance.gather(1, torch.stack([first, last], 1)).amin(1)  # (groups,)
    low, high = least.clamp(max=0), most.clamp(min=0)
    scale, zero = torch.empty_like(low), torch.empty_like(low)
    best = torch.full_like(low, torch.inf)
    open_ = torch.arange(len(w), device=w.device)  # groups whose search goes on
    for ratio in CLIP_RATIOS.tolist():
        s, z = _grid_of_range(low * ratio, high * ratio, spec)
        # What a grid of max_code steps leaves uncovered of a group's range its two ends bear, at
        # least as |cut / 2|**2.4 each, and ever more as the range shrinks: once that alone is no
        # less than the best error, the group's search is done.
        cut = (most - least - spec.max_code * s).clamp_(min=0)
        hope = 2 * ends * (cut / 2).pow_(CLIP_NORM) < best[open_]
        if not hope.all():
            if not hope.any():
                break
            kept = (least, most, ends, low, high, s, z, w, importance, open_)
            least, most, ends, low, high, s, z, w, importance, open_ = (t[hope] for t in kept)
        q = encode(w, s.unsqueeze(-1), z.unsqueeze(-1), spec.max_code)
        error = q.sub_(z.unsqueeze(-1)).mul_(s.unsqueeze(-1)).sub_(w).abs_().pow_(CLIP_NORM)
        error = error.mul_(importance).sum(-1)  # (groups,)
        better = error < best[open_]
        won = open_[better]
        best[won], scale[won], zero[won] = error[better], s[better], z[better]
    return scale, zero


def assemble(q: Tensor, scale: Tensor, zero: Tensor, g_idx: Tensor | None, spec: QuantSpec):
    """QuantizedTensor from codes (out, in) and grids (out, groups)."""
    codes = pack(q.to(torch.uint8), spec.bits)
    g_idx = None if g_idx is None else g_idx.to(torch.int32)
    return QuantizedTensor(codes, scale.to(SCALE_DTYPE), zero.to(torch.uint8), g_idx, q.shape, spec)


def spread(grids: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Scales or zero-points (out, groups) of a packed weight, one a weight: (out, in)."""
    if quantized.g_idx is not None:
        return grids[:, quantized.g_idx.long()]
    return grids.repeat_interleave(quantized.shape[1] // grids.shape[1], 1)


def by_group(g_idx: Tensor, groups: int) -> Tensor:
    """The input features (in,), each group's side by side, where g_idx (in,) is the group of each.
    Raises ValueError unless all groups are of one size."""
    order = g_idx.argsort(stable=True)
    size = len(g_idx) // groups
    if not torch.equal(g_idx[order].long(), torch.arange(len(g_idx), device=g_idx.device) // size):
        raise ValueError(f"g_idx: {groups} groups of {size} input features each are expected")
    return order


def quantize_rtn(weight: Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Each weight of a matrix (out_features, in_features) rounded to the closest point of its
    group's grid. Raises ValueError for NaN or Inf, and for groups that do not fit."""
    check_weight(weight)
    groups = spec.groups(weight.shape[1])
    w = as_float(weight.detach()).unflatten(1, (groups, -1))  # (out, groups, size)
    scale, zero = fit_grid(w, spec)  # (out, groups)
    q = encode(w, scale.unsqueeze(-1), zero.unsqueeze(-1), spec.max_code)
    return assemble(q.flatten(1), scale, zero, None, spec)


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Activations (tokens, in_features) in 2, 3, 4 or 8 bits, one asymmetric grid a token:
    x ~ scale * (codes - zero_point), codes int32 (tokens, in), scale fp32 and zero_point int32
    (tokens, 1). Raises ValueError for NaN, Inf and other bits."""
    check_bits(bits)
    if not torch.isfinite(x).all():
        raise ValueError("the activations hold NaN or Inf")
    x, top = x.float(), 2**bits - 1
    low, high = x.amin(-1, True).clamp(max=0), x.amax(-1, True).clamp(min=0)  # (tokens, 1)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1)
    zero = (-low / scale).round().clamp(0, top)
    return encode(x, scale, zero, top).int(), scale, zero.int()


def quant_matmul(x: Tensor, quantized: QuantizedTensor) -> Tensor:
    """x @ W.T, fp32 (..., out_features), with integer products only: that of the dequantized
    operands, where x (..., in_features) is quantized to 8 bits a token.

    With x = sx (a - za), w = sw (q - zw) (Jacob et al. 2018, eq. 7):
        sum_k x w = sx sw [ sum a q  -  zw sum a  -  za sum q  +  n za zw ]
    Raises ValueError for NaN, Inf, another width and groups of different sizes.
    """
    (out, in_features), groups = quantized.shape, quantized.scale.shape[1]
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {in_features}")
    a, sx, za = quantize_activations(x.reshape(-1, in_features))
    q = quantized.unpacked(slice(None)).int()
    if quantized.g_idx is not None:  # bring each group's features together
        order = by_group(quantized.g_idx, groups)
        a, q = a[:, order], q[:, order]
    a = a.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, tokens, size)
    q = q.unflatten(1, (groups, -1)).permute(1, 2, 0)  # (groups, size, out)
    zw = quantized.zero_point.int().t().unsqueeze(1)  # (groups, 1, out)
    product = torch.bmm(a, q)  # (groups, tokens, out), int32: exact
    product -= zw * a.sum(2, keepdim=True, dtype=torch.int32)
    product -= za * q.sum(1, keepdim=True, dtype=torch.int32)
    product += a.shape[2] * za * zw
    scaled = product * quantized.scale.float().t().unsqueeze(1)  # (groups, tokens, out)
    return (sx * scaled.sum(0)).reshape(*x.shape[:-1], out)
