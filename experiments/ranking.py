"""How well a score tells right solutions from wrong ones, and how sure that is.

Scores and verdicts have the shape (questions, samples); rows are those of experiments/samples.py.
The samples of a question are alike, so an interval draws *questions* again, with replacement (the
bootstrap, Efron 1979), never single samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.samples import verdicts

DRAWS = 1000
AT_ONCE = 100  # draws; each takes eight bytes a sample


def scores_of(rows: Sequence[dict], name: str) -> tuple[Tensor, Tensor]:
    """The scores "likelihood" or "verifier" of all samples, and whether these are right."""
    scores = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    return scores, torch.tensor([verdicts(row) for row in rows])


def questions_drawn(n: int, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """(draws, n): how often each of n questions is among n that are drawn with replacement."""
    draw = torch.Generator().manual_seed(seed)
    some = torch.randint(n, (draws, n), generator=draw)
    return torch.zeros(draws, n, dtype=torch.float64).scatter_add_(
        1, some, torch.ones(some.shape, dtype=torch.float64)
    )


def ends(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """What lies between the two is the middle `level` of the values, NaN left out."""
    tail = (1 - level) / 2
    tails = torch.tensor([tail, 1 - tail], dtype=values.dtype)
    return tuple(values[~values.isnan()].quantile(tails).tolist())


def auc(scores: Tensor, right: Tensor, times: Tensor | None = None) -> Tensor:
    """The chance that a right solution scores higher than a wrong one; ties are half.

    times (draws, questions): how often each question counts, once by default -> (draws,)
    """
    times = torch.ones(1, len(scores), dtype=torch.float64) if times is None else times
    values, place = scores.flatten().unique(return_inverse=True)
    good = right.flatten().double()
    found = []
    for part in times.split(AT_ONCE):
        each = part.repeat_interleave(scores.shape[1], 1)  # (draws, solutions)
        none = torch.zeros(len(part), len(values), dtype=torch.float64)
        rights = none.index_add(1, place, each * good)  # (draws, values)
        wrongs = none.index_add(1, place, each * (1 - good))
        below = wrongs.cumsum(1) - wrongs / 2  # wrong ones that score less
        found.append((rights * below).sum(1) / (rights.sum(1) * wrongs.sum(1)))
    return torch.cat(found)


def auc_within(scores: Tensor, right: Tensor) -> Tensor:
    """The AUC of each question; NaN where all its samples are right, or all are wrong."""
    above = (scores[:, :, None] - scores[:, None, :]).sign() + 1  # (questions, right, wrong)
    pairs = right[:, :, None] & ~right[:, None, :]
    return (above / 2 * pairs).sum((1, 2)) / pairs.sum((1, 2))


def auc_interval(
    scores: Tensor, right: Tensor, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The AUC over all solutions, and the ends of its interval."""
    drawn = auc(scores, right, questions_drawn(len(scores), seed=seed))
    return (auc(scores, right).item(), *ends(drawn, level))


def gap(
    of_a: Tensor, of_b: Tensor, right: Tensor, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """By how much the AUC of a's scores is above that of b's, over all of the same solutions, and
    the ends of its interval."""
    times = questions_drawn(len(right), seed=seed)
    drawn = auc(of_a, right, times) - auc(of_b, right, times)
    return ((auc(of_a, right) - auc(of_b, right)).item(), *ends(drawn, level))


def auc_gap(
    rows: Sequence[dict], a: str, b: str, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """By how much the AUC of score a is above that of b: {"over all" | "within a question":
    (difference, low, high)}, on the same questions."""
    (of_a, right), (of_b, _) = scores_of(rows, a), scores_of(rows, b)
    gaps = auc_within(of_a, right) - auc_within(of_b, right)
    gaps = gaps[~gaps.isnan()]
    within = questions_drawn(len(gaps), seed=seed) @ gaps / len(gaps)
    return {
        "over all": gap(of_a, of_b, right, level, seed),
        "within a question": (gaps.mean().item(), *ends(within, level)),
    }


def reliability(scores: Tensor, right: Tensor, bins: int = 10, seed: int = 0) -> list[dict]:
    """Of the samples in each bin of scores from 0 to 1: n, the mean score ("says"), the share that
    is right, and its 95% interval ("low", "high"). Bins without a sample are left out."""
    at = (scores * bins).long().clamp(0, bins - 1)
    times, found = questions_drawn(len(scores), seed=seed), []
    for i in range(bins):
        own = at == i
        if n := int(own.sum()):
            hits, totals = (own & right).sum(1).double(), own.sum(1).double()
            low, high = ends((times @ hits) / (times @ totals))
            found.append({"n": n, "says": scores[own].mean().item(),
                          "right": (hits.sum() / n).item(), "low": low, "high": high})  # fmt: skip
    return found
