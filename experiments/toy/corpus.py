"""What the tiny model is pretrained on: documents made from templates and a seed.

The corpus holds single arithmetic steps, as equations and in words, questions without
answers, and plain texts (reviews, stories, symbols, code, words of a made-up language).
It never holds a chain of two steps, a question with its answer, or GSM8K's format, so
that fine-tuning has something real to teach: to plan. Items that share a document are
unrelated; no result in it is an operand of another step.
"""
import random
from collections.abc import Callable, Iterator

from experiments.toy.minigsm import (
    FRACTIONS,
    OPERATIONS,
    PRONOUNS,
    draw_problem,
    draw_slots,
    kinds,
    question_of,
)

# Share of the documents; the texts are kept few so that arithmetic stays strong.
MIX = {"equations": 36, "steps": 38, "questions": 12, "reviews": 5, "stories": 4,
       "symbols": 5, "code": 2, "toy_language": 1}

TOY_WORDS = ("mira", "toka", "lun", "sel", "bora", "dini", "kef", "rano", "vesh", "pola",
             "gim", "tasu", "nelo", "hark", "wib", "zuma", "feni", "olk", "jaro", "yist")

# (operation, text before the equation, text with the equation), each a single step;
# `eq` is `12+5=17`, `cash` the same with `$` before the result.
_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "+": (
        ("{n} has {x} {i}. {m} gives {n} {y} more {i}.", "Now {n} has {eq} {i}."),
        ("{n} starts with {x} {i}. {She} finds {y} {i} {place}.", "{n} gets to {eq} {i}."),
        ("Last week {n} had {x} {i}. {She} got {y} more {i}.", "At first {n} had {eq} {i}."),
        ("{n} has {x} {i} and {m} has {y} {i}.", "Together they have {eq} {i}."),
        ("{n} picks up {x} {i} in the morning and {y} {i} in the evening.",
         "In all there are {eq} {i}."),
        ("{n} has {x} {i}. {m} has {y} more {i} than {n}.", "{m} has {eq} {i}."),
        ("{m} made {y} more {i} than {n}. {n} made {x} {i}.", "{m} made {eq} {i}."),
        ("{n} pays ${x} for the {i} and ${y} for the {j}.", "In total {n} pays {cash}."),
        ("A {gift} costs ${y} and the {i} cost ${x}.", "The total cost is {cash}."),
        ("There are {x} {i} in one {c1} and {y} {i} in the other.",
         "Together that is {eq} {i}."),
        ("There were {x} {i} left. {n} brought {y} other {i}.", "In the end there are {eq} {i}."),
        ("{n} and {m} have {x} {i}, and {o} has {y} {i}.", "All three have {eq} {i}."),
        ("{n} adds {y} {i} to the {x} {i} in the {c1}.", "The {c1} holds {eq} {i}."),
    ),
    "-": (
        ("{n} has {x} {i}. {She} loses {y} {i}.", "Then {n} has {eq} {i} left."),
        ("{n} has {x} {i} and gives {y} {i} to {m}.", "Now {n} has {eq} {i}."),
        ("{n} had {x} {i}. {She} sold {y} of them {place}.", "There are {eq} {i} left."),
        ("There are {x} {i} {place}. {n} takes {y} {i} away.", "After that {eq} {i} are left."),
        ("{n} has ${x}. {She} spends ${y}.", "{n} has {cash} left."),
        ("{n} goes to the market with ${x}. {She} pays ${y} for a {gift}.",
         "There is {cash} left."),
        ("{n} has {x} {i}. {m} has {y} fewer {i} than {n}.", "{m} has {eq} {i}."),
        ("{m} made {y} fewer {i} than {n}. {n} made {x} {i}.", "{m} made {eq} {i}."),
        ("A book has {x} pages. {n} reads {y} pages.", "The rest is {eq} pages."),
        ("A wall needs {x} stones. {n} sets {y} stones.", "That leaves {eq} stones."),
        ("{n} must learn {x} words. {She} learns {y} words.", "That leaves {eq} words."),
        ("{n} bakes {x} {food}. {m} eats {y} of them.", "Then {eq} {food} are left."),
        ("{y} of the {x} {food} fall down.", "That leaves {eq} {food}."),
        ("{n} and {m} have {x} {i} and {o} has {z} {j}. {n} and {m} lose {y} {i}.",
         "They have {eq} {i} left."),
        ("{n} has {x} {i} and {z} {j}. {She} gives away {y} {i}.", "{n} still has {eq} {i}."),
    ),
    "*": (
        ("{n} buys {x} {cs} of {i}. Each {c1} holds {y} {i}.", "The {cs} hold {eq} {i}."),
        ("There are {x} {cs} {place} with {y} {i} each.", "There are {eq} {i} in the {cs}."),
        ("{n} fills {x} {cs}. Every {c1} has {y} {i} in it.", "The {cs} hold {eq} {i}."),
        ("{n} buys {x} {i} for ${y} each.", "The {i} cost {cash}."),
        ("In a shop {i} cost ${y} each. {n} buys {x} {i}.", "For the {i} {n} pays {cash}."),
        ("{n} needs {x} {i} at ${y} each.", "The {i} cost {cash}."),
        ("{n} has {y} {i}. {m} has {x} times as many {i} as {n}.", "{m} has {eq} {i}."),
        ("{n} finds {y} {i}. {m} finds {x} times as many.", "{m} finds {eq} {i}."),
        ("{n} collects {x} {i} a day on {y} days of each month.", "Each month {n} gets {eq} {i}."),
        ("{n} gets {x} {i} each week for {y} weeks.", "In {y} weeks {n} gets {eq} {i}."),
        ("One week gives {x} {i}. {n} does it for {y} weeks.", "All the weeks give {eq} {i}."),
        ("{n} earns ${x} an hour and works {y} hours.", "{n} earns {cash}."),
        ("{n} works {y} hours a day and gets ${x} for every hour.", "One day gives {cash}."),
        ("{n} earns ${x} a day for {y} days.", "In {y} days {n} earns {cash}."),
        ("{n} reads {x} pages a day for {y} days.", "In {y} days {n} does {eq}."),
        ("{n} sets {x} stones a day for {y} days.", "At first {n} does {eq}."),
        ("{n} bakes {x} trays of {y} {food} each.", "{n} makes {eq} {food}."),
        ("There are {y} {food} on each of the {x} trays.", "The trays hold {eq} {food}."),
    ),
    "/": (
        ("{n} shares {x} {i} equally among {y} friends.", "Each friend gets {eq} {i}."),
        ("{y} friends share {x} {i} equally.", "One friend gets {eq} {i}."),
        ("{y} friends get {x} {i} in equal parts.", "Each friend gets {eq} {i}."),
        ("{n} wants to read {x} pages in {y} days.", "Each day {n} reads {eq} pages."),
        ("{x} stones must be set in {y} days.", "Each day needs {eq}."),
        ("{n} must learn {x} words in {y} days.", "On each of the days {n} does {eq}."),
        ("{n} packs {x} {food} into {cs} of {y} {food}.", "They fill {eq} {cs}."),
        ("{n} puts {y} of the {x} {food} in every {c1}.", "{n} needs {eq} {cs}."),
        ("{n} packs {x} {i}, {y} to a {c1}.", "{n} fills {eq} {cs}."),
    ),
    "part": (
        ("{n} has {x} {i}. {She} gives {part} of them to {m}.", "{Part} of the {i} is {eq}."),
        ("{n} sells {part} of {her} {x} {i} {place}.", "First {eq} {i} go away."),
        ("There were {x} {i} {place}. {n} took {part} of the {i} away.",
         "{Part} of the {i} is {eq}."),
    ),
}


def operands(op: str, rng: random.Random) -> tuple[int, int]:
    """Two operands for `op` (a key of `_WORDS`), as large as the problems' steps need."""
    if op == "+":
        top = rng.choice((20, 60, 120))
        return rng.randint(2, top), rng.randint(2, min(top, 100))
    if op == "-":
        x = rng.randint(4, rng.choice((30, 90, 160, 270)))
        return x, rng.randint(2, x - 2)
    if op == "*":
        high, low = rng.choice(((12, 12), (12, 12), (72, 6)))
        x, y = rng.randint(2, high), rng.randint(2, low)
        # The large operand of a sentence comes first, as in the problems.
        return (x, y) if high > 12 or rng.random() < 0.5 else (y, x)
    if op == "part":
        y = rng.choice(sorted(FRACTIONS))
        return y * rng.randint(2, 15), y
    y = rng.randint(2, 9)
    return y * rng.randint(2, 15), y


class _Unrelated:
    """Draws steps for one document such that no result is an operand of another step."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.operands: set[int] = set()
        self.results: set[int] = set()

    def step(self, op: str) -> tuple[int, int, int]:
        while True:
            x, y = operands(op, self.rng)
            result = OPERATIONS[_symbol(op)](x, y)
            if not self.results & {x, y} and result not in self.operands:
                self.operands |= {x, y}
                self.results.add(result)
                return x, y, result


def _symbol(op: str) -> str:
    return "/" if op == "part" else op


def equations(rng: random.Random) -> str:
    """2 to 12 unrelated equations, such as `12+5=17 ; 7*8=56`."""
    draws = _Unrelated(rng)
    lines = []
    for _ in range(rng.choice((2, 4, 6, 8, 12))):
        op = rng.choice("++--**/")
        x, y, result = draws.step(op)
        lines.append(f"{x}{op}{y}={result}")
    return rng.choice((" ; ", "\n", ", ")).join(lines)


def steps(rng: random.Random) -> str:
    """One single step in words, or a few about other people and other numbers."""
    draws = _Unrelated(rng)
    names = rng.sample(sorted(PRONOUNS), 15)
    count = rng.choice((1, 1, 1, 1, 2, 2, 3, 5))
    return rng.choice(("\n", " ")).join(
        _step(rng, draws, names[3 * item:3 * item + 3]) for item in range(count))


def _step(rng: random.Random, draws: _Unrelated, names: list[str]) -> str:
    op = rng.choice(("+", "+", "+", "-", "-", "-", "*", "*", "*", "*", "/", "/", "part"))
    x, y, result = draws.step(op)
    first, second = (y, x) if op in "+*" and rng.random() < 0.2 else (x, y)
    note = f"{first}{_symbol(op)}{second}="
    part = FRACTIONS[y] if op == "part" else ""
    return " ".join(rng.choice(_WORDS[op])).format(
        **draw_slots(rng, names), x=x, y=y, z=rng.randint(2, 90), part=part,
        Part=part.capitalize(), eq=f"{note}{result}", cash=f"{note}${result}")


def questions(rng: random.Random) -> str:
    """One to three bare questions with numbers of the train split, without an answer."""
    count = rng.choice((1, 1, 1, 1, 2, 3))
    return "\n".join(question_of(draw_problem(rng, "train", rng.choice(kinds())))
                     for _ in range(count))


ITEMS = ("film", "book", "phone", "cafe", "game", "song", "hotel", "lamp", "bike", "coat")
ASPECTS = ("price", "look", "style", "feel", "quality", "service", "size", "idea")
GOOD = ("great", "lovely", "good", "wonderful", "nice", "fine", "fresh", "clever")
BAD = ("bad", "awful", "boring", "poor", "ugly", "weak", "dull", "broken")
_GOOD_ENDS = ("I would buy it again.", "I loved it.", "We had a lot of fun.",
              "Everyone should try it.", "It made my day.")
_BAD_ENDS = ("I want my money back.", "I hated it.", "It was a waste of time.",
             "Nobody should try it.", "It made me sad.")


def reviews(rng: random.Random) -> str:
    """A review in a good, bad or mixed tone; the tone is never named."""
    item = rng.choice(ITEMS)
    first, second = rng.sample(ASPECTS, 2)
    tone = rng.choice(("good", "bad", "mixed"))
    pool = {"good": GOOD, "bad": BAD, "mixed": GOOD}[tone]
    other = {"good": GOOD, "bad": BAD, "mixed": BAD}[tone]
    ends = {"good": _GOOD_ENDS, "bad": _BAD_ENDS, "mixed": ("It was just okay.",)}[tone]
    link = "but" if tone == "mixed" else "and"
    much = rng.choice(("", "very ", "really ", "so "))
    opening = rng.choice((
        f"This {item} is {much}{rng.choice(pool)}.", f"I got this {item} last week.",
        f"We tried the {item} {rng.choice(('today', 'on Sunday', 'last night'))}.",
        f"What a {rng.choice(pool)} {item}!"))
    middle = rng.choice((
        f"The {first} is {much}{rng.choice(pool)} {link} the {second} is {rng.choice(other)}.",
        f"The {first} was {rng.choice(pool)}, {link} the {second} was {much}{rng.choice(other)}.",
    ))
    return " ".join((opening, middle, rng.choice(ends))[:rng.choice((2, 3, 3))])


ANIMALS = ("dog", "cat", "bird", "horse", "fox", "rabbit")
SPOTS = ("river", "forest", "house", "hill", "road", "lake")
MOODS = ("happy", "tired", "proud", "afraid", "hungry", "calm")


def stories(rng: random.Random) -> str:
    """A story of three to five sentences, without a summary."""
    slots = draw_slots(rng)
    n, m, she, thing = slots["n"], slots["m"], slots["She"], slots["gift"]
    animal, spot, mood = rng.choice(ANIMALS), rng.choice(SPOTS), rng.choice(MOODS)
    opening = rng.choice((
        f"One day {n} went to the {spot} with a {animal}.",
        f"{n} lived near a {spot} and had a {animal}.",
        f"It was a cold morning, and {n} walked to the {spot}."))
    trouble = rng.choice((
        f"There {n} lost a {thing}.", f"A {rng.choice(ANIMALS)} took the {thing} and ran away.",
        f"Then it began to rain, and the {thing} got wet.",
        f"{she} saw a {thing} in the water."))
    action = rng.choice((
        f"{m} came and looked for the {thing}.", f"{m} helped {n} with the {thing}.",
        f"{she} called {m}, and they looked behind the {spot}."))
    turn = rng.choice(("After an hour they found it under a tree.",
                       f"The {animal} was the first to see it.",
                       "They had to wait until the evening."))
    ending = rng.choice((f"In the end {n} was {mood}.", f"They went home, and {m} was {mood}.",
                         f"{n} said thank you to {m}."))
    middle = [trouble, action, turn]
    return " ".join([opening, *middle[:rng.choice((1, 2, 3, 3))], ending])


def symbols(rng: random.Random) -> str:
    """Strings of letters and digits with a pattern: repeats, runs, sorted, mirrored, random."""
    pool = rng.choice(("abcdefgh", "ABCDEFGH", "0123456789", "xyz", "ab01"))
    unit = "".join(rng.choice(pool) for _ in range(rng.randint(2, 6)))
    gap = rng.choice(("", " ", "-"))

    def pattern() -> str:
        letters = {
            "repeat": list(unit) * rng.randint(2, 3),
            "sorted": sorted(unit + rng.choice(pool)),
            "mirror": list(unit + unit[::-1]),
            "run": [letter for letter in unit for _ in range(2)],
            "random": [rng.choice(pool) for _ in range(rng.randint(3, 8))],
        }
        return gap.join(letters[rng.choice(sorted(letters))])

    return rng.choice((" ; ", "\n")).join(pattern() for _ in range(rng.randint(1, 4)))


def code(rng: random.Random) -> str:
    """A few lines that look like a program; nothing in it is computed."""
    f, g = rng.sample(("add", "take", "scale", "mix", "step", "find"), 2)
    x, y = rng.sample("abcnxy", 2)
    op, k = rng.choice("+-*"), rng.randint(2, 9)
    return rng.choice((
        f"def {f}({x}, {y}):\n    return {x} {op} {y}",
        f"def {f}({x}):\n    {y} = {x} {op} {k}\n    return {y}",
        f"for {x} in range({k}):\n    print({x})",
        f"if {x} > {k}:\n    return {f}({x})\nelse:\n    return {g}({x})",
        f"while {x} < {k}:\n    {x} = {f}({x})",
        f"{x} = [{y} for {y} in {f}s if {y} > {k}]",
    ))


def toy_language(rng: random.Random) -> str:
    """Sentences of a made-up language, without a translation."""
    return " ".join(" ".join(rng.choices(TOY_WORDS, k=rng.randint(2, 5))) + "."
                    for _ in range(rng.randint(1, 4)))


KINDS_OF_TEXT: dict[str, Callable[[random.Random], str]] = {
    "equations": equations, "steps": steps, "questions": questions, "reviews": reviews,
    "stories": stories, "symbols": symbols, "code": code, "toy_language": toy_language,
}


def documents(seed: int) -> Iterator[tuple[str, str]]:
    """Endless (kind of text, document) pairs, drawn in the shares of `MIX`."""
    rng = random.Random(f"corpus {seed}")
    names, weights = list(MIX), list(MIX.values())
    while True:
        name = rng.choices(names, weights)[0]
        yield name, KINDS_OF_TEXT[name](rng)
