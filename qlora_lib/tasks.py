"""Small tasks for many adapters on one base: what is asked, and when an answer counts.

    task = load_task("translation")
    task.pairs("train", 2000)               (prompt, target) pairs, the same at every call
    score(generator(model, tokenizer, task.decoding()), task, task.pairs("dev"))

Train, dev and test share no prompt: a hash of the prompt decides its split, whatever the seed.
All but the word problems (mini-GSM, data/minigsm) are drawn by task_kinds.py.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .data import Pair, format_gsm8k, parse_gold
from .evaluation import is_correct
from .generation import Decoding, Generate
from .results import wilson
from .sources import load_minigsm
from .task_kinds import KINDS

SPLITS = ("train", "dev", "test")
SIZES = {"train": 2000, "dev": 200, "test": 500}
SEED = 7


@dataclass(frozen=True)
class Task:
    """A task: where its pairs come from, and its exact-match rule."""

    name: str
    about: str
    rule: str  # what `matches` does, in words
    draw: Callable[[str, int], list[Pair]]  # split and number to pairs
    matches: Callable[[str, str], bool]  # completion and target
    max_new_tokens: int  # room for the longest target and its end token

    def pairs(self, split: str, n: int | None = None) -> list[Pair]:
        """The first `n` (prompt, target) pairs of a split; SIZES says how many by default.

        Raises ValueError for another split, and for fewer than one pair.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        n = SIZES[split] if n is None else n
        if n < 1:
            raise ValueError(f"n={n} pairs of {self.name}; expected at least 1")
        return self.draw(split, n)

    def decoding(self, batch_size: int = 100) -> Decoding:
        """Greedy, with room for this task's answers."""
        return Decoding(max_new_tokens=self.max_new_tokens, batch_size=batch_size, stop=())


def load_task(name: str) -> Task:
    """A task by name; ValueError, with the names that there are, for another."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Score:
    """Verdicts of one model on one task's pairs, in their order."""

    task: str
    right: tuple[bool, ...]
    completions: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.right)

    @property
    def correct(self) -> int:
        return sum(self.right)

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval, fractions."""
        return wilson(self.correct, self.n)

    def row(self) -> dict:
        """As JSON: counts, interval, and a 1 or 0 a question."""
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval": self.interval,
            "right": "".join(str(int(r)) for r in self.right),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return (f"{self.task}: {100 * self.accuracy:.1f}% of {self.n} "
                f"[{100 * low:.1f}, {100 * high:.1f}]")  # fmt: skip


def score(generate: Generate, task: Task, pairs: Sequence[Pair]) -> Score:
    """Ask the prompts alone, and hold each completion against its target by the task's rule.

    Raises ValueError for no pairs.
    """
    if not pairs:
        raise ValueError(f"there is nothing to ask of task {task.name}; give at least one pair")
    completions = generate([prompt for prompt, _ in pairs])
    right = [task.matches(str(c), target) for c, (_, target) in zip(completions, pairs)]
    return Score(task.name, tuple(right), tuple(map(str, completions)))


def split_of(prompt: str) -> str:
    """The split of a drawn prompt, by a hash of its text: 80/10/10."""
    return {8: "dev", 9: "test"}.get(zlib.crc32(prompt.encode()) % 10, "train")


def _drawn(name: str) -> Callable[[str, int], list[Pair]]:
    def draw(split: str, n: int) -> list[Pair]:
        rng, found = random.Random(f"{name} {split} {SEED}"), {}
        for _ in range(100 * n):  # a tenth of the draws is dev or test, and some come twice
            prompt, target = KINDS[name](rng)
            if split_of(prompt) == split:
                found.setdefault(prompt, target)
            if len(found) == n:
                return list(found.items())
        raise ValueError(f"task {name} has only {len(found)} different {split} prompts, not {n}")

    return draw


def _word_problems(split: str, n: int) -> list[Pair]:
    entries = load_minigsm(split)
    if n > len(entries):
        raise ValueError(f"word_problems has {len(entries)} {split} problems, not {n}")
    return [format_gsm8k(entry) for entry in entries[:n]]


def _same_text(completion: str, target: str) -> bool:
    return completion.strip() == target.strip()


def _same_number(completion: str, target: str) -> bool:
    return is_correct(completion, parse_gold(target))


_TEXT = "the whole completion equals the target, blanks at both ends aside"
TASKS = {
    task.name: task
    for task in (
        Task("word_problems", "mini-GSM: two to four steps of arithmetic", "the number after "
             "`####` equals the target's (strict extraction)", _word_problems, _same_number, 128),
        Task("sentiment", "a review is good, bad or mixed", _TEXT, _drawn("sentiment"),
             _same_text, 8),
        Task("classification", "which of four operations a text asks for", _TEXT,
             _drawn("classification"), _same_text, 8),
        Task("summarization", "who, where, what and how it ended, of a short story", _TEXT,
             _drawn("summarization"), _same_text, 24),
        Task("translation", "a made-up language into English", _TEXT, _drawn("translation"),
             _same_text, 28),
        Task("code", "arithmetic in words, as a line of Python", _TEXT, _drawn("code"), _same_text, 24),
    )
}  # fmt: skip
