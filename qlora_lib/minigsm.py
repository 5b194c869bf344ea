"""mini-GSM: word problems made from templates, in GSM8K's exact format.

A problem is plain data (kind, wording, slots, numbers); `render` turns it into a
question and an answer and draws nothing, so the same problem with other numbers is
`dataclasses.replace(problem, numbers=...)`. Train, dev and test are disjoint by
construction: the numbers that stand in the question decide the split, whatever the
seed. Not handled: fractions, negative results, and steps that need world knowledge.

Two variants of test show what an accuracy rests on. Problem i of "test_changed" is problem i
of test with other numbers of the same sizes: who has learned the steps, not the file, scores
as well. In "test_larger" the numbers are larger than any in training.

`python -m qlora_lib.minigsm` writes the five files under data/minigsm.
"""
import argparse
import dataclasses
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_lib.minigsm_kinds import (
    BAKED, CONTAINERS, FRACTIONS, GIFTS, KINDS, OPERATIONS, PLACES, PRONOUNS, THINGS, Step,
)
from qlora_lib.minigsm_larger import LARGER

SPLITS = ("train", "dev", "test")
VARIANTS = ("test_changed", "test_larger")
SIZES = {"train": 6000, "dev": 500, "test": 1000}
SEED = 2025

_BY_NAME = {kind.name: kind for kind in KINDS}


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem as data: `wording` indexes (body, ask, step text)."""

    kind: str
    wording: tuple[int, int, int]
    slots: dict[str, str]
    numbers: dict[str, int]


def kinds() -> tuple[str, ...]:
    """Names of the kinds of problems, in a fixed order."""
    return tuple(_BY_NAME)


def draw_slots(rng: random.Random, names: Sequence[str] = tuple(PRONOUNS)) -> dict[str, str]:
    """Names, things and places for one problem; what must differ is drawn to differ."""
    n, m, o = rng.sample(names, 3)
    i, j = rng.sample(THINGS, 2)
    container = rng.choice(sorted(CONTAINERS))
    she = PRONOUNS[n]
    return {"n": n, "m": m, "o": o, "i": i, "j": j, "she": she, "She": she.capitalize(),
            "her": {"she": "her", "he": "his"}[she], "c1": container,
            "cs": CONTAINERS[container], "place": rng.choice(PLACES),
            "gift": rng.choice(GIFTS), "food": rng.choice(BAKED)}


def split_of(question: str) -> str:
    """Split decided by the numbers that stand in `question`, whatever their order: 80/10/10."""
    numbers = sorted({int(digits) for digits in re.findall(r"\d+", question)})
    bucket = zlib.crc32(repr(numbers).encode()) % 10
    return {8: "dev", 9: "test"}.get(bucket, "train")


def question_of(problem: Problem) -> str:
    """The question's text, two to four sentences."""
    kind = _BY_NAME[problem.kind]
    body, ask, _ = problem.wording
    return _fill(f"{kind.bodies[body]} {kind.asks[ask]}", problem)


def render(problem: Problem) -> dict[str, str]:
    """Question and answer of `problem` as GSM8K writes them; a pure function.

    The answer has one line a step with its calculator note (`48/2=<<48/2=24>>24`) and
    `#### N` as the last line.
    """
    lines, result = [], 0
    for step, x, y, result in solve(problem):
        note = f"{x}{step.op}{y}="
        eq, cash = f"{note}<<{note}{result}>>{result}", f"{note}$<<{note}{result}>>{result}"
        text = step.texts[problem.wording[2]]
        lines.append(_fill(text, problem, eq=eq, cash=cash))
    return {"question": question_of(problem), "answer": "\n".join([*lines, f"#### {result}"])}


def solve(problem: Problem) -> list[tuple[Step, int, int, int]]:
    """The steps of `problem` with their two operands and their result."""
    values = dict(problem.numbers)
    steps = []
    for step in _BY_NAME[problem.kind].steps:
        x, y = values[step.left], values[step.right]
        values[step.name] = OPERATIONS[step.op](x, y)
        steps.append((step, x, y, values[step.name]))
    return steps


def draw(split: str, seed: int, n: int) -> list[Problem]:
    """`n` problems of `split` with distinct questions, the kinds in turn.

    Raises ValueError when `split` is not train, dev or test.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
    rng = random.Random(f"minigsm {split} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = draw_problem(rng, split, KINDS[len(found) % len(KINDS)].name)
        found.setdefault(question_of(problem), problem)
    chosen = list(found.values())
    rng.shuffle(chosen)
    return chosen


def draw_problem(rng: random.Random, split: str, kind: str) -> Problem:
    """One problem of `kind`; its numbers are drawn until they belong to `split`."""
    family = _BY_NAME[kind]
    wording = (rng.randrange(len(family.bodies)), rng.randrange(len(family.asks)),
               rng.randrange(2))
    slots = draw_slots(rng)
    while True:
        problem = Problem(kind, wording, slots, family.draw(rng))
        if split_of(question_of(problem)) == split:
            return problem


def vary(problems: Sequence[Problem], variant: str, seed: int = SEED) -> list[Problem]:
    """Each problem with other numbers and another result; kind, wording and names stay.

    "test_changed": numbers of the kind's own ranges that belong to test, so that no set of
    them occurs in train. "test_larger": numbers above the kind's ranges in training, results
    of up to four digits. The fraction of a "part" stays, since it is a word. Raises ValueError
    for another variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; expected one of {VARIANTS}")
    rng = random.Random(f"minigsm {variant} {seed}")
    taken = {question_of(problem) for problem in problems}
    varied = []
    for problem in problems:
        draw = LARGER[problem.kind] if variant == "test_larger" else _BY_NAME[problem.kind].draw
        while True:
            other = dataclasses.replace(problem, numbers=draw(rng))
            question = question_of(other)
            if (other.numbers.get("f") == problem.numbers.get("f") and question not in taken
                    and (variant == "test_larger" or split_of(question) == "test")
                    and solve(other)[-1][-1] != solve(problem)[-1][-1]):
                break
        taken.add(question)
        varied.append(other)
    return varied


def problems(split: str, seed: int = SEED, n: int | None = None) -> list[dict[str, str]]:
    """`n` entries {"question", "answer"} of `split` or variant; n=None: the bundled file's."""
    return [entry for _, entry in labelled(split, seed, n)]


def labelled(split: str, seed: int = SEED,
             n: int | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """The entries of `problems`, in the same order, each with the name of its kind."""
    base = "test" if split in VARIANTS else split
    found = draw(base, seed, SIZES.get(base, 0) if n is None else n)
    for problem in vary(found, split, seed) if split in VARIANTS else found:
        yield problem.kind, render(problem)


def _fill(text: str, problem: Problem, **extra: str) -> str:
    part = FRACTIONS.get(problem.numbers.get("f"), "")
    return text.format(**problem.slots, **problem.numbers, **extra, part=part,
                       part_cap=part.capitalize())


def main() -> None:
    """Write a file a split and variant, the same bytes at every call."""
    parser = argparse.ArgumentParser(description="write the mini-GSM problems")
    parser.add_argument("--out", type=Path, default=Path("data/minigsm"))
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS + VARIANTS:
        lines = [json.dumps(entry) + "\n" for entry in problems(split, options.seed)]
        path = options.out / f"{split}.jsonl"
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(lines), encoding="utf-8")
        beside.replace(path)
        print(f"{path}: {len(lines)} problems")


if __name__ == "__main__":
    main()
