"""Exercises of notebook 08: temperature and top-p, the vote, pass@k; then a verifier in three
steps, and the weighted vote."""
import math
from collections import Counter
from fractions import Fraction
from itertools import groupby

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


def _exactly_reached(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    ordered, order = p.sort(descending=True)
    kept = torch.where(ordered.cumsum(-1) - ordered <= top_p, ordered, 0)
    p = torch.zeros_like(p).scatter(0, order, kept)
    return p / p.sum()


def _at_least_two(logits, temperature, top_p):
    second = (logits / temperature).softmax(-1).topk(2).values.sum().item()
    return token_probabilities(logits, temperature, max(top_p, second - 1e-6))


def _cut_logits_to_0(logits, temperature, top_p):
    kept = token_probabilities(logits, temperature, top_p) > 0
    return torch.softmax((logits / temperature).where(kept, 0), -1)


def _share_of_the_vocabulary(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    least = p.topk(max(1, round(top_p * len(p)))).values[-1]
    p = torch.where(p >= least, p, 0)
    return p / p.sum()


def _share_of_the_best(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, -1)
    p = torch.where(p >= (1 - top_p) * p.max(), p, 0)
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
        (lambda g: (0.5 * torch.randn(10, generator=g), 1.0, 0.5), "ten tokens, much alike"),
        (lambda g: (torch.randn(6, generator=g), 2.0, 1.0), "top_p=1 cuts nothing"),
        (lambda g: (torch.tensor([0.0, math.log(2), 0.0]), 1.0, 0.5),
         "the first has exactly top_p, 0.5"),
    ],
    mistakes=[
        (_times_temperature, "divide the logits by the temperature: a high one makes them more "
                             "alike, and so the draw wilder"),
        (_probabilities_divided, "the temperature divides the logits, before the softmax; "
                                 "dividing probabilities and scaling them back changes nothing"),
        (_not_scaled, "what is left after the cut must sum to 1 again"),
        (_reaching_token_cut, "the token with which the sum reaches top_p is kept too: keep a "
                              "token while the sum BEFORE it is below top_p"),
        (_exactly_reached, "a token is kept while the more likely ones have LESS than top_p: where "
                           "they have exactly top_p, it goes; `<`, not `<=`"),
        (_at_least_two, "one token alone may reach top_p: then it is the only one"),
        (_cut_logits_to_0, "a logit of 0 is no chance of 0, e^0 = 1: cut the probabilities, or set "
                           "the logits to -inf"),
        (_share_of_the_best, "this compares each token with the best one, which is min-p; top-p "
                             "adds up what the more likely ones have"),
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
        (_share_of_the_vocabulary, "this keeps a share of the tokens, top-k; top_p is a share of "
                                   "the probability"),
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
        (lambda n, right, k: Fraction(math.comb(n, k) - math.comb(n - right, k), math.comb(n, k)),
         "right, as an exact Fraction; later cells print it with digits: return float(...) of it"),
        (lambda n, right, k: 1 - math.comb(n - right, k) / n**k,
         "the number of all sets of k is comb(n, k); n**k counts every order, and repeats"),
        (lambda n, right, k: 100 * pass_at_k(n, right, k), "a chance, from 0 to 1, not percent"),
    ],
    rtol=1e-9,
))


# --- 4. A verifier, in three steps -------------------------------------------------------


def auc(scores: list[float], right: list[bool]) -> float:
    good = [s for s, r in zip(scores, right) if r]
    bad = [s for s, r in zip(scores, right) if not r]
    wins = sum((g > b) + (g == b) / 2 for g in good for b in bad)
    return wins / (len(good) * len(bad))


def _pairs(value):
    """The mean of value(right score, wrong score) over all pairs."""
    def wrong(scores, right):
        good = [s for s, r in zip(scores, right) if r]
        bad = [s for s, r in zip(scores, right) if not r]
        return sum(value(g, b) for g in good for b in bad) / (len(good) * len(bad))

    return wrong


def _all_pairs(scores, right):
    return auc(scores, right) * sum(right) * (len(right) - sum(right)) / len(right) ** 2


def _pairs_of_two(scores, right):
    return 2 * _all_pairs(scores, right) * len(right) / (len(right) - 1)


def _neighbours(scores, right):
    good = [s for s, r in zip(scores, right) if r]
    bad = [s for s, r in zip(scores, right) if not r]
    return sum((g > b) + (g == b) / 2 for g, b in zip(good, bad)) / min(len(good), len(bad))


def _above_the_mean(scores, right):
    bad = [s for s, r in zip(scores, right) if not r]
    return sum(s > sum(bad) / len(bad) for s, r in zip(scores, right) if r) / sum(right)


def _accuracy(scores, right):
    return sum((s > 0.5) == r for s, r in zip(scores, right)) / len(right)


def _means_apart(scores, right):
    good = [s for s, r in zip(scores, right) if r]
    bad = [s for s, r in zip(scores, right) if not r]
    return sum(good) / len(good) - sum(bad) / len(bad)


def _per_right_one(scores, right):
    return auc(scores, right) * (len(right) - sum(right))


def _per_wrong_one(scores, right):
    return auc(scores, right) * sum(right)


def _best_against_best(scores, right):
    good = max(s for s, r in zip(scores, right) if r)
    bad = max(s for s, r in zip(scores, right) if not r)
    return float(good > bad)


def _places_without_ties(scores, right):
    order = sorted(range(len(scores)), key=scores.__getitem__)
    places = sum(place for place, i in enumerate(order, 1) if right[i])
    n = sum(right)
    return (places - n * (n + 1) / 2) / (n * (len(right) - n))


register(Exercise(
    name="auc",
    reference=auc,
    cases=[
        (lambda g: ([0.9, 0.2, 0.6, 0.4], [True, False, False, True]), "two right, two wrong"),
        (lambda g: ([0.7, 0.7, 0.1], [False, True, False]), "a tie"),
        (lambda g: ([-0.4, -0.1, -0.2], [True, False, False]), "below 0, and upside down"),
        (lambda g: ([0.5] * 5, [True, False, True, True, False]), "all scores equal"),
        (lambda g: ((torch.randn(40, generator=g) * 4).round().div(4).tolist(),
                    (torch.rand(40, generator=g) < 0.6).tolist()), "forty, many ties"),
        (lambda g: ([3.0, 1.0], [True, False]), "one pair, in order"),
    ],
    mistakes=[
        (_pairs(lambda g, b: g > b), "a tie counts half: with the same score it is a coin's toss"),
        (_pairs(lambda g, b: g >= b), "a tie counts half, not one"),
        (_pairs(lambda g, b: (g < b) + (g == b) / 2),
         "upside down: asked is how often the RIGHT one scores higher"),
        (_pairs(lambda g, b: (g > b) - (g < b)),
         "this goes from -1 to 1: a pair in the wrong order counts 0, not -1"),
        (_pairs(lambda g, b: 100 * ((g > b) + (g == b) / 2)), "a share, from 0 to 1, not percent"),
        (_pairs(lambda g, b: max(0, g - b)),
         "count the pairs; how far apart they are is no matter"),
        (_all_pairs, "divide by the number of (right, wrong) pairs: pairs of two right or two "
                     "wrong ones are not asked"),
        (_pairs_of_two, "divide by right times wrong, not by n (n - 1) / 2: two right ones, or two "
                        "wrong ones, are no pair here"),
        (_neighbours, "every right one with every wrong one: zip pairs only the first with the "
                      "first, and so on"),
        (_above_the_mean, "compare with every wrong solution, not with their mean"),
        (_accuracy, "no threshold: the AUC asks for the order alone"),
        (_means_apart, "this is how far the means are apart; count the pairs in the right order"),
        (_per_right_one, "divided by the right ones alone: there are right times wrong pairs"),
        (_per_wrong_one, "divided by the wrong ones alone: there are right times wrong pairs"),
        (lambda scores, right: auc(scores, right) * sum(right) * (len(right) - sum(right)),
         "this is the number of pairs in the right order; divide by that of all pairs"),
        (_best_against_best, "this compares only the best right one with the best wrong one"),
        (_places_without_ties, "equal scores need equal places, the mean of theirs; or count "
                               "pairs, a tie half"),
    ],
    rtol=1e-5,
))


def end_states(hidden: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1])
    last = (places * mask.long()).argmax(1)  # (batch,)
    return hidden[torch.arange(len(last)), last]


def _at(places):
    """The hidden states at places(mask), one a row."""
    def wrong(hidden, mask):
        return hidden[torch.arange(len(mask)), places(mask).long()]

    return wrong


def _every_row_by_every_place(hidden, mask):
    return hidden[:, mask.sum(1).long() - 1]


register(Exercise(
    name="end_states",
    reference=end_states,
    cases=[
        (lambda g: (torch.randn(3, 5, 2, generator=g), torch.tensor(
            [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])), "padded on the right"),
        (lambda g: (torch.randn(2, 4, 3, generator=g), torch.tensor(
            [[0, 0, 1, 1], [0, 1, 1, 1]])), "padded on the left"),
        (lambda g: (torch.randn(3, 6, 2, generator=g), torch.tensor(
            [[0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])), "on both sides"),
        (lambda g: (torch.randn(2, 3, 4, generator=g), torch.ones(2, 3, dtype=torch.long)),
         "no padding"),
        (lambda g: (torch.randn(5, 4, 3, generator=g), torch.tensor(
            [[1, 1, 1, 0]] * 5)), "more rows than tokens"),
    ],
    mistakes=[
        (lambda hidden, mask: hidden[:, -1], "the last place may be padding: take each row's last "
                                             "token that the mask holds"),
        (_at(lambda mask: mask.sum(1) - 1), "the number of tokens less one is the last place only "
                                            "where the padding stands on the right"),
        (_at(lambda mask: mask.sum(1).clamp(max=mask.shape[1] - 1)),
         "one too far: the last of n tokens has index n - 1; and padding may stand on the left"),
        (_at(lambda mask: (mask.argmin(1) - 1) % mask.shape[1]),
         "the first 0 of the mask ends the tokens only where the padding stands on the right"),
        (_at(lambda mask: mask.argmax(1)), "this is each row's FIRST token; the last one has read "
                                           "the solution"),
        (lambda hidden, mask: hidden[:, 0], "the first place has read nothing of the solution"),
        (lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
         "this is the mean of all tokens; asked is the last one"),
        (lambda hidden, mask: (hidden * mask[..., None]).sum(1),
         "this is the sum of all tokens; asked is the last one"),
        (lambda hidden, mask: hidden.masked_fill(mask[..., None] == 0, -math.inf).amax(1),
         "this is the largest number of each column; asked is the last token's row"),
        (_every_row_by_every_place, "hidden[:, places] takes all places of every row: "
                                    "hidden[torch.arange(batch), places] takes one a row"),
        (lambda hidden, mask: hidden[mask.bool()], "these are all tokens; asked is the last one of "
                                                   "each row"),
        (lambda hidden, mask: (hidden * mask[..., None])[:, -1],
         "zeros where the last place is padding: find each row's last token instead"),
        (lambda hidden, mask: end_states(hidden, mask)[:, None],
         "right rows, with a dimension too many: (batch, width)"),
    ],
))


def head_step(h: Tensor, right: Tensor, w: Tensor, b: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    off = torch.sigmoid(h @ w + b) - right  # (n,)
    return w - lr * (off @ h) / len(h), b - lr * off.mean()


def _step(error, share=lambda off: 1 / len(off), bias=1.0):
    """A step whose gradient comes from error(p, right), divided by what share says."""
    def wrong(h, right, w, b, lr):
        off = error(torch.sigmoid(h @ w + b), right)
        scale = lr * share(off)
        return w - scale * (off @ h), b - bias * scale * off.sum()

    return wrong


def _linear(h, right, w, b, lr):
    off = h @ w + b - right
    return w - lr * (off @ h) / len(h), b - lr * off.mean()


def _without_the_bias(h, right, w, b, lr):
    off = torch.sigmoid(h @ w) - right
    return w - lr * (off @ h) / len(h), b - lr * off.mean()


def _bias_by_its_sum(h, right, w, b, lr):
    off = torch.sigmoid(h @ w + b) - right
    return w - lr * (off @ h) / len(h), b - lr * off.sum()


def _bias_after_the_weights(h, right, w, b, lr):
    w, _ = head_step(h, right, w, b, lr)
    return w, head_step(h, right, w, b, lr)[1]


def _gradients(h, right, w, b, lr):
    off = torch.sigmoid(h @ w + b) - right
    return off @ h / len(h), off.mean()


def _decayed(h, right, w, b, lr):
    new, bias = head_step(h, right, w, b, lr)
    return new - lr * 0.01 * w, bias


def _in_place(h, right, w, b, lr):
    new, bias = head_step(h, right, w, b, lr)
    return w.copy_(new), b.copy_(bias)


register(Exercise(
    name="head_step",
    reference=head_step,
    cases=[
        (lambda g: (torch.randn(4, 3, generator=g), torch.tensor([1.0, 0.0, 0.0, 1.0]),
                    torch.zeros(3), torch.tensor(0.0), 0.5), "a new head"),
        (lambda g: (torch.randn(6, 2, generator=g), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
                    torch.randn(2, generator=g), torch.tensor(0.7), 0.1), "a head with a bias"),
        (lambda g: (2 * torch.randn(3, 5, generator=g), torch.tensor([0.0, 0.0, 0.0]),
                    torch.randn(5, generator=g), torch.tensor(-0.4), 1.0), "none is right"),
        (lambda g: (torch.randn(1, 4, generator=g), torch.tensor([1.0]),
                    torch.randn(4, generator=g), torch.tensor(0.2), 0.3), "one solution"),
    ],
    mistakes=[
        (_step(lambda p, y: p - y, lambda off: 1.0), "this is the SUM over the solutions: the loss "
                                                     "is their mean"),
        (_step(lambda p, y: y - p), "uphill: p - right is positive where p is too high, and the "
                                    "step goes against the gradient"),
        (_step(lambda p, y: 2 * (p - y) * p * (1 - p)),
         "this is the squared error's gradient; that of the cross-entropy is p - right alone"),
        (_step(lambda p, y: (p - y) * p * (1 - p)),
         "the sigmoid's slope p (1 - p) cancels against the logarithm's: p - right is all"),
        (_step(lambda p, y: (p > 0.5).float() - y), "no threshold: p - right with p itself"),
        (_step(lambda p, y: p - (2 * y - 1)), "labels are 1 and 0 here, not 1 and -1"),
        (_step(lambda p, y: p - y, bias=0.0), "the bias stays as it is: it has a gradient too, the "
                                              "mean of p - right"),
        (_step(lambda p, y: p - y, bias=-1.0), "the bias goes uphill: subtract its gradient too"),
        (_step(lambda p, y: -y * (1 - p)), "this learns from the right solutions alone; wrong ones "
                                           "push down by p"),
        (_step(lambda p, y: p - y, lambda off: len(off) ** -0.5),
         "divide by n, the number of solutions, not by its root"),
        (_linear, "the sigmoid is missing: p = sigmoid(h w + b)"),
        (_without_the_bias, "the bias is missing in p = sigmoid(h w + b)"),
        (_bias_by_its_sum, "the bias takes the mean of p - right too, not the sum"),
        (_bias_after_the_weights, "w and b step together, from the same p: compute p once"),
        (_gradients, "these are the gradients; return w and b after the step"),
        (lambda h, right, w, b, lr: head_step(h, right, w, b, 1.0),
         "lr is not used: the step is lr times the gradient"),
        (_decayed, "no weight decay: the step is lr times the loss's gradient alone"),
        (_in_place, "this writes into w and b that were given: return new ones, `w - ...`, not "
                    "`w -= ...`"),
        (lambda h, right, w, b, lr: head_step(h, right, w, b, lr)[::-1],
         "w first, then b"),
    ],
))


# --- 5. The weighted vote ----------------------------------------------------------------


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


def _different_pairs(answers, scores):
    pairs = list(dict.fromkeys(zip(answers, scores)))
    winner = choose([a for a, _ in pairs], [s for _, s in pairs])
    return answers.index(pairs[winner][0]) if any(answers) else 0


def _runs(answers, scores):
    """The best run of equal answers that follow each other."""
    at, best, place = 0, -1.0, 0
    for answer, run in groupby(answers):
        size = len(list(run))
        if answer is not None and sum(scores[at:at + size]) > best:
            best, place = sum(scores[at:at + size]), answers.index(answer)
        at += size
    return place


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
        (lambda g: (["8", "8", "8", "3", "3"], [0.5, 0.05, 0.05, 0.4, 0.35]),
         "three, of which one is sure"),
        (lambda g: (["1", "1", "6", "6", "6"], [0.55, 0.5, 0.3, 0.3, 0.3]), "two sums near 1"),
        (lambda g: (["2", "7", "2", "7", "2"], [0.05, 0.45, 0.05, 0.4, 0.6]),
         "the last one is sure"),
        (lambda g: (["3", "9", "9", "9"], [0.97, 0.4, 0.3, 0.3]), "one nearly certain"),
        (lambda g: (["4", "4", "1", "1"], [0.3, 0.3, 0.35, 0.2]), "equal scores of one answer"),
        (lambda g: (["5", "6", "6"], [0.9, 0.45, 0.42]), "two doubtful ones fall just short"),
        (lambda g: (["2", "5", "5", "5"], [0.7, 0.6, 0.6, 0.6]), "three above a half"),
        (lambda g: (["3", "9", "9"], [0.97, 0.75, 0.74]), "one nearly certain against two"),
        (lambda g: (["4", "4", "6", "6", "6"], [0.9, 0.8, 0.4, 0.4, 0.4]), "two against three"),
        (lambda g: (["1", "5", "5", "5", "5"], [0.9, 0.25, 0.26, 0.25, 0.25]), "four poor ones"),
        (lambda g: (["4", "4", "4", "9", "9"], [0.9, 0.1, 0.1, 0.6, 0.6]), "one sure, two poor"),
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
        (_by(math.prod), "a product, or a sum of logarithms, makes every further sample a loss: add "
                         "the scores"),
        (_by(lambda own: len(own) * max(own)),
         "this counts every sample of an answer with its best score: add the scores as they are"),
        (_by(lambda own: len(own) * own[0]), "this counts every sample of an answer with its first "
                                             "score: add the scores as they are"),
        (_by(lambda own: len(own) * own[-1]), "this counts every sample of an answer with its last "
                                              "score: add the scores as they are"),
        (_by(lambda own: len(own) * sum(own)), "the sum counts how often an answer came already: "
                                               "do not multiply by that again"),
        (_by(lambda own: sum(s * s for s in own)), "these are sums of squares: add the scores "
                                                   "themselves"),
        (_by(lambda own: sum(s ** 0.5 for s in own)), "these are sums of roots: add the scores "
                                                      "themselves"),
        (_by(lambda own: sum(s - 0.5 for s in own)),
         "nothing is subtracted: a sample at 0.4 counts as 0.4, not as -0.1"),
        (_by(lambda own: sum(math.exp(s) for s in own)), "add the scores as they are, without exp"),
        (_by(lambda own: sum(math.log(s / (1 - s)) for s in own)),
         "these are sums of log-odds, which fall below 0 where s < 0.5: add the scores"),
        (_by(lambda own: 1 - math.prod(1 - s for s in own)),
         "this is the chance that one of independent samples is right: add the scores"),
        (_by(lambda own: sum(sorted(own)[-2:])), "this adds an answer's two best scores: add all"),
        (_by(lambda own: sorted(own)[len(own) // 2]), "this is a median; add the scores"),
        (lambda answers, scores: choose(answers, [round(s) for s in scores]),
         "the scores are rounded to 0 or 1: add them as they are"),
        (_different_pairs, "two samples with the same answer and the same score are two votes"),
        (_runs, "equal answers need not follow each other: add over all samples (groupby wants a "
                "sorted list)"),
        (lambda answers, scores: max(
            range(len(answers)), key=lambda i: answers.count(answers[i]) * scores[i]),
         "this weighs each sample with its answer's count; add the scores of an answer"),
    ],
))
