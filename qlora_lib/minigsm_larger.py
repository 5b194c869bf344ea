"""Numbers for the variant "test_larger" of mini-GSM: above the ranges of `minigsm_kinds`.

In each kind at least `a` (in "share" `k`, the friends) is larger than training ever draws it,
and so are most products and sums. Days of a week and hours of a day stay what they can be.
Results have up to four digits and are at least 2, as in training.
"""
import random
from collections.abc import Callable


def _gain_lose(rng):
    a, b = rng.randint(100, 4000), rng.randint(100, 4000)
    return {"a": a, "b": b, "c": rng.randint(2, a + b - 2)}


def _containers(rng):
    a, b = rng.randint(13, 90), rng.randint(13, 90)
    return {"a": a, "b": b, "c": rng.randint(2, a * b - 2)}


def _shopping(rng):
    return {key: rng.randint(10, 60) for key in "abcd"}


def _share(rng):
    k, each = rng.randint(10, 30), rng.randint(13, 90)
    a = rng.randint(2, k * each - 2)
    return {"a": a, "b": k * each - a, "k": k}


def _times(rng):
    a, k = rng.randint(100, 900), rng.randint(7, 10)
    return {"a": a, "k": k, "c": rng.randint(2, a * k + a - 2)}


def _weekly(rng):
    return {"a": rng.randint(13, 90), "d": rng.randint(2, 6), "w": rng.randint(6, 18)}


def _change(rng):
    a, b, c = rng.randint(10, 60), rng.randint(10, 60), rng.randint(16, 300)
    return {"a": a, "b": b, "c": c, "w": a * b + c + rng.randint(31, 500)}


def _part(rng):
    f = rng.choice((2, 3, 4))
    return {"f": f, "a": f * rng.randint(31, 900), "b": rng.randint(41, 900)}


def _wages(rng):
    a, h, d = rng.randint(10, 60), rng.randint(2, 6), rng.randint(6, 20)
    return {"a": a, "h": h, "d": d, "c": rng.randint(2, a * h * d - 2)}


def _compare(rng):
    a, b = rng.randint(31, 900), rng.randint(21, 900)
    return {"a": a, "b": b, "c": rng.randint(2, a + b - 2)}


def _reading(rng):
    a, d, e = rng.randint(13, 90), rng.randint(7, 30), rng.randint(7, 30)
    return {"a": a, "d": d, "e": e, "p": a * d + e * rng.randint(13, 90)}


def _packing(rng):
    a, b, d = rng.randint(10, 40), rng.randint(13, 60), rng.randint(10, 30)
    return {"a": a, "b": b, "c": a * b - d * rng.randint(2, (a * b - 2) // d), "d": d}


LARGER: dict[str, Callable[[random.Random], dict[str, int]]] = {
    "gain_lose": _gain_lose, "containers": _containers, "shopping": _shopping, "share": _share,
    "times": _times, "weekly": _weekly, "change": _change, "part": _part, "wages": _wages,
    "compare": _compare, "reading": _reading, "packing": _packing,
}
