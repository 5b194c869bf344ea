"""Models that stay on disk: tensors read by name, a model without storage filled by parts.

Quantize a model that does not fit in memory: one decoder block at a time, from its shards.

A block's weights are read, quantized on the inputs that the blocks before it, already
quantized, produce, written to a shard of their own, and freed. In memory are one block, one
Hessian with the copies that its factorization makes (a second one where GPTQOptions choose the
damping), and the calibration activations, which may lie on disk instead (with match_dense two
blocks and two sets of them). Codes and errors are those of `quantize_model`, bit for bit.

Finished shards stay in OUT.unfinished until all are there; it then becomes OUT. A killed run
goes on from them: the finished blocks compute their activations again, so that nothing else
has to be kept. Refused: calibration of models whose blocks take different masks, and
checkpoints with other names than the model's own tensors."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..base.devices import dtype_name
from ..base.files import atomic_folder, open_tensors, read_json, read_tensors, write_json_atomic
from ..base.hashes import content_hash
from ..layers.blocks import decoder_blocks
from ..lora.targets import find_linears, replace_module
from ..quant.gptq import GPTQOptions
from ..quant.grid import QuantSpec
from ..quant.nf4 import NF4Spec
from ..quant.recipe import Recipe
from .calibrate import first_block_inputs, next_call, quantize_block, token_mask
from .checkpoint import (
    INDEX,
    QUANTIZATION,
    WEIGHTS,
    describe,
    empty_model,
    materialize_buffers,
    put_packed,
    spec_as_json,
)
from .quantize import LayerReport, check_calibration, quantize_layer
from .vocabulary import check_tokens

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

    recipe = Recipe.of(spec, method, options, target_modules)
    check_calibration(recipe, calibration)
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
            new, row = quantize_layer(path, layer, recipe, hessian)
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
