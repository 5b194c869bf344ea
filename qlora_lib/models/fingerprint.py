"""Hashes of what a model computes with, and of the part of it that is not trained."""

import hashlib

from ..base.hashes import add_tensors
from ..lora.layer import lora_layers


def fingerprint(model) -> str:
    """Return a SHA-256 of what a model computes with, wherever it lies: its modules as printed
    (kinds of layers, specs, dropout), its LoRA settings, and the bytes of all parameters and
    buffers. Reports and searches on disk hold this hash, so it stays as it is."""
    digest = hashlib.sha256(str(model).encode())
    for name, layer in lora_layers(model).items():
        digest.update(f"{name} {layer.active} {layer.configs}".encode())
    add_tensors(digest, [*model.named_parameters(), *model.named_buffers()])
    return digest.hexdigest()


def frozen_hash(model, trained: dict) -> str:
    """Return a SHA-256 of what the model's state_dict holds besides the `trained` parameters."""
    digest = hashlib.sha256()
    add_tensors(digest, ((n, t) for n, t in model.state_dict().items() if n not in trained))
    return digest.hexdigest()
