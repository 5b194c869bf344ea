"""The template and the gold answers."""

from fractions import Fraction

import pytest

from qlora_lib.data import gsm8k

ENTRY = {
    "question": "Ava has 1,000 apples and sells half.",
    "answer": "She sells 1000/2=<<1000/2=500>>500 apples.\n#### 500",
}


def test_format_strips_calculator_notes_unless_told():
    prompt, target = gsm8k.format_gsm8k(ENTRY)
    assert prompt == "Question: Ava has 1,000 apples and sells half.\nAnswer:\n"
    assert target == "She sells 1000/2=500 apples.\n#### 500"
    assert gsm8k.format_gsm8k(ENTRY, notes=True)[1] == ENTRY["answer"]


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("#### 5", 5),
        ("a\n#### 1,234", 1234),
        ("#### -3", -3),
        ("#### \u22127", -7),
        ("####12", 12),
        ("#### 2.50", Fraction(5, 2)),
        ("#### $2,880,000", 2880000),
    ],
)
def test_gold_answers_are_read(answer, gold):
    assert gsm8k.parse_gold(answer) == gold


@pytest.mark.parametrize("answer", ["42", "#### ", "#### many", "#### 3 or 4", "", "#### 1,2"])
def test_unparsable_gold_is_an_error(answer):
    with pytest.raises(ValueError, match="N`|`answer`"):
        gsm8k.format_gsm8k({"question": "Q?", "answer": answer})


def test_entry_without_question_is_an_error():
    with pytest.raises(ValueError, match="`question`"):
        gsm8k.format_gsm8k({"answer": "#### 1"})


def test_a_context_beside_the_question_is_not_lost_in_silence():
    entry = {"question": "How much for 3 eggs?", "answer": "#### 6"}
    assert gsm8k.format_gsm8k(entry | {"context": "", "id": 3}) == gsm8k.format_gsm8k(entry)
    with pytest.raises(ValueError, match="`context` 'An egg costs 2.' would be lost"):
        gsm8k.format_gsm8k(entry | {"context": "An egg costs 2."})
