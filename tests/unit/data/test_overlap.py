"""Test questions in training examples, against a slow search; and what is no overlap."""

import random

from qlora_lib.data.overlap import Overlap, find_overlap, words

QUESTION = (
    "Bella bought stamps at the post office. Some of the stamps had a snowflake design, and "
    "some had a rose design. How many stamps were there in all?"
)
SHORT = "How many apples does Ava have left in all?"  # 9 words
TINY = "What is 2 + 3?"
TEST = [QUESTION, SHORT, TINY]


def kinds(*texts, ngram=13) -> tuple[int, int, int]:
    found = find_overlap([texts], TEST, ngram)
    return len(found.equal), len(found.contain), len(found.share)


def test_words_leave_out_case_spaces_and_punctuation():
    assert words("  Ava's 1,000\n(red) APPLES!") == ("ava", "s", "1", "000", "red", "apples")


def test_equal_contained_and_shared():
    assert kinds("bella  bought: " + QUESTION[13:].upper()) == (1, 0, 0)
    assert kinds("Another question?", QUESTION) == (1, 0, 0)  # any of an example's texts
    assert kinds(f"Solve this. {QUESTION} Think.") == (0, 1, 0)
    run = QUESTION.split()
    assert kinds(" ".join(["Once", *run[5:18], "then"])) == (0, 0, 1)
    assert kinds(" ".join(["Once", *run[5:17], "then"])) == (0, 0, 0)  # 12 words
    assert kinds(" ".join(["Once", *run[5:18], "then"]), ngram=None) == (0, 0, 0)
    assert kinds(f"Solve this. {QUESTION} Think.", ngram=None) == (0, 1, 0)


def test_short_questions_are_looked_for_whole_or_must_be_equal():
    assert kinds(f"She eats 2. {SHORT.lower()}") == (0, 1, 0)
    assert kinds("How many apples does Ava have left in") == (0, 0, 0)
    assert kinds("what is 2 + 3") == (1, 0, 0)
    assert kinds("Tell me, what is 2 + 3, please") == (0, 0, 0)


def test_each_example_is_counted_once_and_said():
    found = find_overlap([[QUESTION, f"x {QUESTION}"], ["nothing"], [f"x {QUESTION}"]], TEST)
    assert (found.equal, found.contain, found.share, found.found) == ([0], [2], [], {0, 2})
    text = "of 3 examples, 1 equal one of 3 test questions, 1 contain one, 0 share 13 words in a row"
    assert str(found).startswith(text)
    assert "share" not in str(Overlap(1, 1, None))


def test_it_finds_what_a_slow_search_finds():
    draw = random.Random(0)

    def text(length):
        return " ".join(draw.choice("ab") for _ in range(length))

    questions = [text(draw.randint(1, 14)) for _ in range(12)]
    examples = [[text(draw.randint(1, 40))] for _ in range(150)]
    found = find_overlap(examples, questions, ngram=10)

    def inside(short, long):
        return f" {short} " in f" {long} "

    for i, (example,) in enumerate(examples):
        equal = example in questions
        contains = any(len(q.split()) >= 8 and inside(q, example) for q in questions)
        asked = [q.split() for q in questions]
        runs = {" ".join(q[k : k + 10]) for q in asked for k in range(len(q) - 9)}
        shares = any(inside(run, example) for run in runs)
        want = [equal, contains and not equal, shares and not contains and not equal]
        assert [i in found.equal, i in found.contain, i in found.share] == want
    assert found.contain and found.share  # there was something to find
