"""Two reports compared: on the same questions with McNemar's test, else as a drop.

A difference is told from chance only with an interval or a test, and the questions on which
both models agree say nothing about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..base.statistics import mcnemar, newcombe
from .canaries import MODES
from .evaluate import EvalReport, questions_hash

# Splits whose problems correspond line by line. GSM-Hard's are in the order of GSM8K's test.
FAMILIES = ({"test", "test_changed", "test_larger"}, {"test", "gsm_hard"})


@dataclass(frozen=True)
class Comparison:
    """Two models on the same n questions."""

    mode: str
    n: int
    right_a: int
    right_b: int
    only_a: int  # questions that only a has right
    only_b: int
    names: tuple[str, str] = ("a", "b")

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p."""
        return mcnemar(self.only_a, self.only_b)

    @property
    def difference(self) -> float:
        """Accuracy of a minus that of b."""
        return (self.right_a - self.right_b) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's 95% interval of the difference, paired."""
        return newcombe(self.right_a, self.n, self.right_b, self.n, self.right_a - self.only_a)

    def __str__(self) -> str:
        a, b = self.names
        verdict = "chance explains the difference"
        if self.only_a + self.only_b == 0:
            verdict = "they are right on the same questions"
        elif self.p < 0.05:
            better = a if self.only_a > self.only_b else b
            verdict = f"{better} is better, beyond what chance explains at 5%"
        return (
            f"{self.n} questions ({self.mode}): {a} {self.right_a / self.n:.1%}, "
            f"{b} {self.right_b / self.n:.1%}, {_difference(self)}\n"
            f"right in {a} only: {self.only_a}, in {b} only: {self.only_b}; "
            f"exact McNemar p = {self.p:.2g}: {verdict}"
        )


def compare(
    a: EvalReport, b: EvalReport, mode: str = "strict", names: tuple[str, str] = ("a", "b")
) -> Comparison:
    """Return two models' accuracies on the same questions, discordant questions, McNemar's p.

    mode: "strict" or "flexible". Raises ValueError, naming the first difference, unless the
    reports hold the same questions and golds in the same order.
    """
    verdicts, asked = _verdicts(mode, a, b), (pairs(a), pairs(b))
    if asked[0] != asked[1]:
        differ = next((i for i, (x, y) in enumerate(zip(*asked)) if x != y), min(a.n, b.n))
        first, second = (questions_hash(each)[:12] for each in asked)
        raise ValueError(
            f"the reports are not about the same questions: {a.n} with hash {first}, {b.n} "
            f"with hash {second}, the first to differ is number {differ + 1}; evaluate both "
            "on the same problems, or take `drop` for two sets of problems"
        )
    return compare_verdicts(*verdicts, mode, names)


def compare_verdicts(
    a: Sequence[bool], b: Sequence[bool], mode: str = "exact match", names=("a", "b")
) -> Comparison:
    """Return the comparison of right and wrong answers to the same questions, in their order."""
    both = list(zip(a, b, strict=True))
    only_a, only_b = both.count((True, False)), both.count((False, True))
    return Comparison(mode, len(both), sum(a), sum(b), only_a, only_b, names)


@dataclass(frozen=True)
class Drop:
    """The accuracy of one report minus that of another, with a 95% interval."""

    mode: str
    n: tuple[int, int]
    right: tuple[int, int]
    both: int | None  # right in both at the same index; None: not paired
    names: tuple[str, str] = ("a", "b")

    @property
    def difference(self) -> float:
        return self.right[0] / self.n[0] - self.right[1] / self.n[1]

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's: hybrid score, or its paired form."""
        return newcombe(self.right[0], self.n[0], self.right[1], self.n[1], self.both)

    def __str__(self) -> str:
        counts = zip(self.names, self.right, self.n)
        parts = ", ".join(f"{name} {right}/{n} = {right / n:.1%}" for name, right, n in counts)
        how = "unpaired" if self.both is None else "paired by index"
        return f"{self.mode}: {parts}; {_difference(self)}, {how}"


def drop(
    a: EvalReport, b: EvalReport, mode: str = "strict", paired: bool = False, names=("a", "b")
) -> Drop:
    """Return how much accuracy falls from the problems of `a` to those of `b`.

    paired: problem i of b is a variant of problem i of a, which narrows the interval. Raises
    ValueError for a pair of reports that are not equally long.
    """
    of_a, of_b = _verdicts(mode, a, b)
    if paired and a.n != b.n:
        raise ValueError(f"{a.n} and {b.n} problems can't be paired by index; paired=False?")
    both = sum(x and y for x, y in zip(of_a, of_b)) if paired else None
    return Drop(mode, (a.n, b.n), (sum(of_a), sum(of_b)), both, names)


def report_difference(
    a: EvalReport, b: EvalReport, names: tuple[str, str] = ("a", "b")
) -> Comparison | Drop:
    """Return `compare` for the same questions, else `drop`, paired for splits of one family."""
    if pairs(a) == pairs(b):
        return compare(a, b, names=names)
    splits = {a.info.get("split"), b.info.get("split")}
    variants = any(splits <= family for family in FAMILIES) and len(splits) == 2
    return drop(a, b, paired=variants and a.n == b.n, names=names)


def pairs(report: EvalReport) -> list[tuple[str, str]]:
    """Return (question, gold) of each prediction."""
    return [(p.question, p.gold) for p in report.predictions]


def _difference(found: Comparison | Drop) -> str:
    low, high = (100 * x for x in found.interval)
    return f"difference {100 * found.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _verdicts(mode: str, *reports: EvalReport) -> list[list[bool]]:
    """Return right and wrong of each report, in the order of its questions."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected 'strict' or 'flexible'")
    for report in reports:
        found = len(report.predictions)
        if not report.n or found != report.n:
            raise ValueError(f"a report of {report.n} questions holds {found} predictions; read it "
                             "with EvalReport.load(folder)")  # fmt: skip
    return [[getattr(p, mode) for p in report.predictions] for report in reports]
