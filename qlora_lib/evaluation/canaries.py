"""Canaries, run before every evaluation: silence, an echo, the gold solutions, and shuffled ones
are "models" whose score is known beforehand. And the prompts are searched for the answer."""

import random
from collections.abc import Callable, Sequence
from itertools import islice

from ..data.gsm8k import format_gsm8k, parse_gold, without_notes
from .extraction import MODES, equals, numbers

AT_MOST = 64  # problems, evenly spaced


class CanaryError(ValueError):
    """A grader or a prompt that can't be trusted; says which property is broken."""


def run_canaries(
    evaluate: Callable, problems: Sequence[dict[str, str]], prompt: Callable = format_gsm8k
) -> dict[str, tuple[int, int]]:
    """Check `evaluate` on a sample of the problems; returns right answers (strict, flexible) by
    canary. Raises CanaryError for a wrong count, and for a prompt that holds its own solution."""
    for entry in problems:
        _refuse_leak(entry, prompt(entry)[0])
    chosen = sample(problems)
    golds = [parse_gold(entry["answer"]) for entry in chosen]
    prompts = [prompt(entry)[0] for entry in chosen]
    solutions = [a if "####" in a else f"#### {a}" for a in (str(e["answer"]) for e in chosen)]
    order = random.Random(0).sample(range(len(chosen)), len(chosen))
    same = sum(equals(golds[i], gold) for i, gold in zip(order, golds))
    # Before its first "Question:" a prompt of ours is empty. One without it may by chance
    # hold a number that is right, such as an answer that stands in the question.
    lucky = sum(
        any(equals(x, gold) for x in numbers(text.partition("Question:")[0]))
        for text, gold in zip(prompts, golds)
    )
    n = len(chosen)
    canaries = {  # name: completions, at least, at most, what is broken otherwise
        "silent": ([""] * n, 0, 0, "the grader takes silence for an answer"),
        "echo": (prompts, 0, lucky, "the grader reads an answer from the prompt"),
        "gold": (solutions, n, n, "the grader does not find the answer of the gold solutions"),
        "shuffled": ([solutions[i] for i in order], same, same,
                     "the grader does not compare with the right gold"),
    }  # fmt: skip
    scores = {}
    for name, (completions, low, high, broken) in canaries.items():
        rest = iter(completions)
        report = evaluate(
            lambda asked: list(islice(rest, len(asked))), chosen, prompt=prompt, canaries=False
        )
        if report.n != n:
            raise CanaryError(f"canary {name}: {report.n} of {n} questions were counted")
        scores[name] = report.strict_correct, report.flexible_correct
        for mode, right in zip(MODES, scores[name]):
            if not low <= right <= high:
                if name == "gold":
                    wrong = next(p for p in report.predictions if not getattr(p, mode))
                    broken += f", such as {wrong.completion[-60:]!r}"
                expected = str(low) if low == high else f"{low} to {high}"
                found = f"{right} of {n} right ({mode})"
                raise CanaryError(f"canary {name}: {found}, expected {expected}: {broken}")
    return scores


def sample(problems: Sequence) -> Sequence:
    """Return at most AT_MOST of the problems, evenly spaced."""
    return problems[:: -(-len(problems) // AT_MOST)]


def _refuse_leak(entry: dict[str, str], prompt: str) -> None:
    if "####" not in str(entry["answer"]):
        return
    answer = entry["answer"].strip()
    last, whole = answer.splitlines()[-1], {answer, without_notes(answer).strip()}
    if prompt.rstrip().endswith(last) or any("\n" in w and f"{w}\n" in prompt for w in whole):
        raise CanaryError(f"the prompt of {entry['question'][:60]!r} holds its gold solution; "
                          "few-shot examples must come from other problems")  # fmt: skip
