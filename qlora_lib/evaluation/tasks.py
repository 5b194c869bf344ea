"""Tasks of (prompt, target) pairs with an exact-match rule, and a model's score on one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base.statistics import wilson
from ..data.rows import listed
from ..data.tokens import Pair
from ..generation.generate import Decoding, Generator


@dataclass(frozen=True)
class Task:
    """A task, by its exact-match rule."""

    name: str
    matches: Callable[[str, str], bool]  # completion and target
    max_new_tokens: int  # room for the longest target and its end token

    def decoding(self, batch_size: int = 100) -> Decoding:
        """Return greedy decoding with room for this task's answers."""
        return Decoding(max_new_tokens=self.max_new_tokens, batch_size=batch_size, stop=())


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
    def accuracy(self) -> float:
        return sum(self.right) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval, fractions."""
        return wilson(sum(self.right), self.n)

    def row(self) -> dict:
        """Return counts, interval, and a 1 or 0 a question, as JSON takes them."""
        right = "".join(str(int(r)) for r in self.right)
        return {"n": self.n, "correct": sum(self.right), "accuracy": self.accuracy,
                "interval": self.interval, "right": right}  # fmt: skip

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        return f"{self.task}: {self.accuracy:.1%} of {self.n} [{low:.1f}, {high:.1f}]"


def score(generate: Callable, task: Task, pairs: Sequence[Pair]) -> Score:
    """Ask the prompts alone, and hold each completion against its target; ValueError for none."""
    pairs = listed(pairs, "pairs")
    for pair in pairs:
        if len(listed(pair, "a pair", str)) != 2:
            raise ValueError(f"expected pairs (prompt, target), got {pair!r:.80}")
    if not pairs:
        raise ValueError(f"there is nothing to ask of task {task.name}; give at least one pair")
    completions = Generator.of(generate)([prompt for prompt, _ in pairs])
    right = [task.matches(str(c), target) for c, (_, target) in zip(completions, pairs)]
    return Score(task.name, tuple(right), tuple(map(str, completions)))
