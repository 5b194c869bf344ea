"""SmolLM2-135M-Instruct, a real model on real text: `python -m experiments.smollm2`.

perplexity  WikiText-2 and GSM8K's solutions at 8, 4, 3 and 2 bits, round to nearest and GPTQ, in
            groups of 64 and with one grid a row; in groups of 64 also GPTQ's options, each
            at 3 bits, some at 2, and some with other calibration texts (_text1, _text2):
            data/results/smollm2-perplexity.json
gsm8k       a QLoRA run on GSM8K's train problems, and exact match before and after, on the same
            fixed sample of its test problems: data/results/smollm2-gsm8k.json

A row is stored as soon as it is measured, and not measured again unless with --force. Weights
read from a Q4_1 file lie on a 4-bit grid already (blocks of 32): at 8 bits they measure
plumbing, at 4 bits a second rounding, at 3 and 2 bits quality.
"""

import copy
import math
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from experiments.perplexity import perplexity
from experiments.table import Table, asked_rows, command_line
from qlora_lib.base.endings import ending
from qlora_lib.base.files import read_text
from qlora_lib.base.paths import DATA, given_path, short_path
from qlora_lib.base.ranges import COUNT
from qlora_lib.cli.common import check_needs
from qlora_lib.data.calibration import calibration_batches
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.tokens import encode_example
from qlora_lib.evaluation.evaluate import EvalReport, evaluate
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.files import save_adapter
from qlora_lib.lora.inject import inject_lora
from qlora_lib.lora.merge import merge_lora
from qlora_lib.lora.targets import ALL_LINEAR
from qlora_lib.models.quantize import dequantize_model, quantize_model
from qlora_lib.quant.gptq import GPTQOptions
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import Profile, load_profile
from qlora_lib.train.finetune import finetune, validation_loss

RESULTS = DATA / "results"
SEED = 0
WIKITEXT = 32_768  # tokens of WikiText-2's test text, in windows of
WINDOW = 512
SOLUTIONS = 32  # GSM8K test problems whose solutions are scored, given their questions
DEV = 64  # dev problems of the QLoRA run
CALIBRATION = 4096  # tokens of each of the two texts that GPTQ sees, none of them in the test
ASKED = 200  # test problems, drawn once
BASE = QuantSpec(bits=4, group_size=64)  # of the QLoRA run
OPTIONS = {
    "gptq": GPTQOptions(),
    "damped": GPTQOptions(damp_percent=0.05),
    "chosen": GPTQOptions(damp_percent=None),
    "weighed": GPTQOptions(weigh_columns=True),
    "match_dense": GPTQOptions(match_dense=True),
    "refit": GPTQOptions(refit_scales=True),
    "together": GPTQOptions(damp_percent=0.05, weigh_columns=True, match_dense=True),
    "all_four": GPTQOptions(
        damp_percent=0.05, weigh_columns=True, match_dense=True, refit_scales=True
    ),
    "best": GPTQOptions.best(),
    "best_match": GPTQOptions.best(match_dense=True),
}
# At 2 bits these, besides GPTQ itself; at 3 bits all.
AT_2_BITS = "chosen", "refit", "together", "all_four", "best", "best_match"
WITH_OTHER_TEXTS = {
    2: ("gptq", "refit", "together", "best_match"),
    3: ("gptq", "together", "best_match"),
}
WIDTHS = {"fp32": None} | {
    f"{method}_{bits}bit_{group_size or 'row'}": (method, QuantSpec(bits, group_size), 0)
    for bits in (2, 3, 4, 8)
    for group_size in (64, None)
    for method in ("rtn", *OPTIONS)
    if method in ("rtn", "gptq")
    or (group_size and (bits == 3 or (bits == 2 and method in AT_2_BITS)))
}
WIDTHS |= {
    f"{method}_{bits}bit_64_text{text}": (method, QuantSpec(bits, 64), text)
    for bits, methods in WITH_OTHER_TEXTS.items()
    for method in methods
    for text in (1, 2)
}


def text_ids(tokenizer, path: Path, tokens: int) -> torch.Tensor:
    """The first `tokens` ids of a text, int64 (tokens,)."""
    if not path.is_file():
        place = short_path(path)
        raise FileNotFoundError(f"there is no {place}; expected WikiText-2 as plain text")
    text = read_text(path)[: 8 * tokens]  # no text has that long tokens
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False)[:tokens])


def calibration(tokenizer, profile: Profile, wikitext: Path, text: int = 0) -> list[dict]:
    """As many tokens of WikiText-2's validation text as of GSM8K's train problems, of both the
    first CALIBRATION for text 0, the next for text 1."""
    ids = text_ids(tokenizer, wikitext / "valid.txt", (text + 1) * CALIBRATION)
    windows = ids[text * CALIBRATION :].view(-1, 512)
    problems = iter(profile.examples("train"))
    for _ in range(text + 1):
        pairs, left = [], CALIBRATION
        for entry in problems:
            pair = format_gsm8k(entry)
            left -= len(encode_example(tokenizer, *pair, 512).input_ids)
            if left < 0:  # does not fit
                break
            pairs.append(pair)
    return [{"input_ids": windows}, *calibration_batches(tokenizer, pairs)]


def perplexities(model, tokenizer, profile: Profile, wikitext: Path) -> dict:
    """Both perplexities of a model, each with the number of its tokens."""
    wiki = perplexity(model, text_ids(tokenizer, wikitext / "test.txt", WIKITEXT), WINDOW)
    pairs = [format_gsm8k(e) for e in profile.examples("test")[:SOLUTIONS]]
    config = replace(profile.train, batch_size=8, compute_dtype="fp32")
    loss = validation_loss(model, tokenizer, pairs, config)
    return {
        "wikitext2": wiki.value, "wikitext2_tokens": wiki.tokens, "window": wiki.window,
        "gsm8k_solutions": math.exp(loss), "gsm8k_problems": len(pairs),
    }  # fmt: skip


def width(model, tokenizer, profile: Profile, wikitext: Path, how) -> dict:
    """One row of the perplexity table: a copy of the model, quantized, kept dense for speed."""
    if how is None:
        return perplexities(model, tokenizer, profile, wikitext)
    (method, spec, text), model = how, copy.deepcopy(model)
    options = OPTIONS.get(method, GPTQOptions())
    method = "gptq" if method in OPTIONS else method
    batches = calibration(tokenizer, profile, wikitext, text) if method == "gptq" else None
    report = quantize_model(model, batches, spec, method, options)
    dequantize_model(model)
    stored = sum(row.bytes_after for row in report)
    weights = sum(math.prod(row.shape) for row in report)
    return perplexities(model, tokenizer, profile, wikitext) | {
        "spec": asdict(spec), "method": method, "bits_per_weight": 8 * stored / weights,
        "calibration_tokens": sum(b["input_ids"].numel() for b in batches) if batches else 0,
        "seconds_quantizing": round(sum(row.seconds for row in report), 1),
    } | options.changed()  # fmt: skip


def sample_of_test(profile: Profile) -> list[dict]:
    """The same ASKED test problems in every run."""
    return random.Random(SEED).sample(profile.examples("test"), ASKED)


def chat(tokenizer):
    """Questions in the model's own chat template, which asks it to end as GSM8K does."""

    def prompt(entry):
        asked = f"{entry['question']}\nThink step by step, and end with a line \"#### N\"."
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or ""), format_gsm8k(entry)[1]

    return prompt


def ask(model, tokenizer, profile: Profile, folder: Path, prompt=format_gsm8k) -> dict:
    """Exact match on the sample, greedy; a killed evaluation goes on from `folder`."""
    decoding = Decoding(max_new_tokens=profile.max_new_tokens, batch_size=50)
    report: EvalReport = evaluate(
        generator(model, tokenizer, decoding), sample_of_test(profile), folder, prompt, chunk=50
    )
    print(report, flush=True)
    right = "".join(str(int(p["strict"])) for p in report.predictions)
    return report.summary() | {"right": right}


def train(profile: Profile, folder: Path, steps: int, batch_size: int):
    """The fine-tuned model, its adapter merged into the dense weights it was trained against,
    its tokenizer, and how the training went."""
    model, tokenizer = profile.load(quantize=BASE)
    torch.manual_seed(SEED)
    inject_lora(model, ALL_LINEAR, rank=profile.rank, alpha=2 * profile.rank)
    config = replace(
        profile.train, max_steps=steps, batch_size=batch_size, accumulation=1, eval_every=50,
        save_every=20, folder=folder / "training", resume=True, seed=SEED,
    )  # fmt: skip
    pairs = [format_gsm8k(e) for e in profile.examples("train")]
    dev = [format_gsm8k(e) for e in profile.examples("dev")[:DEV]]

    def show(step):
        if step["step"] % 10 == 0:
            took = f"{step['seconds']:.0f} s"
            print(f"  step {step['step']} loss {step['loss']:.4f} {took}", flush=True)

    history = finetune(model, tokenizer, pairs, config, dev, show)
    save_adapter(model, folder / "adapter")
    merge_lora(model, unload=True)
    return model, tokenizer, {
        "base": f"gptq, {BASE}", "target_modules": ALL_LINEAR, "rank": profile.rank,
        "alpha": 2 * profile.rank, "lr": config.lr, "batch_size": batch_size, "steps": steps,
        "trained_parameters": history.trained_parameters, "compute_dtype": history.compute_dtype,
        "seconds": round(history.steps[-1]["seconds"], 1),
        "tokens": sum(s["tokens"] for s in history.steps),
        "losses": [round(loss, 4) for loss in history.losses], "dev": history.dev,
    }  # fmt: skip


NEEDS = {
    "wikitext": ("with perplexity", lambda args: args.part == "perplexity"),
    **dict.fromkeys(("folder", "steps", "batch_size"), (
        "with gsm8k", lambda args: args.part == "gsm8k")),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__, RESULTS, "--force", "--rows", "--model", "--data")
    parser.add_argument("part", choices=("perplexity", "gsm8k"))
    parser.add_argument("--wikitext", type=given_path, default=Path("data/wikitext2"),
                        help="folder with WikiText-2's test.txt and valid.txt")  # fmt: skip
    parser.add_argument("--folder", type=given_path, default=Path("checkpoints/smollm2-experiments"))
    parser.add_argument("--steps", type=COUNT, default=200)
    parser.add_argument("--batch-size", type=COUNT, default=8)
    args = parser.parse_args(argv)
    check_needs(args, NEEDS, parser.get_default)
    profile = load_profile("smollm2", model=args.model, data=args.data)
    profile = replace(profile, compute_dtype="fp32")
    names = list(WIDTHS) if args.part == "perplexity" else ["base", "base_chat", "qlora"]
    path = args.out / f"smollm2-{args.part}.json"
    table, model = Table(path, SEED, names), None
    for name in asked_rows(parser, args.rows, names):
        if name in table.rows and not args.force:
            print(f"{name}: is there")
            continue
        print(f"{name}:", flush=True)
        if name != "qlora" and model is None:
            model, tokenizer = profile.load()
        if args.part == "perplexity":
            row = width(model, tokenizer, profile, args.wikitext, WIDTHS[name])
            print(f"  {row['wikitext2']:.3f} {row['gsm8k_solutions']:.3f}", flush=True)
        elif name == "qlora":
            trained, tokenizer, training = train(profile, args.folder, args.steps, args.batch_size)
            row = ask(trained, tokenizer, profile, args.folder / name) | {"training": training}
        else:
            prompt = chat(tokenizer) if name == "base_chat" else format_gsm8k
            row = ask(model, tokenizer, profile, args.folder / name, prompt)
        table.keep(name, row)
    print(f"stored in {short_path(path)}")


if __name__ == "__main__":
    sys.exit(ending(main))
