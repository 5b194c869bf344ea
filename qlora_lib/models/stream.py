"""Quantize a model that does not fit in memory: one decoder block at a time, from its shards.

In memory are one block, one Hessian with the copies that its factorization makes, and, unless
spilled to disk, the calibration activations (with match_dense blocks and activations twice). Codes
and errors are those of `quantize_model`, bit for bit. A killed run goes on from the finished shards
in OUT.unfinished, which becomes OUT once all are there.
"""

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ..base.devices import dtype_name
from ..base.files import read_json, read_tensors, write_json_atomic
from ..base.folders import HASHES, atomic_folder, check_folder
from ..base.hashes import content_hash, file_hash
from ..base.progress import Progress
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions
from ..quant.recipe import Recipe, Spec
from .batches import Batch
from .calibrate import quantize_block
from .checkpoint import QUANTIZATION, describe, our_tensor, spec_as_json
from .fused import shared_largest
from .packed_model import put_packed
from .quantize import LayerReport, check_calibration, check_shared, quantize_layer, warn_of_dense
from .settings import read_tokenizer
from .stored_weights import INDEX, weight_map
from .stream_output import REPORT, StreamOutput, report_rows
from .streamed_model import StreamedModel


def folder_identity(folder: Path) -> str:
    """Return a hash of config, index and weights."""
    names = {"config.json", INDEX, *weight_map(folder).values()}
    return content_hash({n: file_hash(folder / n) for n in names if (folder / n).is_file()})


@torch.no_grad()
def quantize_checkpoint(
    folder: Path | str,
    out: Path | str,
    spec: Spec,
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
        return report_rows(read_json(out / REPORT))  # finished before
    with atomic_folder(out, QUANTIZATION, keep=True) as scratch:
        output = StreamOutput(scratch, made_from, len(streamed.blocks))
        _quantize_blocks(streamed, output, targets, calibration, recipe, spill, progress)
        output.finish(streamed.parameters)
        packed = {row.name: spec for row in output.rows}
        names = weight_map(scratch)
        describe(model, tokenizer, packed, names, scratch, beside)
    warn_of_dense(path for path in targets if path not in packed)
    return output.rows


def _keep_beside(out: Path, beside: dict[str, dict]) -> None:
    """Put `beside` into a finished folder where it holds other files of these names, or none."""
    there = {name: read_json(out / name) for name in beside if (out / name).is_file()}
    if there != json.loads(json.dumps(beside)):
        with atomic_folder(out, QUANTIZATION) as scratch:
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
            largest = shared_largest(layers, recipe.spec)

            def swap(path: str, hessian=None) -> LayerReport:
                # The dense weight goes as soon as its layer is done.
                one = largest.get(path)
                layer, row = quantize_layer(path, layers.pop(path), recipe, hessian, one)
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


def _read_finished(streamed: StreamedModel, output: StreamOutput, i: int, spec) -> None:
    """Fill block i from the shard that an earlier run made of it."""
    state = read_tensors(output.shards[i + 1])
    names = [row.name for row in output.rows_of[i]]
    layers = dict.fromkeys(names, spec_as_json(spec))
    make = partial(our_tensor, layers=layers)
    put_packed(streamed.model, layers, state, make)
    streamed.fill(state)
    streamed.blocks[i].to(streamed.device)
