"""The accuracy table of the tiny profile: `python -m qlora_lib.experiments`.

Each row is stored in data/results/tiny-accuracy.json as soon as it is measured; rows that
are there are not measured again, unless with --force or when the weights have changed.
All on the whole mini-GSM test set, greedy: the base in GSM8K's format, with three solved
examples, and in the wording of its pretraining; then fine-tuned with LoRA and QLoRA.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from .data import DATA, format_gsm8k, short_path, weights_id
from .evaluation import Prompt, evaluate, few_shot
from .generation import Decoding, generator
from .grid import QuantSpec
from .lora import ALL_LINEAR, ATTENTION, inject_lora
from .profiles import Profile, load_profile
from .results import stamp, write_json_atomic
from .schedule import TrainConfig
from .train import finetune

RESULT = DATA / "results" / "tiny-accuracy.json"
SEED = 0
BATCH = 100  # prompts at a time
# LoRA: (target modules, rank, spec of the base or None)
TRAINED = {
    "lora_attention_r16": (ATTENTION, 16, None),
    "lora_all_r32": (ALL_LINEAR, 32, None),
    "qlora_attention_r16": (ATTENTION, 16, QuantSpec(bits=4, group_size=64)),
    "qlora_all_r32": (ALL_LINEAR, 32, QuantSpec(bits=4, group_size=64)),
}


def bare_question(entry: dict[str, str]) -> tuple[str, str]:
    """The question as pretraining shows it, on a line of its own."""
    return entry["question"] + "\n", ""


def statement(entry: dict[str, str]) -> tuple[str, str]:
    """The question without its last sentence, which asks: pretraining follows such a text
    with a computed step."""
    return entry["question"].rpartition(". ")[0] + ".", ""


def base_prompts(profile: Profile) -> dict[str, Prompt]:
    """The base's prompts by row name."""
    return {
        "base": format_gsm8k,
        "base_3shot": few_shot(profile.examples("train"), 3),
        "base_bare_question": bare_question,
        "base_statement": statement,
    }


def measure(model, tokenizer, profile: Profile, problems, prompt: Prompt = format_gsm8k) -> dict:
    """A row: counts, accuracies and intervals over `problems`."""
    decoding = Decoding(max_new_tokens=profile.max_new_tokens, batch_size=BATCH)
    report = evaluate(generator(model, tokenizer, decoding), problems, prompt=prompt)
    print(report, flush=True)
    return report.summary()


def fine_tune(name: str, profile: Profile, config: TrainConfig):
    """The model of a row of TRAINED, its tokenizer, and how its training went."""
    targets, rank, spec = TRAINED[name]
    model, tokenizer = profile.load(quantize=spec)
    torch.manual_seed(SEED)
    inject_lora(model, targets, rank=rank, alpha=2 * rank)
    pairs, dev = ([format_gsm8k(e) for e in profile.examples(s)] for s in ("train", "dev"))
    history = finetune(model, tokenizer, pairs, config, dev)
    print(history, flush=True)
    training = {
        "target_modules": targets,
        "rank": rank,
        "alpha": 2 * rank,
        "bits": spec and spec.bits,
        "group_size": spec and spec.group_size,
        "lr": config.lr,
        "batch_size": config.batch_size * config.accumulation,
        "trained_parameters": history.trained_parameters,
        "compute_dtype": history.compute_dtype,
        "seconds": round(history.steps[-1]["seconds"], 1),
        "losses": [round(loss, 4) for loss in history.losses],
        "dev": history.dev,
    }
    return model, tokenizer, training


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="measure the tiny profile's accuracy table")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--force", action="store_true", help="measure stored rows again")
    parser.add_argument("--rows", nargs="*", help="only these rows")
    parser.add_argument("--limit", type=int, help="only the first so many problems, for a trial")
    parser.add_argument("--max-steps", type=int, help="fewer training steps, for a trial")
    parser.add_argument("--model", help="other weights")
    parser.add_argument("--data", help="other problems: a folder with {split}.jsonl")
    args = parser.parse_args(argv)

    profile = load_profile("tiny", model=args.model, data=args.data)
    problems = profile.examples("test")[: args.limit]
    config = profile.train
    if args.max_steps:
        config = TrainConfig(**vars(config) | {"max_steps": args.max_steps})
    prompts, weights = base_prompts(profile), weights_id(profile.model)
    names = [*prompts, *TRAINED]
    unknown = set(args.rows or ()) - set(names)
    if unknown:
        parser.error(f"no rows {sorted(unknown)}; expected some of {', '.join(names)}")
    table = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    for name in args.rows or names:
        if not args.force and table.get(name, {}).get("weights") == weights:
            print(f"{name}: is there")
            continue
        print(f"{name}:", flush=True)
        if name in prompts:
            model, tokenizer = profile.load()
            row = measure(model, tokenizer, profile, problems, prompts[name])
        else:
            model, tokenizer, training = fine_tune(name, profile, config)
            row = measure(model, tokenizer, profile, problems) | {"training": training}
        table[name] = row | {"weights": weights, "stamp": stamp(SEED)}
        write_json_atomic(args.out, {n: table[n] for n in names if n in table})
    print(f"stored in {short_path(args.out)}")


if __name__ == "__main__":
    sys.exit(main())
