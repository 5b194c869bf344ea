"""Which base an adapter fits, as a hash: of a whole model, or of one residual base."""

import hashlib

import torch
from torch import nn

from ..layers.linear import QuantizedLinear
from .targets import linear_layers


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base's embeddings and norms: the same whether its linears are packed or dense,
    and, from what bf16 and fp16 can both hold, in every dtype."""
    digest, linears = hashlib.sha256(), tuple(f"{path}." for path in linear_layers(model))
    for name, p in sorted(model.named_parameters()):
        if not name.startswith(linears):
            digest.update(f"{name}{tuple(p.shape)}".encode())
            bits = p.detach().cpu().bfloat16().half().contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def residual_fingerprint(layers: dict[str, nn.Module]) -> str:
    """A hash of the packed weights of these layers, by path; "dense" where one is not packed."""
    digest = hashlib.sha256()
    for path, layer in sorted(layers.items()):
        base = getattr(layer, "base", layer)
        if not isinstance(base, QuantizedLinear):
            return "dense"
        digest.update(f"{path}{base.spec}".encode())
        for name, tensor in base.named_buffers():
            if name != "bias":  # it takes the dtype of the model
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                flat = tensor.cpu().contiguous().view(-1)
                digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
