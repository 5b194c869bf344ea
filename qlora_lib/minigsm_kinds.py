"""The kinds of mini-GSM problems: their numbers, wordings and solutions.

Data only; `qlora_lib.minigsm` draws and renders. Ranges are small enough that a model of
3 million parameters can learn each single step, and every result is at least 2, so that
the nouns stay plural.
"""
import dataclasses
import random
from collections.abc import Callable

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


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of problems: how its numbers are drawn, and its wordings."""

    name: str
    draw: Callable[[random.Random], dict[str, int]]
    bodies: tuple[str, ...]
    asks: tuple[str, ...]
    steps: tuple[Step, ...]


def _gain_lose(rng):
    a, b = rng.randint(5, 90), rng.randint(3, 60)
    return {"a": a, "b": b, "c": rng.randint(2, a + b - 2)}


def _containers(rng):
    a, b = rng.randint(2, 12), rng.randint(3, 12)
    return {"a": a, "b": b, "c": rng.randint(2, a * b - 2)}


def _shopping(rng):
    return {key: rng.randint(2, 9) for key in "abcd"}


def _share(rng):
    k, each = rng.randint(2, 9), rng.randint(3, 12)
    a = rng.randint(2, k * each - 2)
    return {"a": a, "b": k * each - a, "k": k}


def _times(rng):
    a, k = rng.randint(3, 15), rng.randint(2, 6)
    return {"a": a, "k": k, "c": rng.randint(2, a * k + a - 2)}


def _weekly(rng):
    a, d = rng.randint(2, 12), rng.randint(2, 6)
    return {"a": a, "d": d, "w": rng.randint(2, 5)}


def _change(rng):
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(3, 15)
    return {"a": a, "b": b, "c": c, "w": a * b + c + rng.randint(2, 30)}


def _part(rng):
    f = rng.choice((2, 3, 4))
    return {"f": f, "a": f * rng.randint(2, 15), "b": rng.randint(2, 40)}


def _wages(rng):
    a, h, d = rng.randint(3, 9), rng.randint(2, 6), rng.randint(2, 5)
    return {"a": a, "h": h, "d": d, "c": rng.randint(2, a * h * d - 2)}


def _compare(rng):
    a, b = rng.randint(4, 30), rng.randint(2, 20)
    return {"a": a, "b": b, "c": rng.randint(2, a + b - 2)}


def _reading(rng):
    a, d, e = rng.randint(3, 12), rng.randint(2, 6), rng.randint(2, 6)
    return {"a": a, "d": d, "e": e, "p": a * d + e * rng.randint(2, 12)}


def _packing(rng):
    while True:
        a, b, d = rng.randint(2, 9), rng.randint(3, 12), rng.randint(2, 9)
        packs = (a * b - 2) // d
        if packs >= 2:
            c = a * b - d * rng.randint(2, min(packs, 12))
            return {"a": a, "b": b, "c": c, "d": d}


KINDS = (
    Kind("gain_lose", _gain_lose, (
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
    Kind("containers", _containers, (
        "{n} buys {a} {cs} of {i}. Each {c1} holds {b} {i}. {She} gives {c} {i} to {m}.",
        "{n} fills {a} {cs} with {b} {i} each. Then {c} {i} get lost.",
        "There are {a} {cs} {place}, and every {c1} has {b} {i} in it. {n} takes {c} {i} away.",
    ), (
        "How many {i} are left?", "How many {i} remain?", "What number of {i} is left over?",
    ), (
        Step("s", "a", "*", "b", ("The {cs} hold {eq} {i}.", "There are {eq} {i} in the {cs}.")),
        Step("t", "s", "-", "c", ("After that {eq} {i} are left.", "There are {eq} {i} left.")),
    )),
    Kind("shopping", _shopping, (
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
    Kind("share", _share, (
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
    Kind("times", _times, (
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
    Kind("weekly", _weekly, (
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
    Kind("change", _change, (
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
    Kind("part", _part, (
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
    Kind("wages", _wages, (
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
    Kind("compare", _compare, (
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
    Kind("reading", _reading, (
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
    Kind("packing", _packing, (
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
