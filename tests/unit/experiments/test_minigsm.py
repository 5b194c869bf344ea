"""mini-GSM: format, arithmetic, disjoint splits, and the bundled files."""
import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from experiments.toy import minigsm
from experiments.toy.minigsm import KINDS

DATA = Path(__file__).parents[3] / "data" / "minigsm"
PINNED = ["dev", "train", "train", "dev", "dev", *["train"] * 7]
NOTE = re.compile(r"(\d+)([-+*/])(\d+)=(\$?)<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")

# Each kind's result in one expression, written apart from the generator's steps.
EXPECTED = {
    "gain_lose": lambda a, b, c: a + b - c,
    "containers": lambda a, b, c: a * b - c,
    "shopping": lambda a, b, c, d: a * b + c * d,
    "share": lambda a, b, k: (a + b) / k,
    "times": lambda a, k, c: (k + 1) * a - c,
    "weekly": lambda a, d, w: a * d * w,
    "change": lambda a, b, c, w: w - (a * b + c),
    "part": lambda f, a, b: a - a / f + b,
    "wages": lambda a, h, d, c: a * h * d - c,
    "compare": lambda a, b, c: 3 * a + 2 * b - c,
    "reading": lambda a, d, e, p: (p - a * d) / e,
    "packing": lambda a, b, c, d: (a * b - c) / d,
}


@pytest.fixture(scope="module")
def drawn():
    return minigsm.draw("train", seed=3, n=2400)


def numbers_in(question):
    return frozenset(re.findall(r"\d+", question))


def test_at_least_ten_kinds_all_drawn_equally_often(drawn):
    assert len(minigsm.kinds()) >= 10
    for kind in minigsm.kinds():
        assert sum(p.kind == kind for p in drawn) == len(drawn) // len(minigsm.kinds())


def test_answers_agree_with_one_expression_for_each_kind(drawn):
    assert set(EXPECTED) == set(minigsm.kinds())
    for problem in drawn:
        final = minigsm.render(problem)["answer"].split("#### ")[1]
        assert int(final) == EXPECTED[problem.kind](**problem.numbers), problem


def test_answers_have_gsm8k_format(drawn):
    for problem in drawn:
        *lines, last = minigsm.render(problem)["answer"].split("\n")
        assert 2 <= len(lines) <= 4
        assert re.fullmatch(r"#### \d+", last)
        for line in lines:
            assert line.count("<<") == 1
            x, op, y, _, *note, result = NOTE.search(line).groups()
            assert note == [x, op, y, result]
            value = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y),
                     "/": int(x) / int(y)}[op]
            assert value == int(result) and 2 <= value < 1000
        assert result == last.split()[1]


def test_step_names_never_hide_a_number():
    for kind in KINDS:
        numbers = set(kind.draw(random.Random(0)))
        names = [step.name for step in kind.steps]
        assert not numbers & set(names) and len(set(names)) == len(names), kind.name
        known = set(numbers)
        for step in kind.steps:
            assert {step.left, step.right} <= known, (kind.name, step.name)
            known.add(step.name)


def test_every_number_of_a_problem_stands_in_its_question(drawn):
    for problem in drawn:
        said = {str(v) for k, v in problem.numbers.items() if k != "f"}
        assert numbers_in(minigsm.question_of(problem)) == said


def test_wordings_are_all_used_and_filled(drawn):
    for kind in KINDS:
        wordings = {p.wording for p in drawn if p.kind == kind.name}
        assert len(wordings) == len(kind.bodies) * len(kind.asks) * 2
    for problem in drawn:
        entry = minigsm.render(problem)
        assert not re.search(r"[{}]|  | \.|\b1 \w+s\b", entry["question"] + entry["answer"])


@pytest.mark.long
def test_no_text_and_no_numbers_of_dev_or_test_occur_in_another_split():
    found = {split: [entry["question"] for seed in (0, 1, 2025)
                     for entry in minigsm.problems(split, seed, 600)]
             for split in minigsm.SPLITS}
    for one, other in (("train", "test"), ("train", "dev"), ("dev", "test")):
        assert not set(found[one]) & set(found[other])
        assert not {numbers_in(q) for q in found[one]} & {numbers_in(q) for q in found[other]}


def test_split_depends_on_the_numbers_alone():
    assert minigsm.split_of("Ava has 3 and 14.") == minigsm.split_of("14 cards for $3, 3 times")
    # Pinned, so that a change of the hash cannot move test problems into train unseen.
    assert [minigsm.split_of(f"{n}, {n + 21} and 7") for n in range(11, 23)] == PINNED


def test_questions_are_distinct_and_the_seed_decides():
    first = minigsm.problems("dev", 5, 300)
    assert len({entry["question"] for entry in first}) == 300
    assert first == minigsm.problems("dev", 5, 300)
    assert first != minigsm.problems("dev", 6, 300)


def test_labelled_gives_the_same_entries_with_their_kinds():
    pairs = list(minigsm.labelled("test", 5, 60))
    assert [entry for _, entry in pairs] == minigsm.problems("test", 5, 60)
    assert {kind for kind, _ in pairs} == set(minigsm.kinds())


def test_other_numbers_keep_the_wording(drawn):
    problem = next(p for p in drawn if p.kind == "wages")
    other = next(p for p in drawn if p.kind == "wages" and p.numbers != problem.numbers)
    changed = minigsm.render(dataclasses.replace(problem, numbers=other.numbers))
    same = minigsm.render(problem)
    assert changed != same
    for key in ("question", "answer"):
        assert re.sub(r"\d+", "N", changed[key]) == re.sub(r"\d+", "N", same[key])
    assert int(changed["answer"].split("#### ")[1]) == EXPECTED["wages"](**other.numbers)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'valid'.*train.*dev.*test"):
        minigsm.draw("valid", 0, 1)


@pytest.fixture(scope="module")
def tests():
    return minigsm.draw("test", minigsm.SEED, 1000)


@pytest.mark.parametrize("variant", minigsm.VARIANTS)
def test_a_variant_tells_the_same_stories_with_other_numbers(tests, variant):
    varied = minigsm.vary(tests, variant)
    assert len(varied) == len(tests)
    for one, other in zip(tests, varied):
        assert (one.kind, one.wording, one.slots) == (other.kind, other.wording, other.slots)
        before, after = minigsm.render(one), minigsm.render(other)
        for key in ("question", "answer"):
            assert re.sub(r"\d+", "N", before[key]) == re.sub(r"\d+", "N", after[key])
        result = int(after["answer"].split("#### ")[1])
        assert result == EXPECTED[other.kind](**other.numbers) != int(before["answer"].split()[-1])
    questions = [minigsm.question_of(p) for p in varied]
    assert len(set(questions)) == 1000
    assert not set(questions) & {minigsm.question_of(p) for p in tests}
    assert minigsm.vary(tests[:50], variant) == varied[:50]


def test_changed_numbers_stay_in_the_test_split_and_its_ranges(tests):
    train = {frozenset(re.findall(r"\d+", e["question"])) for e in minigsm.problems("train")}
    for problem in minigsm.vary(tests, "test_changed"):
        question = minigsm.question_of(problem)
        assert minigsm.split_of(question) == "test" and numbers_in(question) not in train
        assert all(2 <= value < 1000 for *_, value in minigsm.solve(problem))


def test_larger_numbers_are_above_those_of_training(tests, drawn):
    """`a` (in "share" k) exceeds all that training draws; steps are exact, results 2 to 9,999."""
    seen = {}
    for p in drawn:
        for key, number in p.numbers.items():
            seen[p.kind, key] = max(number, seen.get((p.kind, key), 0))
    longest = 0
    for problem in minigsm.vary(tests, "test_larger"):
        key = "k" if problem.kind == "share" else "a"
        assert problem.numbers[key] > seen[problem.kind, key], problem
        for step, x, y, value in minigsm.solve(problem):
            assert 2 <= value <= 9999 and (step.op != "/" or x % y == 0), problem
            longest = max(longest, value)
    assert longest > 9000


def test_unknown_variant_is_refused(tests):
    with pytest.raises(ValueError, match="'test'.*test_changed.*test_larger"):
        minigsm.vary(tests, "test")


@pytest.mark.long
@pytest.mark.parametrize("split, size", [("train", 6000), ("dev", 500), ("test", 1000),
                                         ("test_changed", 1000), ("test_larger", 1000)])
def test_bundled_files_are_what_the_generator_makes(split, size):
    lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == size
    assert [json.loads(line) for line in lines] == minigsm.problems(split)
