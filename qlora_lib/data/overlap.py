"""Training examples that hold test questions, like GPT-3's check (Brown et al. 2020, arXiv
2005.14165, appendix C): 13 words in a row in common are an overlap."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base.ranges import COUNT
from .rows import listed
from .sources import NGRAM

SHORTEST = 8  # words of a question that is looked for within a text; a shorter one must be equal


@dataclass
class Overlap:
    """Indices of the examples that overlap with the test set; each is counted once."""

    examples: int  # that were compared
    questions: int  # of the test set
    ngram: int | None
    equal: list[int] = field(default_factory=list)  # a text of theirs is a test question
    contain: list[int] = field(default_factory=list)  # a text of theirs contains one
    share: list[int] = field(default_factory=list)  # ngram words in a row are the same

    @property
    def found(self) -> set[int]:
        return {*self.equal, *self.contain, *self.share}

    def __str__(self) -> str:
        share = f", {len(self.share)} share {self.ngram} words in a row with one"
        return (
            f"of {self.examples:,} examples, {len(self.equal)} equal one of {self.questions:,} "
            f"test questions, {len(self.contain)} contain one{share if self.ngram else ''}"
        )


def words(text: str) -> tuple[str, ...]:
    """Return the words and numbers of a text, in one case, without punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))


def find_overlap(
    examples: Sequence[Sequence[str]], questions: Sequence[str], ngram: int | None = NGRAM
) -> Overlap:
    """Return which examples, each given as its texts, overlap with the questions of a test set.
    ngram None compares whole questions only, for problems that share templates."""
    if ngram is not None:
        COUNT.check("ngram", ngram)
    questions = listed(questions, "questions", str)
    examples = [listed(texts, "texts of an example", str) for texts in listed(examples, "examples")]
    asked = {words(question) for question in questions}
    # For each length, the runs of words that give an overlap away, and the questions they are of.
    runs: dict[int, dict[tuple, list[tuple]]] = defaultdict(lambda: defaultdict(list))
    for question in asked:
        if len(question) >= SHORTEST:
            length = min(ngram or len(question), len(question))
            for run in _runs(question, length):
                runs[length][run].append(question)
    overlap = Overlap(len(examples), len(questions), ngram)
    for i, texts in enumerate(examples):
        texts = [words(text) for text in texts]
        suspects = [
            (text, question)
            for text in texts
            for length, known in runs.items()
            if not known.keys().isdisjoint(_runs(text, length))
            for run in _runs(text, length)
            for question in known.get(run, ())
        ]
        if any(text in asked for text in texts):
            overlap.equal.append(i)
        elif any(question in _runs(text, len(question)) for text, question in suspects):
            overlap.contain.append(i)
        elif suspects:
            overlap.share.append(i)
    return overlap


def _runs(text: tuple[str, ...], length: int):
    """Return all runs of `length` words, in order."""
    return zip(*(text[i:] for i in range(length)))
