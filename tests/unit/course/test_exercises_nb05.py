"""Notebook 05's exercises: the twenty completions that a reader grades have the policy's labels and
rules; the strict reader agrees with the library; wrong answers are refused and told why, unusual
right ones pass."""
import itertools
import math
import re
from collections import Counter
from fractions import Fraction

import pytest

from course.kit.exercise import check, registered
from course.nb05 import exercises as nb05
from qlora_lib import extract_answer
from qlora_lib.base.paths import DATA, ROOT
from qlora_lib.base.statistics import mcnemar
from qlora_lib.data.gsm8k import NUMBER, to_number
from qlora_lib.data.rows import read_jsonl

POLICY = (ROOT / "docs" / "EXTRACTION.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d)\. (.*?)(?=^## |\Z)", POLICY, re.M | re.S))
RULES = sorted({rule for rules in nb05._MISREAD.values() for rule in rules})


def plain(text):
    return " ".join(text.replace("**", "").split()).lower()


def test_twenty_completions_each_with_what_is_often_misread():
    assert len(nb05._TWENTY) == 20 and sorted(nb05._MISREAD) == list(range(1, 21))
    for i, rules in nb05._MISREAD.items():
        reads = [read for found in rules.values() for read in found]
        assert nb05.reading(i) not in reads and len(set(reads)) == len(reads) >= 2
    assert nb05.reading(15) == (None, 1234.5) and nb05.reading(14) == (-5, -5)


@pytest.mark.parametrize("section, words", RULES)
def test_each_rule_is_quoted_from_its_section_of_the_policy(section, words):
    assert plain(words) in plain(SECTIONS[section[0]])
    if "." in section:  # the item of that number
        item = re.search(rf"^{section[2:]}\. .*?(?=^\d\. |\Z)", SECTIONS[section[0]], re.M | re.S)
        assert plain(words) in plain(item.group())


def test_the_strict_reader_of_the_exercise_reads_its_cases_as_the_library_does():
    for make, _ in registered()["strict_answers"].cases:
        texts, value = make(None)
        assert nb05.strict_answers(texts, value) == list(map(extract_answer, texts))
    for make, _ in registered()["stated_value"].cases:
        (span,) = make(None)
        assert nb05.stated_value(span) == extract_answer(f"####{span}")


def test_on_real_completions_the_library_reads_what_a_careful_grader_does_but_lists_of_options():
    rows = read_jsonl(DATA / "results" / "real-completions.jsonl")
    assert len(rows) == 20 and len({row["model"] for row in rows}) >= 4
    otherwise = []
    for row in rows:
        for mode in ("strict", "flexible"):
            label = None if row[mode] is None else Fraction(row[mode])
            if extract_answer(row["completion"], mode) != label:
                otherwise.append((mode, row["completion"].lstrip()[:2], label))
    assert otherwise == 3 * [("flexible", "A:", None)]  # docs/EXTRACTION.md says so


def stated(span):
    """`stated_value` as a learner may write it, without its last two rules."""
    match = NUMBER.search(span.split("=")[-1])
    return match and to_number(match.group())


def joined(by=r"[-+*/x]|or\b|to\b|and\b", currency=r"\$?", letters="[A-Za-z]"):
    """`stated_value`, whose second number is joined `by` something; `letters` make a label."""
    def mine(span):
        part = span.split("=")[-1]
        match = NUMBER.search(part)
        if match is None or re.search(letters, part[:match.start()]):
            return None
        second = re.match(rf"\s*(?:{by})\s*{currency}\d", part[match.end():])
        return None if second else to_number(match.group())
    return mine


def in_sentences(find, unless=lambda text: False):
    """Step 3, whose statements "The answer is N" `find` gives, of a text."""
    def mine(completions, value):
        answers = []
        for text in map(nb05._spoken, completions):
            marked = [v for v in map(value, re.findall("####(.*)", text)) if v is not None]
            said = [] if unless(text) else find(text)
            answers.append(marked[0] if marked else value(said[-1]) if said else None)
        return answers
    return mine


def reader(line, spoken=lambda text: text, keep=lambda v: v is not None):
    """Step 3 as a loop over lines; `line` is a function of (line, value)."""
    def mine(completions, value):
        answers = []
        for text in completions:
            found = [line(each, value) for each in spoken(text).split("\n") if "####" in each]
            found = [v for v in found if keep(v)]
            answers.append(found[0] if found else None)
        return answers
    return mine


def changed(change, **parts):
    """Step 3 as it should be, but for `change`, a function of a text before it is read."""
    return lambda completions, value: [
        nb05._strictly(change(text), value=value, **parts) for text in completions]


def tosses(p):
    """Exercise 4; `p` is a function of (only a, only b, questions)."""
    def mine(a, b):
        pairs = Counter(zip(a, b))
        first, second = pairs["1", "0"], pairs["0", "1"]
        return first, second, p(first, second, len(a))
    return mine


def grader(equal, count=lambda answers, golds: len(golds)):
    return lambda answers, golds: (
        sum(bool(equal(a, g)) for a, g in zip(answers, golds)), count(answers, golds))


def both(a, g):
    return to_number(a) == to_number(g)


def rows(cut):
    """Exercise 1 a row at a time; `cut` is a function of (new ids, end ids, the whole row)."""
    return lambda output, width, end_ids: [
        cut(row[width:].tolist(), end_ids, row.tolist()) for row in output]


def until(new, ends):
    """The ids before the first that is in `ends`."""
    return list(itertools.takewhile(lambda token: token not in ends, new))


def interval(low, high=None):
    """Exercise 3; `low` and `high` are functions of (p, z, n)."""
    z = 1.959963984540054
    high = high or (lambda p, z, n: low(p, -z, n))
    return lambda correct, n: (low(correct / n, z, n), high(correct / n, z, n))


def end(p, z, n, under=lambda p, z, n: p * (1 - p) / n + z * z / (4 * n * n), shrink=None):
    by = shrink(z, n) if shrink else 1 + z * z / n
    return (p + z * z / (2 * n) - z * math.sqrt(max(0, under(p, z, n)))) / by


WRONG = {
    "cut_new_tokens": [
        (rows(lambda new, ends, row: until(row, ends)), None),
        (rows(lambda new, ends, row: new), None),
        (rows(lambda new, ends, row: new[:new.index(ends[0])] if ends[0] in new else new),
         "any of them ends"),
        (rows(lambda new, ends, row: until(new, ends) + ends[:1]), None),
        (rows(lambda new, ends, row: until(new[::-1], ends)[::-1]), None),
        (rows(lambda new, ends, row: until(new, ends) if set(ends) & set(new) else []),
         "keep all of it"),
        (rows(lambda new, ends, row: [t for t in new if t not in ends]), "joins what was written"),
        (rows(lambda new, ends, row: until(new[1:], ends)), None),
        (rows(lambda new, ends, row: until(new, ends + [0])), None),
        (rows(lambda new, ends, row: until(new, ends) or new), None),
        (lambda output, width, ends: until(output[0, width:].tolist(), ends), None),
        (lambda output, width, ends: [r for row in output if (
            r := until(row[width:].tolist(), ends))], None),
    ],
    "wilson_interval": [
        (interval(lambda p, z, n: p - z * math.sqrt(p * (1 - p) / n)), "normal approximation"),
        (interval(lambda p, z, n: p - z * math.sqrt(p * (1 - p) / (n - 1 or 1))), None),
        (interval(lambda p, z, n: max(0, p - z * math.sqrt(p * (1 - p) / n)),
                  lambda p, z, n: min(1, p + z * math.sqrt(p * (1 - p) / n))), None),
        (interval(lambda p, z, n: end((p * n + 2) / (n + 4), z, n + 4)), None),
        (interval(lambda p, z, n: end(p, z * 1.6449 / 1.96, n)), "90%"),
        (interval(lambda p, z, n: end(p, z * 2.5758 / 1.96, n)), None),
        (interval(lambda p, z, n: end(p, z, n, lambda p, z, n: p * (1 - p) / n)), "a term is"),
        (interval(lambda p, z, n: end(p, z, n, lambda p, z, n: p * (1 - p) / n + z * z / n / 4)),
         "with n squared"),
        (interval(lambda p, z, n: end(p, z, n, shrink=lambda z, n: 1 + z / n)), None),
        (interval(lambda p, z, n: end(p, z, n, shrink=lambda z, n: 1 + z * z)), None),
        (interval(lambda p, z, n: end(p, z, n) * n), None),
    ],
    "stated_value": [
        (lambda span: stated(span), None),
        (lambda span: to_number(span.strip().split()[0]), None),
        (lambda span: next(map(to_number, filter(NUMBER.fullmatch, span.split())), None), None),
        (lambda span: Fraction(re.sub(r"[^\d.-]", "", span) or "0"), None),
        (lambda span: Fraction(re.sub(r"\D", "", span) or "0"), None),
        (lambda span: nb05.stated_value(span.split("=")[0]), None),
        (lambda span: nb05.stated_value(span) if "-" not in span else None, None),
        (lambda span: None if nb05.LETTER.search(span) else nb05.stated_value(span), None),
        (lambda span: nb05.stated_value(span.replace("$", "").replace(".", "")), None),
        (lambda span: nb05.stated_value(span) if nb05.stated_value(span) else None, "0 is a value"),
        (joined(r"[-+*/x]|or\b"), "5 to 6 and 5 and 6"),
        (joined(r"[-x]|or\b|to\b|and\b"), "3+4 and 3 * 4"),
        (joined(currency=""), "may have a currency before it"),
        (joined(letters="[A-Z]"), "small letters"),
        (joined(letters=r"^\s*[A-Za-z]+"), "ANYWHERE before the number"),
    ],
    "strict_answers": [
        (reader(lambda line, value: value(line)), "right of the mark, not the whole line"),
        (reader(lambda line, value: value(line.partition("####")[0])), "left of it is a step"),
        (reader(lambda line, value: value(line.partition("####")[2]), keep=bool), None),
        (reader(lambda line, value: value(line.partition("####")[2])), None),
        (changed(lambda t: t.partition("</think>")[2] or t), None),
        (changed(lambda t: t.replace("<think>", "").replace("</think>", "")), None),
        (changed(lambda t: t.split("\n")[-1]), None),
        (changed(lambda t: t.split("\n\n")[0]), None),
        (changed(lambda t: t.partition("Question")[0].partition("Problem")[0]), None),
        (changed(str.lower), None),
        (changed(str, said=lambda found: found[:1]), "the last one counts"),
        (changed(lambda t: t if "####" in t else ""), "also reads"),
        (changed(str, spoken=lambda t: nb05.THOUGHT.sub("", nb05.TURN.split(t)[0])),
         "thinking goes first"),
        (in_sentences(lambda t: re.split("[Tt]he answer is", t)[1:]), "and with its line"),
        (in_sentences(lambda t: [span.split("\n")[0] for span in re.split(
            "[Tt]he answer is", t)[1:]]), "ends with its sentence"),
        (in_sentences(lambda t: re.findall(r"[Tt]he answer is(.+?)(?:\. |$)", t)), None),
        (in_sentences(lambda t: re.findall(nb05.SAID, t), lambda t: "####" in t),
         "that states no value is none"),
    ],
    "mcnemar": [
        (tosses(lambda b, c, n: mcnemar(b, c) / 2), None),
        (tosses(lambda b, c, n: sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
                / 2 ** (b + c)), "one-sided"),
        (tosses(lambda b, c, n: 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
                / 2 ** (b + c)), "above 1"),
        (tosses(lambda b, c, n: min(1, 2 * sum(math.comb(b + c, k) for k in range(min(b, c)))
                / 2 ** (b + c))), "belongs to the tail"),
        (tosses(lambda b, c, n: math.erfc(abs(b - c) / math.sqrt(2 * (b + c)))), None),
        (tosses(lambda b, c, n: mcnemar(min(b, c), n - min(b, c))), "only discordant"),
        (tosses(lambda b, c, n: abs(b - c) / n), None),
        (lambda a, b: (sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))),
         "the p is missing"),
        (lambda a, b: (sum(x != y for x, y in zip(a, b)), 0, 1.0), None),
        (lambda a, b: nb05.mcnemar(b, a), "comes first"),
    ],
    "grade": [
        (grader(lambda a, g: a is not None and to_number(a) and both(a, g)), "0 is never right"),
        (grader(lambda a, g: a and both(a, g), lambda answers, golds: sum(map(bool, answers))),
         "denominator"),
        (grader(lambda a, g: a is not None and to_number(a) == g), "a text never equals"),
        (grader(lambda a, g: a is not None and abs(to_number(a) - to_number(g)) < 1e-6),
         "however small a tolerance"),
        (grader(lambda a, g: a is not None and abs(to_number(a) - to_number(g)) < 1e-9), None),
        (grader(lambda a, g: a is not None and round(to_number(a), 4) == round(to_number(g), 4)),
         None),
        (grader(lambda a, g: a is not None and int(to_number(a)) == int(to_number(g))), "int()"),
        (grader(lambda a, g: a is not None and abs(to_number(a)) == abs(to_number(g))), "sign"),
        (grader(lambda a, g: a is not None and a.replace(",", "") == g), None),
        (grader(lambda a, g: a is not None and g in a), "accepts 12 where 2"),
        (lambda answers, golds: (len(set(answers) & set(golds)), len(golds)), None),
        (lambda answers, golds: (sum(a in golds for a in answers), len(golds)), None),
        (lambda answers, golds: (sorted(map(str, answers)) == sorted(golds), len(golds)), None),
    ],
}
RIGHT = {
    "cut_new_tokens": [
        rows(lambda new, ends, row: until(new, ends)),
        rows(lambda new, ends, row: until(new, set(ends))),
        rows(lambda new, ends, row: new[:min([new.index(e) for e in ends if e in new],
                                             default=len(new))]),
        rows(lambda new, ends, row: tuple(until(new, ends))),
        lambda output, width, ends: [
            new[:len(until(new.tolist(), ends))].tolist() for new in output[:, width:]],
    ],
    "wilson_interval": [
        interval(end),
        lambda correct, n: [*interval(end)(correct, n)],
        interval(lambda p, z, n: max(0.0, end(p, z, n)), lambda p, z, n: min(1.0, end(p, -z, n))),
        interval(lambda p, z, n: (2 * n * p + z * z - z * math.sqrt(
            z * z + 4 * n * p * (1 - p))) / (2 * (n + z * z))),
        lambda correct, n: tuple(round(x, 9) for x in interval(end)(correct, n)),
    ],
    "stated_value": [
        lambda span: nb05.stated_value(span.strip(" *")),
        lambda span: nb05.stated_value(span[span.rfind("=") + 1:]),
        lambda span: nb05.stated_value(span.split("=")[-1]),
        lambda span: (lambda v: v if v is None else Fraction(v.numerator, v.denominator))(
            nb05.stated_value(span)),
        lambda span: nb05.stated_value(span + " "),
    ],
    "strict_answers": [
        lambda completions, value: [nb05.strict_answers([t], value)[0] for t in completions],
        lambda completions, value: tuple(nb05.strict_answers(completions, value)),
        changed(lambda t: t + "\n"),
        changed(str.rstrip),
        changed(lambda t: nb05.TURN.split(nb05.THOUGHT.sub("", t))[0]),
        in_sentences(lambda t: re.findall(r"the answer is(.*?)(?:\.\s|\n|\Z)", t, re.I | re.S)),
        in_sentences(lambda t: [span.split("\n")[0].split(". ")[0] for span in re.split(
            "[Tt]he answer is", t)[1:]]),
    ],
    "mcnemar": [
        tosses(lambda b, c, n: mcnemar(c, b)),
        tosses(lambda b, c, n: min(1, 2 * sum(
            math.comb(b + c, k) for k in range(max(b, c), b + c + 1)) / 2 ** (b + c))),
        tosses(lambda b, c, n: sum(math.comb(b + c, k) for k in range(b + c + 1)
                                   if math.comb(b + c, k) <= math.comb(b + c, b)) / 2 ** (b + c)),
        tosses(lambda b, c, n: float(min(Fraction(1), 2 * sum(
            Fraction(math.comb(b + c, k), 2 ** (b + c)) for k in range(min(b, c) + 1))))),
        lambda a, b: list(nb05.mcnemar(a, b)),
    ],
    "grade": [
        lambda answers, golds: (len([1 for a, g in zip(answers, golds)
                                     if a is not None and both(a, g)]), len(answers)),
        grader(lambda a, g: a is not None and to_number(a) - to_number(g) == 0),
        grader(lambda a, g: both(a, g) if isinstance(a, str) else 0),
        grader(lambda a, g: {None: None}.get(a, a) is not None and both(a, g)),
        grader(lambda a, g: str(a and to_number(a)) == str(to_number(g))),
    ],
}


@pytest.mark.parametrize("name, mine, told", [
    pytest.param(name, mine, told, id=f"{name}-{i}")
    for name, answers in WRONG.items() for i, (mine, told) in enumerate(answers, 1)])
def test_a_wrong_answer_is_refused_and_where_it_is_known_told_why(name, mine, told, capsys):
    assert check(name, mine) is not mine
    assert (told or "") in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("name, mine", [
    pytest.param(name, mine, id=f"{name}-{i}")
    for name, answers in RIGHT.items() for i, mine in enumerate(answers, 1)])
def test_an_unusual_right_answer_passes(name, mine, capsys):
    assert check(name, mine) is mine, capsys.readouterr().out
