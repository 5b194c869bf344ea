"""A model that is never whole in memory: without storage, filled from its shards part by part."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..base.files import read_json
from ..base.finite import check_finite
from ..base.folders import check_folder
from ..layers.blocks import decoder_blocks
from .batches import Batch
from .calibrate import BlockCalls
from .checkpoint import QUANTIZATION
from .packed_model import (
    empty_model,
    is_derived,
    keep_own_weights,
    materialize_buffers,
    tied_weights,
)
from .settings import check_config
from .stored_weights import read_weights, stored_shapes, weight_map


class StreamedModel:
    """A model without storage, and the folder that its parts are filled from; limit: only its first
    so many decoder blocks. Raises ValueError for tensors that do not fit or hold NaN or Inf, and
    for quantized ones."""

    def __init__(self, folder: Path, device=None, compute_dtype="auto", limit: int | None = None):
        check_folder(folder)
        config = read_json(folder / "config.json")
        check_config(config, f"{folder}/config.json")
        if config.get("quantization_config") or (folder / QUANTIZATION).is_file():
            raise ValueError(f"{folder} is quantized already; name the dense model's folder")
        count = config.get("num_hidden_layers", 0)
        if limit is not None and (not isinstance(limit, int) or not 1 <= limit <= count):
            raise ValueError(f"blocks={limit}, but {folder} has {count}")
        only = {} if limit is None else {"num_hidden_layers": limit}
        made = empty_model(folder, device, compute_dtype, **only)
        model, self.dtype, self.device = made
        self.folder, self.model = folder, model.eval()
        self.path, self.blocks = decoder_blocks(model)
        self.names = self._check_tensors(range(limit or count, count))
        for block in range(-1, len(self.blocks)):  # before hours are spent on those before it
            check_finite(self.read(block).items(), folder)
        named = model.named_parameters(remove_duplicate=False)
        self.parameters = sum(p.numel() for n, p in named if n in self.names)

    def _check_tensors(self, left_out: range) -> list[str]:
        """Return the names of the tensors that the model needs; left_out: numbers of blocks."""
        model, folder, tied = self.model, self.folder, tied_weights(self.model)
        keep_own_weights(model, read_weights(folder, {*tied, *tied.values()}))
        needed = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        files = set(weight_map(folder).values())
        stored = stored_shapes(folder / name for name in files)
        missing = [n for n in needed if n not in stored]
        strange = [n for n in sorted(stored.keys() - tied.keys() - needed.keys())
                   if self.block_of(n) not in left_out
                   and not is_derived(model, n)]  # fmt: skip
        if missing or strange:
            raise ValueError(f"{folder}: missing {missing[:3]}, not expected {strange[:3]}; a "
                             "model stored under other names can't be streamed")  # fmt: skip
        for name in (n for n, shape in needed.items() if stored[n] != shape):
            raise ValueError(f"{folder}: {name} is {stored[name]}, by config.json {needed[name]}")
        return list(needed)

    def block_of(self, name: str) -> int:
        """Return the number of the decoder block that a path lies in; -1 outside."""
        before, _, inside = name.partition(f"{self.path}.")
        return int(inside.partition(".")[0]) if inside and not before else -1

    def read(self, block: int) -> dict[str, Tensor]:
        """Return the tensors of a block as stored; -1: all that lie outside the blocks."""
        names = {n for n in self.names if self.block_of(n) == block}
        return read_weights(self.folder, names)

    def fill(self, state: dict[str, Tensor]) -> None:
        """Put copies of these tensors, in the dtype to compute in, into the model."""
        # A copy even where the dtype fits: a view of a file begins at any byte, and how a product
        # is rounded may depend on that.
        dtypes = {n: self.dtype if t.is_floating_point() else t.dtype for n, t in state.items()}
        copies = {n: t.to(self.device, dtypes[n], copy=True) for n, t in state.items()}
        self.model.load_state_dict(copies, strict=False, assign=True)

    def calls(self, batches: list[Batch], spill: Path | str | None) -> BlockCalls:
        """Return what the blocks are called with. The embeddings are in memory only meanwhile."""
        head = self.model.get_output_embeddings()
        head = next((p for p, m in self.model.named_modules() if m is head), "no head")
        state = {n: t for n, t in self.read(-1).items() if not n.startswith(f"{head}.")}
        self.fill(state)
        materialize_buffers(self.model, self.device)
        hidden = SpilledTensors(spill, self.device) if spill else []
        calls = BlockCalls(self.model, self.blocks, batches, hidden)
        empty = {n: t.to("meta") for n, t in state.items()}
        self.model.load_state_dict(empty, strict=False, assign=True)
        return calls


class SpilledTensors(list):
    """Hidden states (batch, seq, hidden) in files that lose their names once they are mapped:
    whatever ends the run, nothing is left."""

    def __init__(self, folder: Path | str, device: torch.device):
        self.folder, self.device = folder, device
        Path(folder).mkdir(parents=True, exist_ok=True)

    def append(self, hidden: Tensor) -> None:
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            _allocate(file.fileno(), hidden.nbytes, self.folder)
            size = {"size": hidden.numel(), "dtype": hidden.dtype}
            mapped = torch.from_file(file.name, shared=True, **size).view(hidden.shape)
        super().append(mapped.copy_(hidden))

    def __getitem__(self, n: int) -> Tensor:
        return super().__getitem__(n).to(self.device)

    def __setitem__(self, n: int, hidden: Tensor) -> None:
        super().__getitem__(n).copy_(hidden)


def _allocate(file: int, size: int, folder: Path | str) -> None:
    """Have the disk reserve so many bytes: on a full one a mapped file ends the process (SIGBUS).
    Raises OSError, naming the folder."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno)}, of {size:,} bytes to keep "
                      "activations", str(folder)) from None  # fmt: skip
