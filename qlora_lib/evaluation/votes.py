"""Many samples, one answer: votes, scores, and estimates of what k samples give.

A vote is a function from the samples of one question to the one that counts, for
`evaluate(vote=...)`. Self-consistency is Wang et al. 2022 (arXiv 2203.11171); pass@k is
Chen et al. 2021 (arXiv 2107.03374, eq. 1). Scores by a verifier come from `verifier.py`.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..base.hashes import content_hash
from ..data.tokens import batches, encode_example, pad_id
from ..generation.generate import Completion, Generator
from ..train.loss import chunk_for, token_losses
from .extraction import extract_answer

# (prompts, completions), equally many, to a number each; higher is better
Score = Callable[[Sequence[str], Sequence[str]], list[float]]


# --- One token ---------------------------------------------------------------------------


def token_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Probabilities that a token is drawn with: logits (..., vocab) to the same shape.

    The logits are divided by the temperature; then the most likely tokens are kept, as many
    as it takes to reach top_p together (Holtzman et al. 2019, arXiv 1904.09751), and what
    they have is scaled to 1. Temperature 0 is greedy: all on the largest logit, the first
    of equals. Raises ValueError for a negative temperature or top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}: expected temperature >= 0 and "
            "0 < top_p <= 1"
        )
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, best, 1.0)
    p = torch.softmax(logits / temperature, -1)
    if top_p == 1:  # sums are rounded: they can reach 1 before the last token
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    # What the more likely tokens have already: the first is always kept.
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, 0)
    p = torch.zeros_like(p).scatter(-1, order, kept)
    return p / p.sum(-1, keepdim=True)


# --- Votes -------------------------------------------------------------------------------


def choose(answers: Sequence[object], weights: Sequence[float] | None = None) -> int:
    """Index of the first sample with the answer that has most votes, or most weight.

    A sample without an answer (None) has no vote. Of equals the answer that came first wins;
    without any answer it is sample 0. Raises ValueError for no samples, and for weights that
    are not as many, negative or not finite.
    """
    if not answers:
        raise ValueError("there are no samples to choose from")
    weights = [1.0] * len(answers) if weights is None else list(weights)
    if len(weights) != len(answers) or not all(0 <= w < math.inf for w in weights):
        raise ValueError(
            f"{len(answers)} samples with the weights {weights}; expected as many finite "
            "numbers, 0 or more"
        )
    votes: dict[object, float] = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    if not votes:
        return 0
    return answers.index(max(votes, key=votes.__getitem__))  # max: the first of equals


def sample_answers(samples: Sequence[str]) -> list[Fraction | None]:
    """The answer of each sample: strict, or flexible where no sample has the format."""
    answers = [extract_answer(s) for s in samples]
    if all(answer is None for answer in answers):
        answers = [extract_answer(s, "flexible") for s in samples]
    return answers


def majority(samples: Sequence[str]) -> str:
    """The first sample with the most frequent answer (self-consistency)."""
    return samples[choose(sample_answers(samples))]


def best_score(samples: Sequence[str]) -> str:
    """The sample with the highest score; they come from `with_scores`."""
    return max(samples, key=_score_of)  # the first of equals


def weighted_vote(samples: Sequence[str]) -> str:
    """The first sample with the answer whose samples have the largest sum of scores, which
    must not be negative: probabilities, such as a verifier's."""
    return samples[choose(sample_answers(samples), [_score_of(s) for s in samples])]


def _score_of(sample: str) -> float:
    score = getattr(sample, "score", None)
    if score is None:
        raise ValueError("these samples have no scores; generate them through with_scores")
    return score


def with_scores(generate: Callable, score: Score, name: str) -> Generator:
    """A generator whose samples carry `.score`. `name` says in the report whose it is."""
    return _Scored(Generator.of(generate), score, name)


class _Scored(Generator):
    def __init__(self, generate: Generator, score: Score, name: str):
        super().__init__(generate, generate.info | {"score": name})
        self.score = score

    def __call__(self, prompts: Sequence[str]) -> list:
        answers = self.ask(prompts)
        groups = [said if isinstance(said, list) else [said] for said in answers]
        flat = [(p, s) for p, group in zip(prompts, groups) for s in group]
        scores = iter(self.score([p for p, _ in flat], [s for _, s in flat]))
        scored = [[_with_score(sample, next(scores)) for sample in group] for group in groups]
        return [group if isinstance(said, list) else group[0]
                for said, group in zip(answers, scored)]  # fmt: skip

    def fingerprint(self) -> str | None:
        """A hash of the weights that answer and of those that score, where there are any."""
        scorer = getattr(self.score, "fingerprint", lambda: None)  # a plain function has none
        parts = [part for part in (self.ask.fingerprint(), scorer()) if part is not None]
        return content_hash(parts) if parts else None

    def check(self, prompts: Sequence[str]) -> None:
        self.ask.check(prompts)


def _with_score(sample: str, score: float) -> Completion:
    new = Completion(sample, getattr(sample, "tokens", 0), getattr(sample, "finished", True))
    new.score = score
    return new


# --- Likelihood --------------------------------------------------------------------------


@torch.inference_mode()
def log_likelihoods(
    model, tokenizer, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
) -> list[tuple[float, int]]:
    """(sum of log-probabilities, number of tokens) of each completion, given its prompt.

    The end token counts as one of them, so that a solution cut short is judged as one that
    ends there. Temperature 1, natural logarithm, softmax in fp32.
    """
    encoded = [encode_example(tokenizer, p, c) for p, c in zip(prompts, completions)]
    results: list = [None] * len(encoded)
    device = model.get_input_embeddings().weight.device
    chunk = chunk_for(model, torch.float32)  # no autocast
    for chosen, batch in batches(encoded, batch_size, pad_id(tokenizer), device):
        for i, losses in zip(chosen, token_losses(model, batch, chunk)):
            results[i] = (-losses.sum().item(), len(losses))
    return results


def likelihood(model, tokenizer, batch_size: int = 64) -> Score:
    """A score: the mean log-probability a token of the completion, by the model itself.

    The mean, since a sum prefers short solutions whatever they say.
    """

    def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        found = log_likelihoods(model, tokenizer, prompts, completions, batch_size)
        return [total / count for total, count in found]

    return score


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n
    samples of which `right` are: 1 - C(n - right, k) / C(n, k).

    1 - (1 - right / n)^k, which draws with replacement, is too low. Raises ValueError
    unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(
            f"got {right} right of n={n} samples and k={k}; expected 0 <= right <= n and "
            "1 <= k <= n: draw at least k samples"
        )
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
