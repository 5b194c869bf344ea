"""Hashes of what a model computes with, and of the part of it that is not trained."""

import hashlib

from ..base.hashes import add_tensors
from ..lora.layer import lora_layers


def fingerprint(model) -> str:
    """SHA-256 of what a model computes with, whatever it is called and wherever it lies: its
    modules as printed, its LoRA settings, and the bytes of all parameters and buffers."""
    digest = hashlib.sha256(str(model).encode())
    for name, layer in lora_layers(model).items():
        digest.update(f"{name} {layer.active} {layer.configs}".encode())
    add_tensors(digest, [*model.named_parameters(), *model.named_buffers()])
    return digest.hexdigest()


def _base_hash(model, trained: dict) -> str:
    """SHA-256 of the tensors that the model's checkpoint would hold and that are not trained."""
    digest = hashlib.sha256()
    add_tensors(digest, ((n, t) for n, t in model.state_dict().items() if n not in trained))
    return digest.hexdigest()
