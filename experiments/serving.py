"""What mixing adapters in a batch is worth: `python -m experiments.serving`.

The bundled tiny model with four random adapters and 32 requests, 8 an adapter, answered greedily
in two ways: one batch whose rows use different adapters, and one batch an adapter. Both are
timed in turns, several times, over a dense and over a 4-bit base, and must give the same
answers. Medians and spread go to data/results/tiny-serving.json. Random adapters: throughput,
and nothing about accuracy. About a minute on 2 cores; run it on an idle machine.
"""

import statistics
import sys
import time

import torch

from experiments.table import command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.paths import DATA, short_path
from qlora_lib.base.ranges import COUNT
from qlora_lib.base.stamp import stamp
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.inject import inject_lora, use_adapter
from qlora_lib.lora.layer import lora_layers
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile

RESULT = DATA / "results" / "tiny-serving.json"
SEED, ADAPTERS, EACH, RANK, NEW, TURNS = 0, 4, 8, 16, 48, 7
BASES = {"fp32": None, "4-bit": QuantSpec(4, 64)}


def random_adapters(model, count: int = ADAPTERS, rank: int = RANK, seed: int = SEED) -> list[str]:
    """Adapters on all linears with B drawn from N(0, 0.02): each answers in another way."""
    torch.manual_seed(seed)
    names = [f"task{i}" for i in range(count)]
    for name in names:
        inject_lora(model, ALL_LINEAR, rank=rank, adapter=name)
        for layer in lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B[name], std=0.02)
    return names


def compare_serving(model, tokenizer, prompts, names, new: int, turns: int) -> dict:
    """Seconds of both ways, in turns, after one of each to warm up; prompts[i] goes to adapter
    names[i]. Raises ValueError when the two ways give different answers."""
    mixed = generator(model, tokenizer, Decoding(max_new_tokens=new, batch_size=len(prompts)))
    groups = {n: [i for i, name in enumerate(names) if name == n] for n in names}

    def one_batch_an_adapter():
        answers = [None] * len(prompts)
        for name, rows in groups.items():
            with use_adapter(model, name):
                for i, answer in zip(rows, mixed([prompts[i] for i in rows])):
                    answers[i] = answer
        return answers

    ways = {"mixed": lambda: mixed(prompts, names), "one batch an adapter": one_batch_an_adapter}
    answers = {way: run() for way, run in ways.items()}
    differ = sum(a != b for a, b in zip(*answers.values()))
    if differ:
        raise ValueError(f"{differ} of {len(prompts)} answers differ between the two ways")
    seconds = {way: [] for way in ways}
    for turn in range(turns):
        for way in sorted(ways, reverse=turn % 2 == 1):  # neither is always first
            began = time.perf_counter()
            ways[way]()
            seconds[way].append(round(time.perf_counter() - began, 4))
    tokens = sum(answer.tokens for answer in answers["mixed"])
    median = {way: statistics.median(times) for way, times in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["mixed"], seconds["one batch an adapter"])]
    return {
        "tokens": tokens,
        "different_answers": len(set(answers["mixed"])),
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": {way: round(tokens / s, 1) for way, s in median.items()},
        "speedup": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
        },
    }


def main(argv: list[str] | None = None) -> None:
    options = command_line(__doc__, RESULT)
    options.add_argument("--turns", type=COUNT, default=TURNS)
    options.add_argument("--new-tokens", type=COUNT, default=NEW)
    args = options.parse_args(argv)
    rows, profile = {}, load_profile("tiny")
    for base, spec in BASES.items():
        model, tokenizer = profile.load(quantize=spec, method="rtn") if spec else profile.load()
        names = [name for name in random_adapters(model) for _ in range(EACH)]
        prompts = [format_gsm8k(e)[0] for e in profile.examples("dev")[: len(names)]]
        row = compare_serving(model, tokenizer, prompts, names, args.new_tokens, args.turns)
        rows[base] = row
        print(f"{base}: {row['tokens_per_second']} tokens a second, {row['speedup']}")
    setting = {"adapters": ADAPTERS, "requests": ADAPTERS * EACH, "rank": RANK,
               "new_tokens": args.new_tokens, "turns": args.turns}  # fmt: skip
    what = "random adapters: throughput of generation, nothing about accuracy"
    write_json_atomic(args.out, {"what": what, "setting": setting, "bases": rows,
                                 "stamp": stamp(SEED)})  # fmt: skip
    print(short_path(args.out))


if __name__ == "__main__":
    sys.exit(ending(main))
