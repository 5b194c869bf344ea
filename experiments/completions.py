"""Twenty real completions, to be read by eye: `python -m experiments.completions --model FOLDER`.

Problems of mini-GSM's dev set, answered by SmolLM2-135M-Instruct in two wordings of the prompt
and by the bundled model, as it is, fine-tuned, sampled and rounded to 2 bits. No stop texts: what
a model writes after its answer stays. In data/results/real-completions.jsonl, with what a careful
grader reads from each by docs/EXTRACTION.md, `strict` and `flexible`. Those two are written by
hand: a new run keeps them where the text is the same, and leaves "?" elsewhere.
"""

import copy
import sys
from collections.abc import Callable

from experiments.accuracy import ADAPTER, BASE, STORED, bare_question
from experiments.table import command_line, write_jsonl
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import DATA
from qlora_lib.data.gsm8k import format_gsm8k
from qlora_lib.data.rows import read_jsonl
from qlora_lib.generation.generate import Decoding, generator
from qlora_lib.lora.files import load_adapter
from qlora_lib.lora.merge import merge_lora
from qlora_lib.models.quantize import dequantize_model
from qlora_lib.quant.grid import QuantSpec
from qlora_lib.runs.profiles import load_profile

RESULT = DATA / "results" / "real-completions.jsonl"
NEW_TOKENS = 100
REAL = "SmolLM2-135M-Instruct"


def asked_for_a_sentence(entry: dict[str, str]) -> tuple[str, str]:
    """The question, and in which words the answer shall end."""
    return entry["question"] + ' Think step by step, then end with "The answer is N."\n', ""


def completions(weights: str | None = None) -> list[dict]:
    """The rows without their labels. weights: of the real model, else from the hub."""
    rows: list[dict] = []
    tiny, real = load_profile("tiny"), load_profile("smollm2", weights)
    problems = iter(tiny.examples("dev"))

    def ask(answer: Callable, name: str, wording: str, prompt: Callable, count: int) -> None:
        entries = [next(problems) for _ in range(count)]
        for entry, said in zip(entries, answer([prompt(e)[0] for e in entries])):
            rows.append({"model": name, "prompt": wording, "question": entry["question"],
                         "completion": str(said)})  # fmt: skip

    def answers(model, tokenizer, **how) -> Callable:
        return generator(model, tokenizer, Decoding(max_new_tokens=NEW_TOKENS, stop=(), **how))

    said = answers(*real.load())
    for wording, prompt in (("GSM8K's format", format_gsm8k),
                            ("asked for a sentence", asked_for_a_sentence)):  # fmt: skip
        ask(said, REAL, wording, prompt, 6)

    base, tokenizer = tiny.load()
    ask(answers(base, tokenizer), "bundled, base", "bare question", bare_question, 2)
    tuned, tokenizer = tiny.quantized_base(STORED, BASE)
    load_adapter(tuned, ADAPTER)
    merge_lora(tuned, unload=True)
    ask(answers(tuned, tokenizer), "bundled, fine-tuned", "GSM8K's format", format_gsm8k, 2)
    ask(answers(tuned, tokenizer, temperature=1.3), "bundled, fine-tuned, temperature 1.3",
        "GSM8K's format", format_gsm8k, 2)  # fmt: skip
    rounded = copy.deepcopy(tuned)
    tiny.quantize(rounded, tokenizer, QuantSpec(2, None), "rtn")
    dequantize_model(rounded)
    ask(answers(rounded, tokenizer), "bundled, RTN in 2 bits", "GSM8K's format", format_gsm8k, 2)
    return rows


def main(asked: list[str] | None = None) -> int:
    options = command_line(__doc__, RESULT, "--model").parse_args(asked)
    kept = {row["completion"]: row for row in read_jsonl(options.out)} \
        if options.out.is_file() else {}  # fmt: skip
    rows = completions(options.model)
    for row in rows:
        old = kept.get(row["completion"], {})
        row |= {mode: old.get(mode, "?") for mode in ("strict", "flexible")}
    write_jsonl(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
