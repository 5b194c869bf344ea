"""Stored samples (data/results/tiny-samples.jsonl), and what each way to choose gets right.

A row is a problem: its gold, prompt_tokens, and for each sample the answer (a text, or None),
tokens, likelihood and verifier score; and the greedy answer with its tokens. An answer is right
when it is the gold's text: both are exact numbers in lowest terms.
"""

import math
from collections.abc import Callable, Sequence

import torch

from qlora_lib.base.paths import DATA
from qlora_lib.data.rows import read_jsonl
from qlora_lib.evaluation.votes import choose

SAMPLES = DATA / "results" / "tiny-samples.jsonl"
TEMPERATURES = DATA / "results" / "tiny-temperatures.jsonl"  # dev, a row a temperature
METHODS = ("greedy", "majority", "likelihood", "verifier", "weighted", "best")
DRAWS = 20  # subsets a problem


def vote_at_k(
    answers: Sequence[object],
    right: Sequence[bool],
    k: int,
    pick: Callable[[list[int]], int],
    draws: int,
    generator: torch.Generator,
) -> float:
    """Estimate, for one question, of the chance that a pick among k samples is right.

    answers, right: of all n samples. pick: from the indices of k of them, in order, to one of
    these indices. Mean over `draws` subsets without replacement; with k = n it is exact.
    """
    n = len(answers)
    if not 1 <= k <= n or len(right) != n:
        raise ValueError(f"k={k} of {n} answers with {len(right)} verdicts; expected 1 <= k <= n")
    if k == n:
        return float(right[pick(list(range(n)))])
    subsets = (torch.randperm(n, generator=generator)[:k].tolist() for _ in range(draws))
    return sum(right[pick(subset)] for subset in subsets) / draws


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n
    samples of which `right` are: 1 - C(n - right, k) / C(n, k) (Chen et al. 2021, arXiv
    2107.03374, eq. 1).

    1 - (1 - right / n)^k, which draws with replacement, is too low. Raises ValueError
    unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(
            f"got {right} right of n={n} samples and k={k}; expected 0 <= right <= n and "
            "1 <= k <= n: draw at least k samples"
        )
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def read_samples(path=SAMPLES) -> list[dict]:
    """The rows of a file; FileNotFoundError where there is none."""
    return read_jsonl(path)


def pick(row: dict, method: str, chosen: Sequence[int]) -> int:
    """Which of the samples `chosen` (indices) the method takes. Of equals the first.

    majority: the first with the most frequent answer. likelihood, verifier: the highest score.
    weighted: the first with the answer that has the largest sum of verifier scores. Raises
    ValueError for another method: greedy and best do not choose.
    """
    answers = [row["answers"][i] for i in chosen]
    if method == "majority":
        return chosen[choose(answers)]
    if method == "weighted":
        return chosen[choose(answers, [row["verifier"][i] for i in chosen])]
    if method in ("likelihood", "verifier"):
        return max(chosen, key=row[method].__getitem__)
    raise ValueError(f"{method!r} is no way to choose; expected one of {METHODS[1:-1]}")


def verdicts(row: dict) -> list[bool]:
    """Whether each sample is right."""
    return [answer == row["gold"] for answer in row["answers"]]


def right_at(rows: Sequence[dict], method: str, k: int) -> list[bool]:
    """A verdict a problem, with its first k samples; best: whether one of them is right."""
    if method == "greedy":
        return [row["greedy"] == row["gold"] for row in rows]
    if method == "best":
        return [any(verdicts(row)[:k]) for row in rows]
    return [verdicts(row)[pick(row, method, range(k))] for row in rows]


def expected_at(rows: Sequence[dict], method: str, k: int, seed: int = 0) -> float:
    """Mean accuracy with k of the samples, whichever k: over all sets of k for best (pass@k),
    over DRAWS random ones for the others."""
    if method == "best":
        values = [pass_at_k(len(v), sum(v), k) for v in map(verdicts, rows)]
    else:
        draw = torch.Generator().manual_seed(seed)
        values = [
            vote_at_k(row["answers"], verdicts(row), k, lambda s: pick(row, method, s), DRAWS, draw)
            for row in rows
        ]
    return sum(values) / len(rows)


def cost(rows: Sequence[dict], method: str, k: int) -> float:
    """Mean number of tokens that go through the model for a problem, 2 FLOPs a weight each.

    Each sample costs its prompt and its tokens, as here, where prompts are not shared; a score
    costs the same once more. Likelihoods could be kept while sampling, for nothing.
    """
    if method == "greedy":
        return sum(row["prompt_tokens"] + row["greedy_tokens"] for row in rows) / len(rows)
    passes = {"majority": 1, "best": 1}.get(method, 2)
    each = [row["prompt_tokens"] + sum(row["tokens"]) / len(row["tokens"]) for row in rows]
    return passes * k * sum(each) / len(rows)
