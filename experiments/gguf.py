"""The same model here and through llama.cpp: `python -m experiments.gguf tiny|smollm2`.

tiny      200 test problems: the base alone, with the bundled adapter beside it, and merged;
          quantized by GPTQ in groups of 32, symmetric (Q4_0) or not (Q4_1), and for comparison by
          llama.cpp's own rounding to nearest (Q4_0): data/results/tiny-gguf.json
smollm2   50 of GSM8K's test problems, in the course's template: smollm2-gguf.json

Each row: how many completions are the same text, exact match on both sides with a verdict a problem
and McNemar's test, and tokens a second, one prompt at a time on one thread, the two sides in turns.
A row is stored as soon as it is measured, and not measured again unless with --force. Needs the
packages gguf and xllamacpp.
"""

import copy
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.gflops import gflops
from experiments.accuracy import ADAPTER
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.statistics import mcnemar, newcombe, wilson
from qlora_lib.data.gsm8k import PROMPT, format_gsm8k
from qlora_lib.data.tokens import encode_prompt
from qlora_lib.evaluation.extraction import is_correct
from qlora_lib.formats.gguf_checkpoint import export_gguf
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.files import load_adapter
from qlora_lib.models.load import load_model
from qlora_lib.models.quantize import quantized_layers
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import Profile, load_profile
from qlora_lib.serving.contract import serving_tokenizer
from qlora_lib.serving.engines import llama_cpp

RESULTS = DATA / "results"
SEED = 0
ASKED = {"tiny": 200, "smollm2": 50}
TIMED = {"tiny": 20, "smollm2": 2}  # problems answered one at a time, for the tokens a second
LONGEST = 128  # new tokens
GPTQ_0 = ("gptq", QuantSpec(4, 32, symmetric=True))
GPTQ_1 = ("gptq", QuantSpec(4, 32))
RTN_0 = ("rtn", QuantSpec(4, 32, symmetric=True))
NEAREST = ("llama.cpp", None)  # round to nearest, as its own quantizer does
# How the base is quantized, and where the adapter is: nowhere, beside it, in the weights
ROWS = {
    "tiny": {
        "gptq Q4_0 base": (GPTQ_0, "base"),
        "gptq Q4_0 adapter": (GPTQ_0, "adapter"),
        "gptq Q4_0 merged": (GPTQ_0, "merged"),
        "gptq Q4_1 adapter": (GPTQ_1, "adapter"),
        "gptq Q4_1 merged": (GPTQ_1, "merged"),
        "nearest Q4_0 adapter": (NEAREST, "adapter"),
    },
    "smollm2": {"rtn Q4_0 base": (RTN_0, "base"), "gptq Q4_1 base": (GPTQ_1, "base")},
}


@cache
def quantized(profile: Profile, how):
    """(model, tokenizer) with the base quantized, once for all rows that share it."""
    method, spec = how
    model, tokenizer = profile.load()
    if spec:
        profile.quantize(model, tokenizer, spec, method)
    return model, tokenizer


def made(profile: Profile, how, what: str, folder: Path):
    """(model as it is served, tokenizer, the report), written to `folder` as GGUF."""
    model, tokenizer = copy.deepcopy(quantized(profile, how))
    served, rounded = serving_tokenizer(tokenizer, PROMPT), how is NEAREST
    if rounded:  # the adapter goes beside the rounded weights on both sides
        export_gguf(model, folder, served, linears="Q4_0")
        model, _ = load_model(folder, compute_dtype="fp32")
    if what != "base":
        load_adapter(model, ADAPTER)
    rows = export_gguf(model, folder, served, "rtn" if what == "merged" else None)
    return model, tokenizer, rows


def measured(profile: Profile, how, what: str, n: int) -> dict:
    """One row of the table."""
    problems = profile.examples("test")[:n]
    prompts = [format_gsm8k(entry)[0] for entry in problems]
    decoding = Decoding(max_new_tokens=LONGEST, batch_size=50)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        model, tokenizer, rows = made(profile, how, what, folder)
        ours = [str(text) for text in generator(model, tokenizer, decoding)(prompts)]
        single = generator(model, tokenizer, replace(decoding, batch_size=1))
        longest = max((encode_prompt(tokenizer, prompt) for prompt in prompts), key=len)
        contract = {"golden": [{"ids": longest}], "max_new_tokens": LONGEST,
                    "stop": list(decoding.stop)}  # fmt: skip
        with llama_cpp(folder, contract, threads=1) as engine:
            with single.layout():
                speeds = _in_turns(prompts[: TIMED[profile.name]], (single, engine.complete))
            theirs = [answer.text for answer in engine.complete(prompts)]
            info = engine.info
        size = sum(file.stat().st_size for file in folder.glob("*.gguf"))
        stored = sum(layer.held.nbytes for layer in quantized_layers(model).values())
    golds = [entry["answer"] for entry in problems]
    right = [list(map(is_correct, texts, golds)) for texts in (ours, theirs)]
    pairs = list(zip(*right))
    only = [sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)]
    both = sum(a and b for a, b in pairs)
    return {
        "n": n, "equal": sum(a == b for a, b in zip(ours, theirs)), "ours": _score(right[0]),
        "llama_cpp": _score(right[1]), "only_ours": only[0], "only_llama_cpp": only[1],
        "p": mcnemar(*only), "difference": newcombe(sum(right[1]), n, sum(right[0]), n, both),
        "kinds": sorted({row.kind for row in rows}), "lost": max(row.lost for row in rows),
        "file_bytes": size, "our_bytes": stored, "engine": info, "new_tokens": LONGEST,
        "tokens_per_second": speeds[0], "tokens_per_second_llama_cpp": speeds[1],
        "ratio": speeds[1] / speeds[0], "gflops": round(gflops(), 1),
    }  # fmt: skip


def _in_turns(prompts, sides) -> list[float]:
    """Tokens a second of each side, a prompt at a time, in turns, so that both see the same load
    of the machine."""
    seconds, tokens = [0.0] * len(sides), [0] * len(sides)
    for prompt in prompts:
        for i, ask in enumerate(sides):
            began = time.perf_counter()
            tokens[i] += ask([prompt])[0].tokens
            seconds[i] += time.perf_counter() - began
    return [n / s for n, s in zip(tokens, seconds)]


def _score(right: list[bool]) -> dict:
    n, correct = len(right), sum(right)
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": wilson(correct, n),
            "right": "".join(str(int(r)) for r in right)}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULTS, "--force", "--rows", "--model", "--data")
    parser.add_argument("profile", choices=sorted(ROWS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    profile = load_profile(args.profile, model=args.model, data=args.data)
    profile = replace(profile, compute_dtype="fp32")
    names = ROWS[args.profile]
    path = args.out / f"{args.profile}-gguf.json"
    table = Table(path, SEED, list(names))
    for name in asked_rows(parser, args.rows, names):
        if name in table.rows and not args.force:
            print(f"{name}: is there")
            continue
        row = measured(profile, *names[name], ASKED[args.profile])
        right = [row[side]["correct"] for side in ("ours", "llama_cpp")]
        print(f"{name}: {row['equal']} of {row['n']} the same text, {right[0]} right here, "
              f"{right[1]} there, {row['ratio']:.1f} times as fast", flush=True)
        table.keep(name, row)
    print(f"stored in {short_path(path)}")


if __name__ == "__main__":
    sys.exit(ending(main))
