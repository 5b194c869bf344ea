"""Exercises of notebook 08: temperature and top-p, the vote, pass@k, a weighted vote."""
import math
from collections import Counter

import torch
from torch import Tensor

from qlora_lib.evaluation.votes import choose
from ..kit.exercise import Exercise, register
from .next_token import token_probabilities

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


def _keeping(which):
    """Those of the probabilities for which `which` is true, whatever their sum is."""
    def wrong(logits, temperature, top_p):
        p = torch.softmax(logits / temperature, -1)
        p = torch.where(which(p, top_p), p, 0)
        return p / p.sum()

    return wrong


def _cut_before_temperature(logits, temperature, top_p):
    kept = token_probabilities(logits, 1.0, top_p) > 0
    return torch.softmax((logits / temperature).masked_fill(~kept, -math.inf), -1)


def _least_likely(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    ordered, order = p.sort()
    kept = ordered * (ordered.cumsum(-1) - ordered < top_p)
    p = torch.zeros_like(p).scatter(0, order, kept)
    return p / p.sum()


def _taken_by_order(logits, temperature, top_p):
    return _left_sorted(logits, temperature, top_p)[logits.argsort(descending=True)]


def _mask_by_order(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    ordered, order = p.sort(descending=True)
    p = torch.where((ordered.cumsum(-1) - ordered < top_p)[order], p, 0)
    return p / p.sum()


def _softmax_twice(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    return torch.softmax(p.where(token_probabilities(logits, temperature, top_p) > 0, 0), -1)


register(Exercise(
    name="next_token",
    reference=next_token,
    cases=[
        (lambda g: (torch.tensor([1.2, 3.0, 0.3, 2.1, -1.0]), 0.7, 0.9), "five tokens"),
        (lambda g: (3 * torch.randn(30, generator=g), 1.5, 0.6), "hot, 30 tokens"),
        (lambda g: (2 * torch.randn(12, generator=g), 0.4, 0.95), "cold, 12 tokens"),
        (lambda g: (torch.tensor([0.0, 4.0, 1.0]), 1.0, 0.1),
         "one token alone has more than top_p"),
        (lambda g: (0.5 * torch.randn(10, generator=g), 1.0, 0.5), "ten tokens, much alike"),
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
        (_keeping(lambda p, top_p: p >= 1 - top_p),
         "top-p keeps as many tokens as it takes to reach top_p together; it does not compare each "
         "probability with a threshold"),
        (_cut_before_temperature, "apply the temperature first: how many tokens reach top_p "
                                  "depends on it"),
        (_least_likely, "begin the sum with the MOST likely token: sort descending"),
        (_taken_by_order, "kept[order] shuffles once more: position order[i] must GET kept[i], as "
                          "scatter(0, order, kept) does; kept[order] reads it there"),
        (_mask_by_order, "mask[order] is not the mask of the tokens: it is token order[i] whose "
                         "verdict stands at place i; scatter(0, order, mask) puts them back"),
        (_keeping(lambda p, top_p: p.cumsum(-1) - p < top_p),
         "the sum runs over the tokens from the most likely one down, not in the order of their "
         "ids: sort first"),
        (_keeping(lambda p, top_p: p >= top_p),
         "top_p bounds the SUM of the kept probabilities, not each of them"),
        (_softmax_twice, "a second softmax gives the tokens that were cut a chance again: divide "
                         "by the sum"),
        (lambda z, temperature, top_p: token_probabilities(z, 1.0, top_p),
         "the temperature is not used: divide the logits by it"),
        (lambda z, temperature, top_p: token_probabilities(z, temperature),
         "top_p is not used: nothing was cut"),
    ],
))


# --- 2. The majority ---------------------------------------------------------------------


def vote(answers: list[str | None]) -> int:
    return choose(answers)


def _none_votes(answers):
    return answers.index(Counter(answers).most_common(1)[0][0])


def _largest_wins_ties(answers):
    counts = Counter(a for a in answers if a is not None)
    return answers.index(max(counts, key=lambda a: (counts[a], a))) if counts else 0


def _last_wins_ties(answers):
    winner = answers[::-1][choose(answers[::-1])]
    return answers.index(winner)


def _first_to_reach(answers, scores=None):
    """The answer whose count, or sum of scores, was the first to reach the top."""
    def so_far(i):
        own = zip(answers[:i + 1], scores or [1] * len(answers))
        return sum(s for a, s in own if a == answers[i] is not None)

    return answers.index(answers[max(range(len(answers)), key=so_far)])


def _last_of_the_winner(answers):
    winner = answers[choose(answers)]
    return len(answers) - 1 - answers[::-1].index(winner) if winner else 0


def _needs_half(answers):
    i = choose(answers)
    return i if answers.count(answers[i]) * 2 > len(answers) else 0


def _empty_fails(answers):
    counts = Counter(a for a in answers if a is not None)
    return answers.index(counts.most_common(1)[0][0])


def _without_answers(what):
    """`what` in place of 0 where no sample has an answer."""
    return lambda answers: choose(answers) if any(answers) else what()


def _among(own):
    """The index in `own`, a list made of the answers."""
    return lambda answers: own(answers).index(answers[choose(answers)]) if any(answers) else 0


def _times(answers):
    return answers.count(answers[choose(answers)]) if any(answers) else 0


register(Exercise(
    name="vote",
    reference=vote,
    cases=[
        (lambda g: (["9", "15", "12", None, "12"],), "12 has two of five"),
        (lambda g: ([None, None, None, "7", "8", "8"],), "most samples have no answer"),
        (lambda g: (["5", "31", "4", "31", "4"],), "a tie, 31 came first"),
        (lambda g: ([None, "4", "31", "4", "31"],), "a tie, 4 came first"),
        (lambda g: (["4", "31", "31", "4"],), "a tie, 4 came first, 31 was the first with two"),
        (lambda g: ([None, None],), "no answer at all"),
        (lambda g: (["3", "3", "2", "2", "2"],), "a clear majority"),
    ],
    mistakes=[
        (lambda answers: answers[choose(answers)] or "",
         "this is the answer; return the INDEX of the first sample that gives it"),
        (_none_votes, "a sample without an answer has no vote: leave None out of the count"),
        (_largest_wins_ties, "of equals the answer that came first wins, not the larger text"),
        (_last_wins_ties, "of equals the answer that came first wins, not the last"),
        (_first_to_reach, "of equals the answer that came first wins, not the one whose count was "
                          "the first to reach the top: count all votes, then compare"),
        (_last_of_the_winner, "right answer, but return the FIRST sample that gives it"),
        (_needs_half, "the most frequent answer wins, with less than half of the votes too"),
        (_empty_fails, "where no sample has an answer there is nothing to count: return 0"),
        (lambda answers: 0, "this is always the first sample; count the answers of all of them"),
        (_without_answers(lambda: None), "an index is due here too: where no sample has an answer "
                                         "return 0, not None"),
        (_without_answers(lambda: -1), "-1 is the last sample: where no sample has an answer "
                                       "return 0"),
        (_without_answers(lambda: max([])), "max of nothing fails: where no sample has an answer "
                                            "return 0"),
        (_among(lambda answers: [a for a in answers if a is not None]),
         "this counts places without the Nones; the index is that in `answers` itself"),
        (_among(lambda answers: [a for a in dict.fromkeys(answers) if a is not None]),
         "this is a place among the DIFFERENT answers, as your counts hold them; return the "
         "sample's place in `answers`"),
        (_times, "this is how often the answer came; return the index of its first sample"),
    ],
))


# --- 3. pass@k ---------------------------------------------------------------------------


def pass_at_k(n: int, right: int, k: int) -> float:
    return 1 - math.comb(n - right, k) / math.comb(n, k)


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
        (lambda n, right, k: 1 - (1 - right / n) ** k,
         "this draws with replacement, the same sample may come twice; it is "
         "too low. Count the sets of k different samples"),
        (lambda n, right, k: math.comb(right, k) / math.comb(n, k),
         "this is the chance that ALL k are right; one is enough"),
        (lambda n, right, k: math.comb(n - right, k) / math.comb(n, k),
         "this is the chance that none of the k is right: take 1 minus it"),
        (lambda n, right, k: right / n,
         "this is the share of right samples, pass@1, whatever k is"),
        (lambda n, right, k: float(right > 0),
         "this is 1 as soon as any of all n samples is right, pass@n; only k are drawn. (If you "
         "divide with `//`: that gives whole numbers, 0 or 1; use `/`)"),
        (lambda n, right, k: min(1.0, k * right / n),
         "chances of samples do not add up: two of them may both be right"),
        (lambda n, right, k: 1 - math.comb(right, k) / math.comb(n, k),
         "you leave out the sets in which all are right; leave out those without "
         "a right one: k of the n - right wrong samples"),
        (lambda n, right, k: right * math.comb(n - right, k - 1) / math.comb(n, k),
         "this is the chance of exactly one right sample; more are as good"),
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


def _by(value, tie=lambda a, answers: 0):
    def wrong(answers, scores):
        own = _scores_of(answers, scores)
        best = max(own, key=lambda a: (value(own[a]), tie(a, answers)), default=answers[0])
        return answers.index(best)

    return wrong


def _none_scores(answers, scores):
    sums = {}
    for answer, score in zip(answers, scores):
        sums[answer] = sums.get(answer, 0) + score
    return answers.index(max(sums, key=sums.get))


def _answer_of_best_sample(answers, scores):
    return answers.index(answers[_best_sample(answers, scores)])


def _place_of_best_sum(answers, scores):
    sums = [sum(own) for own in _scores_of(answers, scores).values()]
    return sums.index(max(sums)) if sums else 0


def _sample_of_the_winner(best):
    """Another sample than the first that gives the best answer; `best` tells which."""
    def wrong(answers, scores):
        winner = answers[choose(answers, scores)]
        own = [i for i, a in enumerate(answers) if a == winner and a is not None]
        return max(own, key=lambda i: best(i, scores)) if own else 0

    return wrong


def _weighted_answer(answers, scores):
    return answers[choose(answers, scores)] or 0


def _weighted_without_answers(what):
    return lambda answers, scores: choose(answers, scores) if any(answers) else what()


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
        (lambda g: (["1", "2", "2"], [0.9, 0.6, 0.55]), "the best score against two good ones"),
        (lambda g: (["4", "3", "3"], [0.6, 0.9, 0.1]), "one sample each pulls its answer's mean"),
        (lambda g: ([*"5694349356"], [0.5] * 10), "five equal sums"),
    ],
    mistakes=[
        (_best_sample, "this is the best single sample; add the scores of equal answers"),
        (_by(lambda own: sum(own) / len(own)), "this is the MEAN score of an answer; the sum also "
                                               "counts how often it came"),
        (_by(max), "this keeps the best score of each answer; add them all"),
        (_answer_of_best_sample, "this is the answer of the best single sample, with its first "
                                 "place; which answer has the largest SUM of scores?"),
        (_place_of_best_sum, "this is a place among your sums, one for each DIFFERENT answer; "
                             "return a sample's place in `answers`"),
        (_sample_of_the_winner(lambda i, scores: scores[i]),
         "right answer, but this is its best sample; return the first that gives it"),
        (_sample_of_the_winner(lambda i, scores: i),
         "right answer, but this is the last sample that gives it; return the first"),
        (_weighted_answer, "this is the answer; return the INDEX of the first sample that gives "
                           "it"),
        (_weighted_without_answers(lambda: None), "where no sample has an answer return 0, which "
                                                  "is an index too, not None"),
        (_weighted_without_answers(lambda: max([])), "where no sample has an answer your sums are "
                                                     "empty, and max fails: return 0"),
        (lambda answers, scores: choose(answers),
         "every sample has one vote here: let it weigh its score"),
        (_none_scores, "a sample without an answer has no vote, however good its score"),
        (lambda answers, scores: choose([a if s > 0.5 else None for a, s in zip(answers, scores)]),
         "no threshold: a sample at 0.4 counts as 0.4"),
        (_by(lambda own: own[-1]), "the sums are overwritten: add each score to what its answer "
                                   "has already"),
        (_by(sum, lambda a, answers: a),
         "of equal sums the answer that came first wins, not the larger text"),
        (_by(sum, lambda a, answers: answers.index(a)),
         "of equal sums the answer that came first wins, not the last: `>`, not `>=`"),
        (_first_to_reach, "of equal sums the answer that came first wins, not the one that was the "
                          "first to reach the top: add all scores, then compare"),
        (_by(math.prod), "multiplying makes every further sample a loss: add the scores"),
    ],
))
