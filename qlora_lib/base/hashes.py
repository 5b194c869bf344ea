"""SHA-256 of what can change under a run: JSON, tensors, a folder's weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # hashing JSON need not wait for torch
    from torch import Tensor


def content_hash(content: Any) -> str:
    """Return the SHA-256 of what JSON writes for `content`, keys in order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def changes(before: dict, now: dict) -> str:
    """Return what differs between two settings, as "lr was 0.1, is 0.2; ..."; "" where nothing."""
    names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    return "; ".join(f"{n} was {before.get(n)!r:.80}, is {now.get(n)!r:.80}" for n in names)


def add_tensors(digest, named: Iterable[tuple[str, Tensor]]) -> None:
    """Update a hash with names, shapes, dtypes and bytes of these tensors."""
    import torch

    for name, tensor in named:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy())


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_id(model: str) -> str:
    """Return a hash of a local folder's or file's weights; a hub id stands for itself."""
    path = Path(model)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.gguf"))
    files = [path] if path.is_file() else files
    hashes = b"".join(bytes.fromhex(file_hash(file)) for file in files)
    return hashlib.sha256(hashes).hexdigest() if files else model
