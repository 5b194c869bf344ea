"""Two reports compared: on the same questions with McNemar's test, else as a drop."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..base.statistics import mcnemar, newcombe
from .evaluate import EvalReport, questions_hash
from .extraction import MODES

# Splits whose problems correspond line by line. GSM-Hard's are in the order of GSM8K's test.
FAMILIES = ({"test", "test_changed", "test_larger"}, {"test", "gsm_hard"})


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


class Comparison(Drop):
    """Two models on the same questions, in the same order."""

    @property
    def only_a(self) -> int:  # questions that only a has right
        return self.right[0] - self.both

    @property
    def only_b(self) -> int:
        return self.right[1] - self.both

    @property
    def difference(self) -> float:
        return (self.right[0] - self.right[1]) / self.n[0]

    @property
    def p(self) -> float:
        """McNemar's exact two-sided p."""
        return mcnemar(self.only_a, self.only_b)

    def __str__(self) -> str:
        (a, b), (right_a, right_b), n = self.names, self.right, self.n[0]
        verdict = "no difference is shown"
        if self.only_a + self.only_b == 0:
            verdict = "they are right on the same questions"
        elif self.p < 0.05:
            better = a if self.only_a > self.only_b else b
            verdict = f"{better} is better, at the 5% level of a single test"
        return (
            f"{n} questions ({self.mode}): {a} {right_a / n:.1%}, {b} {right_b / n:.1%}, "
            f"{_difference(self)}\n"
            f"right in {a} only: {self.only_a}, in {b} only: {self.only_b}; "
            f"exact McNemar p = {self.p:.2g}: {verdict}"
        )


def compare(a: EvalReport, b: EvalReport, mode: str = "strict", names=("a", "b")) -> Comparison:
    """Return two models' accuracies on the same questions, discordant questions, McNemar's p.

    mode: "strict" or "flexible". Raises ValueError for reports of other questions or golds.
    """
    verdicts, asked = _verdicts(mode, a, b), (pairs(a), pairs(b))
    if asked[0] != asked[1]:
        differ = next((i for i, (x, y) in enumerate(zip(*asked)) if x != y), min(a.n, b.n))
        first, second = (questions_hash(each)[:12] for each in asked)
        raise ValueError(f"the reports are not about the same questions: {a.n} with hash {first}, "
                         f"{b.n} with hash {second}, the first to differ is number {differ + 1}; "
                         "for two sets take `drop`")  # fmt: skip
    return compare_verdicts(*verdicts, mode, names)


def compare_verdicts(
    a: Sequence[bool], b: Sequence[bool], mode: str = "exact match", names=("a", "b")
) -> Comparison:
    """Return the comparison of right and wrong answers to the same questions, in their order."""
    if len(a) != len(b) or not a:
        raise ValueError(f"got {len(a)} and {len(b)} verdicts; expected as many, at least one")
    both = sum(x and y for x, y in zip(a, b))
    return Comparison(mode, (len(a), len(b)), (sum(a), sum(b)), both, names)


def drop(
    a: EvalReport, b: EvalReport, mode: str = "strict", paired: bool = False, names=("a", "b")
) -> Drop:
    """Return how much accuracy falls from the problems of `a` to those of `b`. paired: problem i of
    b is a variant of problem i of a; ValueError for reports that are not equally long."""
    of_a, of_b = _verdicts(mode, a, b)
    if paired and a.n != b.n:
        raise ValueError(f"{a.n} and {b.n} problems can't be paired by index; paired=False?")
    both = sum(x and y for x, y in zip(of_a, of_b)) if paired else None
    return Drop(mode, (a.n, b.n), (sum(of_a), sum(of_b)), both, names)


def report_difference(a: EvalReport, b: EvalReport, names=("a", "b")) -> Drop:
    """Return `compare` for the same questions, else `drop`, paired for splits of one family."""
    if pairs(a) == pairs(b):
        return compare(a, b, names=names)
    splits = {a.info.get("split"), b.info.get("split")}
    variants = any(splits <= family for family in FAMILIES) and len(splits) == 2
    return drop(a, b, paired=variants and a.n == b.n, names=names)


def pairs(report: EvalReport) -> list[tuple[str, str]]:
    """Return (question, gold) of each prediction."""
    return [(p.question, p.gold) for p in report.predictions]


def _difference(found: Drop) -> str:
    low, high = (100 * x for x in found.interval)
    return f"difference {100 * found.difference:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _verdicts(mode: str, *reports: EvalReport) -> list[list[bool]]:
    """Return right and wrong of each report, in the order of its questions."""
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected 'strict' or 'flexible'")
    for report in reports:
        if not isinstance(report, EvalReport):
            raise ValueError(f"expected an EvalReport, got {report!r:.60}")
        found = len(report.predictions)
        if not report.n or found != report.n:
            raise ValueError(f"a report of {report.n} questions holds {found} predictions; read it "
                             "with EvalReport.load(folder)")  # fmt: skip
    return [[getattr(p, mode) for p in report.predictions] for report in reports]
