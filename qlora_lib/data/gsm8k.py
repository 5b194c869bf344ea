"""GSM8K's problems: the one prompt template, and the gold answers as numbers.

Entries are dicts with `question` and `answer` (Cobbe et al. 2021, arXiv 2110.14168): the answer
holds calculator notes like `<<48/2=24>>` and ends in a line `#### N`.
"""

import math
import re
from collections.abc import Mapping
from fractions import Fraction

from ..base.ranges import Range
from .rows import check_lost, text_of

PROMPT = "Question: {question}\nAnswer:\n"  # tokenizers split at a newline

# A minus counts as a sign only where no number, name or bracket precedes it: 10-3 is not -3.
NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-\u2212\u2013])?\$?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)
NUMBERS = Range(-math.inf)
_MAX_DIGITS = 60  # longer numbers are noise, and slow to convert


class GoldError(ValueError):
    """A gold answer that is no number."""


def to_number(text: str) -> Fraction | None:
    """Return the exact value of what `NUMBER` matched, such as "-$1,234.50"; None if too long."""
    if len(text) > _MAX_DIGITS:
        return None
    text = text.replace("\u2212", "-").replace("\u2013", "-")
    return Fraction(text.replace(",", "").replace("$", ""))


def format_gsm8k(entry: dict[str, str], notes: bool = False) -> tuple[str, str]:
    """Return (prompt, target) of an entry; the target's calculator notes go unless `notes`. Raises
    ValueError for no question, an unparsable answer, and a field that would be lost."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"an entry is a dict with question and answer, got {entry!r:.80}")
    check_lost(entry)
    question, answer = text_of(entry, "question"), text_of(entry, "answer")
    if "####" not in answer:
        raise GoldError(f"the gold answer {answer[-60:]!r} does not end in `#### N`")
    parse_gold(answer)
    answer = answer if notes else without_notes(answer)
    return PROMPT.format(question=question.strip()), answer.strip()


def without_notes(answer: str) -> str:
    """Return a solution without its calculator notes."""
    return re.sub(r"<<[^<>]*>>", "", answer)


def parse_gold(gold: object) -> Fraction:
    """Return a gold answer as a number: an answer text with `####`, a numeral, or a number.
    Raises GoldError for anything else, NaN and infinities included."""
    if isinstance(gold, str):
        match = NUMBER.fullmatch(gold.rpartition("####")[2].strip())
        value = to_number(match.group()) if match else None
        if value is not None:
            return value
    elif isinstance(gold, Fraction) or gold in NUMBERS:
        return Fraction(gold)
    shown = gold[-60:] if isinstance(gold, str) else gold
    raise GoldError(f"a gold answer must be a number or end in `#### N`, got {shown!r:.80}")
