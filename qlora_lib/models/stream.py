"""Quantize a model that does not fit in memory: one decoder block at a time, from its shards.

In memory are one block, one Hessian with the copies that its factorization makes, and, unless
spilled to disk, the calibration activations (with match_dense blocks and activations twice). Codes
and errors are those of `quantize_model`, bit for bit. A killed run goes on from the finished shards
in OUT.unfinished, which becomes OUT once all are there.
"""

import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base.devices import dtype_name
from ..base.files import (
    read_json,
    read_proved_json,
    read_tensors,
    whole_file,
    write_json_atomic,
    write_proved_json,
)
from ..base.finite import check_finite
from ..base.folders import HASHES, atomic_folder, check_folder
from ..base.hashes import changes, content_hash, file_hash
from ..base.progress import Progress
from ..layers.blocks import decoder_blocks
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from . import checkpoint
from .batches import Batch
from .calibrate import BlockCalls, quantize_block
from .quantize import LayerReport, check_calibration, check_shared, quantize_layer, warn_of_dense
from .settings import check_config, read_tokenizer

REPORT = "report.json"  # what OUT was made from, a row a layer, bits a parameter
SAMPLE = 1 << 16  # bytes of each tensor that identify it


def folder_identity(folder: Path) -> str:
    """Return a hash of config and index and, of each file of weights, its size, its header and
    64 KB in the middle of each tensor: all bytes of 13 GB would take minutes."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", folder / checkpoint.INDEX):
        digest.update(path.read_bytes() if path.is_file() else b"none")
    for name in sorted(set(checkpoint.weight_map(folder).values())):
        with open(folder / name, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size)
            digest.update(f"{name} {(folder / name).stat().st_size}".encode() + header)
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            for begin, end in (entry["data_offsets"] for entry in entries.values()):
                file.seek(8 + size + max(begin, (begin + end - SAMPLE) // 2))
                digest.update(file.read(min(SAMPLE, end - begin)))
    return digest.hexdigest()


class StreamedModel:
    """A model without storage, and the folder that its parts are filled from; limit: only its first
    so many decoder blocks. Raises ValueError for tensors that do not fit or hold NaN or Inf, and
    for quantized ones."""

    def __init__(self, folder: Path, device=None, compute_dtype="auto", limit: int | None = None):
        check_folder(folder)
        config = read_json(folder / "config.json")
        check_config(config, f"{folder}/config.json")
        if config.get("quantization_config") or (folder / checkpoint.QUANTIZATION).is_file():
            raise ValueError(f"{folder} is quantized already; name the dense model's folder")
        count = config.get("num_hidden_layers", 0)
        if limit is not None and (not isinstance(limit, int) or not 1 <= limit <= count):
            raise ValueError(f"blocks={limit}, but {folder} has {count}")
        only = {} if limit is None else {"num_hidden_layers": limit}
        made = checkpoint.empty_model(folder, device, compute_dtype, **only)
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
        model, folder, tied = self.model, self.folder, checkpoint.tied_weights(self.model)
        checkpoint.keep_own_weights(model, checkpoint.read_weights(folder, {*tied, *tied.values()}))
        needed = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
        files = set(checkpoint.weight_map(folder).values())
        stored = checkpoint.stored_shapes(folder / name for name in files)
        missing = [n for n in needed if n not in stored]
        strange = [n for n in sorted(stored.keys() - tied.keys() - needed.keys())
                   if self.block_of(n) not in left_out
                   and not checkpoint.is_derived(model, n)]  # fmt: skip
        if missing or strange:
            raise ValueError(
                f"{folder}: missing {missing[:3]}, not expected {strange[:3]}; a model that is "
                "stored under other names than its own is quantized in memory, without streaming"
            )
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
        return checkpoint.read_weights(self.folder, names)

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
        checkpoint.materialize_buffers(self.model, self.device)
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


@torch.no_grad()
def quantize_checkpoint(
    folder: Path | str,
    out: Path | str,
    spec: QuantSpec | NF4Spec,
    calibration: list[Batch] | None = None,
    method: str = "gptq",
    options: GPTQOptions = GPTQOptions(),
    target_modules="all",
    compute_dtype: str = "auto",
    device=None,
    spill: Path | str | None = None,
    blocks: int | None = None,
    progress: Callable[[LayerReport], None] | None = None,
    beside: dict[str, dict] | None = None,
) -> list[LayerReport]:
    """Quantize the model in `folder` (config, tokenizer, safetensors) into `out`; a row a layer.

    `out` is what load_quantized reads, a shard a decoder block; dense tensors keep the dtype in
    which they are stored. Its report.json holds the rows and the bits a parameter of the model.
    calibration, method, options, target_modules: as for quantize_model. spill: a folder to keep
    activations in. blocks: make a model of only the first so many. progress: called with each row
    at once. beside: as for save_quantized. A killed run goes on where it stopped, to the same bits
    if given as many threads; a finished one is not made again. Raises ValueError for what
    quantize_model refuses, for tensors that do not fit the model, and for an unfinished run of
    other settings or weights; FileNotFoundError for missing files.
    """
    recipe = Recipe.of(spec, method, options, target_modules)
    folder, out = Path(folder), Path(out)
    streamed = StreamedModel(folder, device, compute_dtype, blocks)
    model = streamed.model
    check_calibration(model, recipe, calibration)
    tokenizer = read_tokenizer(folder)
    targets = list(find_linears(model, target_modules))
    check_shared(model, targets)
    if outside := [path for path in targets if streamed.block_of(path) < 0]:
        raise ValueError(f"{outside} lie outside the decoder blocks, which alone are quantized")
    made_from = _made_from(streamed, recipe, calibration, targets)
    if (out / REPORT).is_file() and read_json(out / REPORT).get("made_from") == made_from:
        check_folder(out)
        _keep_beside(out, beside or {})
        return _rows(read_json(out / REPORT))  # finished before
    with atomic_folder(out, checkpoint.QUANTIZATION, keep=True) as scratch:
        output = _Output(scratch, made_from, len(streamed.blocks))
        _quantize_blocks(streamed, output, targets, calibration, recipe, spill, progress)
        output.finish(streamed.parameters)
        packed = {row.name: spec for row in output.rows}
        names = checkpoint.weight_map(scratch)
        checkpoint.describe(model, tokenizer, packed, names, scratch, beside)
    warn_of_dense(path for path in targets if path not in packed)
    return output.rows


def _keep_beside(out: Path, beside: dict[str, dict]) -> None:
    """Put `beside` into a finished folder where it holds other files of these names, or none."""
    there = {name: read_json(out / name) for name in beside if (out / name).is_file()}
    if there != json.loads(json.dumps(beside)):
        with atomic_folder(out, checkpoint.QUANTIZATION) as scratch:
            skip = shutil.ignore_patterns(HASHES)
            shutil.copytree(out, scratch, dirs_exist_ok=True, ignore=skip)
            for name, said in beside.items():
                write_json_atomic(scratch / name, said)


def _made_from(streamed, recipe: Recipe, calibration, targets) -> dict:
    """Return all that the result depends on, as report.json holds it."""
    batches = calibration and [{k: v.tolist() for k, v in batch.items()} for batch in calibration]
    return {
        "weights": folder_identity(streamed.folder),
        "method": recipe.method,
        "spec": str(recipe.spec),
        "options": str(recipe.options) if recipe.options else None,
        "targets": sorted({path.rpartition(".")[2] for path in targets}),
        "blocks": len(streamed.blocks),
        "compute_dtype": dtype_name(streamed.dtype),
        "device": streamed.device.type,
        "calibration": content_hash(batches) if batches else None,
    }


def _quantize_blocks(streamed, output, targets, calibration, recipe: Recipe, spill, progress):
    """Write a shard for each block that has none yet; free each block when the next is called."""
    done = set(output.rows_of)
    if -1 not in done:
        output.write(-1, streamed.read(-1))
    calls = dense_calls = None
    if calibration and not done.issuperset(range(len(streamed.blocks))):
        calls = streamed.calls(calibration, spill)
        dense_calls = streamed.calls(calibration, spill) if recipe.matches_dense else None
    say = Progress(f"quantizing with {recipe.method}", len(targets), "layers", len(output.rows))
    for i, block in enumerate(streamed.blocks):
        twin = None
        if i not in done or dense_calls:
            streamed.fill(stored := streamed.read(i))
            twin = copy.deepcopy(block) if dense_calls else None
        if i not in done:
            paths = [path for path in targets if streamed.block_of(path) == i]
            layers = {path: streamed.model.get_submodule(path) for path in paths}

            def swap(path: str, hessian=None) -> LayerReport:
                # The dense weight goes as soon as its layer is done.
                layer, row = quantize_layer(path, layers.pop(path), recipe, hessian)
                replace_module(streamed.model, path, layer)
                say(len(output.rows) + len(paths) - len(layers), path)
                if progress:
                    progress(row)
                return row

            if calls:
                dense = (twin, dense_calls) if dense_calls else None
                rows = quantize_block(i, block, layers, calls, swap, dense, recipe.needs_halves)
            else:
                rows = [swap(path) for path in paths]
            packed = [row.name for row in rows]
            tensors = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in packed}
            for path in packed:
                tensors |= streamed.model.get_submodule(path).state_dict(prefix=f"{path}.")
            output.write(i, tensors, rows)
        elif calls:  # of a finished block only what it gives is needed
            _read_finished(streamed, output, i, recipe.spec)
        if calls and i + 1 < len(streamed.blocks):
            calls.advance(i, block)
            if dense_calls:
                dense_calls.advance(i, twin)
        streamed.blocks[i] = nn.Identity()


def _read_finished(streamed: StreamedModel, output: "_Output", i: int, spec) -> None:
    """Fill block i from the shard that an earlier run made of it."""
    state = read_tensors(output.shards[i + 1])
    names = [row.name for row in output.rows_of[i]]
    layers = dict.fromkeys(names, checkpoint.spec_as_json(spec))
    make = partial(checkpoint.our_tensor, layers=layers)
    checkpoint.put_packed(streamed.model, layers, state, make)
    streamed.fill(state)
    streamed.blocks[i].to(streamed.device)


class _Output:
    """The shards and the report of a run, in the scratch folder that an unfinished one leaves.

    shards   first what lies outside the blocks (-1), then a block each, made in this order
    rows_of  the report's rows for each block that has its shard
    hashes   of the shards, as the report holds them
    """

    def __init__(self, scratch: Path, made_from: dict, blocks: int):
        self.scratch, self.made_from, self.rows_of, self.hashes = scratch, made_from, {}, {}
        names = [f"model-{k + 1:05}-of-{blocks + 1:05}.safetensors" for k in range(blocks + 1)]
        self.shards = [scratch / name for name in names]
        for part in scratch.glob(".*"):  # files that a kill left half written
            part.unlink()
        if not any(scratch.iterdir()):
            self._write_report()
        try:
            report = read_proved_json(scratch / REPORT)
            old, rows = dict(report["made_from"]), _rows(report)
        except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{scratch} can't be gone on with ({error}); delete it to start "
                             "anew") from None  # fmt: skip
        if other := changes(old, made_from):
            raise ValueError(
                f"{scratch} holds an unfinished run of other settings: {other}. Give "
                "the same ones to go on, or delete that folder to start anew"
            )
        written = report.get("shards")  # older versions did not hash them
        for block, shard in enumerate(self.shards, -1):
            if not shard.is_file():
                continue
            now = file_hash(shard)
            if written is not None and written.get(shard.name) != now:
                print(f"{shard.name}: damaged since it was written, made anew", file=sys.stderr)
                shard.unlink()
                continue
            # Rows of a block that has no shard do not count: the shard comes last.
            named = checkpoint.stored_shapes([shard])
            self.rows_of[block] = [row for row in rows if f"{row.name}.codes" in named]
            self.hashes[shard.name] = now

    @property
    def rows(self) -> list[LayerReport]:
        """The rows of all blocks that are done, in their order."""
        return [row for block in sorted(self.rows_of) for row in self.rows_of[block]]

    def _write_report(self, **more) -> None:
        said = {"made_from": self.made_from, "layers": [asdict(row) for row in self.rows]}
        write_proved_json(self.scratch / REPORT, said | {"shards": self.hashes} | more)

    def write(self, block: int, tensors: dict[str, Tensor], rows=()) -> None:
        """Keep the rows and the shard of a block; -1: of what lies outside."""
        shard = self.shards[block + 1]
        with whole_file(shard) as part:
            tensors = {n: t.contiguous().cpu() for n, t in tensors.items()}
            save_file(tensors, part, {"format": "pt"})
            self.rows_of[block], self.hashes[shard.name] = list(rows), file_hash(part)
            self._write_report()

    def finish(self, parameters: int) -> None:
        """Write the index, and what the model's weights take, into the report."""
        where = {n: shard.name for shard in self.shards for n in checkpoint.stored_shapes([shard])}
        write_json_atomic(self.scratch / checkpoint.INDEX, {"metadata": {}, "weight_map": where})
        size = sum(shard.stat().st_size for shard in self.shards)
        bits = round(8 * size / parameters, 4)
        self._write_report(parameters=parameters, weight_bytes=size, bits_per_parameter=bits)


def _rows(report: dict) -> list[LayerReport]:
    return [LayerReport(**row | {"shape": tuple(row["shape"])}) for row in report["layers"]]
