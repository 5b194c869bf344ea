"""Exact match on word problems: extract the answer, score, report.

The model sees the prompt only, and every question counts in the denominator. Answers
are compared as exact fractions. Not handled: sharing the work between processes.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from .data import NUMBER, format_gsm8k, parse_gold, to_number
from .generation import Completion, Decoding, Generate, generator
from .results import wilson, write_json_atomic

Entry = dict[str, str]
Prompt = Callable[[Entry], tuple[str, str]]  # an entry to (prompt, target)
MAX_TEXT = 20_000  # characters of a completion that are read


_MARKED = re.compile(r"####([^\n]*)")
_ANSWER_IS = re.compile(r"\bthe answer is\b", re.IGNORECASE)


def extract_answer(completion: str, mode: str = "strict") -> Fraction | None:
    """The number a completion gives as its answer, or None.

    Text from "Question:" on is a new question and is ignored. Strict: the first
    `#### N` line that holds a number, else the last "The answer is N". Flexible: else
    the last number of all. Raises ValueError for another mode, never for a text.
    """
    if mode not in ("strict", "flexible"):
        raise ValueError(f"mode is {mode!r}; expected 'strict' or 'flexible'")
    text = completion[:MAX_TEXT].split("Question:")[0]
    said = [after.partition("\n")[0] for after in _ANSWER_IS.split(text)[1:]]
    spans = _MARKED.findall(text) + said[::-1]
    for span in spans:
        # "= 5. Then ...": one sentence, and the right side of its last equals sign.
        match = NUMBER.search(re.split(r"\.\s", span)[0].rpartition("=")[2])
        if match:
            return to_number(match.group())
    numbers = NUMBER.findall(text) if mode == "flexible" else []
    return to_number(numbers[-1]) if numbers else None


def is_correct(completion: str, gold: object, mode: str = "strict") -> bool:
    """Whether the extracted answer equals `gold` (an answer text, a numeral or a number).

    Integers must be equal, other golds within 1e-6. No answer is never correct. Raises
    ValueError for an unparsable gold.
    """
    expected, answer = parse_gold(gold), extract_answer(completion, mode)
    if answer is None:
        return False
    return abs(answer - expected) <= (0 if expected.denominator == 1 else Fraction(1, 10**6))


def few_shot(examples: Sequence[Entry], k: int) -> Prompt:
    """A prompt function that puts the first `k` examples, solved, before the question."""
    if not 0 <= k <= len(examples):
        raise ValueError(f"k={k} examples asked for, {len(examples)} given")
    shown = "".join(p + t + "\n\n" for p, t in map(format_gsm8k, examples[:k]))

    def prompt(entry: Entry) -> tuple[str, str]:
        question, target = format_gsm8k(entry)
        return shown + question, target

    return prompt


@dataclass
class EvalReport:
    """Accuracies over all n questions, and what they were measured with."""

    n: int
    strict_correct: int
    flexible_correct: int
    formatted: int  # completions with a strict answer, right or wrong
    truncated: int  # completions cut by the limit of new tokens
    tokens: int  # generated
    seconds: float  # spent generating
    info: dict = field(default_factory=dict)  # model, compute_dtype, decoding
    predictions: list[dict] = field(default_factory=list, repr=False)

    @property
    def strict(self) -> float:
        return self.strict_correct / self.n

    @property
    def flexible(self) -> float:
        return self.flexible_correct / self.n

    @property
    def strict_interval(self) -> tuple[float, float]:
        """95% Wilson interval, fractions."""
        return wilson(self.strict_correct, self.n)

    @property
    def flexible_interval(self) -> tuple[float, float]:
        return wilson(self.flexible_correct, self.n)

    @property
    def format_rate(self) -> float:
        return self.formatted / self.n

    @property
    def truncation_rate(self) -> float:
        return self.truncated / self.n

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self) -> dict:
        """Everything but the predictions, as JSON takes it."""
        values = {k: v for k, v in vars(self).items() if k != "predictions"}
        names = ("strict", "flexible", "strict_interval", "flexible_interval", "format_rate",
                 "truncation_rate", "tokens_per_second")  # fmt: skip
        return values | {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        lines = [f"{self.n} questions    exact match   95% interval"]
        for name in ("strict", "flexible"):
            low, high = getattr(self, f"{name}_interval")
            right = getattr(self, f"{name}_correct")
            lines.append(
                f"{name:<9}{right:>6}/{self.n:<8} {100 * getattr(self, name):5.1f}%   "
                f"[{100 * low:.1f}%, {100 * high:.1f}%]"
            )
        lines.append(
            f"in format {100 * self.format_rate:.1f}%, "
            f"cut short {100 * self.truncation_rate:.1f}%, {self.tokens_per_second:.0f} tokens/s, "
            f"compute dtype {self.info.get('compute_dtype', 'unknown')}"
        )
        return "\n".join(lines)


def evaluate(
    generate: Generate,
    problems: Sequence[Entry],
    report_folder: str | Path | None = None,
    prompt: Prompt = format_gsm8k,
    callback: Callable[[dict], None] | None = None,
    chunk: int = 128,
) -> EvalReport:
    """Ask every problem once and score the answers.

    generate: prompts to completions (plain strings will do). prompt: entry to (prompt,
    target), of which only the prompt is used. `chunk` questions are asked at a time;
    each prediction (question, prompt, completion, gold, answers, verdicts) is written to
    report_folder/predictions.jsonl and given to `callback` as its chunk is done, the sums
    to report.json at the end. Raises ValueError for no problems, or an unparsable gold,
    before anything is generated.
    """
    if not problems:
        raise ValueError("there are no problems to evaluate on")
    golds = [parse_gold(entry["answer"]) for entry in problems]
    prompts = [prompt(entry)[0] for entry in problems]
    report = EvalReport(len(problems), 0, 0, 0, 0, 0, 0.0, dict(getattr(generate, "info", {})))
    stream = None
    if report_folder is not None:
        Path(report_folder).mkdir(parents=True, exist_ok=True)
        stream = open(Path(report_folder) / "predictions.jsonl", "w", encoding="utf-8")
    try:
        for start in range(0, len(problems), chunk):
            asked = prompts[start : start + chunk]
            began = time.perf_counter()
            completions = generate(asked)
            report.seconds += time.perf_counter() - began
            if len(completions) != len(asked):
                raise ValueError(f"{len(asked)} prompts gave {len(completions)} completions")
            for i, completion in enumerate(completions, start):
                prediction = _score(problems[i]["question"], prompts[i], completion, golds[i])
                _count(report, prediction)
                if stream:
                    print(json.dumps(prediction, ensure_ascii=False), file=stream, flush=True)
                if callback:
                    callback(prediction)
    finally:
        if stream:
            stream.close()
    if report_folder is not None:
        write_json_atomic(Path(report_folder) / "report.json", report.summary())
    return report


def _score(question: str, prompt: str, completion: str, gold: Fraction) -> dict:
    strict, flexible = extract_answer(completion), extract_answer(completion, "flexible")
    return {
        "question": question,
        "prompt": prompt,
        "completion": str(completion),
        "gold": str(gold),
        "strict_answer": None if strict is None else str(strict),
        "flexible_answer": None if flexible is None else str(flexible),
        "strict": is_correct(completion, gold),
        "flexible": is_correct(completion, gold, "flexible"),
        "tokens": getattr(completion, "tokens", 0),
        "finished": getattr(completion, "finished", True),
    }


def _count(report: EvalReport, prediction: dict) -> None:
    report.strict_correct += prediction["strict"]
    report.flexible_correct += prediction["flexible"]
    report.formatted += prediction["strict_answer"] is not None
    report.truncated += not prediction["finished"]
    report.tokens += prediction["tokens"]
    report.predictions.append(prediction)
