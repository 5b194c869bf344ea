"""One layer in the GPTQ checkpoint layout, to and from a QuantizedTensor.

A layer P with K inputs and N outputs is stored as
    P.qweight  int32 (K * bits / 32, N)       codes, packed down the inputs
    P.qzeros   int32 (groups, N * bits / 32)  zero-points, packed along the outputs
    P.scales   fp16  (groups, N)
    P.g_idx    int32 (K,)                     the group of each input
with W[n, k] = scales[g_idx[k], n] * (q[k, n] - zero[g_idx[k], n]).

Two versions of the layout differ in the zero-points alone: "gptq_v2" stores them, "gptq" (v1)
stores them minus 1, which leaves 0 without a code: readers that add 1 to a whole word carry it
over into the next zero-point.
"""

import torch
from torch import Tensor

from ..lora.layer import named
from ..quant.grid import QuantizedTensor, QuantSpec
from ..quant.packing import as_bytes, as_words, pack, unpack

FORMATS = ("gptq_v2", "gptq")


def check_shape(path: str, in_features: int, out_features: int) -> None:
    """Raise ValueError, naming the layer, unless both are multiples of 32."""
    if in_features % 32 or out_features % 32:
        raise ValueError(f"{path} has {in_features} inputs and {out_features} outputs; the GPTQ "
                         "format packs multiples of 32: leave this layer dense")  # fmt: skip


def groups_in_order(in_features: int, groups: int) -> Tensor:
    """Return the group of each input, int32 (in,), where groups are neighbours."""
    return torch.arange(in_features, dtype=torch.int32) // (in_features // groups)


def to_gptq(path: str, quantized: QuantizedTensor, v1: bool) -> dict[str, Tensor]:
    """Return qweight, qzeros, scales and g_idx of a layer, contiguous, on the CPU, which decode to
    the very weights of `quantized`. Raises ValueError, naming the layer, for shapes and zero-points
    that can't be stored."""
    out, in_features = quantized.shape
    check_shape(path, in_features, out)
    codes, zero, g_idx = quantized.codes, quantized.zero_point, quantized.g_idx
    if g_idx is None:
        g_idx = groups_in_order(in_features, zero.shape[1])
    if v1:
        codes, zero = _without_zero(path, quantized, g_idx)
        zero = zero - 1
    tensors = {
        "qweight": as_words(codes).t(),  # (out, in * bits / 32) -> (in * bits / 32, out)
        "qzeros": as_words(pack(zero.t(), quantized.spec.bits)),  # (groups, out * bits / 32)
        "scales": quantized.scale.t(),  # (out, groups) -> (groups, out)
        "g_idx": g_idx,  # readers index with it, in order or not: it is never left out
    }
    return {name: t.cpu().contiguous() for name, t in tensors.items()}


def _without_zero(path: str, quantized: QuantizedTensor, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed codes and zero-points (out, groups) >= 1 that decode to the same weights: where
    a group has the zero-point 0, both move up by one, scale * (q - 0) = scale * ((q + 1) - 1).
    ValueError where it uses the largest code, so that no v1 file has these weights."""
    spec, zero = quantized.spec, quantized.zero_point
    lift = zero == 0  # (out, groups)
    if not lift.any():
        return quantized.codes, zero
    q = unpack(quantized.codes, spec.bits, quantized.shape)  # (out, in)
    lifted = lift[:, g_idx.long().to(q.device)]  # (out, groups) -> (out, in)
    if stuck := int((lifted & (q == spec.max_code)).any(1).sum()):
        raise ValueError(f"{path}.qzeros: {stuck} of {q.shape[0]} outputs have a zero-point of 0 "
                         f"beside the code {spec.max_code}, which checkpoint_format='gptq' (v1) "
                         "can't hold. Export as 'gptq_v2', or quantize with symmetric=True")
    return pack(q + lifted, spec.bits), zero + lift


def from_gptq(
    path: str, tensors: dict[str, Tensor], shape: torch.Size, spec: QuantSpec, v1: bool
) -> QuantizedTensor:
    """Return the weight of `shape` (out, in) that a layer's tensors hold: the inverse of `to_gptq`.
    Raises ValueError, naming the tensor, for what is missing, misshapen or means nothing."""
    out, in_features = shape
    check_shape(path, in_features, out)
    with named(path):
        groups = spec.groups(in_features)
    expected = {
        "qweight": (torch.int32, (in_features * spec.bits // 32, out)),
        "qzeros": (torch.int32, (groups, out * spec.bits // 32)),
        "scales": (torch.float16, (groups, out)),
        "g_idx": (torch.int32, (in_features,)),
    }
    for name in expected.keys() - tensors.keys():
        raise ValueError(f"{path}.{name} is missing; export the checkpoint again")
    for name, (dtype, size) in expected.items():
        got = tensors[name]
        fits = got.dtype == dtype or name == "scales" and got.is_floating_point()
        if tuple(got.shape) != size or not fits:
            raise ValueError(f"{path}.{name} is {got.dtype} {tuple(got.shape)}, expected {dtype} "
                             f"{size} for {spec.bits} bits in {groups} groups; does config.json "
                             "belong to these weights?")  # fmt: skip
    g_idx = tensors["g_idx"]
    quantized = QuantizedTensor(
        codes=as_bytes(tensors["qweight"].t()),  # (in * bits / 32, out) -> (out, in * bits / 8)
        scale=tensors["scales"].t().contiguous(),  # (groups, out) -> (out, groups)
        zero_point=_read_zeros(path, tensors["qzeros"], (groups, out), spec, v1),
        g_idx=None if torch.equal(g_idx, groups_in_order(in_features, groups)) else g_idx,
        shape=torch.Size(shape),
        spec=spec,
    )
    with named(path):
        quantized.check()
    return quantized


def _read_zeros(path: str, qzeros: Tensor, shape: tuple, spec: QuantSpec, v1: bool) -> Tensor:
    """Return the zero-points as uint8 (out, groups)."""
    zero = unpack(as_bytes(qzeros), spec.bits, shape)  # (groups, out)
    if v1:
        if overflowed := int((zero == spec.max_code).sum()):
            raise ValueError(f"{path}.qzeros: {overflowed} zero-points are stored as "
                             f"{spec.max_code}, in v1 a 0 that overflowed, maybe into others: save "
                             "it as 'gptq_v2', or correct checkpoint_format if it is v2")
        zero = zero + 1
    middle = 2 ** (spec.bits - 1)
    if spec.symmetric and not (zero == middle).all():
        raise ValueError(f"{path}.qzeros: sym is true, but a zero-point is "
                         f"{int(zero[zero != middle][0])}, not {middle}: config.json has the wrong "
                         "checkpoint_format ('gptq' for 'gptq_v2'?) or sym")  # fmt: skip
    return zero.t().contiguous()
