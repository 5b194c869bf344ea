"""Exercises of notebook 05: new tokens, strict answers, a careful grader's reading, Wilson's
interval, a grader."""
import math
import re
from fractions import Fraction

import torch
from torch import Tensor

from qlora_lib.base.paths import DATA
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
        (lambda g: (torch.tensor([[1, 5, 6, 7, 8, 2, 0, 0], [1, 9, 4, 3, 3, 7, 3, 3]]), 3, [2]),
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


# --- 2. Strict answers -------------------------------------------------------------------

def strict_answers(completions: list[str]) -> list[Fraction | None]:
    answers = []
    for text in completions:
        span = text.partition("####")[2].partition("\n")[0]
        match = NUMBER.search(span)
        answers.append(to_number(match.group()) if match else None)
    return answers


def _read(text: str) -> Fraction | None:
    match = NUMBER.search(text)
    return to_number(match.group()) if match else None


def _last_mark(completions):
    return [_read(t.rpartition("####")[2].partition("\n")[0]) if "####" in t else None
            for t in completions]


def _beyond_the_line(completions):
    return [_read(t.partition("####")[2]) for t in completions]


def _signed_digits(completions):
    found = [re.search(r"-?\d+", t.partition("####")[2].partition("\n")[0])
             for t in completions]
    return [Fraction(m.group()) if m else None for m in found]


def _cut_at_dot(completions):
    return [_read(t.partition("####")[2].partition("\n")[0].partition(".")[0])
            for t in completions]


def _without_sign(completions):
    return [None if a is None else abs(a) for a in strict_answers(completions)]


def _zero_for_nothing(completions):
    return [Fraction(0) if a is None else a for a in strict_answers(completions)]


def _last_number_else(completions):
    answers = []
    for text, answer in zip(completions, strict_answers(completions)):
        numbers = NUMBER.findall(text)
        answers.append(to_number(numbers[-1]) if answer is None and numbers else answer)
    return answers


def _last_in_line(completions):
    spans = [t.partition("####")[2].partition("\n")[0] for t in completions]
    found = [NUMBER.findall(span) for span in spans]
    return [to_number(numbers[-1]) if numbers else None for numbers in found]


def _mark_not_asked_for(completions):
    return [_read(t.split("####")[-1].partition("\n")[0]) for t in completions]


def _stripped_first(completions):
    return [_read(t.partition("####")[2].strip().partition("\n")[0]) for t in completions]


def _as_text(completions):
    found = [NUMBER.search(t.partition("####")[2].partition("\n")[0]) for t in completions]
    return [m.group() if m else None for m in found]


def _float_of_line(completions):
    return [Fraction(t.partition("####")[2].partition("\n")[0]) if "####" in t else None
            for t in completions]


register(Exercise(
    name="strict_answers",
    reference=strict_answers,
    cases=[
        (lambda g: (["4*3=12 eggs.\n#### 12", "#### 1,234", "#### 5.25.", "#### -7",
                     "#### $18.00"],), "five ways to write a number"),
        (lambda g: (["There are 18 eggs.", "", "#### none\n3 are left", "####\n18"],),
         "no strict answer"),
        (lambda g: (["#### 7\nQuestion: 5 and 4?\nAnswer:\n5+4=9\n#### 9"],),
         "the model goes on with a question of its own"),
        (lambda g: (["#### 12 of the 30 eggs", "so #### 2,880,000 dollars"],),
         "words and numbers after the answer"),
    ],
    mistakes=[
        (_last_mark, "take the first `####`: after its answer this model asked itself a new "
                     "question, and you graded that one"),
        (_beyond_the_line, "the answer ends with its line: nothing from the next line counts"),
        (_signed_digits, "`-?\\d+` stops at the comma and the dot: 1,234 became 1. Search with "
                         "NUMBER"),
        (_cut_at_dot, "a dot does not end an answer: 5.25 became 5"),
        (_without_sign, "the sign is gone: -7 is not 7"),
        (_zero_for_nothing, "no answer is None, not 0: somewhere the right answer is 0"),
        (_last_number_else, "strict means strict: without `####` there is no answer, even if "
                            "the text holds a number (that is the flexible mode)"),
        (_last_in_line, "the first number after `####` counts; later ones are comment"),
        (_mark_not_asked_for, "without `####` split gives the whole text, which is no strict "
                              "answer"),
        (_stripped_first, "the number stands on the line of `####`; do not strip line breaks "
                          "first"),
        (_as_text, "return numbers, not text: as text \"18\" and \"18.0\" differ"),
        (_float_of_line, "the whole line is not a number: search in it with NUMBER, which knows "
                         "commas and $"),
    ],
))


# --- 3. The reading of a careful grader --------------------------------------------------

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


# --- 4. Wilson's interval ----------------------------------------------------------------

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
        (lambda g: ([None, None], ["3", "4"]), "a model that says nothing"),
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
        (_right_if(lambda a, g: math.isclose(a, g, rel_tol=1e-4)),
         "a relative tolerance accepts 70003 for 70000: integers must be equal"),
        (_right_if(math.isclose),
         "as floats, 9007199254740993 and ...992 are one number: compare with == what to_number "
         "gives, without float() or math.isclose"),
        (_right_if(lambda a, g: round(a) == round(g)),
         "rounding accepts 18.4 for 18: compare exactly"),
        (_right_if(lambda a, g: a in (g, g / 100, g * 100)),
         "accepting gold/100 and gold*100 as well makes 0.25 right where the gold is 25"),
        (_as_rate, "return the counts (right, n): a rate without its n says little"),
    ],
))
