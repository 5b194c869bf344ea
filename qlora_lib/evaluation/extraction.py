"""From a completion to its answer, an exact fraction, or to none where it is ambiguous.

docs/EXTRACTION.md is the policy that this code follows, section by section;
data/completions.jsonl holds texts with the verdicts of a careful grader.
"""

import re
import unicodedata
from fractions import Fraction

from ..data.gsm8k import parse_gold

MODES = ("strict", "flexible")
MAX_TEXT = 20_000  # characters that are read of what is said after the thinking
MAX_DIGITS = MAX_EXPONENT = 60  # longer numerals, and powers of 10, are noise and slow
TOLERANCE = Fraction(1, 10**6)  # absolute, for golds that are no integers

# --- 1. What is read ---------------------------------------------------------------------

_TOKEN = re.compile(  # of thinking, and between turns
    r"""
    (?P<final><\|channel\|?>final(?:<\|message\|>)?|assistantfinal)
  | [<\[◁]\|?(?P<close>/|end_of_)?[\w:]{0,20}(?:think|thought|reason)\w{0,10}\|?[>\]▷]
  | (?P<channel><\|channel\|?>(?:analysis|commentary|thought))
  | (?P<end></?s>|<[be]os>|<(?:start|end)_of_turn>(?:model\b)?|\[/?INST\]
           |<\|\w{1,40}\|>(?:assistant\b)?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_UNREAD = re.compile(
    r"^```(?:python|py|javascript|js|java|cpp|c|bash|sh|sql|r|rust|go|tool_code)\b.*?(?:^```|\Z)"
    r"|~~[^~\n]++~~|<<[^<>\n]*+>>",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_TURN = re.compile(  # the label of a new question or of another speaker
    r"Question:|(?<!\w)Q:"
    r"|^[ \t>#*_]*+(?i:(?:next )?(?:question|problem|exercise|example|task|input|instruction"
    r"|frage|aufgabe|pregunta|pergunta|domanda|вопрос|задача|问题|問題)[ ]?\#?[0-9]*|human|user)"
    r"(?:(?<=[0-9])[.]|[*_ ]*+(?:[:：]|$))"
    r"|^[ ]*+\#+[ ]*+(?i:response|instruction|input)\b",
    re.MULTILINE,
)
_ANSWER = (
    "answer|ans|réponse|antwort|respuesta|resposta|risposta|antwoord|svaret|odpowiedź|cevap"
    "|đáp án|ответ|答案|答え|답|उत्तर|الجواب|الإجابة"
)
_REPLY = re.compile(
    rf"(?<!\w)(?:{_ANSWER}|solution|response|assistant|A)[*_ ]*+[:：]", re.IGNORECASE
)
_PARAGRAPH = re.compile(r"\n[ \t]*+\n")


def _read_part(completion: str) -> str:
    """What the model says to the user, and of it only the first turn."""
    text = _spoken(completion)
    if len(text) > MAX_TEXT:  # nor is the line that the cut breaks read
        text = text[:MAX_TEXT].rpartition("\n")[0]
    text = _UNREAD.sub(" ", text)
    turn = _TURN.search(text)
    if turn is None or text[: turn.start()].strip():
        return text[: turn.start()] if turn else text
    # It repeats its question. Of two questions nobody can say which one was asked.
    reply = _REPLY.search(text, turn.start()) or _PARAGRAPH.search(text, turn.end())
    if reply is None or _TURN.search(text, reply.end()):
        return ""
    return text[reply.start() :]


def _spoken(text: str) -> str:
    """The text without thinking, up to the first end token after something was said."""
    parts, depth, start, said = [], 0, 0, False
    for token in _TOKEN.finditer(text):
        if not depth:
            parts.append(text[start : token.start()])
            said = said or bool(parts[-1].strip())
        start = token.end()
        if token["end"]:
            if said and not depth:
                return "".join(parts)
        elif token["final"] or token["close"]:
            if not depth or token["final"]:  # the prompt opened the thinking
                parts, said = [], False
            depth = 0 if token["final"] else max(depth - 1, 0)
        else:
            depth += 1
    return "".join(parts) + ("" if depth else text[start:])


# --- 2. What a number is -----------------------------------------------------------------

_VULGAR = {c: unicodedata.normalize("NFKC", c) for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}  # ½ to 1⁄2
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("×·⋅", "*") | dict.fromkeys("€£¥₹₩₽＄", "$")
    | dict.fromkeys("\u00a0\u2009\u202f", " ") | {"’": "'", "٫": ".", "٬": ","}
    | {c: " " + text.replace("\u2044", "/") for c, text in _VULGAR.items()}  # 1½ to 1 1/2
)  # fmt: skip
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_PART = r"\{ ?(-?)([0-9.,]{1,60}) ?\}"  # of a LaTeX fraction
_CODES = r"(?:US|CA|AU|HK|[RAC])\$|\b(?:Rs\.?|(?:USD|EUR|GBP|INR|CHF|CAD|AUD|BRL)(?![A-Za-z]))"
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?![0-9])\d", lambda m: str(unicodedata.decimal(m[0]))),
        (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
        (r"\\(?=[$%])|(?<!\w)__?(?=[^\s_])", ""),  # \$5 and __5__
        (r"\^\{?\\circ", "°"),
        (r"\\?\bsqrt *\{?", "√"),
        # 10³ is a power, but cm³ is a unit.
        (r"(?<=[0-9])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: "^" + m[0].translate(_RAISED)),
        (r"(?<=[0-9])\*\*(?=[0-9])", "^"),
        # 1\frac{1}{2} to 1 1/2; a sign inside goes before: \frac{-1}{2} to -1/2
        (r"(?<=[0-9]) ?\\[dt]?frac", r" \\frac"),
        (rf"\\[dt]?frac ?{_PART} ?{_PART.replace('(-?)', '')}", r"\1\2/\3"),
        (r"\\[dt]?frac ?([0-9]) ?([0-9])(?![0-9])", r"\1/\2"),
        (r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9])", ","),
        (r"(?<=[0-9])\\,(?=[0-9])", " "),
        (rf"(?:{_CODES}) ?(?=-?[0-9])", "$"),
        (r"\b(?i:minus|negative) +(?=\$?[0-9])", "-"),
        (r"\b(?i:between) (\S{1,30}) and (?=\$?[0-9])", r"\1 to "),
        # No end of a sentence
        (r"\b(approx|ca|Nr|No|ft|hrs?|min|lbs?|oz)\.(?= \$?[0-9])", r"\1"),
        (r"\b(?i:step|part|case|option|equation|problem|question|example) *\#?[0-9]++(?![0-9])",
         "label"),
        (r"[0-9]++(?:[.,_' ][0-9]++)*+", lambda m: _ungrouped(m[0])),
    )
]  # fmt: skip
_NUMERALS = [  # (numerals with their thousands marked, decimal sign)
    (re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?"), "."),
    (re.compile(r"\d{1,3}([_' ])\d{3}(?:\1\d{3})*(?:\.\d+)?"), "."),
    (re.compile(r"\d{1,3}([_' ])\d{3}(?:\1\d{3})*,\d+|\d{1,3}(?:\.\d{3})+,\d+"), ","),
    (re.compile(r"\d+,\d{1,2}|0,\d+|\d{1,3}(?:\.\d{3}){2,}"), ","),
]


def _ungrouped(run: str) -> str:
    """Digits and separators as 1234.5; as they are where they are no numeral."""
    for pattern, point in _NUMERALS:
        if pattern.fullmatch(run):
            whole, _, decimals = run.partition(point)
            return re.sub("[^0-9]", "", whole) + (f".{decimals}" if decimals else "")
    return " ".join(map(_ungrouped, run.split(" "))) if " " in run else run


def plain(text: str) -> str:
    """Return `text` with one spelling for each part of a number; lines stay lines."""
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text


_SCALES = {"k": 10**3, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
           "trillion": 10**12, "lakh": 10**5, "crore": 10**7, "万": 10**4, "亿": 10**8,
           "m": 10**6, "b": 10**9, "bn": 10**9}  # fmt: skip
_DECIMAL = r"(?:[0-9]++(?:\.[0-9]++)?|\.[0-9]++)"
# Digits are read from the start of a run only, and possessively (++), so the time is linear.
QUANTITY = re.compile(
    rf"""
    (?<![\^_√a-zA-Zà-ÿ])(?<![\^√][{{(])(?<![a-zA-Z]-)    # m^2, x_1 and COVID-19 hold no number
    (?P<sign>(?<![\w)\]}}])(?<![0-9)\]}}][ ])-\$?|\$-?)?          # 10-3 holds no -3
    (?<![0-9^])(?<![0-9][./:,_'(])                      # not within 1.2.3, 1/2/2020, 3:30
    (?<![0-9][eE])(?<![0-9][eE][-+])                    # nor 1e2.5
    (?:
        (?P<whole>[0-9]++)[ ](?P<part>[0-9]++/[0-9]++)           # 1 1/2
      | (?P<number>{_DECIMAL})
        (?: [ ]?/[ ]?\$?(?P<bottom>{_DECIMAL})                   # 3/4
          | [eE](?P<e>[-+]?[0-9]++)                              # 1e3
          | \^\{{?(?P<power>-?[0-9]++)\}}?                       # 10^3
          | [ ]?[x*][ ]?10\^\{{?(?P<ten>-?[0-9]++)\}}?           # 2 x 10^3
        )?
    )
    (?![0-9^])(?![.,_'(][0-9])(?![ ]?/[ ]?[0-9])(?![eE][-+]?[0-9])    # all of it was read
    (?![ ]?[:：])(?!(?:st|nd|rd|th)\b)(?![ ]?\\?(?:π|pi\b))         # a label, 3:30, 3rd, 5π
    (?P<scale>[kK](?!\w)|[万亿]|(?(sign)[ ]?(?:M|m|B|bn)(?!\w)|(?!))
      |(?:[ ](?i:hundred|thousand|(?:m|b|tr)illion|lakh|crore)s?(?!\w)){{1,2}})?
    """,
    re.VERBOSE,
)


def value(match: re.Match) -> Fraction | None:
    """Return what a match of QUANTITY is worth; None for what is too long, or divided by zero."""
    if len(match[0]) > MAX_DIGITS:
        return None
    part = match.groupdict(default="")
    exponent = int(part["e"] or part["power"] or part["ten"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    try:
        result = Fraction(part["whole"] or part["number"]) / Fraction(part["bottom"] or "1")
        result += Fraction(part["part"] or "0")
        result = result**exponent if part["power"] else result * Fraction(10) ** exponent
    except ZeroDivisionError:
        return None
    for word in part["scale"].lower().split():
        if len(word) > 2 or word not in "mbn" or "$" in part["sign"]:
            result *= _SCALES.get(word.removesuffix("s"), 1)
    return -result if "-" in part["sign"] else result


def numbers(text: str) -> list[Fraction]:
    """Return all numbers of a text, in order; those that are too long are left out."""
    values = map(value, QUANTITY.finditer(plain(text[:MAX_TEXT])))
    return [v for v in values if v is not None]


# --- 3. Which span states the answer ------------------------------------------------------

_NOTHING = object()  # a span holds no number; None: its number can't be told
_MARK = re.compile(r"(?<!#)####(?!#)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_SAID = re.compile(r"\bthe answer is\b(?!\s+not\b)", re.IGNORECASE)
_SAID_ANYHOW = re.compile(
    rf"(?<![a-zA-Zà-ÿ/])(?:{_ANSWER})(?:[\"'*_` ]{{0,4}}[:：=>]|[은는は是为為]"
    r"|(?: [^\W\d]{1,20}){0,4}? (?:is|are|equals|est|ist|lautet|es|é|è|är|равен|है|هو|هي|为|是)"
    r"(?!\w)(?!\s+not\b))"
    r"(?:[^\w\n]*+\n\W*?(?=-?\$?[0-9]))?",  # on to the next line, if that begins with a number
    re.IGNORECASE,
)
_ITEM = re.compile(r"^([ \t>#*_-]*+)([0-9]{1,3})[.)](?=[ \t*]+\S)", re.MULTILINE)
_REMARK = re.compile(r"(?:^|(?<=\s))\([^()\n]*+\)", re.MULTILINE)
_BOLD = re.compile(r"\*\*([^*\n]++)\*\*")
_SENTENCE = re.compile(  # what lies between two
    r"(?<=[.!?])\s+|(?<=[.!?][*_\"')])\s+|(?<=[.!?]\*\*)\s+|(?<=[。！？])|\n"
)
_NEXT_KEY = re.compile(r",\s*\"")  # of JSON
_CLAUSE = re.compile(r"[;(]|,\s|\b(?:because|since|as|denn|car|porque)\b")  # where one ends
_ASKS = re.compile(r"\b(?:how many|how much|what)\b", re.IGNORECASE)
_LETTER = re.compile(r"[^\W\d_]")
_FILLER = re.compile(  # words that may stand before the number
    r"\\[a-zA-Z]+|\b(?:about|approx(?:imately)?|around|exactly|only|just|indeed|simply|therefore"
    r"|thus|x)\b"
)
_SUM = re.compile(r"[0-9)][ ]?[-+*x÷][ ]?\$?[0-9(](?!0\^)")
# What joins two numbers into a sum, a range, a list; or a unit before a smaller one: 5 feet 10
_JOINT = re.compile(
    r"|[-+*/x÷&~,]|to|times|(?:hours?|hrs?|h|minutes?|min|days?|weeks?|years?|feet|foot|ft|pounds?"
    r"|lbs?|dollars?)\.?"
)
_OR = re.compile(r"\bor\b", re.IGNORECASE)
_AND = re.compile(r"\b(?:or|and|to|times|oder|und|ou|et|o|y|e)\b", re.IGNORECASE)


def _unnumbered(text: str) -> str:
    """The text without the numbers of its lists, which have a neighbour or are 1."""
    found = {int(item[2]) for item in _ITEM.finditer(text)}
    listed = {n for n in found if n == 1 or found & {n - 1, n + 1}}
    return _ITEM.sub(lambda item: item[1] if int(item[2]) in listed else item[0], text)


def _after(marker: re.Pattern, text: str) -> list[tuple[int, int]]:
    """(start, end) of what follows each marker up to the next one or the end of the line."""
    found = [*marker.finditer(text)]
    starts = [match.end() for match in found]
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [(a, a + len(text[a:b].partition("\n")[0])) for a, b in zip(starts, ends)]


def _boxed(text: str) -> list[tuple[int, int]]:
    r"""[(start, end)] of the content of the last \boxed{...}; end -1 where it is not closed."""
    boxes = [*_BOX.finditer(text)]
    if not boxes:
        return []
    start, depth = boxes[-1].end(), 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return [(start, i)]
    return [(start, -1)]


def _stated(text: str, spans: list[tuple[int, int]]) -> tuple[Fraction | None | object, str]:
    """What the first span with a number states, or _NOTHING and what follows answers in words."""
    *_, last = [-1, *(q.start() for q in QUANTITY.finditer(text))]
    follows = 0
    for start, end in spans:
        if end < 0:  # a box that may be cut within its number
            return None, ""
        span = text[start:end].lstrip()
        sentence = _SENTENCE.split(span, maxsplit=1)[0]
        end -= len(span) - len(sentence)
        sentence = _NEXT_KEY.split(sentence, maxsplit=1)[0]
        answer = _one_number(sentence, last < end)
        if answer is not _NOTHING:
            return answer, ""
        if _LETTER.search(sentence) and not QUANTITY.search(sentence):
            follows = max(follows, end)
    return _NOTHING, text[follows:]


def _one_number(sentence: str, is_last: bool) -> Fraction | None | object:
    """The number that a sentence states; is_last: the text has none after it."""
    # A spaced minus is a sign where nothing stands before it.
    sentence = re.sub(r"(^[\s*:]*|=\s*)-\s+(?=\$?[0-9])", r"\1-", sentence)
    first = QUANTITY.search(sentence)
    if first is None:
        return _NOTHING
    clause = _CLAUSE.search(sentence, first.end())
    end = clause.start() if clause else len(sentence)
    sides = sentence[:end].split("=")
    right = next((s for s in sides[::-1] if QUANTITY.search(s) and not _SUM.search(s)), sides[-1])
    if right is sides[-1]:  # a list may go on behind the clause: 5, 6 or 7
        right += sentence[end:]
    found = [*QUANTITY.finditer(right)]
    if not found or len(found) > 1 and _joined(right, *found[:2], _AND):
        return None
    if len(sides) > 1 or not _LETTER.search(_FILLER.sub("", right[: found[0].start()])):
        return value(found[0])
    if is_last:
        return value(found[0]) if len({*map(value, found)}) == 1 else None
    return _NOTHING


def _joined(text: str, a: re.Match, b: re.Match, words: re.Pattern) -> bool:
    """Whether two quantities of different value are parts of a sum, a range or a choice."""
    between = text[a.end() : b.start()]
    core = between.replace("**", "").strip(" \t$_`").lower()
    return value(a) != value(b) and bool(_JOINT.fullmatch(core) or words.search(between))


def _last_number(*texts: str) -> Fraction | None:
    """The last number of the first text that has one, where that says what the answer is."""
    for text in texts:
        sentences = [s.rstrip(' *_"') for s in _SENTENCE.split(text) if s.strip()]
        if sentences and sentences[-1].endswith("?") and _ASKS.search(sentences[-1]):
            return None
        for sentence in reversed(sentences):
            *_, part = sentence, *filter(QUANTITY.search, _BOLD.findall(sentence))
            found = [*QUANTITY.finditer(part)]
            if found and not sentence.endswith("?"):
                joined = len(found) > 1 and _joined(part, *found[-2:], _OR)
                return None if joined else value(found[-1])
    return None


# --- 4. Strict and flexible --------------------------------------------------------------


def extract_answer(completion: str, mode: str = "strict") -> Fraction | None:
    r"""Return the number that a completion gives as its answer, or None.

    flexible: the first `#### ...` line with a number, else the last `\boxed{...}`, else the last
    "answer is ..." or "answer: ...", else the last number. strict: only `#### N` and "The
    answer is N", where that is the flexible answer too. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected 'strict' or 'flexible'")
    if not isinstance(completion, str):
        raise ValueError(f"a completion should be a text, got {completion!r:.60}")
    text = _unnumbered(plain(_read_part(completion)))
    marks = _after(_MARK, text)
    said = _after(_SAID_ANYHOW, text)[::-1]
    flexible, rest = _stated(text, [*marks, *_boxed(text), *said])
    if flexible is _NOTHING:
        flexible = _last_number(_REMARK.sub(" ", rest), rest)
    if mode == "flexible":
        return flexible
    strict, _ = _stated(text, [*marks, *_after(_SAID, text)[::-1]])
    return strict if strict == flexible else None


def is_correct(completion: str, gold: object, mode: str = "strict") -> bool:
    """Return whether the extracted answer equals `gold`, as `parse_gold` reads it, with its errors:
    exactly where that is an integer, else within 1e-6."""
    return equals(extract_answer(completion, mode), parse_gold(gold))


def equals(answer: Fraction | None, gold: Fraction) -> bool:
    """Return whether an extracted answer is the gold one; None never is."""
    if answer is None or gold.denominator == 1:
        return answer == gold
    return abs(answer - gold) <= TOLERANCE
