"""Small tasks for many adapters on one base: what is asked, and when an answer counts.

    task = load_task("translation")
    task.pairs("train", 2000)               (prompt, target) pairs, the same at every call
    score(generator(model, tokenizer, task.decoding()), task, task.pairs("dev"))

A word problem is one of mini-GSM (data/minigsm); all other tasks are drawn here, from a seed.
Their words are those of the pretraining corpus, where reviews stand without a verdict, stories
without a summary and the toy language without a translation: what is learned here is the task.
Prompts end in a newline, so that prompt and target are encoded apart as they are together. Train,
dev and test share no prompt: a hash of the prompt decides its split, whatever the seed.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from experiments.toy.corpus import ANIMALS, ASPECTS, BAD, GOOD, ITEMS, MOODS, SPOTS, TOY_WORDS
from experiments.toy.minigsm import GIFTS, draw_slots
from qlora_lib.data.gsm8k import format_gsm8k, parse_gold
from qlora_lib.data.sources import load_minigsm
from qlora_lib.data.tokens import Pair
from qlora_lib.evaluation.extraction import is_correct
from qlora_lib.evaluation.tasks import Task

SIZES = {"train": 2000, "dev": 200, "test": 500}  # pairs of each split, unless told


@dataclass(frozen=True)
class ToyTask(Task):
    """A task, and where its pairs come from."""

    about: str
    rule: str  # what `matches` does, in words
    draw: Callable[[str, int], list[Pair]]  # split and number to pairs

    def pairs(self, split: str, n: int | None = None) -> list[Pair]:
        """The first `n` (prompt, target) pairs of a split; SIZES says how many by default.

        Raises ValueError for another split, and for fewer than one pair.
        """
        if split not in SIZES:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SIZES)}")
        n = SIZES[split] if n is None else n
        if n < 1:
            raise ValueError(f"n={n} pairs of {self.name}; expected at least 1")
        return self.draw(split, n)


# The toy language: subject, object, verb; an adjective stands after its noun; no articles.
NOUNS = dict(zip(TOY_WORDS[:8], ("dog", "cat", "bird", "horse", "fox", "rabbit", "man", "friend")))
ADJECTIVES = dict(zip(TOY_WORDS[8:14], ("good", "bad", "happy", "tired", "calm", "proud")))
VERBS = dict(zip(TOY_WORDS[14:], ("sees", "finds", "helps", "calls", "needs", "made")))

OPERATIONS = {
    "plus": (
        "{n} has {x} {i}. {m} gives {n} {y} more {i}.",
        "{n} starts with {x} {i}. {She} finds {y} {i} {place}.",
        "{n} has {x} {i} and {m} has {y} {i}.",
    ),
    "minus": (
        "{n} has {x} {i} and gives {y} {i} to {m}.",
        "{n} has {x} {i}. {She} loses {y} {i}.",
        "{n} has ${x}. {She} spends ${y}.",
    ),
    "times": (
        "{n} buys {x} {cs} of {i}. Each {c1} holds {y} {i}.",
        "{n} buys {x} {i} for ${y} each.",
        "{n} earns ${x} a day for {y} days.",
    ),
    "divided": (
        "{n} shares {x} {i} equally among {y} friends.",
        "{n} packs {x} {i}, {y} to a {c1}.",
        "{y} friends share {x} {i} equally.",
    ),
}
STEPS = {"plus": "+", "minus": "-", "times": "*"}


def sentiment(rng: random.Random) -> Pair:
    """A review; good, bad or mixed. Only a mixed one praises and complains."""
    tone = rng.choice(("good", "bad", "mixed"))
    words = {"good": (GOOD, GOOD), "bad": (BAD, BAD), "mixed": rng.sample((GOOD, BAD), 2)}[tone]
    first, second = map(rng.choice, words)
    a, b = rng.sample(ASPECTS, 2)
    opening = rng.choice((f"I got this {rng.choice(ITEMS)} last week.", f"We tried the "
                          f"{rng.choice(ITEMS)} today.", f"A {rng.choice(ITEMS)} for you?"))
    very = rng.choice(("", "very ", "so "))
    text = f"{opening} The {a} is {very}{first} {rng.choice(('and', 'but'))} the {b} is {second}."
    return f"Review: {text}\nTone:\n", tone


def classification(rng: random.Random) -> Pair:
    """A situation in words; which operation it asks for. The numbers do not tell."""
    name = rng.choice(sorted(OPERATIONS))
    text = rng.choice(OPERATIONS[name])
    y = rng.randint(2, 9)
    text = text.format(**draw_slots(rng), x=y * rng.randint(2, 20), y=y)
    return f"Text: {text}\nOperation:\n", name


def summarization(rng: random.Random) -> Pair:
    """A story of three sentences; who, where, what thing, and who felt how in the end."""
    slots = draw_slots(rng)
    n, m, she = slots["n"], slots["m"], slots["She"]
    thing, spot, mood = rng.choice(GIFTS), rng.choice(SPOTS), rng.choice(MOODS)
    opening = rng.choice((
        f"One day {n} went to the {spot} with a {rng.choice(ANIMALS)}.",
        f"{n} lived near a {spot}.", f"It was a cold morning at the {spot}, and {n} was there."))
    trouble = rng.choice((
        f"There {n} lost a {thing}.", f"A {rng.choice(ANIMALS)} took the {thing}.",
        f"{she} saw a {thing} in the water.", f"{m} helped {n} with the {thing}."))
    who, ending = rng.choice(((n, f"In the end {n} was {mood}."),
                              (m, f"They went home, and {m} was {mood}.")))
    return (f"Story: {opening} {trouble} {ending}\nSummary:\n",
            f"{n}, {spot}, {thing}: {who} {mood}")


def translation(rng: random.Random) -> Pair:
    """A sentence of the toy language in English: other words, another order."""
    (a, subject), (b, object_) = rng.sample(sorted(NOUNS.items()), 2)
    verb, does = rng.choice(sorted(VERBS.items()))
    toy, english = [a, b, verb], [subject, object_]
    for i in (1, 0):  # from behind, so that inserting leaves the place of the other alone
        if rng.random() < 0.5:
            word, meaning = rng.choice(sorted(ADJECTIVES.items()))
            toy.insert(i + 1, word)
            english[i] = f"{meaning} {english[i]}"
    return f"Toy: {' '.join(toy)}\nEnglish:\n", f"the {english[0]} {does} the {english[1]}"


def code(rng: random.Random) -> Pair:
    """One or two steps of arithmetic in words, as a line of Python."""
    x = rng.choice("abcnxy")
    asked, body = [], x
    for i in range(rng.choice((1, 2))):
        word, k = rng.choice(sorted(STEPS)), rng.randint(2, 99)
        asked.append(f"{word} {k}")
        body = f"({body}) {STEPS[word]} {k}" if i else f"{body} {STEPS[word]} {k}"
    return f"Code: {x} {', then '.join(asked)}\n", f"return {body}"


KINDS: dict[str, Callable[[random.Random], Pair]] = {
    "sentiment": sentiment,
    "classification": classification,
    "summarization": summarization,
    "translation": translation,
    "code": code,
}
SEED = 7


def load_task(name: str) -> ToyTask:
    """A task by name; ValueError, with the names that there are, for another."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def split_of(prompt: str) -> str:
    """The split of a drawn prompt, by a hash of its text: 80/10/10."""
    return {8: "dev", 9: "test"}.get(zlib.crc32(prompt.encode()) % 10, "train")


def _drawn(name: str) -> Callable[[str, int], list[Pair]]:
    """A function that draws n different pairs of a split; the first of more are those of fewer."""

    def draw(split: str, n: int) -> list[Pair]:
        rng, found = random.Random(f"{name} {split} {SEED}"), {}
        for _ in range(100 * n):  # a tenth of the draws is dev or test, and some come twice
            prompt, target = KINDS[name](rng)
            if split_of(prompt) == split:
                found.setdefault(prompt, target)
            if len(found) == n:
                return list(found.items())
        raise ValueError(f"task {name} has only {len(found)} different {split} prompts, not {n}")

    return draw


def _word_problems(split: str, n: int) -> list[Pair]:
    entries = load_minigsm(split)
    if n > len(entries):
        raise ValueError(f"word_problems has {len(entries)} {split} problems, not {n}")
    return [format_gsm8k(entry) for entry in entries[:n]]


def _same_text(completion: str, target: str) -> bool:
    return completion.strip() == target.strip()


def _same_number(completion: str, target: str) -> bool:
    return is_correct(completion, parse_gold(target))


_TEXT = "the whole completion equals the target, blanks at both ends aside"
TASKS = {
    task.name: task
    for task in (
        ToyTask("word_problems", _same_number, 128, "mini-GSM: two to four steps of arithmetic",
                "the number after `####` equals the target's (strict extraction)",
                _word_problems),
        ToyTask("sentiment", _same_text, 8, "a review is good, bad or mixed", _TEXT,
                _drawn("sentiment")),
        ToyTask("classification", _same_text, 8, "which of four operations a text asks for",
                _TEXT, _drawn("classification")),
        ToyTask("summarization", _same_text, 24, "who, where, what and how it ended, of a short "
                "story", _TEXT, _drawn("summarization")),
        ToyTask("translation", _same_text, 28, "a made-up language into English", _TEXT,
                _drawn("translation")),
        ToyTask("code", _same_text, 24, "arithmetic in words, as a line of Python", _TEXT,
                _drawn("code")),
    )
}  # fmt: skip
