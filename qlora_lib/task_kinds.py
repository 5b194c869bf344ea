"""Generators of the tiny profile's small tasks: a seeded draw gives (prompt, target).

Their words are those of the pretraining corpus, where reviews stand without a verdict, stories
without a summary and the toy language without a translation: what is learned here is the task.
Prompts end in a newline, so that prompt and target are encoded apart as they are together.
"""

import random
from collections.abc import Callable

from .corpus import ANIMALS, ASPECTS, BAD, GOOD, ITEMS, MOODS, SPOTS, TOY_WORDS
from .data import Pair
from .minigsm import draw_slots
from .minigsm_kinds import GIFTS

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
