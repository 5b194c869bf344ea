"""Models that stay on disk: tensors read by name, a model without storage filled by parts."""

import hashlib
import json
from pathlib import Path

from torch import Tensor

from .checkpoint import (
    INDEX, WEIGHTS, empty_model, materialize_buffers, open_tensors, read_json,
)  # fmt: skip
from .block_inputs import first_block_inputs
from .blocks import decoder_blocks

SAMPLE = 1 << 16  # bytes of each tensor that identify it
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it, though it follows from the config


class Shards:
    """The tensors of a transformers folder, in one file or several, read only when asked for.

    Raises FileNotFoundError and ValueError, naming the file, for missing and damaged ones.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            self.file_of: dict[str, str] = read_json(folder / INDEX).get("weight_map", {})
        else:
            with open_tensors(folder / WEIGHTS) as file:
                self.file_of = dict.fromkeys(file.keys(), WEIGHTS)

    def files(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self.file_of.values()))]

    def read(self, names) -> dict[str, Tensor]:
        """These tensors as stored, on the CPU: views of the files, not yet in memory."""
        state = {}
        for path in self.files():
            here = [n for n in names if self.file_of[n] == path.name]
            if here:
                with open_tensors(path) as file:
                    state |= {n: file.get_tensor(n) for n in here}
        return state

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, from the headers of the files alone."""
        found = {}
        for path in self.files():
            with open_tensors(path) as file:
                found |= {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}
        return found

    def identity(self) -> str:
        """A hash of config and index and, of each file, its size, its header and 64 KB in the
        middle of each tensor.

        For 13 GB that takes a moment, where all bytes would take minutes. Training changes
        tensors throughout, and cannot go unnoticed; a few weights of a large tensor that
        were changed by hand can.
        """
        digest = hashlib.sha256()
        for path in (self.folder / "config.json", self.folder / INDEX):
            digest.update(path.read_bytes() if path.is_file() else b"none")
        for path in self.files():
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size)
                digest.update(f"{path.name} {path.stat().st_size}".encode() + header)
                entries = json.loads(header)
                entries.pop("__metadata__", None)
                for begin, end in (entry["data_offsets"] for entry in entries.values()):
                    file.seek(8 + size + max(begin, (begin + end - SAMPLE) // 2))
                    digest.update(file.read(min(SAMPLE, end - begin)))
        return digest.hexdigest()


class StreamedModel:
    """A model without storage, and the shards that its parts are filled from.

    blocks: only the first so many decoder blocks. Raises ValueError for tensors that are
    missing, not expected or of another shape.
    """

    def __init__(self, folder: Path, device=None, compute_dtype="auto", blocks: int | None = None):
        count = read_json(folder / "config.json").get("num_hidden_layers", 0)
        if blocks is not None and not 1 <= blocks <= count:
            raise ValueError(f"blocks={blocks}, but {folder} has {count}")
        only = {} if blocks is None else {"num_hidden_layers": blocks}
        self.shards = Shards(folder)
        self.model, self.dtype, self.device = empty_model(folder, device, compute_dtype, **only)
        self.model.eval()
        self.path, self.blocks = decoder_blocks(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        shapes = {n: t.shape for n, t in self.model.state_dict().items() if n not in tied}
        self.names = list(shapes)
        stored = self.shards.shapes()
        missing = [n for n in shapes if n not in stored]
        last = count if blocks is None else blocks
        wanted = [n for n in stored if DERIVED not in n and not last <= self.block_of(n) < count]
        strange = sorted(set(wanted) - tied - shapes.keys())
        if missing or strange:
            raise ValueError(f"{folder}: missing {missing[:3]}, not expected {strange[:3]}")
        for name, shape in shapes.items():
            if stored[name] != shape:
                raise ValueError(
                    f"{folder}: {name} is {stored[name]}, by config.json {tuple(shape)}"
                )

    def block_of(self, name: str) -> int:
        """The number of the decoder block that a path lies in; -1 outside."""
        if not name.startswith(f"{self.path}."):
            return -1
        return int(name.removeprefix(f"{self.path}.").partition(".")[0])

    def read(self, block: int) -> dict[str, Tensor]:
        """The tensors of a block as stored; -1: all that lie outside the blocks."""
        return self.shards.read([n for n in self.names if self.block_of(n) == block])

    def fill(self, state: dict[str, Tensor]) -> None:
        """Put copies of these tensors, in the dtype to compute in, into the model."""
        copies = {
            # A copy even where the dtype fits: a view of a file begins at any byte, and how a
            # product is rounded may depend on that.
            n: t.to(self.device, self.dtype if t.is_floating_point() else t.dtype, copy=True)
            for n, t in state.items()
        }
        self.model.load_state_dict(copies, strict=False, assign=True)

    def first_calls(self, batches):
        """What the first block is called with, (args, kwargs) for each batch; with the head
        still empty, and the embeddings only while this generator runs."""
        head = self.model.get_output_embeddings()
        head = next((p for p, m in self.model.named_modules() if m is head), "no head")
        state = {n: t for n, t in self.read(-1).items() if not n.startswith(f"{head}.")}
        self.fill(state)
        materialize_buffers(self.model, self.device)
        for batch in batches:
            yield from first_block_inputs(self.model, self.blocks[0], [batch])
        empty = {n: t.to("meta") for n, t in state.items()}
        self.model.load_state_dict(empty, strict=False, assign=True)
