"""The memory of streamed quantization, measured: `python -m experiments.streaming`.

Makes a folder like that of LLaMA-2-7B, 13.5 GB in bf16 shards, but with random weights, and
quantizes its first blocks, at full width, with GPTQ. Memory and time are those of the real
model; output errors are not: random weights and random tokens only show that all is plumbed.
"""

import json
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from experiments.peak_memory import PeakMemory
from experiments.table import command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_json, whole_file, write_json_atomic
from qlora_lib.base.paths import DATA, given_path
from qlora_lib.base.ranges import COUNT
from qlora_lib.base.stamp import stamp
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.models.settings import read_config, read_tokenizer
from qlora_lib.models.stored_weights import INDEX
from qlora_lib.models.stream import REPORT, quantize_checkpoint
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.train.memory import memory_ledger

RESULT = DATA / "results" / "llama2-7b-shape-streaming.json"
# meta-llama/Llama-2-7b-hf, config.json; what is not here is LlamaConfig's default.
LLAMA2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SHARD = 10_000_000_000  # bytes of a file, at most
STD = 0.02  # of the weights; norms are 1
SEED = 0
LENGTH, BATCH = 512, 4  # tokens of a sequence, sequences of a batch
MEANING = "random weights: no meaning beyond plumbing"


def make_folder(folder: Path, shape: dict, blocks: int | None = None) -> None:
    """Config, tokenizer of the bundled model, random bf16 weights; kept when they are there.

    blocks: only the first so many, to save time and disk. A tensor is in memory at a time:
    safetensors is a length (8 bytes), a JSON header and the bytes of the tensors.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    seeds = {name: SEED + i for i, name in enumerate(shapes)}  # a tensor is the same in any subset
    if blocks is not None:
        late = [f"layers.{i}." for i in range(blocks, config.num_hidden_layers)]
        shapes = {n: s for n, s in shapes.items() if not any(part in n for part in late)}
    files, size = [[]], 0
    for name, dims in shapes.items():
        size += 2 * dims.numel()
        if size > SHARD:
            files, size = [*files, []], 2 * dims.numel()
        files[-1].append(name)
    weight_map = {
        name: f"model-{k:05}-of-{len(files):05}.safetensors"
        for k, names in enumerate(files, 1) for name in names
    }  # fmt: skip
    index = folder / INDEX
    there = index.is_file() and read_json(index)
    if there and there["weight_map"] == weight_map:
        return
    config.save_pretrained(folder)
    read_tokenizer(DATA / "tiny-llama").save_pretrained(folder)
    for names in files:
        write_random(folder / weight_map[names[0]], {n: shapes[n] for n in names}, seeds)
        print(f"  {weight_map[names[0]]}", flush=True)
    write_json_atomic(index, {"metadata": {}, "weight_map": weight_map})  # last: all is there


def write_random(path: Path, shapes: dict[str, torch.Size], seeds: dict[str, int]) -> None:
    """Write a safetensors file of bf16 tensors of these shapes, each drawn with its seed."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(seeds[name])
            tensor = torch.ones(shape)
            if "norm" not in name:
                tensor.normal_(0, STD, generator=generator)
            tensor.bfloat16().view(torch.uint8).numpy().tofile(file)


def measure(folder: Path, out: Path, blocks: int, sequences: int, targets, spill) -> dict:
    """Quantize the first blocks of the folder; how much memory and time it took."""
    config, spec, options = read_config(folder), QuantSpec(), GPTQOptions()
    ids = torch.randint(
        config.vocab_size, (sequences, LENGTH), generator=torch.Generator().manual_seed(SEED)
    )
    batches = [{"input_ids": ids[i : i + BATCH]} for i in range(0, sequences, BATCH)]
    for old in (out, out.with_name(out.name + ".unfinished")):  # a whole run is measured
        shutil.rmtree(old, ignore_errors=True)
    began, ends, load = time.perf_counter(), [], os.getloadavg()[0]

    def show(row) -> None:
        ends.append(time.perf_counter() - began)
        error = f"output error {row.output_error:.4f}"
        print(f"  {ends[-1]:6.0f} s   {row.name:<34} {error}", flush=True)

    with PeakMemory() as memory:
        rows = quantize_checkpoint(
            folder, out, spec, batches, "gptq", options, targets, "auto", "cpu", spill, blocks, show
        )
    seconds, by_layer = time.perf_counter() - began, defaultdict(list)
    for row in rows:
        by_layer[row.name.rpartition(".")[2]].append(row.seconds)
    made = read_json(out / REPORT)
    ledger = memory_ledger(config, "qlora", spec=spec, targets=targets)
    a_block = sum(row.bytes_after for row in rows) / blocks
    predicted = (ledger.parts["packed weights"] + ledger.parts["scales"]) / config.num_hidden_layers
    return {
        "weights": f"normal, std {STD}, of the shape of LLaMA-2-7B",
        "blocks": blocks,
        "blocks_of_the_model": config.num_hidden_layers,
        "calibration_tokens": ids.numel(),
        "sequence_length": LENGTH,
        "spec": asdict(spec),
        "options": asdict(options),
        "targets": list(targets),
        "compute_dtype": made["made_from"]["compute_dtype"],
        "activations": "on disk" if spill else "in memory",
        "peak_anonymous_bytes": memory.peak,
        "anonymous_bytes_before": memory.before,
        "peak_resident_bytes": memory.resident,
        # Of how many processes the cores were asked meanwhile: above their number, seconds
        # say more of the others than of this run.
        "cores": os.cpu_count(),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "seconds": round(seconds, 1),
        "seconds_a_block": round(seconds / blocks, 1),
        "seconds_quantizing": round(sum(row.seconds for row in rows), 1),
        "seconds_quantizing_by_layer": {n: round(sum(s) / len(s), 1) for n, s in by_layer.items()},
        "packed_bytes_a_block": a_block,
        "predicted_packed_bytes_a_block": predicted if targets == ALL_LINEAR else None,
        "predicted_for_the_whole_model": {
            "setting": ledger.setting,
            "parameters": ledger.parameters,
            "parts": ledger.parts,
            "total": ledger.total,
            "bits_per_parameter": round(ledger.bits_per_parameter, 4),
        },
        "output_errors": {
            "meaning": MEANING, "layers": {row.name: round(row.output_error, 5) for row in rows}
        },
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT)
    add = parser.add_argument
    add("folder", type=given_path, help="for the model (13.5 GB) and, in quantized/, the result")
    add("--blocks", type=COUNT, default=4, help="decoder blocks to quantize (default 4)")
    add("--part", action="store_true", help="make only those blocks, to save disk and time")
    add("--sequences", type=COUNT, default=16, help=f"of {LENGTH} calibration tokens (default 16)")
    add("--targets", choices=("all", "attention"), default="all")
    add("--spill", action="store_true", help="keep activations in the folder, not in memory")
    add("--hidden", type=COUNT, help="another width than 4096, for a trial")
    args = parser.parse_args(argv)

    shape = dict(LLAMA2_7B)
    if args.hidden:
        inner = 64 * math.ceil(args.hidden * 2.6875 / 64)
        heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), args.hidden // 32)
        shape |= {"hidden_size": args.hidden, "intermediate_size": inner, **heads}
    print(f"weights of {shape['num_hidden_layers']} blocks, hidden {shape['hidden_size']}")
    make_folder(args.folder / "model", shape, args.blocks if args.part else None)
    targets = {"all": ALL_LINEAR, "attention": ATTENTION}[args.targets]
    spill = args.folder / "spill" if args.spill else None
    out = args.folder / "quantized"
    result = measure(args.folder / "model", out, args.blocks, args.sequences, targets, spill)
    write_json_atomic(args.out, result | {"stamp": stamp(SEED)})
    print(
        f"peak anonymous memory {result['peak_anonymous_bytes'] / 1e9:.2f} GB "
        f"({result['anonymous_bytes_before'] / 1e9:.2f} GB before), "
        f"{result['seconds_a_block']:.0f} s a block, {result['seconds']:.0f} s in all"
    )


if __name__ == "__main__":
    sys.exit(ending(main))
