"""Exercises of notebook 05: new tokens; a strict reader in three steps, of which the first is a
careful grader's reading by eye; Wilson's interval, McNemar's test, a grader."""
import math
import re
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from qlora_lib.base.paths import DATA
from qlora_lib.base.statistics import mcnemar as exact_p
from qlora_lib.base.statistics import wilson
from qlora_lib.data.gsm8k import NUMBER, to_number
from qlora_lib.data.rows import read_jsonl
from ..kit.exercise import Exercise, register

# --- 1. The new tokens, cut by index -----------------------------------------------------

def cut_new_tokens(output: Tensor, width: int, end_ids: list[int]) -> list[list[int]]:
    rows = []
    for new in output[:, width:].tolist():  # (batch, width + new) -> new
        end = next((i for i, token in enumerate(new) if token in end_ids), len(new))
        rows.append(new[:end])
    return rows


def _prompt_kept(output, width, end_ids):
    new = cut_new_tokens(output, width, end_ids)
    return [prompt + row for prompt, row in zip(output[:, :width].tolist(), new)]


def _end_kept(output, width, end_ids):
    new = cut_new_tokens(output, width, end_ids)
    return [row[: len(cut) + 1] for row, cut in zip(output[:, width:].tolist(), new)]


def _last_end(output, width, end_ids):
    rows = []
    for new in output[:, width:].tolist():
        ends = [i for i, token in enumerate(new) if token in end_ids]
        rows.append(new[: ends[-1]] if ends else new)
    return rows


def _ends_dropped(output, width, end_ids):
    return [[t for t in row if t not in end_ids] for row in output[:, width:].tolist()]


def _one_end_id(output, width, end_ids):
    return cut_new_tokens(output, width, end_ids[:1])


def _index_raises(output, width, end_ids):
    return [row[: row.index(end_ids[0])] for row in output[:, width:].tolist()]


def _find_minus_one(output, width, end_ids):
    cut = cut_new_tokens(output, width, end_ids)
    new = output.shape[1] - width
    return [row[:-1] if len(row) == new else row for row in cut]


def _empty_without_end(output, width, end_ids):
    cut = cut_new_tokens(output, width, end_ids)
    new = output.shape[1] - width
    return [[] if len(row) == new else row for row in cut]


def _end_in_the_prompt(output, width, end_ids):
    rows = []
    for row in output.tolist():
        end = next((i for i, token in enumerate(row) if token in end_ids), len(row))
        rows.append(row[width:end])
    return rows


register(Exercise(
    name="cut_new_tokens",
    reference=cut_new_tokens,
    cases=[
        (lambda g: (torch.tensor([[1, 5, 6, 7, 8, 2, 0, 0], [1, 9, 4, 3, 0, 7, 3, 3]]), 3, [2]),
         "one row ends early, one is cut by the limit"),
        (lambda g: (torch.tensor([[2, 2, 1, 5, 7, 8, 2, 2], [1, 5, 6, 9, 4, 2, 2, 2]]), 4, [2]),
         "the padding has the id of the end token, as for LLaMA-2"),
        (lambda g: (torch.tensor([[1, 5, 7, 9, 6, 2], [1, 6, 8, 2, 5, 9]]), 2, [2, 9]),
         "two end ids, as chat models have"),
        (lambda g: (torch.tensor([[1, 5, 2, 0, 0, 0], [1, 6, 7, 2, 4, 2]]), 2, [2]),
         "an empty answer, and text after the end"),
    ],
    mistakes=[
        (_prompt_kept, "the prompt is still there: new tokens begin at column `width`, for every "
                       "row, because the padding is on the left"),
        (_end_kept, "the end token is not part of the answer: cut before it"),
        (_last_end, "cut at the first end token among the new ones; what follows it was written "
                    "after the model had said that it was done"),
        (_ends_dropped, "dropping the end tokens joins what was written after the end to the "
                        "answer: cut instead"),
        (_one_end_id, "`end_ids` may hold several ids, and any of them ends the answer"),
        (_index_raises, "`list.index` raises where a row has no end token: such a row was cut by "
                        "the limit, keep all of it"),
        (_find_minus_one, "a row without an end token has lost its last token (an index of -1?): "
                          "keep all of it"),
        (_empty_without_end, "a row without an end token was cut by the limit, but it is text: "
                             "keep all of it"),
        (_end_in_the_prompt, "the end id also stands in the padding on the left: look for it "
                             "among the new tokens only"),
    ],
))


# --- 2. A strict reader: step 1, the reading of a careful grader --------------------------

_TWENTY = [row for row in read_jsonl(DATA / "completions.jsonl") if row.get("show")]


def reading(i: int) -> tuple[float | None, float | None]:
    return _number(_TWENTY[i - 1]["strict"]), _number(_TWENTY[i - 1]["flexible"])


def _number(label: str | None) -> float | None:
    """A label as a reader writes it: 18 or 1234.5."""
    if label is None:
        return None
    value = Fraction(label)
    return int(value) if value.denominator == 1 else float(value)


# The policy (docs/EXTRACTION.md): section and words, which a test finds there.
THINKING = ("1.1", "what stands between a tag whose name says think, thought or reason")
UNENDED = ("1.1", "Thinking that never ends leaves only what stands before it")
NEW_TURN = ("1.3", "A new turn ends the completion: a line that begins with a label for a new "
                   "question")
REPEATED = ("1.4", 'Its answer begins after "Answer:"')
ONE_MORE = ("1.4", "If it then goes on to one more question, nobody can say which one was asked: "
                   "no answer")
DIGITS = ("2.1", "Digits of any script, with a sign, one decimal point, and the thousands marked "
                 "by one of comma, space, thin space, underscore or apostrophe")
COMMA = ("2.1", "A comma is a decimal sign where it can be nothing else: 1.234,50; 1 234,50")
SIGN = ("2.3", "A sign is a hyphen or minus of any kind right before the number or its currency")
LABEL = ("2.5", "a label (Step 2, Day 3:, the 2. that numbers a list)")
STATED = ("3", 'the last statement "the answer is", "answer:" (also in other languages, as a key '
               "of JSON")
HEAD = ("3", "the number at the head of the span")
IN_WORDS = ("3", "An answer in words says nothing, but then what stands before it is none either")
CUT = ("3", "A box that is not closed may be cut within its number: no answer")
BOXED = ("3", "2. the last `\\boxed{}`")
LAST = ("3", "the last number, right of its `=`, and a bold one before a plain one of the same "
             "line")
REMARKS = ("3", "Remarks in round brackets and questions do not count")
ASKING = ("3", "none where the text ends by asking how many or how much")
TAUGHT = ("4", 'strict reads only `#### N` and "The answer is N", the formats that a model is '
               "taught")
CORRECTED = ("4", 'Of several "The answer is N" the last one counts: a correction')

# For each completion, what is often read instead, and the rule that decides.
_MISREAD = {
    1: {THINKING: [(17, 17), (17, 18)]},
    2: {UNENDED: [(17, 17), (None, 17), (None, 9), (9, 9)]},
    3: {TAUGHT: [(18, 18)], BOXED: [(None, None)]},
    4: {CUT: [(None, 18), (None, 1), (18, 18), (1, 1)]},
    5: {REMARKS: [(None, 9)], TAUGHT: [(18, 18)], LAST: [(None, None)]},
    6: {LABEL: [(1, 1), (2, 2), (2, 18), (1, 18), (1, 2), (None, 1), (None, 2)],
        TAUGHT: [(18, 18)], LAST: [(None, None), (None, 9)]},
    7: {LAST: [(None, 9), (None, None)], TAUGHT: [(18, 18)]},
    8: {STATED: [(None, 0.95), (None, None)], TAUGHT: [(18, 18)]},
    9: {IN_WORDS: [(None, 3), (3, 3), (None, 18), (18, 18)]},
    10: {CORRECTED: [(17, 17), (17, 18), (18, 17), (None, 18), (None, None)]},
    11: {REMARKS: [(None, 2), (None, 9)], TAUGHT: [(18, 18)], LAST: [(None, None)]},
    12: {ASKING: [(None, 16), (16, 16), (None, 3)]},
    13: {DIGITS: [(1, 1), (234, 234), (None, 1), (None, 234), (None, None), (1, 1234)],
         TAUGHT: [(None, 1234)]},
    14: {SIGN: [(5, 5), (None, 5), (None, None), (None, -5)]},
    15: {COMMA: [(None, 50), (None, 123450), (None, 1234), (None, 234.5), (None, None)],
         TAUGHT: [(1234.5, 1234.5)]},
    16: {HEAD: [(None, 9)], TAUGHT: [(18, 18)], STATED: [(None, None)]},
    17: {DIGITS: [(None, None)], TAUGHT: [(18, 18)]},
    18: {NEW_TURN: [(5, 5), (18, 5), (None, 5), (5, 18)], TAUGHT: [(None, 18)]},
    19: {REPEATED: [(None, None), (None, 7), (None, 16)], TAUGHT: [(9, 9)]},
    20: {ONE_MORE: [(None, 18), (None, 5), (18, 18), (5, 5)]},
}


def _misreading(where: int, read: tuple):
    return lambda i: read if i == where else reading(i)


register(Exercise(
    name="reading",
    reference=reading,
    cases=[(lambda g, i=i: (i,), f"completion {i}, {row['kind']}")
           for i, row in enumerate(_TWENTY, 1)],
    mistakes=[(_misreading(i, read), f"{i} is not {read}; rule {section}: \"{words}\"")
              for i, rules in _MISREAD.items()
              for (section, words), reads in rules.items() for read in reads],
))


# --- 2. A strict reader: step 2, the value that a span states -----------------------------

LETTER = re.compile("[A-Za-z]")
SECOND = re.compile(r"\s*(?:[-+*/x]|or\b|to\b|and\b)\s*\$?\d")  # one more value


def stated_value(span: str) -> Fraction | None:
    part = span.rpartition("=")[2]
    match = NUMBER.search(part)
    if match is None or LETTER.search(part[: match.start()]):
        return None
    if SECOND.match(part[match.end():]):
        return None
    return to_number(match.group())


def _valued(before=LETTER, after=SECOND, part=lambda span: span.rpartition("=")[2],
            pick=NUMBER.search, number=to_number):
    """`stated_value` with parts changed: what may not stand before the number, what not after it,
    where it is looked for and how, and what becomes of its text."""
    def wrong(span):
        text = part(span)
        match = pick(text)
        if match is None or before and before.search(text[: match.start()]):
            return None
        return None if after and after.match(text[match.end():]) else number(match.group())
    return wrong


def _last_of(text: str):
    return max(NUMBER.finditer(text), key=lambda m: m.start(), default=None)


register(Exercise(
    name="stated_value",
    reference=stated_value,
    cases=[(lambda g, span=span: (span,), label) for span, label in (
        ("18", "a number alone"), (" 1,234 dollars", "words after it"),
        (" $18.50", "a currency before it"), (" -7", "a sign"), (" **0**", "markup"),
        (" 9*2=18", "an equation"), (" 9-12=-3", "an equation with a negative result"),
        (" 3*3+4=9+4=13", "an equation in steps"),
        (" 12 of the 30 eggs", "a number in what follows"),
        (" 5.25.", "a decimal at a sentence's end"), (" 10-12", "a sum or a range"),
        (" 5 or 6", "two values"), (" 5 to 6", "a range in words"),
        (" 5 and 6", "a list"), (" 5 or $6", "two values with a currency"), (" 3+4", "a sum"),
        (" 3 * 4", "a product with spaces"), (" 2 x 9", "a product that is not worked out"),
        (" Step 2: eggs", "words before the number"), (" step 2", "small letters"),
        (" **Step 2**", "a label behind markup"), (" none", "no number"), ("", "nothing"),
        (" 7 orders", "a word that begins with or"))],
    mistakes=[
        (_valued(part=lambda span: span), "of an equation the result counts, right of the last "
                                          "`=`: span.rpartition(\"=\")[2]"),
        (_valued(part=lambda span: span.partition("=")[2] or span),
         "right of the LAST `=`: partition finds the first, rpartition the last"),
        (_valued(before=None), "words before the number make it a label, as in Step 2: no value"),
        (_valued(after=None), "10-12 and 5 or 6 are two values, so none is stated: look at what "
                              "follows the number"),
        (_valued(pick=_last_of), "the first number is the value; in 12 of the 30 eggs the 30 is "
                                 "comment"),
        (_valued(pick=NUMBER.match), "NUMBER.match finds a number only at the very first "
                                     "character: search, then look at what stands before it"),
        (_valued(pick=lambda text: re.search(r"\d+", text), number=Fraction),
         "`\\d+` loses the sign, the comma and the decimals: search with NUMBER"),
        (_valued(pick=lambda text: re.search(r"-?\d+", text), number=Fraction),
         "`-?\\d+` stops at the comma and the dot: 1,234 became 1. Search with NUMBER"),
        (_valued(after=re.compile(r"\s*(?:[-+*/x]|or|to|and)")),
         "only a second NUMBER after the operator or word spoils the first: orders begins with or, "
         "and ** is markup"),
        (_valued(after=re.compile(r".*\d")),
         "a number somewhere later is comment: 12 of the 30 eggs states 12. Only one that is "
         "joined by an operator or by or, to, and makes two values"),
        (_valued(after=re.compile(r"\s*[-+*/x]\s*\$?\d")), "5 or 6 are two values as well"),
        (_valued(after=re.compile(r"\s*(?:[-+*/x]|or\b)\s*\$?\d")),
         "5 to 6 and 5 and 6 are two values as well as 5 or 6"),
        (_valued(after=re.compile(r"\s*(?:[-x]|or\b|to\b|and\b)\s*\$?\d")),
         "3+4 and 3 * 4 are no values either: nothing is evaluated"),
        (_valued(after=re.compile(r"\s*(?:[-+*/x]|or\b|to\b|and\b)\s*\d")),
         "the second number may have a currency before it: 5 or $6"),
        (_valued(before=re.compile("[A-Z]")), "small letters make a label too: step 2"),
        (_valued(before=re.compile(r"^\s*[A-Za-z]")),
         "letters ANYWHERE before the number make a label, behind markup too, as in **Step 2**"),
        (_valued(after=re.compile(r"\s*(?:or|to|and)\b\s*\$?\d")),
         "10-12 and 2 x 9 are no values as they stand: nothing is evaluated"),
        (_valued(number=lambda text: text), "return a number, to_number(...): as text \"18\" and "
                                            "\"18.0\" differ"),
        (_valued(number=lambda text: float(text.replace(",", "").replace("$", ""))),
         "return to_number's exact Fraction, not a float or an int"),
        (_valued(number=lambda text: abs(to_number(text))), "the sign is gone: -7 is not 7"),
        (lambda span: stated_value(span) or None, "0 is a value, but false in Python: ask "
                                                  "`is not None`"),
        (lambda span: stated_value(span) or Fraction(0), "no value is None, not 0"),
        (lambda span: stated_value(span.partition(".")[0]), "a dot does not end a number: 5.25 "
                                                            "became 5"),
        (lambda span: to_number(NUMBER.search(span.rpartition("=")[2]).group()),
         "search gives None where there is no number: then the value is None"),
        (lambda span: to_number(span.strip()), "the span is not a number as it stands: search in "
                                               "it with NUMBER, which knows commas and $"),
    ],
))


# --- 2. A strict reader: step 3, whole completions ---------------------------------------

THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.S)
TURN = re.compile(r"^(?:Question|Problem)\b", re.M)
SAID = re.compile(r"[Tt]he answer is(.+?)(?:\.\s|$)", re.M)


def strict_answers(completions: list[str], value: Callable) -> list[Fraction | None]:
    return [_strictly(text, value=value) for text in completions]


def _spoken(text: str) -> str:
    return TURN.split(THOUGHT.sub("", text))[0]


def _strictly(text: str, spoken=_spoken, marks=lambda text: re.findall("####(.*)", text),
              value=stated_value, said=lambda found: found[-1:],
              sentence=SAID) -> Fraction | None:
    """One strict answer; the rest is what mistakes change."""
    text = spoken(text)
    spans = list(marks(text))
    values = [v for v in map(value, spans) if v is not None]
    if values:
        return values[0]
    for span in said(sentence.findall(text)):
        return value(span)
    return None


def _reads(**changed):
    return lambda completions, value: [_strictly(text, **changed) for text in completions]


def _changed(change):
    return lambda completions, value: change(strict_answers(completions, value))


def _first_mark_only(text):
    return re.findall("####(.*)", text)[:1]


def _last_number_else(completions, value):
    answers = []
    for text, answer in zip(completions, strict_answers(completions, value)):
        numbers = NUMBER.findall(text)
        answers.append(to_number(numbers[-1]) if answer is None and numbers else answer)
    return answers


def _marks_alone(completions, value):
    return [_strictly(text, said=lambda found: []) for text in completions]


def _said_unmarked(completions, value):
    return [_strictly(text, said=(lambda found: []) if "####" in _spoken(text)
                      else lambda found: found[-1:]) for text in completions]


def _said_first(completions, value):
    return [_strictly(text, marks=lambda t: []) if SAID.search(_spoken(text)) else _strictly(text)
            for text in completions]


register(Exercise(
    name="strict_answers",
    reference=strict_answers,
    cases=[
        (lambda g: (["4*3=12 eggs.\n#### 12", "12 eggs #### 18", "#### 1,234 dollars", "#### 0",
                     "#### $18.00", "9 are left.\n\n#### 9*2=18"], stated_value),
         "the marked line"),
        (lambda g: (["There are 18 eggs.", "", "#### none\n3 are left", "#### 10-12", "#### 5 or 6",
                     "####\n18"], stated_value), "no strict answer"),
        (lambda g: (["####\n#### 18", "#### 7\nor rather\n#### 9", "#### 7\n5+4=9"], stated_value),
         "the first marked line that states a value"),
        (lambda g: (["#### 7\nQuestion: 5 and 4?\n#### 9",
                     "It depends.\nProblem 2: 5 hats?\n#### 5",
                     "The answer is 4.\nQuestion: How many?\nThe answer is 5.",
                     "The Problem is easy.\n#### 6", "Question: 5 eggs?\n#### 5"], stated_value),
         "the model goes on with a question of its own"),
        (lambda g: (["<think>\n#### 17?\n</think>\n#### 18", "<think>\n16-3=13\n#### 17",
                     "<think>#### 2</think>\nThe answer is 4.\n<think>\n#### 3\n</think>",
                     "#### 8\n<think>or #### 9</think>\nDone.",
                     "<think>\nQuestion: 5 eggs?\n</think>\n#### 18"],
                    stated_value),
         "thinking is not read"),
        (lambda g: (["The answer is 18.", "So the answer is 5.25.", "The answer is 9-12=-3.",
                     "The answer is 17. No. The answer is 18.", "3 hens. The answer is eighteen.",
                     "The answer is 3 or 4.", "The answer is 6. In all that is 7+2=9.",
                     "The answer is 7\n9-5=4 eggs"], stated_value),
         "the answer in a sentence"),
        (lambda g: (["The answer is 17.\n#### 18", "#### 18\nThe answer is 17.",
                     "#### none\nThe answer is 5."], stated_value),
         "both formats"),
    ],
    mistakes=[
        (_reads(marks=_first_mark_only), "the first marked line that STATES a value: the line of "
                                         "`####` alone does not, so the next one counts"),
        (_reads(marks=lambda t: re.findall("####(.*)", t)[::-1]),
         "the first marked line with a value counts, not the last: what follows it may be another "
         "question"),
        (_reads(marks=lambda t: re.findall(r"####\s*(.*)", t)),
         "the number stands on the line of `####`: `\\s` also matches a line break, `.` does not"),
        (_reads(marks=lambda t: re.findall("(?s)####(.*)", t)),
         "the answer ends with its line: nothing from the next line counts"),
        (_reads(marks=lambda t: re.findall("(.*)####", t)),
         "the answer stands right of the mark: the number left of it is a step"),
        (_reads(marks=lambda t: [line for line in t.split("\n") if "####" in line]),
         "take what stands right of the mark, not the whole line: in 12 eggs #### 18 the 12 is a "
         "step"),
        (_reads(value=lambda span: (m := NUMBER.search(span)) and to_number(m.group())),
         "hand each span to `value`, your step 2: searching it with NUMBER alone reads 10 from "
         "10-12"),
        (_reads(marks=lambda t: t.split("####")), "without `####` split gives the whole text, "
                                                  "which is no strict answer"),
        (_marks_alone, "strict also reads \"The answer is N\" where no marked line states a value"),
        (_said_first, "the marked line comes first: \"The answer is\" counts only without one"),
        (_reads(said=lambda found: found[:1]),
         "of several \"The answer is N\" the last one counts: it corrects the others"),
        (_reads(spoken=lambda t: THOUGHT.sub("", t)),
         "the completion ends where a line begins with Question or Problem: the model asks itself "
         "something new there"),
        (_reads(spoken=lambda t: TURN.split(t)[0]),
         "what stands between <think> and </think> is not read"),
        (_reads(spoken=lambda t: TURN.split(re.sub("<think>.*?</think>", "", t))[0]),
         "`.` does not match a line break: thinking has several lines, so pass flags=re.S"),
        (_reads(spoken=lambda t: TURN.split(re.sub("(?s)<think>.*?</think>", "", t))[0]),
         "thinking that never ends is not read either: `(</think>|\\Z)`"),
        (_reads(spoken=lambda t: TURN.split(re.sub(r"(?s)<think>.*(</think>|\Z)", "", t))[0]),
         "`.*` runs to the LAST </think> and swallows what was said between two thoughts: `.*?`"),
        (_reads(spoken=lambda t: re.split("Question|Problem", THOUGHT.sub("", t))[0]),
         "only a LINE that begins so is a new question: flags=re.M, and `^` before it"),
        (_reads(spoken=lambda t: re.split("^(?:Question|Problem)", THOUGHT.sub("", t))[0]),
         "without flags=re.M the `^` matches at the text's very beginning only"),
        (_reads(spoken=lambda t: THOUGHT.sub("", TURN.split(t)[0])),
         "thinking goes first: a line in it that begins with Question ends nothing"),
        (_reads(sentence=re.compile(r"[Tt]he answer is((?:(?![Tt]he answer is).)+)")),
         "a statement ends with its sentence: what follows, as In all that is 7+2=9, is another"),
        (_reads(sentence=re.compile(r"(?s)[Tt]he answer is((?:(?![Tt]he answer is).)+)")),
         "a statement ends with its sentence, and with its line: what follows is another"),
        (_said_unmarked, "a marked line that states no value is none: then \"The answer is\" "
                         "counts"),
        (_last_number_else, "strict means strict: without one of the two formats there is no "
                            "answer, even if the text holds a number (that is the flexible mode)"),
        (_changed(lambda answers: [a or None for a in answers]),
         "0 is an answer, but false in Python: ask `is not None`"),
        (_changed(lambda answers: [Fraction(0) if a is None else a for a in answers]),
         "no answer is None, not 0: somewhere the right answer is 0"),
        (_changed(lambda answers: [a for a in answers if a is not None]),
         "one answer a completion: where there is none, None keeps its place"),
        (_changed(lambda answers: answers[0]),
         "a list comes in and a list goes out, one answer a completion"),
    ],
))


# --- 3. Wilson's interval ----------------------------------------------------------------

Z = 1.959963984540054


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    return wilson(correct, n)


def _other(second=lambda n: Z * Z / (4 * n * n), outside=0.0, pull=True, by=(1, 1), z=Z):
    """Wilson's interval with parts changed: the second term under the root, what is added outside
    of it, the pull to one half, the factor z, whether (centre, half) are divided by 1 + z^2/n."""
    def wrong(correct, n):
        p, shrink = correct / n, 1 + Z * Z / n
        centre = (p + pull * Z * Z / (2 * n)) / shrink ** by[0]
        half = z * (math.sqrt(p * (1 - p) / n + second(n)) + outside / n) / shrink ** by[1]
        return centre - half, centre + half
    return wrong


def _at_90_percent(correct, n):
    return wilson(correct, n, z=1.6448536269514722)


def _centre_and_half(correct, n):
    low, high = wilson(correct, n)
    return (low + high) / 2, (high - low) / 2


def _in_percent(correct, n):
    low, high = wilson(correct, n)
    return 100 * low, 100 * high


def _swapped(correct, n):
    return wilson(correct, n)[::-1]


register(Exercise(
    name="wilson_interval",
    reference=wilson_interval,
    cases=[
        (lambda g: (15, 20), "15 of 20"),
        (lambda g: (0, 20), "none of 20"),
        (lambda g: (487, 1319), "487 of 1,319"),
        (lambda g: (1, 1), "one question, answered rightly"),
    ],
    mistakes=[
        (_other(lambda n: 0, pull=False, by=(0, 0)),
         "this is the normal approximation p ± z·sqrt(p(1-p)/n): at 0 of 20 it has no width"),
        (_at_90_percent, "z = 1.645 gives a 90% interval; for 95% it is 1.96"),
        (_other(by=(0, 0)), "divide both the centre and the half-width by 1 + z²/n"),
        (_other(by=(1, 0)), "the half-width too is divided by 1 + z²/n, not the centre alone"),
        (_other(by=(0, 1)), "the centre too is divided by 1 + z²/n, not the half-width alone"),
        (_other(pull=False, by=(0, 1)),
         "the centre is not p: it is pulled towards one half, (p + z²/2n) / (1 + z²/n)"),
        (_other(pull=False), "z²/2n is missing from the centre: (p + z²/2n) / (1 + z²/n)"),
        (_other(lambda n: 0), "under the root a term is missing: z²/4n², which is what keeps a "
                              "width at p = 0"),
        (_other(lambda n: Z * Z / (4 * n)), "under the root it is z²/4n², with n squared: "
                                            "z * z / (4 * n * n), not z * z / (4 * n)"),
        (_other(lambda n: 0, outside=Z / 2), "z²/4n² stands under the root, beside p(1-p)/n"),
        (_other(z=1), "the root is one standard error: the half-width takes z of them"),
        (_centre_and_half, "these are centre and half-width; return both ends, centre ± half"),
        (_in_percent, "return fractions, not percent"),
        (_swapped, "the lower end comes first"),
    ],
    rtol=1e-4,
))


# --- 4. McNemar's exact test -------------------------------------------------------------

def mcnemar(a: str, b: str) -> tuple[int, int, float]:
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(x < y for x, y in zip(a, b))
    return only_a, only_b, exact_p(only_a, only_b)


def _tail(count: int, tosses: int) -> float:
    """The chance of at most `count` heads in `tosses` tosses."""
    return sum(math.comb(tosses, k) for k in range(count + 1)) / 2**tosses


def _with_p(p):
    """McNemar's counts with another p, a function of (only_a, only_b, questions)."""
    def wrong(a, b):
        only_a, only_b, _ = mcnemar(a, b)
        return only_a, only_b, p(only_a, only_b, len(a))
    return wrong


def _chi_squared(shift):
    def p(b, c, n):
        return math.erfc(max(abs(b - c) - shift, 0) / math.sqrt(2 * (b + c))) if b + c else 1.0
    return _with_p(p)


def _unpaired(b, c, n):
    return 1.0 if b == c else math.erfc(abs(b - c) / n / math.sqrt(4 * 0.25 / n))


def _agreeing(a, b):
    both = sum(x == y == "1" for x, y in zip(a, b))
    neither = sum(x == y == "0" for x, y in zip(a, b))
    return both, neither, exact_p(both, neither)


register(Exercise(
    name="mcnemar",
    reference=mcnemar,
    cases=[
        (lambda g: ("1111101110", "1000111000"), "six to one"),
        (lambda g: ("0001110001", "1111111011"), "the second is better"),
        (lambda g: ("11001", "00111"), "nearly as many on both sides"),
        (lambda g: ("1100", "0011"), "as many on both sides"),
        (lambda g: ("10110", "10110"), "no question is discordant"),
        (lambda g: ("1" * 209 + "0" * 152 + "1" * 300, "0" * 209 + "1" * 152 + "1" * 300),
         "209 to 152, of 661"),
    ],
    mistakes=[
        (_with_p(lambda b, c, n: _tail(min(b, c), b + c)),
         "this is one-sided: a split as uneven the other way would have surprised you as much, so "
         "double it"),
        (_with_p(lambda b, c, n: 2 * _tail(min(b, c), b + c)),
         "a probability above 1: where both counts are alike, the two tails overlap. min(1, ...)"),
        (_with_p(lambda b, c, n: min(1.0, 2 * math.comb(b + c, min(b, c)) / 2 ** (b + c))),
         "that is the chance of exactly this split: add all that are more uneven"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(max(b, c), b + c))),
         "the tail runs up to the SMALLER count"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(b, b + c))),
         "the tail runs up to the smaller count, whichever model that is"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(c, b + c))),
         "the tail runs up to the smaller count, whichever model that is; this is the second's"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(min(b, c) - 1, b + c))),
         "the observed split belongs to the tail: range(min(...) + 1)"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(min(b, c), n))),
         "only discordant questions are tosses, b + c of them: where the models agree, nothing is "
         "decided"),
        (_with_p(lambda b, c, n: min(1.0, 2 * _tail(min(b, c), b + c)
                                     - math.comb(b + c, min(b, c)) / 2 ** (b + c))),
         "this is the mid-p, which counts the observed split half; asked is the exact test"),
        (_chi_squared(0), "this is the chi-squared approximation; count the outcomes of the tosses "
                          "instead"),
        (_chi_squared(1), "this is the chi-squared approximation with its correction; count the "
                          "outcomes of the tosses instead"),
        (_with_p(_unpaired), "this compares two accuracies as if on different questions: take the "
                             "discordant ones"),
        (lambda a, b: (mcnemar(a, b)[1], mcnemar(a, b)[0], mcnemar(a, b)[2]),
         "right in a only comes first, then right in b only"),
        (_agreeing, "these are the questions on which both agree: count those that one model "
                    "alone gets right"),
        (lambda a, b: (a.count("1"), b.count("1"), exact_p(a.count("1"), b.count("1"))),
         "these are all right answers of each: count only the questions on which they differ"),
        (_with_p(lambda b, c, n: 1 - min(1.0, 2 * _tail(min(b, c), b + c))),
         "this is 1 - p: a small p speaks against a toss of coins"),
        (lambda a, b: mcnemar(a, b)[2], "return both counts as well: (only a, only b, p)"),
        (lambda a, b: mcnemar(a, b)[:2], "the p is missing: (only a, only b, p)"),
    ],
))


# --- 5. A grader -------------------------------------------------------------------------

def grade(answers: list[str | None], golds: list[str]) -> tuple[int, int]:
    right = sum(a is not None and to_number(a) == to_number(g) for a, g in zip(answers, golds))
    return right, len(golds)


def _skipping(answers, golds):
    pairs = [(a, g) for a, g in zip(answers, golds) if a is not None]
    return sum(to_number(a) == to_number(g) for a, g in pairs), len(pairs)


def _filtered_first(answers, golds):
    given = [a for a in answers if a is not None]
    return sum(to_number(a) == to_number(g) for a, g in zip(given, golds)), len(golds)


def _as_floats(answers, golds):
    return sum(a is not None and float(a) == float(g) for a, g in zip(answers, golds)), len(golds)


def _as_strings(answers, golds):
    return sum(a == g for a, g in zip(answers, golds)), len(golds)


def _contained(answers, golds):
    return sum(a is not None and g in a for a, g in zip(answers, golds)), len(golds)


def _none_is_zero(answers, golds):
    return sum(to_number(a or "0") == to_number(g) for a, g in zip(answers, golds)), len(golds)


def _right_if(equal):
    """Another comparison of the two exact numbers."""
    return lambda answers, golds: (
        sum(a is not None and equal(to_number(a), to_number(g)) for a, g in zip(answers, golds)),
        len(golds))


def _zero_is_nothing(answers, golds):
    read = [a and to_number(a) for a in answers]
    return sum(bool(a) and a == to_number(g) for a, g in zip(read, golds)), \
        sum(bool(a) for a in read)


def _unread_golds(answers, golds):
    return sum(a is not None and to_number(a) == g for a, g in zip(answers, golds)), len(golds)


def _wrong_count(answers, golds):
    right, n = grade(answers, golds)
    return right, n - right


def _as_rate(answers, golds):
    right, n = grade(answers, golds)
    return right / n


register(Exercise(
    name="grade",
    reference=grade,
    cases=[
        (lambda g: (["18", None, "7", "18"], ["18", "5", "8", "18"]), "one question unanswered"),
        (lambda g: (["18.0", "1,234", "$5", None], ["18", "1234", "5", "0"]),
         "the same numbers, written otherwise"),
        (lambda g: (["70003", "18.4", "18.2", "19.7", "19.8", "0.25", "2500", "0.5", "12"],
                    ["70000", "18", "18", "19", "19", "25", "25", "50", "2"]),
         "close is not right"),
        (lambda g: (["18.0005"], ["18"]), "very close is not right"),
        (lambda g: (["9007199254740993"], ["9007199254740992"]), "the next whole number"),
        (lambda g: (["18.0000000001"], ["18"]), "closer still"),
        (lambda g: ([None, None], ["3", "4"]), "a model that says nothing"),
        (lambda g: (["0", None, "0.0", "-0"], ["0", "0", "0", "0"]), "0 is an answer too"),
        (lambda g: (["-5", "5"], ["5", "-5"]), "the sign counts"),
    ],
    mistakes=[
        (_skipping, "unanswered questions left the denominator: a model that answers only what "
                    "it knows would score 100%"),
        (_filtered_first, "removing the Nones first shifts the answers: each is compared with "
                          "the gold of another question"),
        (_as_floats, "float() does not read \"1,234\" or \"$5\": use to_number, which is exact as "
                     "well"),
        (_as_strings, "as text \"18.0\" and \"18\" differ: compare numbers, to_number(...)"),
        (_contained, "`gold in answer` accepts 12 where 2 is right"),
        (_none_is_zero, "no answer is not the answer 0: it would be right wherever the gold is "
                        "0"),
        (_right_if(lambda a, g: abs(a - g) < 0.1),
         "a tolerance accepts 18.0005 for 18: compare exactly, with =="),
        (_right_if(lambda a, g: abs(a - g) < 1e-6),
         "however small a tolerance is, it accepts what is not the gold: compare with =="),
        (_right_if(lambda a, g: math.isclose(a, g, rel_tol=1e-4)),
         "a relative tolerance accepts 70003 for 70000: integers must be equal"),
        (_right_if(math.isclose),
         "18.0000000001 is close to 18, but not right: no tolerance of your own or math.isclose's, "
         "compare with =="),
        (_right_if(lambda a, g: float(a) == float(g)),
         "as floats, 9007199254740993 and ...992 are one number: compare with == what to_number "
         "gives, without float()"),
        (_right_if(lambda a, g: round(a) == round(g)),
         "rounding accepts 18.4 for 18: compare exactly"),
        (_right_if(lambda a, g: a in (g, g / 100, g * 100)),
         "accepting gold/100 and gold*100 as well makes 0.25 right where the gold is 25"),
        (_zero_is_nothing, "an answered 0 counts as no answer: Fraction(0) is false in Python. Ask "
                           "`is not None`"),
        (_right_if(lambda a, g: bool(a) and a == g),
         "an answered 0 is never right here: Fraction(0) is false in Python. Compare only"),
        (_right_if(lambda a, g: abs(a) == abs(g)), "the sign is lost: -5 is not 5"),
        (_right_if(lambda a, g: int(a) == int(g)), "int() cuts 18.4 to 18: compare exactly"),
        (_unread_golds, "only the answer went through to_number: a text never equals a number"),
        (_wrong_count, "the second value is the number of questions, not of the wrong ones"),
        (_as_rate, "return the counts (right, n): a rate without its n says little"),
    ],
))
