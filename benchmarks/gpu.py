"""QLoRA's memory and speed on a GPU, in one command and under 8 minutes, without network: after
BUDGET seconds nothing new is begun, and what is missing is named.

    python benchmarks/gpu.py [--smollm2 PATH] [--out data/results/gpu.json]
    python benchmarks/gpu.py --small        everything at a small size, on a CPU too

Models of the shapes of LLaMA-2-7B and SmolLM2-135M with random weights, which are packed on
the device as they are drawn: NF4, and 4-bit grids in groups of 64 as GPTQ stores them. LoRA
r=16 on all linears, 512 tokens, batch 1 and 4. For each: tokens a second of training, peak
memory beside the ledger's prediction, tokens a second of decoding with a cache of keys and
values as they come and in 4 bits; then single linears for 1 to 512 tokens: packed (grids within
`decoding_layout`: our Triton kernels), in cuBLAS's 16 bits, by torch's int4 operator and by
bitsandbytes where they are there, and beside a plain copy. All are warm, and medians; linears come
with their quartiles, timed without the cost of launching them (CUDA graphs) and with weights that
no cache holds. Decoding is not, and mostly waits for Python.
Random weights: nothing about accuracy. What is skipped says why.
Needs torch, transformers, safetensors and tqdm (and triton, where kernels are used).
"""

import argparse
import gc
import math
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works without an installation

from experiments.measured_step import measure_step, random_step  # noqa: E402
from experiments.step import SEED, SPECS, random_packed_model  # noqa: E402
from qlora_lib.base.devices import (
    dtype_name,
    resolve_dtype,  # noqa: E402
)
from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic  # noqa: E402
from qlora_lib.base.paths import given_path
from qlora_lib.base.stamp import stamp
from qlora_lib.generation.graph_steps import WARM, Steps, cuda_graph, own_stream  # noqa: E402
from qlora_lib.generation.kv_cache import CacheSpec, PackedCache  # noqa: E402
from qlora_lib.layers.kernels import fused_kernels  # noqa: E402
from qlora_lib.layers.linear import QuantizedLinear, decoding_layout  # noqa: E402
from qlora_lib.lora.inject import inject_lora, trainable_parameters  # noqa: E402
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.load import load_model  # noqa: E402
from qlora_lib.models.quantize import quantize_model  # noqa: E402
from qlora_lib.quant.recipe import Recipe  # noqa: E402
from qlora_lib.train.loss import CHUNK  # noqa: E402
from qlora_lib.train.measure import NotEnoughMemory, check_fits  # noqa: E402
from qlora_lib.train.memory import memory_ledger  # noqa: E402
from qlora_lib.train.step import training_mode  # noqa: E402

RANK = 16
# (batch, gradient checkpointing)
ROWS = ((1, True), (4, True), (1, False))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)  # of single linears, and a whole sequence
CACHED = 1 << 27  # bytes that no GPU of today keeps in its cache
CACHES = {"as it comes": None, "4 bits": CacheSpec(4)}  # of keys and values
BUDGET = 390.0  # seconds; of the 480 the others are for what is under way: a 7B model to be packed


class Budget:
    """The seconds that measuring may take, and what was `skipped`, with the reason."""

    def __init__(self, seconds: float = BUDGET, clock=time.perf_counter):
        self.began, self.seconds, self.clock = clock(), seconds, clock
        self.skipped: list[str] = []

    def spent(self) -> float:
        return self.clock() - self.began

    def over(self) -> bool:
        return self.spent() >= self.seconds

    def allows(self, what: str) -> bool:
        """Whether there is time left to measure this; else it is noted as skipped."""
        over = self.over()
        if over:
            self.skipped.append(f"{what}: the {self.seconds:.0f} seconds are spent")
        return not over


def shapes(small: bool) -> dict:
    """Configurations by name."""
    from transformers import LlamaConfig

    if small:
        sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=300)
        return {"small": LlamaConfig(num_hidden_layers=1, **sizes)}
    smollm2 = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return {"llama2-7b": LlamaConfig(), "smollm2-135m": smollm2}  # the defaults are LLaMA-7B's


def all_seconds(run, device: torch.device, repeats: int, budget: Budget) -> list[float]:
    """Times of some calls, after one that is not counted; of one where the time is over."""
    times = []
    for _ in range(repeats + 1):
        if len(times) > 1 and budget.over():
            break
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return times[1:]


def seconds(run, device: torch.device, repeats: int, budget: Budget) -> float:
    """Median time of a call, after one that is not counted."""
    return statistics.median(all_seconds(run, device, repeats, budget))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training(model, config, spec, seq: int, repeats: int, name: str, budget: Budget) -> list[dict]:
    """Peak memory and speed of QLoRA steps; `model` has its adapter."""
    rows, device = [], model.device
    for batch, checkpointing in ROWS:
        ledger = memory_ledger(
            config, "qlora", batch, seq, RANK, spec=spec, checkpointing=checkpointing,
            compute_dtype=dtype_name(model.dtype), logit_tokens=CHUNK,
        )  # fmt: skip
        if not budget.allows(f"{name}, {ledger.setting}"):
            continue
        try:
            check_fits(ledger_beside(model, ledger), device)
        except NotEnoughMemory as error:
            budget.skipped.append(f"{ledger.setting}: {str(error).splitlines()[0]}")
            continue
        optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-4)
        step = random_step(ledger, model, optimizer)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result = measure_step(ledger, model, step, optimizer)
        reserved = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        with training_mode(model, checkpointing):
            took = seconds(step, device, repeats, budget)
        rows.append({
            "setting": ledger.setting, "batch": batch, "seq": seq, "checkpointing": checkpointing,
            "tokens_per_second": batch * seq / took, "peak_bytes": result.measured["peak"],
            "reserved_bytes": reserved, "predicted_bytes": ledger.parts | {"peak": ledger.peak},
            "measured_bytes": result.measured, "ratio": result.ratio,
        })  # fmt: skip
        print(f"  {ledger.setting}: {rows[-1]['tokens_per_second']:.0f} tokens/s\n{result}")
    return rows


def ledger_beside(model, ledger):
    """The ledger less what is on the device already: the model and its adapter."""
    from dataclasses import replace

    there = dict.fromkeys(("weights", "packed weights", "scales", "adapters"), 0)
    return replace(ledger, parts=ledger.parts | there)


@torch.no_grad()
def decode(model, tokens: int, repeats: int, context: int, spec: CacheSpec | None,
           budget: Budget) -> float:  # fmt: skip
    """Tokens a second of greedy decoding at batch 1 after `context` tokens, from Python."""

    def run(steps: int = tokens):
        from transformers.cache_utils import DynamicCache

        cache = PackedCache(spec) if spec else DynamicCache()
        ids = torch.ones(1, context, dtype=torch.long, device=model.device)
        for _ in range(1 + steps):  # the prompt, and a token each
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = out.logits.argmax(-1)  # (1, 1)

    with decoding_layout(model):
        prompt = seconds(lambda: run(0), model.device, repeats, budget)
        return tokens / max(1e-9, seconds(run, model.device, repeats, budget) - prompt)


@torch.inference_mode()
def decode_by_graph(model, tokens: int, repeats: int, context: int, budget: Budget) -> float:
    """The same by the steps that `generate` captures; on a CPU they are called."""
    from transformers import GenerationConfig

    device = model.device
    ids = torch.ones(1, context, dtype=torch.long, device=device)
    settings = GenerationConfig(max_new_tokens=1 + WARM + tokens * (1 + repeats),
                                eos_token_id=[-1], pad_token_id=0)  # fmt: skip
    with decoding_layout(model), own_stream(device):
        steps = Steps(model, ids, torch.ones_like(ids), settings)
        for _ in range(WARM):
            steps.step()
        step = cuda_graph(steps.step) if device.type == "cuda" else steps.step
        return tokens / seconds(lambda: [step() for _ in range(tokens)], device, repeats, budget)


def decoded(model, tokens: int, repeats: int, context: int, name: str, budget: Budget) -> dict:
    """Tokens a second of each way to decode."""
    ways = {cache: lambda spec=spec: decode(model, tokens, repeats, context, spec, budget)
            for cache, spec in CACHES.items()}  # fmt: skip
    graph = "CUDA graph" if model.device.type == "cuda" else "steps of a graph"
    ways[graph] = lambda: decode_by_graph(model, tokens, repeats, context, budget)
    rates = {}
    for way, measured in ways.items():
        if not budget.allows(f"{name}, decoding, {way}"):
            continue
        try:
            rates[way] = measured()
            print(f"{name}: {rates[way]:.1f} tokens/s decoded, {way}")
        except RuntimeError as error:  # no memory, or a capture that fails
            budget.skipped.append(f"{name}, decoding, {way}: {str(error).splitlines()[0]}")
    return rates


def copy_rate(device: torch.device, numbers: int, repeats: int, budget: Budget) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, repeats, budget)


def seconds_each(runs: list, device: torch.device, repeats: int, budget: Budget) -> list[float]:
    """Seconds of one of these calls, which are made one after the other, `repeats` times. On a GPU
    they are captured once and replayed, so that Python and launching cost nothing."""
    for run in runs[:2]:  # Triton compiles now
        run()

    def all_of_them():
        for run in runs:
            run()

    if device.type != "cuda":
        return [t / len(runs) for t in all_seconds(all_of_them, device, repeats, budget)]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        all_of_them()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return [t / len(runs) for t in all_seconds(graph.replay, device, repeats, budget)]


def quartiles(times: list[float]) -> list[float]:
    """The middle half's ends."""
    return statistics.quantiles(times, n=4)[::2] if len(times) > 1 else [times[0], times[0]]


def bitsandbytes_linear(weight: torch.Tensor, dtype: torch.dtype):
    import bitsandbytes as bnb

    out, n = weight.shape
    layer = bnb.nn.Linear4bit(n, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight.to(dtype)})
    return layer.to(weight.device).requires_grad_(False)  # .to() quantizes


def torch_int4_linear(weight: torch.Tensor, dtype: torch.dtype):
    """torch's operator for GPUs, in groups of 64; codes and grids need no meaning here."""
    out, n = weight.shape
    codes = torch.randint(0, 256, (out, n // 2), dtype=torch.uint8, device=weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    grids = torch.ones(n // 64, out, 2, dtype=dtype, device=weight.device)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 64, grids)


PEERS = {"torch int4": torch_int4_linear, "bitsandbytes nf4": bitsandbytes_linear}


@torch.no_grad()
def linears(config, dtype, device, tokens: tuple[int, ...], repeats: int, name: str,
            budget: Budget) -> list:  # fmt: skip
    """Milliseconds of one linear, packed and dense (medians, and quartiles), and what share of a
    copy's bytes a second the packed grids are read at."""
    h, inner, rows = config.hidden_size, config.intermediate_size, []
    copied = copy_rate(device, CACHED if device.type == "cuda" else 1 << 20, repeats, budget)
    draw = torch.Generator(device).manual_seed(SEED)
    for out, n in ((h, h), (inner, h), (h, inner)):
        if not budget.allows(f"{name}, one linear of {out} x {n}"):
            continue
        weight = torch.randn(out, n, generator=draw, device=device) * 0.02
        makers = {dtype_name(dtype): lambda: torch.nn.Linear(n, out, False, device, dtype)}
        for way, spec in SPECS.items():
            makers[way] = lambda s=spec, m=way: QuantizedLinear(Recipe.of(s, m).quantize(weight))
        if device.type == "cuda":
            makers |= {way: lambda f=f: f(weight, dtype) for way, f in PEERS.items()}
        enough = CACHED if device.type == "cuda" else 1
        layers = {}
        for way, make in makers.items():
            size = out * n * (dtype.itemsize if way == dtype_name(dtype) else 0.5)
            try:
                layers[way] = [make() for _ in range(math.ceil(enough / size))]
            except (ImportError, RuntimeError) as error:
                budget.skipped.append(f"{way}, {out} x {n}: {str(error).splitlines()[0]}")
        for layer in layers["rtn"]:
            layer.lay_out(decoding=True)
        for count in tokens:
            if not budget.allows(f"{name}, one linear of {out} x {n}, {count} tokens"):
                continue
            x = torch.randn(count, n, generator=draw, device=device).to(dtype)
            times, spread = {}, {}
            for way, copies in layers.items():
                try:
                    runs = [lambda f=f: f(x) for f in copies]
                    took = [1e3 * t for t in seconds_each(runs, device, repeats, budget)]
                    times[way], spread[way] = statistics.median(took), quartiles(took)
                except RuntimeError as error:
                    budget.skipped.append(f"{way}, {count} tokens: {str(error).splitlines()[0]}")
            share = layers["rtn"][0].nbytes / (times["rtn"] / 1e3) / copied
            rows.append({"shape": [out, n], "tokens": count, "milliseconds": times,
                         "quartiles": spread, "packed_of_copy": share})  # fmt: skip
            shown = ", ".join(f"{k} {t:.3f}" for k, t in times.items())
            print(f"  {out} x {n}, {count} tokens: {shown} ms; grids at {share:.0%} of a copy")
    return rows


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python benchmarks/gpu.py")
    options.add_argument("--small", action="store_true", help="seconds, on a CPU too")
    options.add_argument("--smollm2", type=given_path, help="folder with SmolLM2-135M's weights")
    options.add_argument("--out", type=given_path, default=ROOT / "data" / "results" / "gpu.json")
    args = options.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu and not args.small:
        print("skipped: torch sees no CUDA GPU; --small runs it all at a small size on the CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    device = torch.device("cuda" if gpu else "cpu")
    dtype = resolve_dtype("auto", device)
    seq, tokens, repeats = (16, 2, 1) if args.small else (512, 64, 5)
    counts = (1, seq) if args.small else (*TOKENS, seq)
    budget = Budget()
    skipped = budget.skipped
    if not gpu:
        skipped.append("GPU memory, cuBLAS: torch sees no CUDA GPU; these are the CPU's")
    elif fused_kernels(device) is None:
        skipped.append("our kernels: Triton does not work here; packed layers are made dense")
    result = {"what": "random weights: memory and time, nothing about accuracy", "models": {}}
    result |= {"linears": {}, "skipped": skipped}
    extra = {"cuda": torch.version.cuda, "dtype": dtype_name(dtype), "small": args.small}
    if gpu:
        extra["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    result["stamp"] = stamp(SEED, **extra)

    def keep() -> None:
        """Write what there is: it is kept, should the next one be killed."""
        result["seconds"] = round(budget.spent(), 1)
        write_json_atomic(args.out, result)

    def measure(name: str, make, spec) -> None:
        """All of one model; `make` gives it."""
        if not budget.allows(name):
            return
        started = budget.spent()
        try:
            model = make()
        except torch.OutOfMemoryError as error:
            skipped.append(f"{name}: {str(error).splitlines()[0]}")
            return
        row = {"seconds_to_build": round(budget.spent() - started, 1)}
        row["context"] = 40 if args.small else 1024
        few = 1 if args.small else 2
        rates = decoded(model, tokens, few, row["context"], name, budget)
        row["decoded_tokens_per_second"] = rates
        torch.manual_seed(SEED)
        inject_lora(model, ALL_LINEAR, rank=RANK)
        row["training"] = training(model, model.config, spec, seq, repeats, name, budget)
        result["models"][name] = row
        keep()

    def with_own_weights(method: str, spec):
        model, _ = load_model(str(args.smollm2), device, dtype_name(dtype))
        quantize_model(model, None, spec, method)
        return model

    configs = shapes(args.small)
    for shape, config in configs.items():
        print(f"{shape}, one linear")
        rows = linears(config, dtype, device, counts, 1 if args.small else 20, shape, budget)
        result["linears"][shape] = rows
        release(device)
        keep()
    for shape, config in configs.items():
        for method, spec in SPECS.items():
            measure(f"{shape}, {method}",
                    lambda: random_packed_model(config, spec, dtype, device), spec)  # fmt: skip
            release(device)
    for method, spec in SPECS.items() if args.smollm2 else ():
        measure(f"smollm2-135m with its own weights, {method}",
                lambda: with_own_weights(method, spec), spec)  # fmt: skip
        release(device)
    if not args.smollm2:
        skipped.append("SmolLM2 with its own weights: no --smollm2 PATH was given")
    keep()
    for reason in skipped:
        print(f"skipped: {reason}")
    print(f"{result['seconds']} s; {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
