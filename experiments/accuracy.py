"""The accuracy table of the tiny profile: `python -m experiments.accuracy`.

Each row is stored in data/results/tiny-accuracy.json as soon as it is measured; rows that
are there are not measured again, unless with --force or when the weights have changed.
What each way to merge that adapter costs is in tiny-merges.json. Of some rows, wrong answers are
kept to be read: tiny-wrong-answers.jsonl beside the table.
All on the whole mini-GSM test set, greedy: the base in GSM8K's format, with three solved
examples, and in the wording of its pretraining; then fine-tuned with LoRA and QLoRA; then
the bundled adapter, merged, with all linears quantized at four widths. Each row keeps a
verdict a question, so that two rows can be compared on the same questions.
"""

import copy
import sys
from functools import cache
from pathlib import Path

import torch

from experiments.merge_report import merge_report
from experiments.table import Table, asked_rows, command_line, write_jsonl
from qlora_lib.base.endings import ending
from qlora_lib.base.files import write_json_atomic
from qlora_lib.base.hashes import weights_id
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.base.ranges import COUNT
from qlora_lib.base.stamp import stamp
from qlora_lib.cli.common import check_needs
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.rows import read_jsonl
from qlora_lib.evaluation.evaluate import EvalReport, Prompt, evaluate, few_shot
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.merge import merge_into_original, merge_lora
from qlora_lib.lora.targets import ALL_LINEAR, ATTENTION
from qlora_lib.models.quantize import dequantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import TINY, Profile, load_profile
from qlora_lib.train.config import TrainConfig
from qlora_lib.train.finetune import finetune

RESULT = DATA / "results" / "tiny-accuracy.json"
SEED = 0
BATCH = 100  # prompts at a time
# LoRA: (target modules, rank, spec of the base or None)
TRAINED = {
    "lora_attention_r16": (ATTENTION, 16, None),
    "lora_all_r32": (ALL_LINEAR, 32, None),
    "qlora_attention_r16": (ATTENTION, 16, QuantSpec(bits=4, group_size=64)),
    # about as many parameters as attention_r16: where against how many
    "qlora_all_r8": (ALL_LINEAR, 8, QuantSpec(bits=4, group_size=64)),
    "qlora_all_r32": (ALL_LINEAR, 32, QuantSpec(bits=4, group_size=64)),
}
ADAPTER = DATA / "tiny-adapter"
BASE = QuantSpec(bits=4, group_size=64)  # what the adapter was trained on,
STORED = DATA / "tiny-gptq"  # and the base itself, quantized once
WRONG = ("merged_fp32", "merged_gptq_2bit_row")  # rows whose wrong answers are kept,
KEPT = 20  # so many of each
# The merged model, quantized again: (method, spec)
WIDTHS = {"merged_fp32": None} | {
    f"merged_{method}_{bits}bit_{group_size or 'row'}": (method, QuantSpec(bits, group_size))
    for group_size in (None, 64)
    for bits in (8, 4, 3, 2)
    for method in ("gptq", "rtn")
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


def measure(
    model, tokenizer, profile: Profile, problems, prompt: Prompt = format_gsm8k
) -> EvalReport:
    """The answers of `model` to `problems`, greedy, with their verdicts."""
    decoding = Decoding(max_new_tokens=profile.max_new_tokens, batch_size=BATCH)
    report = evaluate(generator(model, tokenizer, decoding), problems, prompt=prompt)
    print(report, flush=True)
    return report


def table_row(report: EvalReport) -> dict:
    """Counts, accuracies and intervals; "right": 1 or 0 a question (strict), in their order."""
    right = "".join(str(int(p["strict"])) for p in report.predictions)
    return report.summary() | {"right": right}


def keep_wrong(name: str, report: EvalReport, path: Path) -> None:
    """Replace the wrong answers of row `name` in `path`: KEPT of them, evenly spaced."""
    rows = read_jsonl(path) if path.is_file() and path.stat().st_size else []
    others = [row for row in rows if row["row"] != name]
    wrong = [p for p in report.predictions if not p["strict"]]
    picked = [wrong[i * len(wrong) // KEPT] for i in range(KEPT)] if len(wrong) > KEPT else wrong
    fields = ("question", "gold", "completion")
    write_jsonl(path, others + [{"row": name} | {k: p[k] for k in fields} for p in picked])


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


@cache
def merged(profile: Profile, adapter: Path):
    """The fine-tuned model with its adapter merged into the dense weights it was trained
    against, and its tokenizer."""
    stored = STORED if profile.model == str(TINY) else None  # of other weights nothing is kept
    model, tokenizer = profile.quantized_base(stored, BASE)
    load_adapter(model, adapter)
    merge_lora(model, unload=True)
    return model, tokenizer


def quantized(profile: Profile, adapter: Path, method: str, spec: QuantSpec):
    """A copy of the merged model with all linears rounded; they are kept as dense weights,
    which compute the same and generate faster."""
    model, tokenizer = merged(profile, adapter)
    model = copy.deepcopy(model)
    profile.quantize(model, tokenizer, spec, method)
    dequantize_model(model)
    return model


def merges(profile: Profile, adapter: Path, problems) -> list[dict]:
    """What each way to merge the adapter costs: update, logits on dev problems, exact match.

    "original" adds it to the weights that the base was quantized from: another model.
    """
    model, tokenizer = profile.load(quantize=BASE)
    load_adapter(model, adapter)
    train, dev = (
        calibration_batches(tokenizer, [format_gsm8k(e) for e in profile.examples(split)])
        for split in ("train", "dev")
    )

    def exact_match(model) -> dict:
        return table_row(measure(model, tokenizer, profile, problems))

    rows = merge_report(model, dev, ("dense", "rtn", "gptq"), train, measure=exact_match)
    original, _ = profile.load()
    gaps = [row.base_gap for row in merge_into_original(model, original)]
    print("original:", flush=True)
    last = {"method": "original", "base_gap": sum(gaps) / len(gaps)}
    return [vars(row) for row in rows] + [last | {"measured": exact_match(original)}]


NEEDS = dict.fromkeys(("rows", "force", "max_steps"), (
    "without --merges, which trains nothing", lambda args: not args.merges))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULT, "--force", "--rows", "--model", "--data")
    parser.add_argument("--limit", type=COUNT, help="only the first so many problems, for a trial")
    parser.add_argument("--max-steps", type=COUNT, help="fewer training steps, for a trial")
    parser.add_argument("--merges", action="store_true", help="only tiny-merges.json")
    parser.add_argument("--adapter", type=given_path, default=ADAPTER, help="of the merged rows")
    args = parser.parse_args(argv)
    check_needs(args, NEEDS, parser.get_default)

    profile = load_profile("tiny", model=args.model, data=args.data)
    problems = profile.examples("test")[: args.limit]
    if args.merges:
        rows = merges(profile, args.adapter, problems)
        record = {"rows": rows, "stamp": stamp(SEED)}
        write_json_atomic(args.out.with_name("tiny-merges.json"), record)
        return
    config = profile.train
    if args.max_steps:
        config = TrainConfig(**vars(config) | {"max_steps": args.max_steps})
    prompts, weights = base_prompts(profile), weights_id(profile.model)
    names = [*prompts, *TRAINED, *WIDTHS]
    table = Table(args.out, SEED, names)
    for name in asked_rows(parser, args.rows, names):
        own = weights
        if name in WIDTHS:
            if not args.adapter.is_dir():
                missing = f"{name} needs an adapter in {short_path(args.adapter)}"
                if args.rows:
                    parser.error(f"{missing}; give another folder with --adapter")
                print(f"{missing}: left out")
                continue
            own = f"{weights}+{weights_id(str(args.adapter))}"
        if not args.force and table.rows.get(name, {}).get("weights") == own:
            print(f"{name}: is there")
            continue
        print(f"{name}:", flush=True)
        extra = {}
        if name in prompts:
            model, tokenizer = profile.load()
            report = measure(model, tokenizer, profile, problems, prompts[name])
        elif name in WIDTHS:
            model, tokenizer = merged(profile, args.adapter)
            if WIDTHS[name]:
                model = quantized(profile, args.adapter, *WIDTHS[name])
            report = measure(model, tokenizer, profile, problems)
        else:
            model, tokenizer, training = fine_tune(name, profile, config)
            report = measure(model, tokenizer, profile, problems)
            extra = {"training": training}
        if name in WRONG:
            keep_wrong(name, report, args.out.with_name("tiny-wrong-answers.jsonl"))
        table.keep(name, table_row(report) | extra | {"weights": own})
    print(f"stored in {short_path(args.out)}")


if __name__ == "__main__":
    sys.exit(ending(main))
