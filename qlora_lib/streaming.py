"""Quantize a model that does not fit in memory: one decoder block at a time, from its shards.

A block's weights are read, quantized on the inputs that the blocks before it, already
quantized, produce, written to a shard of their own, and freed. In memory are one block, one
Hessian with the copies that its factorization makes (a second one where GPTQOptions choose the
damping), and the calibration activations, which may lie on disk instead (with match_dense two
blocks and two sets of them). Codes and errors are those of `quantize_model`, bit for bit.

Finished shards stay in OUT.unfinished until all are there; it then becomes OUT. A killed run
goes on from them: the finished blocks compute their activations again, so that nothing else
has to be kept. Refused: calibration of models whose blocks take different masks, and
checkpoints with other names than the model's own tensors.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .block_inputs import next_call, quantize_block, token_mask
from .checkpoint import (
    INDEX, QUANTIZATION, atomic_folder, describe, open_tensors, put_packed, read_json,
    read_tensors, spec_as_json,
)  # fmt: skip
from .data import check_tokens
from .gptq import GPTQOptions
from .grid import QuantSpec
from .lora import find_linears, replace_module
from .models import LayerReport, check_method, dtype_name, quantize_layer
from .nf4 import NF4Spec
from .results import content_hash, write_json_atomic
from .shards import StreamedModel

REPORT = "report.json"  # what OUT was made from, a row a layer, bits a parameter


class SpilledCalls:
    """A list of calls whose hidden states (batch, seq, hidden) lie in files, not in memory.

    A file has no name any more once it is mapped: whatever ends the run, nothing is left.
    """

    def __init__(self, folder: Path | str, device: torch.device):
        self.folder, self.device, self.calls = Path(folder), device, []
        self.folder.mkdir(parents=True, exist_ok=True)

    def append(self, call: tuple[tuple, dict]) -> None:
        (hidden, *args), kwargs = call
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            size = {"size": hidden.numel(), "dtype": hidden.dtype}
            mapped = torch.from_file(file.name, shared=True, **size).view(hidden.shape)
        self.calls.append(((mapped.copy_(hidden), *args), kwargs))

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, n: int) -> tuple[tuple, dict]:
        (mapped, *args), kwargs = self.calls[n]
        return (mapped.to(self.device), *args), kwargs

    def __setitem__(self, n: int, call: tuple[tuple, dict]) -> None:
        self.calls[n][0][0].copy_(call[0][0])


@torch.no_grad()
def quantize_checkpoint(
    folder: Path | str,
    out: Path | str,
    spec: QuantSpec | NF4Spec,
    calibration: list[dict[str, Tensor]] | None = None,
    method: str = "gptq",
    options: GPTQOptions = GPTQOptions(),
    target_modules="all",
    compute_dtype: str = "auto",
    device=None,
    spill: Path | str | None = None,
    blocks: int | None = None,
    progress: Callable[[LayerReport], None] | None = None,
) -> list[LayerReport]:
    """Quantize the model in `folder` (config, tokenizer, safetensors) into `out`; a row a layer.

    `out` is what load_quantized reads, with a shard for each decoder block; tensors that are
    not quantized pass through in the dtype in which they are stored. Its report.json holds the
    rows and the bits a parameter of the whole model. calibration, method, options,
    target_modules: as for quantize_model. spill: a folder to keep activations in. blocks: make
    a model of only the first so many. progress: called with each row as soon as it is there.
    A killed run goes on where it stopped; with the same number of threads its result is that
    of an uninterrupted one, bit for bit. A finished one is not made again.
    Raises ValueError for what quantize_model refuses, for tensors that are missing, unknown or
    of another shape, and for an unfinished run of other settings or weights (told apart by
    Shards.identity); FileNotFoundError for missing files.
    """
    from transformers import AutoTokenizer, GenerationConfig

    check_method(method, spec, calibration)
    options = options if method == "gptq" else GPTQOptions()
    folder, out = Path(folder), Path(out)
    streamed = StreamedModel(folder, device, compute_dtype, blocks)
    model, modules = streamed.model, streamed.blocks
    if calibration:
        check_tokens(model, (int(batch["input_ids"].max()) for batch in calibration))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    targets = list(find_linears(model, target_modules))
    outside = [path for path in targets if streamed.block_of(path) < 0]
    if outside:
        raise ValueError(f"{outside} lie outside the decoder blocks, which alone are quantized")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if calibration and len(kinds) > 1:  # quantize_model finds each kind's mask (block_settings)
        raise ValueError(
            f"{folder} has blocks of the kinds {sorted(kinds)}, with masks of their own, which "
            "streamed calibration lacks; use quantize_model, or no calibration (rtn, nf4)"
        )
    made_from = {
        "weights": streamed.shards.identity(),
        "method": method,
        "spec": str(spec),
        "options": str(options) if method == "gptq" else None,
        "targets": sorted({path.rpartition(".")[2] for path in targets}),
        "blocks": len(modules),
        "compute_dtype": dtype_name(streamed.dtype),
        "device": streamed.device.type,
        "calibration": content_hash([{k: v.tolist() for k, v in b.items()} for b in calibration])
        if calibration else None,
    }  # fmt: skip

    if (out / REPORT).is_file() and read_json(out / REPORT)["made_from"] == made_from:
        return _rows(read_json(out / REPORT))  # finished before

    with atomic_folder(out, QUANTIZATION, keep=True) as scratch:
        count = len(modules) + 1  # the first shard holds what lies outside the blocks
        shards = [scratch / f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
        rows = _resume(scratch, made_from)
        done = sum(shard.is_file() for shard in shards[1:])  # made in order
        rows = [row for row in rows if streamed.block_of(row.name) < done]
        if not shards[0].is_file():
            _save(streamed.read(-1), shards[0])
        calls, dense_calls, masks = [], [], []
        if calibration and done < len(modules):
            calls = SpilledCalls(spill, streamed.device) if spill else []
            if options.match_dense:
                dense_calls = SpilledCalls(spill, streamed.device) if spill else []
            for call in streamed.first_calls(calibration):
                calls.append(call)
                if options.match_dense:
                    dense_calls.append(call)
            masks = [token_mask(batch).to(streamed.device) for batch in calibration]

        bar = tqdm(total=len(targets), initial=len(rows), unit="layer", disable=None)

        def quantize(path: str, layer: nn.Linear, hessian) -> LayerReport:
            new, row = quantize_layer(path, layer, spec, method, hessian, options)
            replace_module(model, path, new)
            error = "" if row.output_error is None else f": output error {row.output_error:.4f}"
            bar.set_postfix_str(path.rpartition(".")[2] + error)
            bar.update()
            if progress:
                progress(row)
            return row

        with bar:
            for i in range(len(modules)):
                bar.set_description(f"{method}, block {i + 1} of {len(modules)}")
                own = [path for path in targets if streamed.block_of(path) == i]
                if i >= done:
                    streamed.fill(stored := streamed.read(i))
                    twin = copy.deepcopy(modules[i]) if dense_calls else None
                    dense = (twin, dense_calls) if dense_calls else None
                    new, tensors = _quantize_block(
                        streamed, i, own, stored, calls, masks, quantize, dense, options.needs_halves
                    )
                    rows += new
                    # Rows of blocks that have no shard do not count: the shard comes last.
                    write_json_atomic(scratch / REPORT, _report(made_from, rows))
                    _save(tensors, shards[i + 1])
                elif calls:
                    if dense_calls:
                        streamed.fill(streamed.read(i))
                        twin = copy.deepcopy(modules[i])
                    state = read_tensors(shards[i + 1])
                    put_packed(model, dict.fromkeys(own, spec_as_json(spec)), state)
                    streamed.fill(state)
                    modules[i].to(streamed.device)
                if i + 1 < len(modules):
                    for n in range(len(calls)):
                        calls[n] = next_call(modules[i], calls[n])
                    for n in range(len(dense_calls)):
                        dense_calls[n] = next_call(twin, dense_calls[n])
                modules[i] = nn.Identity()  # freed

        weight_map = {}
        for shard in shards:
            with open_tensors(shard) as file:
                weight_map |= dict.fromkeys(file.keys(), shard.name)
        text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
        (scratch / INDEX).write_text(text + "\n", encoding="utf-8")
        size = sum(shard.stat().st_size for shard in shards)
        write_json_atomic(scratch / REPORT, _report(made_from, rows) | {
            "parameters": streamed.parameters,
            "weight_bytes": size,
            "bits_per_parameter": round(8 * size / streamed.parameters, 4),
        })  # fmt: skip
        describe(model, tokenizer, dict.fromkeys(targets, spec), scratch)
    return rows


def _quantize_block(
    streamed: StreamedModel, i: int, paths: list[str], stored, calls, masks, quantize, dense, halves
) -> tuple[list[LayerReport], dict[str, Tensor]]:
    """The rows of block i, quantized in place, and the tensors of its shard.

    stored: its tensors as they were read. quantize(path, layer, hessian) replaces a layer and
    returns its row. dense, halves: as for `quantize_block`.
    """
    layers = {path: streamed.model.get_submodule(path) for path in paths}

    def swap(path: str, hessian=None) -> LayerReport:
        return quantize(path, layers.pop(path), hessian)  # popped, so that its weight is freed

    if calls:
        rows = quantize_block(streamed.blocks[i], layers, calls, masks, swap, dense, halves)
    else:
        rows = [swap(path) for path in paths]
    tensors = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in paths}
    for path in paths:
        packed = streamed.model.get_submodule(path).state_dict()
        tensors |= {f"{path}.{n}": t for n, t in packed.items()}
    return rows, tensors


def _save(tensors: dict[str, Tensor], shard: Path) -> None:
    """Write a shard beside its place, then rename."""
    part = shard.with_name(f".{shard.name}")
    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, part, {"format": "pt"})
    part.replace(shard)


def _report(made_from: dict, rows: list[LayerReport]) -> dict:
    return {"made_from": made_from, "layers": [asdict(row) for row in rows]}


def _rows(report: dict) -> list[LayerReport]:
    return [LayerReport(**row | {"shape": tuple(row["shape"])}) for row in report["layers"]]


def _resume(scratch: Path, made_from: dict) -> list[LayerReport]:
    """The rows of an unfinished run; ValueError, naming what differs, for that of another."""
    for part in scratch.glob(".*"):  # files that a kill left half written
        part.unlink()
    if not any(scratch.iterdir()):
        write_json_atomic(scratch / REPORT, _report(made_from, []))
    report = read_json(scratch / REPORT)
    old = report["made_from"]
    differ = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in made_from.items() if old.get(k) != v]
    if differ:
        raise ValueError(
            f"{scratch} holds an unfinished run of other settings: {'; '.join(differ)}. Give "
            "the same ones to go on, or delete that folder to start anew"
        )
    return _rows(report)
