"""From a completion to its answer, an exact fraction, or to none.

A grader errs in two ways: it misses a right answer for its spelling (70,000 or 7e4), or takes
a number for an answer that is none. Where a text is ambiguous, there is no answer here.

Nothing is evaluated (2+3 stays two numbers) and no unit is converted: 5% is 5, 2 dozen is 2.
Not handled: numbers in words, and a comma as the decimal sign (3,5 is two numbers).
"""

import re
import unicodedata
from fractions import Fraction

from ..data.gsm8k import parse_gold

MAX_TEXT = 20_000  # characters of a completion that are read
MAX_DIGITS = 60  # a longer numeral is noise, and slow to compute with
MAX_EXPONENT = 60  # of 1e3 and 10^3, likewise
TOLERANCE = Fraction(1, 10**6)  # absolute, for golds that are no integers

# A completion ends before the first of these: a new question, or an end token left as text.
STOP = re.compile(
    r"Question:|(?<!\w)Q:|</s>|<eos>|<end_of_turn>"
    r"|<\|(?:endoftext|end_of_text|im_end|eot_id|end)\|>"
)

# --- Spelling ----------------------------------------------------------------------------

_VULGAR = {c: unicodedata.normalize("NFKC", c) for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}  # ½ to 1⁄2
_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*"}
    | dict.fromkeys("€£¥₹", "$")
    | {c: " " + text.replace("\u2044", "/") for c, text in _VULGAR.items()}  # 1½ to 1 1/2
)
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_PART = r"\{ ?(-?)([0-9.,]{1,60}) ?\}"  # of a LaTeX fraction
_SPELLINGS = (
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?=[$%])"), ""),
    # 10³ is a power, but cm³ is a unit.
    (re.compile(r"(?<=[0-9])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+"), lambda m: "^" + m[0].translate(_RAISED)),
    (re.compile(r"(?<=[0-9])\*\*(?=[0-9])"), "^"),
    # 1\frac{1}{2} to 1 1/2; a sign inside goes before: \frac{-1}{2} to -1/2
    (re.compile(r"(?<=[0-9]) ?\\[dt]?frac"), r" \\frac"),
    (re.compile(rf"\\[dt]?frac ?{_PART} ?{_PART.replace('(-?)', '')}"), r"\1\2/\3"),
    (re.compile(r"\\[dt]?frac ?([0-9]) ?([0-9])(?![0-9])"), r"\1/\2"),
    # Thin and no-break spaces and LaTeX's commas between groups of three digits
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,|,\\!|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))"), ","),
)


def plain(text: str) -> str:
    """`text` with one spelling for each sign of a number; lines stay lines."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


# --- Numbers -----------------------------------------------------------------------------

_SCALES = {"k": 10**3, "hundred": 10**2, "thousand": 10**3, "million": 10**6} | {
    "billion": 10**9, "trillion": 10**12}  # fmt: skip
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]++)?|\.[0-9]++)"
# Digits are read from the start of a run only, and possessively (++), so the time is linear.
QUANTITY = re.compile(
    rf"""
    (?<![\^_])(?<!\^\{{)                        # m^2 holds no number
    (?P<sign>(?<![\w)\]}}])-\$?|\$-?)?          # 10-3 holds no -3
    (?<![0-9^])(?<![0-9][./])                   # not within 1.2.3 or 1/2/2020
    (?<![0-9][eE])(?<![0-9][eE][-+])            # nor 1e2.5
    (?:
        (?P<whole>{_INTEGER})[ ](?P<part>[0-9]++/[0-9]++)    # 1 1/2
      | (?P<number>{_DECIMAL})
        (?: [ ]?/[ ]?\$?(?P<bottom>{_DECIMAL})               # 3/4
          | [eE](?P<e>[-+]?[0-9]++)                          # 1e3
          | \^\{{?(?P<power>-?[0-9]++)\}}?                   # 10^3
          | [ ]?[x*][ ]?10\^\{{?(?P<ten>-?[0-9]++)\}}?       # 2 x 10^3
        )?
    )
    (?![0-9^])(?![.][0-9])(?![ ]?/[ ]?[0-9])(?![eE][-+]?[0-9])      # all of it was read
    (?P<scale>[kK](?!\w)|(?:[ ](?i:hundred|thousand|(?:m|b|tr)illion)s?(?!\w)){{1,2}})?
    """,
    re.VERBOSE,
)


def value(match: re.Match) -> Fraction | None:
    """What a match of QUANTITY is worth; None for what is too long, or divided by zero."""
    if len(match[0]) > MAX_DIGITS:
        return None
    part = match.groupdict(default="")
    exponent = int(part["e"] or part["power"] or part["ten"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    try:
        if part["whole"]:
            result = _fraction(part["whole"]) + Fraction(part["part"])
        else:
            result = _fraction(part["number"]) / _fraction(part["bottom"] or "1")
        if part["power"]:
            result **= exponent
        else:
            result *= Fraction(10) ** exponent
    except ZeroDivisionError:
        return None
    for word in part["scale"].lower().split():
        result *= _SCALES.get(word.removesuffix("s"), 1)
    return -result if "-" in part["sign"] else result


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order; those that are too long are left out."""
    values = map(value, QUANTITY.finditer(plain(text[:MAX_TEXT])))
    return [v for v in values if v is not None]


def _fraction(numeral: str) -> Fraction:
    return Fraction(numeral.replace(",", ""))


# --- Answers -----------------------------------------------------------------------------

_MARK = re.compile(r"####([^\n]*)")
_SAID = re.compile(r"\bthe answer is\b(?!\s+not\b)", re.IGNORECASE)
_SAID_ANYHOW = re.compile(r"\banswer\s*(?:is\b(?!\s+not\b)|\**\s?:)[\s*:]*+", re.IGNORECASE)
# Two numbers with nothing else between them than one of these are not one answer.
_JOINED = re.compile(r",|\s*(?:[-+*/x&~]|to|and)\s*", re.IGNORECASE)
_OR = re.compile(r"\bor\b", re.IGNORECASE)


def extract_answer(completion: str, mode: str = "strict") -> Fraction | None:
    r"""The number that a completion gives as its answer, or None.

    The text ends where a new question or an end token begins (STOP). Then the first of:
    1. the first `#### ...` line with a number; 2. the last `\boxed{...}`; 3. the last
    "answer is ..." or "answer: ..." with a number; 4. the last number of all.

    flexible: all four. strict: only `#### N` and "The answer is N", and none where the text
    gives another answer too by these rules, so that a strict answer is also the flexible one.

    In 1 to 3 the answer is the first number of the sentence, right of its last "=". "5 or 6"
    is no answer. Raises ValueError for another mode, never for a text.
    """
    if mode not in ("strict", "flexible"):
        raise ValueError(f"mode is {mode!r}; expected 'strict' or 'flexible'")
    stop = STOP.search(completion)
    text = completion[: stop.start()] if stop else completion
    if len(text) > MAX_TEXT:  # nor is the line that the cut breaks read
        text = text[:MAX_TEXT].rpartition("\n")[0]
    text = plain(text)
    marked = _MARK.findall(text)
    flexible = _first_answer([*marked, _boxed(text), *_after(_SAID_ANYHOW, text)])
    if flexible is _NO_SPAN:
        *_, last = [None, *QUANTITY.finditer(text)]
        flexible = value(last) if last else None
    if mode == "flexible":
        return flexible
    strict = _first_answer([*marked, *_after(_SAID, text)])
    return strict if strict == flexible else None


def is_correct(completion: str, gold: object, mode: str = "strict") -> bool:
    """Whether the extracted answer equals `gold` (an answer text, a numeral or a number).

    Integers must be equal, other golds within 1e-6. No answer is never correct. Raises
    GoldError (a ValueError) for an unparsable gold.
    """
    return equals(extract_answer(completion, mode), parse_gold(gold))


def equals(answer: Fraction | None, gold: Fraction) -> bool:
    """Whether an extracted answer is the gold one; None never is."""
    if answer is None:
        return False
    return answer == gold or gold.denominator != 1 and abs(answer - gold) <= TOLERANCE


_NO_SPAN = object()  # no text that marks an answer holds a number


def _first_answer(spans: list[str]) -> Fraction | None | object:
    """The answer of the first span with digits in it: None when they are no one number."""
    for span in spans:
        right = re.split(r"\.\s", span, maxsplit=1)[0].rpartition("=")[2]
        if re.search("[0-9]", right):
            return _one_number(right)
    return _NO_SPAN


def _one_number(span: str) -> Fraction | None:
    first, second = [*QUANTITY.finditer(span), None, None][:2]
    if first is None:
        return None
    if second is not None and value(first) != value(second):
        between = span[first.end() : second.start()]
        if _OR.search(between) or _JOINED.fullmatch(between):
            return None
    return value(first)


def _after(marker: re.Pattern, text: str) -> list[str]:
    """What follows each marker up to the next one or the end of the line, last one first."""
    return [rest.partition("\n")[0] for rest in marker.split(text)[:0:-1]]


def _boxed(text: str) -> str:
    r"""The content of the last \boxed{...}, braces within it balanced; "" without one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return ""
    depth, content = 1, start + len(r"\boxed{")
    for i in range(content, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[content:i]
    return ""  # cut short: the number may be, too
