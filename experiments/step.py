"""What a QLoRA step at LLaMA-2-7B's width takes: `python -m experiments.step`.

Four of its 32 decoder blocks and its whole vocabulary, with random weights that are packed as
they are drawn, a layer at a time; LoRA on all seven linears; one sequence of 512 tokens, all
supervised, with all logits at once (training takes
them in chunks, qlora_lib/train/loss.py). The peak of the
process's anonymous memory above what it held after its imports is set beside the ledger's
prediction, in data/results/llama2-7b-shape-step.json. Random weights: memory and time, and
nothing about accuracy. Linux only (/proc); about 3 GB and some minutes on 2 cores.

Two steps are taken: with B = 0 the first gives every A a zero gradient. In the second every
adapter tensor must have a finite gradient that is not zero.
"""

import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from experiments.measured_step import measure_step, random_step
from experiments.peak_memory import PeakMemory
from experiments.table import command_line
from qlora_lib.base.devices import DTYPES, dtype_name, resolve_dtype
from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.stamp import stamp
from qlora_lib.layers.linear import QuantizedLinear
from qlora_lib.lora.inject import inject_lora, trainable_parameters
from qlora_lib.lora.targets import ALL_LINEAR, find_linears, replace_module
from qlora_lib.models.packed_model import fill
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.quant.nf4 import NF4Spec
from qlora_lib.quant.recipe import Recipe
from qlora_lib.train.memory import memory_ledger

RESULT = DATA / "results" / "llama2-7b-shape-step.json"
SEED, BLOCKS, SEQ, RANK = 0, 4, 512, 16
SPECS = {"nf4": NF4Spec(), "rtn": QuantSpec(4, 64, clip_search=False)}
# glibc keeps freed blocks for later, and would count as used what no tensor holds any more:
# one arena, and every block above 64 kB on pages of its own, given back when it is freed.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def random_packed_model(config, spec, dtype: torch.dtype, device="cpu", seed: int = SEED):
    """A causal model of this config, N(0, 0.02) weights, its decoder linears packed as `spec`
    says; built on the device, and never dense. In eval mode, frozen."""
    from transformers import AutoModelForCausalLM

    draw = torch.Generator(device).manual_seed(seed)

    def normal(shape, dtype=torch.float32):
        return torch.randn(shape, generator=draw, device=device, dtype=dtype).mul_(0.02)

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    linears = find_linears(model, ALL_LINEAR)
    for path, linear in linears.items():
        weight = normal(linear.weight.shape)
        method = "nf4" if isinstance(spec, NF4Spec) else "rtn"
        packed = QuantizedLinear(Recipe.of(spec, method).quantize(weight))
        replace_module(model, path, packed)
    state = {
        name: normal(p.shape, dtype) if p.dim() > 1 else torch.ones(p.shape, dtype=dtype)
        for name, p in model.named_parameters()
    }
    return fill(model, linears, state, Path("random weights"), dtype, device)


def measure_shape(config, spec, seq: int, rank: int, compute_dtype: str, seed: int = SEED) -> dict:
    """Build the model, take two QLoRA steps, and say what they took beside the prediction.

    Raises ValueError when an adapter tensor gets no gradient in the second step.
    """
    ledger = memory_ledger(config, "qlora", 1, seq, rank, spec=spec, compute_dtype=compute_dtype)
    dtype, began = DTYPES[compute_dtype], time.perf_counter()
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # wakes the threads
    with PeakMemory() as building:
        model = random_packed_model(config, spec, dtype, seed=seed)
        torch.manual_seed(seed)
        inject_lora(model, ALL_LINEAR, rank=rank)
    built = time.perf_counter()
    parameters, learning = trainable_parameters(model), {}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, weight_decay=0.0)

    def see(name: str, p) -> None:
        learning[name] = bool(p.grad.isfinite().all() and p.grad.any())

    for name, p in parameters.items():
        p.register_post_accumulate_grad_hook(partial(see, name))
    with PeakMemory() as memory:
        step = random_step(ledger, model, optimizer)
        result = measure_step(ledger, model, step, optimizer)
    idle = [name for name, learns in learning.items() if not learns]
    if idle or len(learning) != len(parameters):
        raise ValueError(f"{len(idle)} adapter tensors have no gradient, such as {idle[:1]}")
    measured = memory.peak - building.before
    return {
        "what": "random weights: memory and time of QLoRA steps, nothing about accuracy",
        "setting": ledger.setting,
        "blocks": config.num_hidden_layers,
        "spec": asdict(spec),
        "parameters": ledger.parameters,
        "trained": ledger.trained,
        "predicted_bytes": ledger.parts | {"peak": ledger.peak},
        "measured_bytes": {"peak": measured, "of imports, not counted": building.before},
        "measured_tensors": result.measured,
        "ratio": ledger.peak / measured,
        "building_peak_bytes": building.peak - building.before,
        "tensors_with_gradient": len(learning),
        "seconds": {
            "build": round(built - began, 1),
            "two steps": round(time.perf_counter() - built, 1),
        },
    }


def main(argv: list[str] | None = None) -> None:
    from transformers import LlamaConfig

    options = command_line(__doc__, RESULT)
    options.add_argument("--method", choices=SPECS, default="nf4")
    options.add_argument("--compute-dtype", choices=("auto", *DTYPES), default="auto")
    args = options.parse_args(argv)
    config = LlamaConfig(num_hidden_layers=BLOCKS)  # transformers' defaults are LLaMA-7B's
    dtype = dtype_name(resolve_dtype(args.compute_dtype, "cpu"))
    row = measure_shape(config, SPECS[args.method], SEQ, RANK, dtype)
    write_json_atomic(args.out, row | {"malloc": MALLOC, "stamp": stamp(SEED)})
    predicted, measured = row["predicted_bytes"]["peak"], row["measured_bytes"]["peak"]
    print(f"predicted {predicted / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB, ratio "
          f"{row['ratio']:.3f}; {row['seconds']}; {short_path(args.out)}")  # fmt: skip


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in MALLOC.items()):
        # Read by glibc when a process starts: begin again with them.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | MALLOC)
    sys.exit(ending(main))
