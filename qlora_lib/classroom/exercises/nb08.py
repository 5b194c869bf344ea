"""Exercises of notebook 08: temperature and top-p, the vote, pass@k, a weighted vote."""
import math
from collections import Counter

import torch
from torch import Tensor

from ...sampling import choose, token_probabilities
from ..checks import Exercise, register

# --- 1. The next token's probabilities ---------------------------------------------------


def next_token(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    return token_probabilities(logits, temperature, top_p)


def _times_temperature(logits, temperature, top_p):
    return token_probabilities(logits * temperature, 1.0, top_p)


def _probabilities_divided(logits, temperature, top_p):
    p = torch.softmax(logits, -1) / temperature
    return p / p.sum()


def _not_scaled(logits, temperature, top_p):
    full = token_probabilities(logits, temperature)
    return full * (token_probabilities(logits, temperature, top_p) > 0)


def _reaching_token_cut(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    ordered, order = p.sort(descending=True)
    kept = ordered * (ordered.cumsum(-1) <= top_p)
    p = torch.zeros_like(p).scatter(0, order, kept)
    return p / p.sum()


def _left_sorted(logits, temperature, top_p):
    return token_probabilities(logits, temperature, top_p).sort(descending=True).values


def _by_threshold(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    p = torch.where(p >= 1 - top_p, p, 0)
    return p / p.sum()


def _cut_before_temperature(logits, temperature, top_p):
    kept = token_probabilities(logits, 1.0, top_p) > 0
    return torch.softmax((logits / temperature).masked_fill(~kept, -math.inf), -1)


def _least_likely(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    ordered, order = p.sort()
    kept = ordered * (ordered.cumsum(-1) - ordered < top_p)
    p = torch.zeros_like(p).scatter(0, order, kept)
    return p / p.sum()


register(Exercise(
    name="next_token",
    reference=next_token,
    cases=[
        (lambda g: (torch.tensor([1.2, 3.0, 0.3, 2.1, -1.0]), 0.7, 0.9), "five tokens"),
        (lambda g: (3 * torch.randn(30, generator=g), 1.5, 0.6), "hot, 30 tokens"),
        (lambda g: (2 * torch.randn(12, generator=g), 0.4, 0.95), "cold, 12 tokens"),
        (lambda g: (torch.tensor([0.0, 4.0, 1.0]), 1.0, 0.1),
         "one token alone has more than top_p"),
        (lambda g: (torch.randn(6, generator=g), 2.0, 1.0), "top_p=1 cuts nothing"),
    ],
    mistakes=[
        (_times_temperature, "divide the logits by the temperature: a high one makes them more "
                             "alike, and so the draw wilder"),
        (_probabilities_divided, "the temperature divides the logits, before the softmax; "
                                 "dividing probabilities and scaling them back changes nothing"),
        (_not_scaled, "what is left after the cut must sum to 1 again"),
        (_reaching_token_cut, "the token with which the sum reaches top_p is kept too: keep a "
                              "token while the sum BEFORE it is below top_p"),
        (_left_sorted, "right numbers, in sorted order: put each back at its token's place"),
        (_by_threshold, "top-p keeps as many tokens as it takes to reach top_p together; it does "
                        "not compare each probability with a threshold"),
        (_cut_before_temperature, "apply the temperature first: how many tokens reach top_p "
                                  "depends on it"),
        (_least_likely, "begin the sum with the MOST likely token: sort descending"),
    ],
))


# --- 2. The majority ---------------------------------------------------------------------


def vote(answers: list[str | None]) -> int:
    return choose(answers)


def _answer_itself(answers):
    return answers[choose(answers)] or ""


def _none_votes(answers):
    return answers.index(Counter(answers).most_common(1)[0][0])


def _largest_wins_ties(answers):
    counts = Counter(a for a in answers if a is not None)
    return answers.index(max(counts, key=lambda a: (counts[a], a))) if counts else 0


def _last_wins_ties(answers):
    winner = answers[::-1][choose(answers[::-1])]
    return answers.index(winner)


def _last_of_the_winner(answers):
    winner = answers[choose(answers)]
    return len(answers) - 1 - answers[::-1].index(winner) if winner else 0


def _needs_half(answers):
    i = choose(answers)
    return i if answers.count(answers[i]) * 2 > len(answers) else 0


def _empty_fails(answers):
    counts = Counter(a for a in answers if a is not None)
    return answers.index(counts.most_common(1)[0][0])


def _first(answers):
    return 0


register(Exercise(
    name="vote",
    reference=vote,
    cases=[
        (lambda g: (["9", "15", "12", None, "12"],), "12 has two of five"),
        (lambda g: ([None, None, None, "7", "8", "8"],), "most samples have no answer"),
        (lambda g: (["5", "31", "4", "31", "4"],), "a tie, 31 came first"),
        (lambda g: ([None, "4", "31", "4", "31"],), "a tie, 4 came first"),
        (lambda g: ([None, None],), "no answer at all"),
        (lambda g: (["3", "2", "2", "2"],), "a clear majority"),
    ],
    mistakes=[
        (_answer_itself, "this is the answer; return the INDEX of the first sample that gives it"),
        (_none_votes, "a sample without an answer has no vote: leave None out of the count"),
        (_largest_wins_ties, "of equals the answer that came first wins, not the larger text"),
        (_last_wins_ties, "of equals the answer that came first wins, not the last"),
        (_last_of_the_winner, "right answer, but return the FIRST sample that gives it"),
        (_needs_half, "the most frequent answer wins, with less than half of the votes too"),
        (_empty_fails, "where no sample has an answer there is nothing to count: return 0"),
        (_first, "this is always the first sample; count the answers of all of them"),
    ],
))


# --- 3. pass@k ---------------------------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def _with_replacement(n, right, k):
    return 1 - (1 - right / n) ** k


def _all_right(n, right, k):
    return math.comb(right, k) / math.comb(n, k)


def _none_right(n, right, k):
    return math.comb(n - right, k) / math.comb(n, k)


def _rate(n, right, k):
    return right / n


def _any_of_n(n, right, k):
    return float(right > 0)


def _k_times_rate(n, right, k):
    return min(1.0, k * right / n)


def _exactly_one(n, right, k):
    return right * math.comb(n - right, k - 1) / math.comb(n, k)


register(Exercise(
    name="pass_at_k",
    reference=pass_at_k,
    cases=[
        (lambda g: (16, 3, 4), "3 of 16 right, k = 4"),
        (lambda g: (8, 8, 3), "all right"),
        (lambda g: (8, 0, 3), "none right"),
        (lambda g: (10, 4, 1), "k = 1"),
        (lambda g: (6, 4, 3), "fewer wrong ones than k"),
        (lambda g: (12, 1, 12), "k = n"),
    ],
    mistakes=[
        (_with_replacement, "this draws with replacement, the same sample may come twice; it is "
                            "too low. Count the sets of k different samples"),
        (_all_right, "this is the chance that ALL k are right; one is enough"),
        (_none_right, "this is the chance that none of the k is right: take 1 minus it"),
        (_rate, "this is the share of right samples, pass@1, whatever k is"),
        (_any_of_n, "this asks whether any of all n samples is right, pass@n; only k are drawn"),
        (_k_times_rate, "chances of samples do not add up: two of them may both be right"),
        (_exactly_one, "this is the chance of exactly one right sample; more are as good"),
    ],
    rtol=1e-9,
))


# --- 4. The weighted vote ----------------------------------------------------------------


def weighted_vote(answers: list[str | None], scores: list[float]) -> int:
    return choose(answers, scores)


def _scores_of(answers, scores) -> dict[str, list[float]]:
    named = [a for a in dict.fromkeys(answers) if a is not None]
    return {a: [s for b, s in zip(answers, scores) if b == a] for a in named}


def _best_sample(answers, scores):
    return max(range(len(answers)), key=scores.__getitem__)


def _by(value):
    def wrong(answers, scores):
        own = _scores_of(answers, scores)
        return answers.index(max(own, key=lambda a: value(own[a]))) if own else 0

    return wrong


def _majority(answers, scores):
    return choose(answers)


def _none_scores(answers, scores):
    sums = {}
    for answer, score in zip(answers, scores):
        sums[answer] = sums.get(answer, 0) + score
    return answers.index(max(sums, key=sums.get))


def _above_a_half(answers, scores):
    kept = [a if s > 0.5 else None for a, s in zip(answers, scores)]
    return choose(kept)


register(Exercise(
    name="weighted_vote",
    reference=weighted_vote,
    cases=[
        (lambda g: (["15", "12", "12"], [0.7, 0.4, 0.45]), "two doubtful ones outweigh a sure one"),
        (lambda g: (["8", "8", "9", "8"], [0.1, 0.2, 0.9, 0.1]), "a sure one outweighs three"),
        (lambda g: ([None, "3", "4"], [0.95, 0.2, 0.3]), "the best score has no answer"),
        (lambda g: (["6", "5", "6", "5"], [0.45, 0.9, 0.4, 0.3]), "the order of the scores"),
        (lambda g: ([None, None], [0.3, 0.4]), "no answer at all"),
        (lambda g: (["7", "2", "2"], [0.75, 0.9, 0.8]), "two sure ones"),
        (lambda g: (["1", "2", "2", "2"], [0.6, 0.3, 0.3, 0.3]), "three below a half"),
    ],
    mistakes=[
        (_best_sample, "this is the best single sample; add the scores of equal answers"),
        (_by(lambda own: sum(own) / len(own)), "this is the MEAN score of an answer; the sum also "
                                               "counts how often it came"),
        (_majority, "every sample has one vote here: let it weigh its score"),
        (_none_scores, "a sample without an answer has no vote, however good its score"),
        (_above_a_half, "no threshold: a sample at 0.4 counts as 0.4"),
        (_by(lambda own: own[-1]), "the sums are overwritten: add each score to what its answer "
                                   "has already"),
        (_by(math.prod), "multiplying makes every further sample a loss: add the scores"),
    ],
))
