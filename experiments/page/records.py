"""The records in data/results, and what may be said of them."""

from qlora_lib.base.files import read_json, read_text
from qlora_lib.base.paths import DATA
from qlora_lib.base.statistics import mcnemar, wilson

RESULTS = DATA / "results"
STAMPED = ("device", "torch", "seed", "date", "command")


def recorded(name: str) -> dict:
    """A record, stamped, with its rows' counts and intervals compared with their verdicts."""
    found, text = read_json(RESULTS / f"{name}.json"), read_text(RESULTS / f"{name}.json")
    claim(all(f'"{key}":' in text for key in STAMPED), f"{name} has {', '.join(STAMPED)}")
    check_scores(found, name)
    return found


def check_scores(part: dict | list, where: str) -> None:
    """Raises ValueError unless each score in `part`, at whatever depth, agrees with itself: a
    verdict ("0" or "1") a question in `right`, and the counts and intervals that follow."""
    if isinstance(part, dict):
        if isinstance(part.get("right"), str):
            exact = part["right"].count("1")
            prefix, share = ("strict_", "strict") if "strict" in part else ("", "accuracy")
            counted = len(part["right"]), exact, exact / part["n"], *wilson(exact, part["n"])
            stated = (part["n"], part[prefix + "correct"], part[share],
                      *part[prefix + "interval"])  # fmt: skip
            if any(abs(a - b) > 1e-12 for a, b in zip(counted, stated)):
                raise ValueError(f"{where}: its verdicts give {counted}, it states {stated}")
    inside = part.items() if isinstance(part, dict) else enumerate(part)
    for name, value in inside:
        if isinstance(value, (dict, list)):
            check_scores(value, f"{where}, {name}")


def claim(holds: bool, text: str) -> str:
    """`text`; ValueError when the records say otherwise."""
    if not holds:
        raise ValueError(f"the records do not bear this out any more: {text!r}")
    return text


def p_value(a: dict, b: dict) -> float:
    """McNemar's test of two rows on the same questions."""
    pairs = list(zip(a["right"], b["right"], strict=True))
    return mcnemar(pairs.count(("1", "0")), pairs.count(("0", "1")))
