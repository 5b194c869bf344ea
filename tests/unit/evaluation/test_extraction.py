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


# --- Each word and each sign of the policy ------------------------------------------------


def reads(text: str, answer, mode: str = "flexible") -> None:
    assert extract_answer(text, mode) == answer, text


@pytest.mark.parametrize("opened, closed", [
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"), ("<thought>", "</thought>"), ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"), ("<seed:think>", "</seed:think>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel|>commentary", "<|channel|>final"), ("<|channel>thought", "<|channel>final"),
    ("", "assistantfinal"), ("", "</think>"), ("", "<|end_of_thought|>"),
])  # fmt: skip
def test_thinking_in_all_its_tags(opened, closed):
    for mode, seven, five in (("flexible", "So 7", "So 5"), ("strict", "#### 7", "#### 5")):
        reads(f"{opened}{five}{closed}{seven}", 7, mode)
        reads(f"{opened}\n{five}\n{closed}\n\n{seven}", 7, mode)
        reads(f"{opened}{five}{closed}", None, mode)
        if opened:
            reads(f"{seven} {opened}{five}", 7, mode)


def test_tags_of_thinking_nest_and_other_tags_are_no_thinking():
    reads("<think>a<think>#### 5</think>#### 6</think>#### 7", 7, "strict")
    reads("<think>a<think>#### 5</think>#### 6", None, "strict")
    reads("a</think>#### 6</think>#### 7", 7, "strict")
    reads("<sub>6</sub> and 7", 7)
    reads("(think) so 7", 7)


@pytest.mark.parametrize("end", [
    "</s>", "<s>", "<eos>", "<bos>", "<end_of_turn>", "<start_of_turn>", "<start_of_turn>model",
    "[INST]", "[/INST]", "<|im_end|>", "<|x|>", "<|" + "x" * 40 + "|>", "</S>",
])  # fmt: skip
def test_end_tokens_end_what_has_been_said_and_nothing_before(end):
    reads(f"It is 7{end} 8", 7)
    reads(f"{end}\nIt is 7", 7)
    reads(f" {end}{end} It is 7{end} 8{end} 9", 7)
    reads(f"<think>5{end}6</think>It is 7", 7)  # not within thinking


def test_what_only_looks_like_an_end_token_is_read():
    for text in ("<|" + "x" * 41 + "|>", "<||>", "<|a b|>", "s>", "<b>", "INST"):
        reads(f"It is 7 {text} 8", 8)
    reads("<start_of_turn>model5 and 7<eos>8", 7)
    reads("<|im_start|>assistant\nIt is 7", 7)


LANGUAGES = "python py javascript js java cpp c bash sh sql r rust go tool_code".split()


@pytest.mark.parametrize("language", [*LANGUAGES, "Python"])
def test_program_code_is_not_read(language):
    reads(f"It is 7\n```{language}\nprint(5)\n\n5\n```", 7)
    reads(f"It is 7\n```{language} title\nprint(5)", 7)  # cut
    reads(f"```{language}\n5\n``` It is 7\n```{language}\n5\n```", 7)
    reads(f"It is 7. ```{language} 5```", 5)  # no fence: it does not begin the line
    reads(f"It is 7\n```{language}\nf'```5'\n6\n```", 7)  # nor does this one end it


def test_other_fences_and_marks_are_read():
    for fence in ("```", "```text", "```csv", "```json", "```pythonic"):
        reads(f"It is 7\n{fence}\n8\n```", 8)
    reads("It is 7 ~~5~~", 7)
    reads("It is 7 ~~5 and 6~~ <<3*4=12>> <<>>", 7)
    reads("It is 7 ~~~~", 7)
    reads("It is ~8", 8)
    reads("It is 7 ~~5\n8~~", 8)
    reads("It is 7 <<5\n8>>", 8)


TURNS = ("question problem exercise example task input instruction frage aufgabe pregunta pergunta "
         "domanda вопрос задача 问题 問題 human user").split()  # fmt: skip


@pytest.mark.parametrize("label", [*TURNS, "Next question", "NEXT PROBLEM", "User"])
def test_a_label_of_a_new_turn_ends_the_completion(label):
    for colon in (":", "：", "", ":**", " :"):
        reads(f"It is 7\n{label}{colon}\n8", 7)
        reads(f"It is 7\n**{label.title()}{colon}\n8", 7)
    reads(f"It is 7\n> # {label}: what is 8?", 7)
    reads(f"It is 7, {label}: no, 8", 8)
    reads(f"It is 7\n{label} is 8", 8)
    reads(f"It is 7\nThe {label}: 8", 8)
    if label not in ("human", "user", "User"):
        for number in ("2:", " 2:", " #2:", " 12.", " 2", " 2**", "2 :"):
            reads(f"It is 7\n{label}{number}\n8", 7)
        reads(f"It is 7\n{label} 8 is 9", 9)
        reads(f"It is 7\n{label}. 9", 9)


def test_a_question_and_a_heading_end_the_completion():
    for turn in ("Question:", " Q:", "\n### Response", "\n # instruction", "\n#Input here"):
        reads(f"It is 7{turn} 8", 7)
    for text in ("question:", "FAQ:", "\n### Responses", "\n### Result", "### Response"):
        reads(f"It is 7 and {text} 8", 8)


REPLIES = ["Answer", "answer", "Solution", "Response", "Assistant", "A"]


@pytest.mark.parametrize("label", REPLIES)
def test_a_repeated_question_is_not_read_but_what_answers_it(label):
    for question in ("Question: 5 apples", "\nQ: 5 apples", "Problem 5:\n5 apples"):
        for colon in (":", "：", ":**", "** :", " : "):
            reads(f"{question}\n{label}{colon} it is 7", 7)
        reads(f"{question}\n\nIt is 7", 7)
        reads(f"{question}\n \t\nIt is 7", 7)
        reads(f"{question}\nIt is 7", None)
        reads(f"{question}\n{label}: it is 7\nQuestion: 5?\n{label}: it is 6", None)
    reads(f"Question: 5 apples x{label}: it is 7", None)
    # The first empty line counts only where nothing answers by name.
    reads(f"Question: 5 apples\n\n5 pears\n{label}: it is 7 or so", 7)


ANSWERS_SAID = {  # each language of "answer", with its "is"
    "answer": "is", "ans": "is", "réponse": "est", "antwort": "ist", "Antwort": "lautet",
    "respuesta": "es", "resposta": "é", "risposta": "è", "antwoord": "is", "svaret": "är",
    "ответ": "равен", "उत्तर": "है", "الجواب": "هو", "الإجابة": "هي",
    "odpowiedź": None, "cevap": None, "đáp án": None, "答案": "是", "答え": "は", "답": "은",
}  # fmt: skip


@pytest.mark.parametrize("word", ANSWERS_SAID)
def test_answers_in_other_languages(word):
    verb = ANSWERS_SAID[word]
    for said in (":", "：", "=", " =>", '": ', ">", "**:"):
        reads(f"5 {word}{said}7 of 9", 7)
    if verb:
        space = "" if ord(word[0]) > 0x3000 else " "
        reads(f"5 {word}{space}{verb} 7 of 9", 7)
        if space:
            reads(f"5 {word} {verb}x 7 of 9", 9)
    reads(f"{word}:\n\n7 of 9", 7)
    reads(f"{word}: x\n7 of 9", 9)
    if word.isascii():
        reads(f"an{word}: 7 of 9", 9)
    reads(f"Question: 5?\n{word}: it is 7", 7)


def test_the_answer_is_said_in_english_too():
    for verb in ("is", "are", "equals", "IS"):
        reads(f"The answer {verb} 7 of 9", 7)
        reads(f"The answer {verb} not 7 of 9", 9)
    reads("The answer is not x = 7 of 9", 9)
    reads("The answer is notes = 7 of 9", 7)
    reads("The answer is what is 7 of 9", None)  # of two verbs the first one
    for said in ("The answer isn't 7", "Bathe answer is 7", "The answer are 7", "The answer: 7"):
        reads(said, 7)
        reads(said, None, "strict")
    for words in ("", " to it", " that we get now", " to all of this"):
        reads(f"Answer{words} is 7 of 9", 7)
    reads("Answer to all of this too is 7 of 9", 9)
    for particle in "은는":
        reads(f"답{particle} 7 of 9", 7)
    for particle in "은는は是为為":
        reads(f"答案{particle}7 of 9", 7)
    reads("a/answer: 7 of 9", 9)  # a closing tag


NUMERALS = {
    "€5": 5, "£5": 5, "¥5": 5, "₹5": 5, "₩5": 5, "₽5": 5, "＄5": 5, "US$5": 5, "CA$5": 5,
    "AU$5": 5, "HK$ 5": 5, "R$5": 5, "A$5": 5, "C$5": 5, "Rs 5": 5, "Rs. 5": 5, "Rs5": 5, "Rs.5": 5,
    "USD 5": 5, "EUR 5": 5, "GBP5": 5, "INR 5": 5, "CHF 5": 5, "CAD 5": 5, "AUD 5": 5,
    "BRL 5": 5, "USD -5": -5, "-€5": -5, "€-5": -5,
    "2·3": None, "2⋅3": None, "2×3": None, r"2\times3": None, r"2\cdot 3": None,
    "\u20105": -5, "\u20115": -5, "\u20125": -5, "\u20135": -5, "\u22125": -5,
    "\ufe635": -5, "\uff0d5": -5, "minus 5": -5, "negative $5": -5, "Minus  5": -5,
    "1\u00a0234": 1234, "1\u2009234": 1234, "1\u202f234": 1234, "1’234": 1234, "1'234": 1234,
    "1_234_567": 1234567, "1 234.5": Fraction(2469, 2), "1٬234": 1234, "1٫5": Fraction(3, 2),
    "1,23,456": 123456, "1,23,45,678": 12345678, "12,34,567.5": Fraction(2469135, 2),
    "1.234,50": Fraction(2469, 2), "1.234.567,5": Fraction(2469135, 2), "1.234.567": 1234567,
    "1 234,50": Fraction(2469, 2), "3,5": Fraction(7, 2), "12,50": Fraction(25, 2),
    "0,123": Fraction(123, 1000), "1.234": Fraction(617, 500), "12,345": 12345,
    "0,1234": Fraction(617, 5000), "1,2345": None, "012,345": None, "1 23": None, "1.23,4": None,
    "12'34": None, "1234,567": None, "1 234_567": None,
    "½": HALF, "1½": Fraction(3, 2), "10²": 100, "2⁴": 16, "2⁵": 32, "2⁶": 64, "2⁷": 128,
    "2⁸": 256, "2⁹": 512, "1⁰": 1, "3¹": 3, "10⁻¹": Fraction(1, 10), "2**4": 16, "2 ** 4": None,
    r"\frac{1}{2}": HALF, r"\dfrac{1}{2}": HALF, r"\tfrac12": HALF, r"\frac 1 2": HALF,
    r"\frac{ 1 }{ 2 }": HALF, r"3\frac12": Fraction(7, 2),
    r"\frac{1.5}{3}": HALF, r"\frac{1,000}{2}": 500, r"\frac123": None,
    "$3/$4": Fraction(3, 4), ".5/.25": 2, "1e3": 1000, "1E-1": Fraction(1, 10), "1e+2": 100,
    "2 x 10^3": 2000, "2x10^3": 2000, "2*10^{-1}": Fraction(1, 5), "10^{3}": 1000,
    "10^-1": Fraction(1, 10),
    "5°": 5, r"5^\circ": 5, r"5^{\circ}": 5, "__5__": 5, "_5_": 5, "5 hundred": 500,
    "5 Thousand": 5000, "5 millions": 5 * 10**6, "5 billion": 5 * 10**9, "5 trillion": 5 * 10**12,
    "5 lakh": 5 * 10**5, "5 crores": 5 * 10**7, "5 hundred thousand": 5 * 10**5,
    "5k": 5000, "5K": 5000, "5万": 5 * 10**4, "5亿": 5 * 10**8, "$5M": 5 * 10**6,
    "$5 m": 5 * 10**6,
    "$5B": 5 * 10**9, "$5bn": 5 * 10**9, "5M": 5, "5 m": 5, "5kg": 5, "$5mm": 5, "5 thousandth": 5,
    "-$2M": -2 * 10**6, "-2 m": -2, "-2bn": -2, "-2 B": -2,
    "10-3": None, "10 -3": None, "5 to 7": None, "between 5 and 7": None,
    "B12": None, "x_1": None, "m^2": None, "m^{2}": None, "é5": None, "COVID-19": None,
    "√5": None, "√(5)": None, r"\sqrt5": None, r"\sqrt{5}": None, "sqrt 5": None, "5π": None,
    "5 pi": None, r"5\pi": None, "5 pies": 5, "3:30": None, "2:3": None,
    "12/25/2020": None,
    "1.2.3": None, "1st": None, "2nd": None, "3rd": None, "4th": None, "5 thick": 5, "5/0": None,
    "Step 5": None, "part 5": None, "Case 5": None, "option #5": None, "equation 5": None,
    "problem 5": None, "example5": None, "Day 5:": None, "steps 5": 5,
    "9" * 60: int("9" * 60), "9" * 61: None, "10^60": 10**60, "10^61": None,
    "1e-60": Fraction(1, 10**60), "1e-61": None,
}  # fmt: skip


@pytest.mark.parametrize("numeral", NUMERALS)
def test_what_is_a_number_and_which(numeral):
    reads(f"#### {numeral}", NUMERALS[numeral], "strict")

SPANS = {  # what a span states that begins with #### or "The answer is"
    # words before the number
    "about 7 of 9": 7, "approx. 7 of 9": 7, "approximately 7 of 9": 7, "around 7 of 9": 7,
    "exactly 7 of 9": 7, "only 7 of 9": 7, "just 7 of 9": 7, "indeed 7 of 9": 7,
    "simply 7 of 9": 7, "therefore 7 of 9": 7, "thus 7 of 9": 7, "x = 7 of 9": 7,
    "x 7 of 9": 7, r"\text{7} of 9": 7, r"$\mathbf 7$ of 9": 7, "just about **7** of 9": 7,
    "thusly 7 of 9": None, "apples 7": 7, "apples 7 of 7": 7, "apples 7 of 8": None,
    "apples": None,
    # the clause, and which side of "="
    "3 + 4 = 7 because 9 = 9": 7, "3 + 4 = 7 since 9 = 9": 7, "3 + 4 = 7 as 9 = 9": 7,
    "3 + 4 = 7 denn 9 = 9": 7, "3 + 4 = 7 car 9 = 9": 7, "3 + 4 = 7 porque 9 = 9": 7,
    "3 + 4 = 7; 9 = 9": 7, "3 + 4 = 7 (9 = 9)": 7, "3 + 4 = 7, then 9 = 9": 7,
    "3 + 4 = 7 asking 9 = 9": 9, "3 + 4 = 7,9 = 8": 8, "x = 7 apples for 9": 7,
    "7 = 3 + 4": 7, "7 = 3 - 4": 7, "7 = 3*4": 7, "7 = 3 x 4": 7, "7 = 3 ÷ 4": 7,
    "7 = (3) + (4)": 7, "7 = 3 + $4": 7, "7 = x": 7, "6 = 7 = 3 + 4": 7, "6 = 2 x 10^3": 2000,
    "= 7": 7, "7 =": 7, "- 7": -7, "** - 7": -7, "6 = - 7": -7, ": - $7": -7, "6 - 7": None,
    # two values
    "5 or 6": None, "5 and 6": None, "5 times 6": None, "5 oder 6": None, "5 und 6": None,
    "5 ou 6": None, "5 et 6": None, "5 o 6": None, "5 y 6": None, "5 e 6": None,
    "5 apples or 6": None, "5 apples and 6": None, "5 apples to 6": None, "5 pies times 6": None,
    "5 Pfund oder 6": None, "5 Pfund und 6": None, "5 l ou 6": None, "5 l et 6": None,
    "5 l o 6": None, "5 l y 6": None, "5 l e 6": None,
    "5 apples of 6": 5, "5 for 6": 5, "5 or 5": 5, "5 apples and 5": 5, "5 ordinary 6": 5,
    "5, 6": None, "5, 6 or 7": None, "5, or 7": None, "5, not 7": 5, "5 & 6": None, "5~6": None,
    "5 ** 6": None, "**5** - **6**": None, "5/6/7": None, "5 x 6": None, "5 ÷ 6": None,
    "5 + 6": None, "5 $6": None, "`5` `6`": None, "5_6": None,
    "5 hours 20": None, "5 hour 20": None, "5 hrs. 20": None, "5 hr 20": None, "5 h 20": None,
    "5 minutes 20": None, "5 minute 20": None, "5 min. 20": None, "5 days 2": None,
    "5 day 2": None, "5 weeks 2": None, "5 week 2": None, "5 years 2": None, "5 year 2": None,
    "5 feet 10": None, "5 foot 10": None, "5 ft. 10": None, "5 pounds 2": None,
    "5 pound 2": None, "5 lbs 2": None, "5 lb 2": None, "5 lbs. 2": None, "5 lb. 2": None,
    "5 hr. 20": None, "5 hrs. 20 or so": None, "5 dollars 20": None,
    "5 dollar 20": None, "5 Dollars 20": None, "5 inches 20": 5,
    # the end of the sentence, and of the line
    "7. But 8 or 9": 7, "7! But 8 or 9": 7, "7? But 8 or 9": 7, "7。8 or 9": 7, '7." 8 or 9': 7,
    "7.) 8 or 9": 7, "**7.** 8 or 9": 7, "7！8 or 9": 7, "7？8 or 9": 7, "7.5 for 9": 7.5,
    "7\n8 or 9": 7, "approx. 7 or 9": None, '7, "check": 8 or 9': 7, '7, "8 or 9': 7,
    "ca. 7 or 9": None, "No. 7 or 9": None, "Nr. 7 or 9": None, "5 ft. 7 or 9": None,
    "5 oz. 7": 5,
}  # fmt: skip


@pytest.mark.parametrize("span", SPANS)
def test_what_a_span_states(span):
    for stated in ("####", "The answer is"):
        reads(f"{stated} {span}", SPANS[span], "strict")


def test_an_answer_in_words_is_none_and_hides_what_stands_before_it():
    reads("It is 7. The answer is many.", None)
    reads("It is 7. The answer is many. Or 8.", 8)
    reads("It is 7. #### many\n#### few\n8", 8)
    reads("The answer is 7. The answer is clear.", 7)
    reads("So 7. The answer is ... .", 7)  # no words, either


def test_other_words_before_the_number_ask_that_no_number_follows():
    for said in ("The answer is obviously 7", "The answer is, by adding, 7"):
        reads(f"{said}.", 7, "strict")
        reads(f"{said}. Check: 8", None, "strict")
        reads(f"{said}. Check: 8", 8)


LAST = {  # where nothing is stated: the last sentence with a number
    "It is 7. Is it 8?": 7, "It is 7. How many?": None, "It is 7. How much?": None,
    "It is 7. And what then?": None, "It is 7. Somewhat?": 7, "It is 7. Why?": 7,
    "What is 6? It is 7.": 7, "It is 7. What a day.": 7, "8?": None,
    "It is 7 (of 9)": 7, "(7)": 7, "It is 7. f(9)": 9, "It is 7 (of\n9)": 9, "(8) It is 7": 7,
    "It is 7 (9) or so": 7, "6 (9)\n7 (8)": 7,
    "It is **7** of 9": 7, "**6** and **7** of 9": 7, "**x** of 7": 7, "**7\n** of 9": 9,
    "8 is **5 or 6**": None, "5 or 6": None, "5 apples or 6": None, "5 or 6 and 7": 7,
    "5 and 6": 6, "5 to 6": None, "5-6": None, "5 + 6 = 7": 7, "5 hours 6": None, "5 of 6": 6,
    "5 or 5": 5, "It is 7. Fine": 7, "It is 7\n\nFine": 7, "It is $7.50.": 7.5,
    "1. 7 eggs\n2. So": 7, "1) 7 eggs\n2) So": 7, "2. So": 2, "8. So": 8,
    "7. So\n8. Then": None, "- 1. So": None, "> **1. So**": None, "* 1. So": None,
    "1. So\n3. Then 7": 7, "1.So": 1, "999. So\n998. So": None, "1000. So\n1001. So": 1001,
    "1. 7": 7, "7\n1.": 1, "**It is 7.** Is it 8?": 7, "_It is 7._ Is it 8?": 7,
    '"It is 7." Is it 8?': 7, "It is 7! Is it 8?": 7, "It is 7。Is it 8?": 7,
    "It is 7.Is it 8?": None, "It is 7. ** ": 7,
}  # fmt: skip


@pytest.mark.parametrize("text", LAST)
def test_the_last_number_where_nothing_is_stated(text):
    reads(text, LAST[text])


def test_a_statement_reaches_to_the_next_one_and_to_the_end_of_its_line():
    reads("#### x #### 7", 7)
    reads("#### x\n7 of 9", 9)
    reads("##### 7\n8 of 9", 9)
    reads("### 7\n8 of 9", 9)
    reads("Answer: 6, answer: 7 of 9", 7)
    reads('{"answer": 7, "steps": 9}', 7)
    reads('{"answer": "7", "steps": "9"}', 7)
    reads("<answer>7</answer> of 9", 7)
    reads("**Final Answer**\n\nAnswer: **7** of 9", 7)
    reads("Answer:\n\n  **7** of 9", 7)
    reads("Answer: \n$-7$ of 9", -7)
    reads("Answer:\nit is 7\nor 9", 9)


def test_boxes():
    reads(r"\boxed{7} of 9", 7)
    reads(r"\boxed {7} of 9", 7)
    reads(r"\fbox{7} of 9", 7)
    reads(r"boxed{7} of 9", 9)
    reads(r"\boxed{5}, \boxed{7} of 9", 7)
    reads(r"{\boxed{{7}}} of 9", 7)
    reads(r"It is 7. \boxed{8", None)
    reads(r"It is 7. \boxed{8} \boxed{", None)
    reads(r"It is 7. \boxed{}", 7)


def test_golds_that_are_no_integers_have_a_tolerance():
    for gold in (HALF, -HALF):
        for off in (1, -1):
            assert is_correct(f"#### {float(gold) + off * 1e-6:.6f}", gold)
            assert not is_correct(f"#### {float(gold) + off * 1.1e-6:.7f}", gold)
    assert not is_correct("#### none", HALF)


def test_numbers_reads_no_more_than_the_cap():
    assert numbers("7 " * MAX_TEXT) == [7] * (MAX_TEXT // 2)
    assert numbers("x" * (MAX_TEXT - 1) + "78") == []
    assert numbers(" " * (MAX_TEXT - 1) + "78") == [7]

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
