"""mini-GSM: word problems made from templates, in GSM8K's exact format.

A problem is plain data (kind, wording, slots, numbers); `render` turns it into a question and an
answer and draws nothing, so the same problem with other numbers is
`dataclasses.replace(problem, numbers=...)`. Ranges are small enough that a model of 3 million
parameters can learn each single step, and every result is at least 2, so that the nouns stay
plural. Train, dev and test are disjoint by construction: the numbers that stand in the question
decide the split, whatever the seed. Not handled: fractions, negative results, and steps that need
world knowledge.

Two variants of test show what an accuracy rests on. Problem i of "test_changed" is problem i of
test with other numbers of the same sizes: who has learned the steps, not the file, scores as well.
In "test_larger" the numbers are larger than any in training: in each kind at least `a` (in "share"
`k`, the friends) is, and so are most products and sums. Days of a week and hours of a day stay what
they can be, and results have up to four digits.

`python -m experiments.toy.minigsm` writes the five files under data/minigsm.
"""

import argparse
import dataclasses
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.table import write_jsonl
from qlora_lib.base.endings import ending
from qlora_lib.base.paths import given_path
from qlora_lib.base.ranges import ANY_SEED

SPLITS = ("train", "dev", "test")
VARIANTS = ("test_changed", "test_larger")
SIZES = {"train": 6000, "dev": 500, "test": 1000}
SEED = 2025

PRONOUNS = {
    "Ava": "she", "Ben": "he", "Cara": "she", "Dan": "he", "Ella": "she", "Finn": "he",
    "Gina": "she", "Hugo": "he", "Iris": "she", "Jack": "he", "Kira": "she", "Liam": "he",
    "Mia": "she", "Noah": "he", "Olga": "she", "Paul": "he",
}
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells",
          "stamps", "stickers", "toys", "cookies", "flowers", "stones")
BAKED = ("cookies", "muffins", "rolls", "buns")
GIFTS = ("ball", "hat", "lamp", "kite")
CONTAINERS = {"box": "boxes", "bag": "bags", "jar": "jars", "crate": "crates",
              "basket": "baskets", "chest": "chests"}
PLACES = ("at school", "at home", "in the park", "at the market", "in the garden")
FRACTIONS = {2: "half", 3: "a third", 4: "a quarter"}

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x // y,
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One line of a solution: `name` = `left` `op` `right`, told in one of two ways.

    A text holds `{eq}`, which becomes `48/2=<<48/2=24>>24`, or `{cash}`, the same with
    a dollar sign before the result.
    """

    name: str
    left: str
    op: str
    right: str
    texts: tuple[str, str]


Ranges = dict[str, tuple[int, int] | int]  # least and most of a number, or the number itself


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of problems: how its numbers are drawn, and its wordings."""

    name: str
    complete: Callable[..., dict[str, int]]  # (rng, **drawn) -> all numbers; {}: draw again
    ranges: Ranges
    larger: Ranges  # of the variant "test_larger"
    bodies: tuple[str, ...]
    asks: tuple[str, ...]
    steps: tuple[Step, ...]

    def draw(self, rng: random.Random, larger: bool = False) -> dict[str, int]:
        """The numbers of a problem by name, from the kind's ranges or from its larger ones."""
        numbers: dict[str, int] = {}
        while not numbers:
            drawn = {
                key: span if isinstance(span, int) else rng.randint(*span)
                for key, span in (self.larger if larger else self.ranges).items()
            }
            numbers = self.complete(rng, **drawn)
        return numbers


# All numbers of a problem, from those drawn: what is taken away leaves at least 2.


def _part_of_sum(rng, a, b):
    return {"a": a, "b": b, "c": rng.randint(2, a + b - 2)}


def _part_of_product(rng, a, b):
    return {"a": a, "b": b, "c": rng.randint(2, a * b - 2)}


def _as_drawn(rng, **numbers):
    return numbers


def _share(rng, k, each):
    a = rng.randint(2, k * each - 2)
    return {"a": a, "b": k * each - a, "k": k}


def _times(rng, a, k):
    return {"a": a, "k": k, "c": rng.randint(2, a * k + a - 2)}


def _change(rng, a, b, c, left):
    return {"a": a, "b": b, "c": c, "w": a * b + c + left}


def _part(rng, f, each, b):
    return {"f": f, "a": f * each, "b": b}


def _wages(rng, a, h, d):
    return {"a": a, "h": h, "d": d, "c": rng.randint(2, a * h * d - 2)}


def _reading(rng, a, d, e, each):
    return {"a": a, "d": d, "e": e, "p": a * d + e * each}


def _packing(rng, a, b, d, most):  # most: packs
    packs = (a * b - 2) // d
    if packs < 2:
        return {}
    return {"a": a, "b": b, "c": a * b - d * rng.randint(2, min(packs, most)), "d": d}


KINDS = (
    Kind("gain_lose", _part_of_sum,
         {"a": (5, 90), "b": (3, 60)}, {"a": (100, 4000), "b": (100, 4000)}, (
        "{n} has {a} {i}. {m} gives {n} {b} more {i}. Then {n} loses {c} {i}.",
        "{n} starts the day with {a} {i}. {She} finds {b} {i} {place} and then gives {c} {i} "
        "to {m}.",
        "Last week {n} had {a} {i}. {She} got {b} more {i} {place} and sold {c} of them.",
    ), (
        "How many {i} does {n} have now?", "How many {i} does {n} have left?",
        "What number of {i} does {she} still have?",
    ), (
        Step("s", "a", "+", "b", ("At first {n} gets to {eq} {i}.", "{n} had {eq} {i}.")),
        Step("t", "s", "-", "c", ("Then {n} has {eq} {i} left.", "Now {n} has {eq} {i}.")),
    )),
    Kind("containers", _part_of_product,
         {"a": (2, 12), "b": (3, 12)}, {"a": (13, 90), "b": (13, 90)}, (
        "{n} buys {a} {cs} of {i}. Each {c1} holds {b} {i}. {She} gives {c} {i} to {m}.",
        "{n} fills {a} {cs} with {b} {i} each. Then {c} {i} get lost.",
        "There are {a} {cs} {place}, and every {c1} has {b} {i} in it. {n} takes {c} {i} away.",
    ), (
        "How many {i} are left?", "How many {i} remain?", "What number of {i} is left over?",
    ), (
        Step("s", "a", "*", "b", ("The {cs} hold {eq} {i}.", "There are {eq} {i} in the {cs}.")),
        Step("t", "s", "-", "c", ("After that {eq} {i} are left.", "There are {eq} {i} left.")),
    )),
    Kind("shopping", _as_drawn,
         dict.fromkeys("abcd", (2, 9)), dict.fromkeys("abcd", (10, 60)), (
        "{n} buys {a} {i} for ${b} each and {c} {j} for ${d} each.",
        "In a shop {i} cost ${b} each and {j} cost ${d} each. {n} buys {a} {i} and {c} {j}.",
        "{n} needs {a} {i} at ${b} each. {She} also needs {c} {j} at ${d} each.",
    ), (
        "How many dollars does {n} pay?", "How much money does {she} need?",
        "What is the total cost in dollars?",
    ), (
        Step("s", "a", "*", "b", ("The {i} cost {cash}.", "For the {i} {n} pays {cash}.")),
        Step("t", "c", "*", "d", ("The {j} cost {cash}.", "For the {j} {n} pays {cash}.")),
        Step("u", "s", "+", "t", ("In total {n} pays {cash}.", "The total cost is {cash}.")),
    )),
    Kind("share", _share,
         {"k": (2, 9), "each": (3, 12)}, {"k": (10, 30), "each": (13, 90)}, (
        "{n} has {a} {i} and finds {b} more {place}. {She} shares all of them equally among "
        "{k} friends.",
        "{n} has {a} {i} and {m} has {b} {i}. They put them together, and {k} friends share "
        "them equally.",
        "{n} picks up {a} {i} in the morning and {b} {i} in the evening. {k} friends get all "
        "of them in equal parts.",
    ), (
        "How many {i} does each friend get?", "How many {i} are there for each friend?",
        "What number of {i} does one friend get?",
    ), (
        Step("s", "a", "+", "b", ("In all there are {eq} {i}.", "Together that is {eq} {i}.")),
        Step("t", "s", "/", "k", ("Each friend gets {eq} {i}.", "One friend gets {eq} {i}.")),
    )),
    Kind("times", _times,
         {"a": (3, 15), "k": (2, 6)}, {"a": (100, 900), "k": (7, 10)}, (
        "{n} has {a} {i}. {m} has {k} times as many {i} as {n}. Together they give {c} {i} "
        "to {o}.",
        "{m} has {k} times as many {i} as {n}, and {n} has {a} {i}. The two of them lose {c} {i}.",
        "{n} finds {a} {i} {place}. {m} finds {k} times as many. They put them together and "
        "sell {c} {i}.",
    ), (
        "How many {i} do they have left?", "How many {i} do {n} and {m} still have?",
        "What number of {i} is left?",
    ), (
        Step("s", "k", "*", "a", ("{m} has {eq} {i}.", "{m} starts with {eq} {i}.")),
        Step("t", "s", "+", "a", ("Together they have {eq} {i}.", "In all that is {eq} {i}.")),
        Step("u", "t", "-", "c", ("They have {eq} {i} left.", "There are {eq} {i} left.")),
    )),
    Kind("weekly", _as_drawn,
         {"a": (2, 12), "d": (2, 6), "w": (2, 5)}, {"a": (13, 90), "d": (2, 6), "w": (6, 18)}, (
        "{n} collects {a} {i} a day on {d} days of each week.",
        "On {d} days of every week {n} makes {a} {i} a day {place}.",
        "{n} goes out on {d} days each week and brings home {a} {i} every time.",
    ), (
        "How many {i} is that in {w} weeks?", "How many {i} does {she} have after {w} weeks?",
        "What number of {i} does {n} get in {w} weeks?",
    ), (
        Step("s", "a", "*", "d", ("Each week {n} gets {eq} {i}.", "One week gives {eq} {i}.")),
        Step("t", "s", "*", "w", ("In {w} weeks {n} gets {eq} {i}.",
                                  "All the weeks give {eq} {i}.")),
    )),
    Kind("change", _change,
         {"a": (2, 9), "b": (2, 9), "c": (3, 15), "left": (2, 30)},
         {"a": (10, 60), "b": (10, 60), "c": (16, 300), "left": (31, 500)}, (
        "{n} has ${w}. {She} buys {a} {i} for ${b} each and a {gift} for ${c}.",
        "{n} goes to the market with ${w}. {She} pays ${c} for a {gift} and buys {a} {i} at "
        "${b} each.",
        "A {gift} costs ${c} and {i} cost ${b} each. {n}, who has ${w}, buys the {gift} and "
        "{a} {i}.",
    ), (
        "How many dollars does {n} have left?", "How much money is left?",
        "What is left of {n}'s money, in dollars?",
    ), (
        Step("s", "a", "*", "b", ("The {i} cost {cash}.", "For the {i} {n} pays {cash}.")),
        Step("t", "s", "+", "c", ("With the {gift} that is {cash}.",
                                  "The total cost with the {gift} is {cash}.")),
        Step("u", "w", "-", "t", ("{n} has {cash} left.", "There is {cash} left.")),
    )),
    Kind("part", _part,
         {"f": (2, 4), "each": (2, 15), "b": (2, 40)},
         {"f": (2, 4), "each": (31, 900), "b": (41, 900)}, (
        "{n} has {a} {i}. {She} gives {part} of them to {m}. Later {she} finds {b} more {i}.",
        "{n} sells {part} of {her} {a} {i} {place} and then buys {b} new {i}.",
        "There were {a} {i} in {n}'s room. {She} took {part} of the {i} away and brought "
        "{b} other {i}.",
    ), (
        "How many {i} does {n} have now?", "How many {i} are there in the end?",
        "What number of {i} does {she} have now?",
    ), (
        Step("s", "a", "/", "f", ("{part_cap} of the {i} is {eq}.",
                                  "First {eq} {i} go away.")),
        Step("t", "a", "-", "s", ("That leaves {eq} {i}.", "Then {n} has {eq} {i} left.")),
        Step("u", "t", "+", "b", ("Now {n} has {eq} {i}.", "In the end there are {eq} {i}.")),
    )),
    Kind("wages", _wages,
         {"a": (3, 9), "h": (2, 6), "d": (2, 5)}, {"a": (10, 60), "h": (2, 6), "d": (6, 20)}, (
        "{n} earns ${a} an hour. {She} works {h} hours a day for {d} days and then spends ${c}.",
        "For {d} days {n} works {h} hours a day {place} at ${a} an hour. Later {she} pays ${c} "
        "for a {gift}.",
        "{n} works {h} hours each day and gets ${a} for every hour. After {d} days {she} gives "
        "${c} to {m}.",
    ), (
        "How many dollars does {n} have left?", "How much of the money is left?",
        "What is left of the money, in dollars?",
    ), (
        Step("s", "a", "*", "h", ("Each day {n} earns {cash}.", "One day gives {cash}.")),
        Step("t", "s", "*", "d", ("In {d} days {n} earns {cash}.", "All the days give {cash}.")),
        Step("u", "t", "-", "c", ("{n} has {cash} left.", "There is {cash} left.")),
    )),
    Kind("compare", _part_of_sum,
         {"a": (4, 30), "b": (2, 20)}, {"a": (31, 900), "b": (21, 900)}, (
        "{n} has {a} {i}. {m} has {b} more {i} than {n}. {o} has {c} fewer {i} than {m}.",
        "{m} finds {b} more {i} than {n}, and {o} finds {c} fewer {i} than {m}. {n} finds {a} {i}.",
        "{n} made {a} {i} {place}. {m} made {b} more than {n}, and {o} made {c} fewer than {m}.",
    ), (
        "How many {i} is that in all?", "How many {i} do the three have together?",
        "What is the total number of {i}?",
    ), (
        Step("s", "a", "+", "b", ("{m} has {eq} {i}.", "{m}'s number of {i} is {eq}.")),
        Step("t", "s", "-", "c", ("{o} has {eq} {i}.", "{o}'s number of {i} is {eq}.")),
        Step("u", "a", "+", "s", ("{n} and {m} together have {eq} {i}.",
                                  "For {n} and {m} that is {eq} {i}.")),
        Step("v", "u", "+", "t", ("All three have {eq} {i}.", "In all that is {eq} {i}.")),
    )),
    Kind("reading", _reading,
         {"a": (3, 12), "d": (2, 6), "e": (2, 6), "each": (2, 12)},
         {"a": (13, 90), "d": (7, 30), "e": (7, 30), "each": (13, 90)}, (
        "{n}'s book has {p} pages. {She} reads {a} pages a day for {d} days and wants to "
        "read the rest in {e} days.",
        "{n} must learn {p} words. For {d} days {she} learns {a} words a day. There are {e} "
        "more days for the rest.",
        "A wall needs {p} stones. {n} sets {a} stones a day for {d} days. The rest must be "
        "done in {e} days.",
    ), (
        "How many is that for each of the last {e} days?",
        "How many must {n} do on each of these {e} days?",
        "What number must {she} do a day to finish in time?",
    ), (
        Step("s", "a", "*", "d", ("At first {n} does {eq}.", "In {d} days {n} does {eq}.")),
        Step("t", "p", "-", "s", ("The rest is {eq}.", "That leaves {eq}.")),
        Step("u", "t", "/", "e", ("On each of the last days {n} does {eq}.",
                                  "Each day needs {eq}.")),
    )),
    Kind("packing", _packing,
         {"a": (2, 9), "b": (3, 12), "d": (2, 9), "most": 12},
         {"a": (10, 40), "b": (13, 60), "d": (10, 30), "most": 999}, (
        "{n} bakes {a} trays of {b} {food} each. {m} eats {c} of them. The rest go into "
        "{cs} of {d} {food}.",
        "There are {b} {food} on each of {n}'s {a} trays. {She} sells {c} {food} and puts {d} "
        "of the others in every {c1}.",
        "{n} makes {a} trays with {b} {food} on each. After {c} {food} fall down, {she} packs "
        "the rest {d} to a {c1}.",
    ), (
        "How many {cs} does {n} need?", "How many {cs} are filled?",
        "What number of {cs} does {she} fill?",
    ), (
        Step("s", "a", "*", "b", ("The trays hold {eq} {food}.", "{n} makes {eq} {food}.")),
        Step("t", "s", "-", "c", ("Then {eq} {food} are left.", "That leaves {eq} {food}.")),
        Step("u", "t", "/", "d", ("They fill {eq} {cs}.", "{n} needs {eq} {cs}.")),
    )),
)

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
        while True:
            numbers = _BY_NAME[problem.kind].draw(rng, larger=variant == "test_larger")
            other = dataclasses.replace(problem, numbers=numbers)
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
    parser.add_argument("--out", type=given_path, default=Path("data/minigsm"))
    parser.add_argument("--seed", type=ANY_SEED, default=SEED)
    options = parser.parse_args()
    for split in SPLITS + VARIANTS:
        path, rows = options.out / f"{split}.jsonl", problems(split, options.seed)
        write_jsonl(path, rows)
        print(f"{path}: {len(rows)} problems")


if __name__ == "__main__":
    sys.exit(ending(main))
