"""What a completion's answer is: the policy, other graders' agreement, texts that attack it."""

import json
import os
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lib.base.paths import DATA
from qlora_lib.data.gsm8k import GoldError
from qlora_lib.data.rows import read_jsonl
from qlora_lib.data.sources import load_gsm8k, load_minigsm
from qlora_lib.evaluation import extraction
from qlora_lib.evaluation.extraction import (
    MAX_TEXT,
    QUANTITY,
    extract_answer,
    is_correct,
    numbers,
    plain,
    value,
)
from tests.support.tensors import PROPERTY

HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        # 1. the first #### line with a number
        ("3+4=7\n#### 7", 7, 7),
        ("#### none\n#### 8", 8, 8),
        ("#### 8\n#### 9", 8, 8),
        ("#### 7\n\\boxed{8} The answer is 9", 7, 7),
        ("####\n18 is what remains", None, 18),
        # 2. the last \boxed{}
        (r"\boxed{3}, no, \boxed{4}", None, 4),
        (r"\boxed{\boxed{4}}", None, 4),
        (r"\boxed{\text{about {5} m}}", None, 5),
        (r"\boxed{3}. The answer is 4", None, 3),  # two answers: no strict one
        (r"The answer is \boxed{4}.", 4, 4),
        (r"5, so \boxed{12", None, None),  # cut short: the number may be, too
        (r"5, so \boxed{x}", None, None),  # the answer is x, not 5
        # 3. the last "answer is" or "answer:" with a number
        ("The answer is 5.", 5, 5),
        ("The answer is: $70,000. Check: 1+1=2", 70000, 70000),
        ("The answer is 4. No, the answer is 6", 6, 6),
        ("The answer is 6. The answer is clear.", 6, 6),
        ("The answer is not 6. It is 7", None, 7),
        ("So the final answer is 12, as 3 of 4", None, 12),
        ("**Answer:** 42 of 50", None, 42),
        ("Answer:\n42 of 50", None, 42),
        # 4. the last number
        ("so 10-3", None, None),
        ("Ava has 12 apples and 5.5 pears.", None, Fraction(11, 2)),
        ("1,2345", None, None),
        # numbers of lists
        ("#### 18. That is all", 18, 18),
        ("1. Eggs left", None, None),
        ("2. Eggs left\n3. Money", None, None),
        ("nothing", None, None),
        ("", None, None),
        # right of the last "=", and one number
        ("#### 3 + 4 = 7 apples", 7, 7),
        ("#### 7 apples for 3", 7, 7),
        ("#### 5 or 6", None, None),
        ("#### 5 apples or 6 apples", None, None),
        ("2+3. #### 5-6", None, None),
        ("#### 1,2345", None, None),
        ("#### 1/2 or 0.5", HALF, HALF),
        # the stop
        ("#### 7\nQuestion: What is 2+2?\nAnswer:\n#### 4", 7, 7),
        ("Question: 3 apples. The answer is 3", None, None),
        ("It is 7\nQ: 2+2? The answer is 4", None, 7),
        ("FAQ: 7", None, 7),
        ("It is 7</s> 8", None, 7),
        ("It is 7<|endoftext|> 8", None, 7),
        ("It is 7<|im_end|>\n8", None, 7),
        ("It is 7<|eot_id|>8", None, 7),
    ],
)
def test_policy(text, strict, flexible):
    assert extract_answer(text) == strict
    assert extract_answer(text, "flexible") == flexible


@pytest.mark.parametrize(
    "numeral, number",
    [
        ("1,234", 1234), ("1,234,567.5", Fraction(2469135, 2)), ("1{,}234", 1234),
        ("1\u202f234", 1234), ("1\u2009234\u2009567", 1234567), ("1\u00a0234", 1234),
        (r"1\,234", 1234), ("$1,234", 1234), ("€5", 5), (r"\$5", 5), ("$5$", 5), ("5%", 5),
        (r"5\%", 5), ("5 km", 5), ("5kg", 5), ("**5**", 5), ("`5`", 5), (r"\(5\)", 5),
        (r"\text{5 apples}", 5), (r"5\text{ apples}", 5), ("5.", 5), ("$18.00", 18), (".5", HALF),
        ("5 cm²", 5), ("5 m^2", 5), ("5 m^{2}", 5),
        ("-3", -3), ("\u22123", -3), ("\u20133", -3), ("-$3", -3), ("$-3", -3), ("**-3**", -3),
        ("+3", 3), ("$-3$", -3),
        ("3/4", Fraction(3, 4)), ("3 / 4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)), (r"-\frac{3}{4}", Fraction(-3, 4)), ("¾", Fraction(3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)), ("1 1/2", Fraction(3, 2)), ("1½", Fraction(3, 2)),
        (r"1\frac{1}{2}", Fraction(3, 2)), ("-1 1/2", Fraction(-3, 2)),
        ("1,000/3", Fraction(1000, 3)),
        ("2 million", 2 * 10**6), ("2.5 Million", 2500000), ("3k", 3000), ("3K.", 3000),
        ("2 hundred thousand", 200000), ("5 thousands", 5000), ("1 trillion", 10**12),
        ("1e3", 1000), ("1.5E+3", 1500), ("2e-1", Fraction(1, 5)), ("10^3", 1000), ("10**3", 1000),
        ("10^{3}", 1000), ("10³", 1000), ("10⁻¹", Fraction(1, 10)), ("2^10", 1024),
        ("2 x 10^3", 2000), ("2*10^3", 2000), (r"2 \times 10^{3}", 2000), ("2 × 10³", 2000),
        ("2 · 10^3", 2000),
    ],
)  # fmt: skip
def test_spellings_of_a_number(numeral, number):
    for text in (f"#### {numeral}", f"9 - 8 = 1\n#### {numeral}\n", f"The answer is {numeral}."):
        assert extract_answer(text) == number
    assert extract_answer(rf"so \boxed{{{numeral}}}, not 9", "flexible") == number
    assert extract_answer(f"9 - 8 and {numeral}", "flexible") == number


@pytest.mark.parametrize(
    "text",
    ["12/25/2020", "1.2.3", "5/0", "0^-1", "x_1", "m^2", "1e999999999", "10^999", "10^x",
     "9" * 61, "9" * 60 + ".1", "1/2/3", "2^3.5", "1e5.5", "inf", "NaN"],
)  # fmt: skip
def test_what_is_no_number_has_no_answer(text):
    assert extract_answer(f"#### {text}") is None
    assert extract_answer(text, "flexible") is None


def test_nothing_is_evaluated_and_no_unit_converted():
    assert extract_answer("#### 3 x 4") is None and extract_answer("#### 3+4") is None
    assert extract_answer("#### 50% of it") == 50 and extract_answer("#### 2 dozen") == 2


# --- A careful grader's verdicts ----------------------------------------------------------

COMPLETIONS = read_jsonl(DATA / "completions.jsonl")
READ_WRONG = "The answer is $\\frac{1}{2}$ of 36, which is 18."  # as 1/2, by both modes
MISSED = {  # verdicts that the flexible reading does not reach
    READ_WRONG,
    "She makes $18.\n\nStudent: why 5?\nTeacher: because 6.",
    "She makes $18.\n\n(Question 2) Tom has 5.",
    "$18\n\nComment: 5 stars for this question!",
    "def solution():\n    eggs = 16\n    return eggs * 2",
    "18,19",
}


@pytest.mark.parametrize("mode", ["strict", "flexible"])
def test_the_verdicts_of_a_careful_grader(mode):
    wrong = set()
    for row in COMPLETIONS:
        answer = row[mode] and Fraction(row[mode])
        if extract_answer(row["completion"], mode) != answer:
            wrong.add(row["completion"])
    assert wrong == (MISSED if mode == "flexible" else {READ_WRONG})


def test_the_completions_are_many_and_twenty_are_to_be_shown():
    texts = [row["completion"] for row in COMPLETIONS]
    assert len(texts) == len(set(texts)) >= 300
    assert sum(row.get("show", False) for row in COMPLETIONS) == 20
    assert all(row["strict"] in (None, row["flexible"]) for row in COMPLETIONS)


def test_unknown_mode_is_an_error():
    with pytest.raises(ValueError, match="strict"):
        extract_answer("5", "lenient")


def test_is_correct_is_exact():
    assert is_correct("#### 70,000", "70000") and not is_correct("#### 70003", 70000)
    assert not is_correct("#### 5", 500) and not is_correct("#### 5.4", 5)
    assert not is_correct("#### 5.0000001", 5)  # an integer gold is compared exactly
    assert is_correct("#### 0.3333333", Fraction(1, 3)) and not is_correct("#### 0.33", "0.3333333")
    assert is_correct("#### 2", "1+1\n#### 2")
    assert not is_correct("", 0) and not is_correct("2", 2) and is_correct("2", 2, "flexible")
    for gold in ("", "many", float("nan"), float("inf"), None, "#### x", "3 or 4"):
        with pytest.raises(GoldError, match="gold"):
            is_correct("#### 1", gold)


# --- Agreement with OpenAI's grader -------------------------------------------------------

OPENAI = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade-school-math, dataset.py


def openai_answer(text: str) -> str | None:
    match = OPENAI.search(text)
    return match and match.group(1).strip().replace(",", "")


def agree(entries: list[dict], count: int) -> None:
    """Both graders give each solution the same number, and the same verdict on its own gold
    and on the next one's."""
    solutions = [entry["answer"] for entry in entries]
    assert len(solutions) == count
    for own, other in zip(solutions, [*solutions[1:], solutions[0]]):
        number = Fraction(openai_answer(own))
        assert extract_answer(own) == extract_answer(own, "flexible") == number
        assert is_correct(own, own)
        assert is_correct(own, other) == (openai_answer(own) == openai_answer(other))


@pytest.mark.long
def test_agrees_with_openai_on_the_gold_solutions_of_minigsm():
    agree(load_minigsm("dev") + load_minigsm("test"), 1500)


GSM8K = Path(os.environ.get("GSM8K_DIR") or DATA / "gsm8k")


@pytest.mark.skipif(not (GSM8K / "train.jsonl").is_file(), reason="needs GSM8K_DIR")
def test_agrees_with_openai_on_the_gold_solutions_of_gsm8k():
    agree(load_gsm8k("train", GSM8K) + load_gsm8k("test", GSM8K), 8792)


# --- Properties ---------------------------------------------------------------------------

ALPHABET = "0123456789.,#$-\u2212= \n%/^()[]\\{}*eExk\u0663\u00bd\u00b2Theanswris:Qtio\ud800\u202f"
PARTS = ["####", "The answer is", "9" * 30, ",", "1,000", "-", "$", "=", ".", "\n", "Question:",
         r"\boxed{", "}", r"\frac{1}{", "/", "^", "e9", "0", " million", "or", " "]  # fmt: skip
TEXTS = st.text(ALPHABET) | st.text() | st.lists(st.sampled_from(PARTS)).map("".join)


ANSWERS = ["#### 5", "\n#### Day 3: 5", "The answer is 5.", r"\boxed{5}", "Answer: 5", "5 ", "</s>",
           "Question: 5?\n", "\n\n", "<think>5", "Wait. ", "1. a", "2. b"]  # fmt: skip
WILD = TEXTS | st.lists(st.sampled_from([
    *PARTS, "<think>", "</think>", "<|a|>", "<|channel|>final", "```python\n", "~~", "<<", ">>",
    "**", "(", "?", "How many", "Answer:", "Problem 2:\n", "### Response:", "step 2", "Day 3:",
    "- ", "3. a", "\u0663", "1 234", "1,5", "3:30", "Rs.", "minus ", "between 1 and ", "\\sqrt{",
])).map("".join)  # fmt: skip


@PROPERTY
@given(WILD)
def test_no_text_crashes_and_a_strict_answer_is_the_flexible_one(text):
    strict, flexible = extract_answer(text), extract_answer(text, "flexible")
    assert strict is None or strict == flexible
    assert flexible is None or isinstance(flexible, Fraction)


@PROPERTY
@given(TEXTS, TEXTS, st.sampled_from(["Question:", "\nQ:", "</s>", "<|im_end|>", "<|eot_id|>"]))
def test_what_comes_after_the_stop_changes_nothing(text, more, stop):
    text = "So " + text  # only what says something can end
    for mode in ("strict", "flexible"):
        assert extract_answer(text + stop + more, mode) == extract_answer(text + stop, mode)


@PROPERTY
@given(st.integers(-(10**9), 10**9), WILD | st.lists(st.sampled_from(ANSWERS)).map("".join))
def test_what_comes_after_the_line_of_the_mark_changes_nothing(number, more):
    more = more.replace("</think>", "").replace("<|channel|>final", "")
    for mode in ("strict", "flexible"):
        assert extract_answer(f"#### {number}\n{more}", mode) == number


@PROPERTY
@given(WILD, TEXTS)
def test_thinking_is_not_read_and_thinking_that_is_cut_has_no_answer(thought, said):
    thought = re.sub("</?think>|<[|]channel[|]>final", "", thought)
    for opened in ("<think>", "<thinking>", "[THINK]", "<|channel|>analysis<|message|>"):
        for mode in ("strict", "flexible"):
            assert extract_answer(opened + thought, mode) is None
    for opened in ("", "<think>", "<think>a<think>#### 5</think>"):
        for mode in ("strict", "flexible"):
            if opened or "<|" not in thought and "</s" not in thought:
                answer = extract_answer(f"{opened}{thought}</think>{said}", mode)
                assert answer == extract_answer(said, mode)


def grouped(digits: str, separator: str) -> str:
    return f"{int(digits):,}".replace(",", separator)


SEPARATORS = ["", ",", " ", "_", "'", "\u2019", "\u202f", "\u00a0"]
DECIMALS = ["", ".5", ".25", ",5", ",75"]
SIGNS = ["", "-", "\u2212", "\u2011", "\u2013", "\uff0d"]
CURRENCIES = ["", "$", "\u20ac", "Rs. ", "R$ ", "USD ", "\u00a3"]
ZEROS = ["0", "\uff10", "\u0660", "\u0966"]  # of Latin, full-width, Arabic, Devanagari digits
AFTER = ["", ".", " apples", "%", " \u20ac", "**", "\n", " (9 of them)", ", not 5"]


@PROPERTY
@given(st.integers(0, 10**12), *map(st.sampled_from, (SEPARATORS, DECIMALS, SIGNS, CURRENCIES,
                                                      ZEROS, AFTER)))  # fmt: skip
def test_every_spelling_reads_back(number, separator, decimals, sign, currency, zero, after):
    if separator == "," and decimals.startswith(","):
        separator = "."
    if separator == "." and number < 1000:
        separator = ""
    numeral = grouped(str(number), separator) + decimals
    numeral = numeral.translate({ord("0") + i: ord(zero) + i for i in range(10)})
    expected = number + Fraction("0" + decimals.replace(",", "."))
    text = f"#### {sign}{currency}{numeral}{after}"
    assert extract_answer(text) == (-expected if sign else expected)


@PROPERTY
@given(st.text("012345689.,#$-= \n()%{}*\\Theanswrisbox:"))
def test_without_a_7_nothing_is_7(text):
    """No digit 7, fraction, power or scale word: no number that equals 7, 70 or 0.7."""
    for mode in ("strict", "flexible"):
        assert not any(is_correct(text, gold, mode) for gold in (7, 70, -7, 0.7))
        assert not is_correct(text, "7", mode)


WORDS = st.sampled_from([" apples\n", ". Then ", " or ", " = ", "\n#### ", "\nThe answer is ",
                         r" \boxed{} ", "; answer: ", " (", ") "])  # fmt: skip


@PROPERTY
@given(st.lists(st.tuples(st.integers(-20, 20), WORDS)), st.integers(-20, 20))
def test_a_gold_that_is_not_among_the_numbers_is_never_found(parts, gold):
    text = "".join(f"{word}{number}" for number, word in parts)
    if gold not in [number for number, _ in parts]:
        assert not is_correct(text, gold) and not is_correct(text, gold, "flexible")


VARIANTS = [
    "#### {}", "####{}", "The answer is {}.", "the answer is: {}", r"The answer is \boxed{{{}}}",
    "#### **{}**", r"#### \({}\)", "#### 1 + 1 = {}", "#### {}.00", "#### {}%", "#### {} apples",
    "#### {}e0", "#### {}/1", "#### {}\n\nQuestion: 1?\n#### 1",
]  # fmt: skip


@PROPERTY
@given(st.integers(-(10**9), 10**9), st.sampled_from(VARIANTS),
       st.sampled_from([",", "", "\u202f"]), st.sampled_from(["", "$"]),
       st.sampled_from("-\u2212"))  # fmt: skip
def test_variants_of_the_same_number_are_correct(number, variant, comma, currency, minus):
    numeral = f"{abs(number):,}".replace(",", comma)
    text = variant.format(minus * (number < 0) + currency + numeral)
    assert is_correct(text, number) and is_correct(text, number, "flexible")
    assert not is_correct(text, number + 1) and not is_correct(text, -number or 1)


# --- Texts that attack the grader ---------------------------------------------------------

ATTACKS = ["1e999999999", "9" * 10**6, "-" * 10**6, "answer" + " " * 10**6] + [
    part * 10**5 for part in ("####", r"\boxed{", "1,", "1,111", "1,111,", r"\frac{", "1/", "10^",
                              "the answer is", "\u00bd", "</s", "1 ", "<think>", "</s>",
                              "```python\n", "1. a\n", "Question:\n", "answer: ", "1 234 ",
                              "minus ", "(", "1? ", "**1", "~~", "1 or ")]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a[:12])
def test_attacks_end_and_give_no_answer_beyond_the_caps(attack):
    for text in (attack, attack[:MAX_TEXT], f"#### {attack}", f"{attack}\n#### 5"):
        answer = extract_answer(text, "flexible")
        assert answer is None or len(str(answer)) <= 2 * extraction.MAX_DIGITS


def test_a_long_text_is_read_in_whole_lines_up_to_the_cap():
    line = "3 apples\n"
    fits = line * (MAX_TEXT // len(line))
    assert extract_answer(fits[:-20] + "\n#### 8", "flexible") == 8
    # The line of 123 is cut, and 12 is not what it says.
    text = "x" * (MAX_TEXT - 10) + "\n#### 123"
    assert extract_answer(text[: MAX_TEXT + 1] + "45") is None


def test_numbers_cost_steps_in_proportion_to_their_text():
    """Each run of digits is tried once: matches over runs, not over all their ends."""
    for unit in ("9" * 20, "1,", "1,111,", "1/", "1 ", "1e", "10^"):
        text = unit * (2000 // len(unit))
        spans = [m.span() for m in QUANTITY.finditer(text)]
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
        assert len(spans) <= len(text) / 2 + 1


def test_long_numerals_and_large_exponents_are_refused_before_they_are_computed(monkeypatch):
    def never(numeral):
        raise AssertionError(f"computed {len(numeral)} digits")

    monkeypatch.setattr(extraction, "Fraction", never)
    for text in ("9" * 61, "1" * 5000 + "/3", "1e999999999", "10^61", "2 x 10^-61"):
        assert value(QUANTITY.search(text)) is None


def test_numbers_of_a_text():
    assert numbers("3 of 1,000 and ½, not 1.2.3 " + "9" * 70) == [3, 1000, HALF]


def test_plain_keeps_lines():
    text = json.dumps(PARTS) + "\n1\u00a0000\n\u2212½\n"
    assert plain(text).count("\n") == text.count("\n")
