"""Which base an adapter fits, as hashes: its embeddings and norms, its linears, one residual base;
and whether weights hold an adapter's update already."""

import hashlib

import torch
from torch import Tensor, nn

from ..layers.linear import QuantizedLinear, dense_pieces
from .targets import linear_layers

NEAR = 0.5  # of 1: what a merged adapter adds to an overlap; other weights add about 0


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base's embeddings and norms: the same whether its linears are packed or dense,
    and, from what bf16 and fp16 can both hold, in every dtype."""
    digest, linears = hashlib.sha256(), tuple(f"{path}." for path in linear_layers(model))
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(linears):
            _add_dense(digest, name, p)
    return digest.hexdigest()[:16]


def linears_fingerprint(model: nn.Module) -> str:
    """"packed" or "dense" and a hash of the base's linear layers: of codes and scales as stored, of
    dense weights in a form that is the same in every dtype that holds them. A layer that PiSSA took
    apart counts as it was before."""
    digest, kind = hashlib.sha256(), "dense"
    for path, layer in sorted(linear_layers(model).items()):
        base = getattr(layer, "base", layer)
        if isinstance(base, QuantizedLinear):
            kind = "packed"
            _add_packed(digest, path, base)
        else:
            digest.update(f"{path} {getattr(layer, 'original', None) or dense_hash(base)}".encode())
        if base.bias is not None:
            _add_dense(digest, f"{path}.bias", base.bias)
    return f"{kind} {digest.hexdigest()[:16]}"


def dense_hash(linear: nn.Linear) -> str:
    """A hash of a dense weight (out, in), the same in every dtype that holds its values."""
    digest = hashlib.sha256()
    _add_dense(digest, "", linear.weight)
    return digest.hexdigest()


def residual_fingerprint(layers: dict[str, nn.Module]) -> str:
    """A hash of the packed weights of these layers, by path; "dense" where one is not packed."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        base = getattr(layer, "base", layer)
        if not isinstance(base, QuantizedLinear):
            return "dense"
        _add_packed(digest, path, base)
    return digest.hexdigest()[:16]


def _add_dense(digest, name: str, weight: Tensor) -> None:
    digest.update(f"{name}{tuple(weight.shape)}".encode())
    bits = weight.detach().cpu().bfloat16().half().contiguous().view(torch.int16)
    digest.update(bits.numpy().tobytes())


def _add_packed(digest, path: str, base: QuantizedLinear) -> None:
    digest.update(f"{path}{base.spec}".encode())
    for name, tensor in base.state_dict().items():  # in order, whatever the layout
        if name != "bias":  # it takes the dtype of the model
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            flat = tensor.cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())


@torch.no_grad()
def overlap(base: nn.Module, b: Tensor, a: Tensor, scaling: float) -> float | None:
    """<W, D> / |D|^2 of a base's weight W and the update D = scaling * B A; None where D is 0.
    Merging adds 1 to it: <W + D, D> / |D|^2, however W is rounded before or afterwards; what only
    rounds W adds 0.002 at most (the bundled adapter between dense, NF4, 4 and 2 bits)."""
    product = size = 0.0
    for rows, weight in dense_pieces(base):  # (rows, in)
        update = scaling * (b[rows].to(weight) @ a.to(weight))
        product += (weight * update).sum(dtype=torch.float64).item()
        size += update.square().sum(dtype=torch.float64).item()
    return round(product / size, 2) if size else None


def holds_update(overlaps: list[float | None], now: list[float | None]) -> bool:
    """Whether weights with the overlaps `now`, a layer each, hold an update already, of which
    `overlaps` were those of its own base."""
    gaps = [abs(b - a - 1) for a, b in zip(overlaps, now) if a is not None and b is not None]
    return bool(gaps) and sum(gaps) / len(gaps) < NEAR
