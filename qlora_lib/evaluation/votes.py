"""Many samples, one answer: votes and scores.

A vote is a function from the samples of one question to the one that counts. A score is a
function from prompts and as many completions to a number each, higher is better: `likelihood`,
or a Verifier.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch

from ..base.hashes import content_hash
from ..base.ranges import COUNT, ZERO_ON
from ..data.rows import listed
from ..data.tokens import Example, batches, encode_example
from ..generation.generate import Completion, Generator
from ..models.batches import check_tokens
from ..train.loss import chunk_for, token_losses
from .extraction import extract_answer

Score = Callable[[Sequence[str], Sequence[str]], list[float]]


def choose(answers: Sequence[object], weights: Sequence[float] | None = None) -> int:
    """Return the index of the first sample with the answer of most votes, or most weight; 0 where
    all are None. Raises ValueError for no samples, and for weights that are not as many, negative
    or not finite."""
    answers = listed(answers, "samples")
    if not answers:
        raise ValueError("there are no samples to choose from")
    weights = [1.0] * len(answers) if weights is None else list(weights)
    if len(weights) != len(answers) or not all(w in ZERO_ON for w in weights):
        raise ValueError(f"{len(answers)} samples with the weights {weights}; expected as many "
                         "finite numbers, 0 or more")  # fmt: skip
    votes: dict[object, float] = {}
    for answer, weight in zip(answers, weights):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return answers.index(max(votes, key=votes.__getitem__)) if votes else 0


def sample_answers(samples: Sequence[str]) -> list[Fraction | None]:
    """Return the answer of each sample: strict, or flexible where no sample has the format."""
    samples = listed(samples, "samples", str)
    strict = [extract_answer(s) for s in samples]
    if any(answer is not None for answer in strict):
        return strict
    return [extract_answer(s, "flexible") for s in samples]


def majority(samples: Sequence[str]) -> str:
    """Return the first sample with the most frequent answer: self-consistency, Wang et al. 2022
    (arXiv 2203.11171)."""
    return samples[choose(sample_answers(samples))]


def best_score(samples: Sequence[str]) -> str:
    """Return the first sample with the highest score; scores come from `with_scores`."""
    if not samples:
        raise ValueError("there are no samples to choose from")
    return max(samples, key=_score_of)


def weighted_vote(samples: Sequence[str]) -> str:
    """Return the first sample with the answer of the largest sum of scores, all 0 or more."""
    return samples[choose(sample_answers(samples), [_score_of(s) for s in samples])]


def _score_of(sample: str) -> float:
    score = getattr(sample, "score", None)
    if score is None:
        raise ValueError("these samples have no scores; generate them through with_scores")
    return score


def with_scores(generate: Callable, score: Score, name: str) -> Generator:
    """Return a generator whose samples carry `.score`; `name` says in the report whose it is."""
    return _Scored(Generator.of(generate), score, name)


class _Scored(Generator):
    def __init__(self, generate: Generator, score: Score, name: str):
        super().__init__(generate, generate.info | {"score": name})
        self.score = score

    def __call__(self, prompts: Sequence[str]) -> list:
        answers = super().__call__(prompts)
        groups = [said if isinstance(said, list) else [said] for said in answers]
        asked = [prompt for prompt, group in zip(prompts, groups) for _ in group]
        found = self.score(asked, [sample for group in groups for sample in group])
        if len(found) != len(asked):
            raise ValueError(f"{len(asked)} samples got {len(found)} scores; expected one each")
        scores = iter(found)
        scored = [[_with_score(sample, next(scores)) for sample in group] for group in groups]
        return [new if isinstance(said, list) else new[0] for said, new in zip(answers, scored)]

    def fingerprint(self) -> str | None:
        scorer = getattr(self.score, "fingerprint", lambda: None)
        parts = [part for part in (self.ask.fingerprint(), scorer()) if part is not None]
        return content_hash(parts) if parts else None

    def check(self, prompts: Sequence[str]) -> None:
        self.ask.check(prompts)


def _with_score(sample: str, score: float) -> Completion:
    new = Completion(sample, getattr(sample, "tokens", 0), getattr(sample, "finished", True))
    new.score = score
    return new


def encode_solutions(model, tokenizer, prompts, completions) -> list[Example]:
    """Return each prompt and its completion as an Example; ValueError unless they are equally long
    lists of texts, of tokens that the model has."""
    asked, said = listed(prompts, "prompts", str), listed(completions, "completions", str)
    if len(asked) != len(said):
        raise ValueError(f"got {len(asked)} prompts and {len(said)} completions; expected as many")
    encoded = [encode_example(tokenizer, *pair) for pair in zip(asked, said)]
    check_tokens(model, {token for example in encoded for token in example.input_ids})
    return encoded


@torch.inference_mode()
def log_likelihoods(
    model, tokenizer, prompts: Sequence[str], completions: Sequence[str], batch_size: int = 64
) -> list[tuple[float, int]]:
    """Return (sum of log-probabilities, number of tokens) of each completion and its end token,
    given the prompt: temperature 1, natural logarithm, softmax in fp32."""
    COUNT.check("batch_size", batch_size)
    encoded = encode_solutions(model, tokenizer, prompts, completions)
    results: list = [None] * len(encoded)
    device = model.get_input_embeddings().weight.device
    chunk = chunk_for(model, torch.float32)  # no autocast
    for chosen, batch in batches(encoded, batch_size, device):
        for i, losses in zip(chosen, token_losses(model, batch, chunk)):
            results[i] = (-losses.sum().item(), len(losses))
    return results


def likelihood(model, tokenizer, batch_size: int = 64) -> Score:
    """Return a score: the completion's mean log-probability a token, by the model itself."""

    def score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        found = log_likelihoods(model, tokenizer, prompts, completions, batch_size)
        return [total / count for total, count in found]

    return score
