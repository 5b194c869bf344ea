"""Wrong answers to the exercises of notebook 08, as learners write them."""

import math
from collections import Counter
from fractions import Fraction

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from course.nb08 import exercises as nb08
from tests.support.wrong_answers import assert_told, each


def next_token(put_back):
    """The solution of 08's first exercise; `put_back` is a function of (p, kept, order)."""
    def mine(logits, temperature, top_p):
        p = torch.softmax(logits / temperature, -1)
        ordered, order = p.sort(descending=True)
        kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0)
        p = put_back(p, kept, order)
        return p / p.sum()
    return mine


def up_to(keep):
    """The same; `keep` is a function of (running sums, probabilities, top_p)."""
    def mine(logits, temperature, top_p):
        p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
        kept = torch.where(keep(p.cumsum(-1), p, top_p), p, 0)
        return torch.zeros_like(p).scatter(0, order, kept / kept.sum())
    return mine


def vote(index, nothing):
    """That of the second; `index` is a function of (answers, counts), `nothing` without counts."""
    def mine(answers):
        counts = Counter(a for a in answers if a is not None)
        return index(answers, counts) if counts else nothing(counts)
    return mine


def weighted_vote(index, nothing=lambda sums: 0):
    """That of the fifth; `index` is a function of (answers, scores, sums)."""
    def mine(answers, scores):
        sums = {}
        for answer, score in zip(answers, scores):
            if answer is not None:
                sums[answer] = sums.get(answer, 0) + score
        return index(answers, scores, sums) if sums else nothing(sums)
    return mine


def of_each_answer(value):
    """Its fifth, with another number for an answer than the sum of its scores."""
    def mine(answers, scores):
        own = {}
        for answer, score in zip(answers, scores):
            if answer is not None:
                own.setdefault(answer, []).append(score)
        best = {answer: value(its) for answer, its in own.items()}
        return answers.index(max(best, key=best.get)) if best else 0
    return mine


def at_the_place(place):
    """The second step of its fourth; `place` is a function of one row's mask."""
    return lambda hidden, mask: torch.stack([h[place(m)] for h, m in zip(hidden, mask.tolist())])


def by_autograd(loss, signs=(-1, -1)):
    """The third step; `loss` is a function of (logits, right)."""
    def mine(h, right, w, b, lr):
        w, b = (t.detach().clone().requires_grad_() for t in (w, b))
        loss(h @ w + b, right).backward()
        return tuple(t.detach() + sign * lr * t.grad for t, sign in zip((w, b), signs))
    return mine


def leader(answers, scores=None):
    """One pass over the samples, which keeps the first answer to get ahead."""
    sums, best = {}, None
    for answer, score in zip(answers, scores or [1] * len(answers)):
        if answer is not None:
            sums[answer] = sums.get(answer, 0) + score
            best = answer if best is None or sums[answer] > sums[best] else best
    return answers.index(best) if sums else 0


def first(answers, counts):
    return answers.index(counts.most_common(1)[0][0])


def winner(sums):
    return max(sums, key=sums.get)


WRONG = {
    "next_token": [
        (next_token(lambda p, kept, order: kept[order]), "kept[order] shuffles once more"),
        (next_token(lambda p, kept, order: p * (kept > 0)[order]), "mask[order] is not the mask"),
        (next_token(lambda p, kept, order: p), "top_p is not used"),
        (next_token(lambda p, kept, order: torch.where(p.cumsum(-1) - p < 0.9, p, 0)),
         "perhaps: the sum runs over the tokens from the most likely one down"),
        (up_to(lambda cumsum, v, top_p: (cumsum - v) <= top_p), "`<`, not `<=`"),
        (up_to(lambda cumsum, v, top_p: cumsum < top_p), "the sum BEFORE it"),
        (up_to(lambda cumsum, v, top_p: torch.cat(
            [torch.tensor([True]), cumsum[:-1] <= top_p])), "`<`, not `<=`"),
        (lambda logits, temperature, top_p: (logits / temperature).where(
            nb08.next_token(logits, temperature, top_p) > 0, 0).softmax(-1), "e^0 = 1"),
    ],
    "vote": [
        (vote(first, lambda counts: None), "an index is due here too"),
        (vote(first, lambda counts: -1), "-1 is the last sample"),
        (vote(first, lambda counts: max(counts)), "max of nothing fails"),
        (vote(first, lambda counts: counts.most_common(1)[0]), "there is nothing to count"),
        (vote(lambda answers, counts: list(counts).index(max(counts, key=counts.get)),
              lambda counts: 0), "a place among the DIFFERENT answers"),
        (vote(lambda answers, counts: max(counts.values()), lambda counts: 0), "how often"),
        (leader, "the first to reach the top"),
    ],
    "pass_at_k": [
        (lambda n, right, k: 1 - math.comb(n - right, k) // math.comb(n, k), "divide with `//`"),
        (lambda n, right, k: 1 - math.comb(right, k) / math.comb(n, k), "those without a right"),
        (lambda n, right, k: 1 - Fraction(math.comb(n - right, k), math.comb(n, k)),
         "as an exact Fraction"),
    ],
    "weighted_vote": [
        (lambda answers, scores: scores.index(max(scores)), "the best single sample; add"),
        (lambda answers, scores: answers.index(answers[scores.index(max(scores))]),
         "the answer of the best single sample"),
        (weighted_vote(lambda answers, scores, sums: list(sums).index(winner(sums))),
         "a place among your sums"),
        (weighted_vote(lambda answers, scores, sums: max(
            (s, i) for i, (a, s) in enumerate(zip(answers, scores)) if a == winner(sums))[1]),
         "its best sample"),
        (weighted_vote(lambda answers, scores, sums: winner(sums)), "return the INDEX"),
        (weighted_vote(lambda answers, scores, sums: answers.index(winner(sums)), winner),
         "your sums are empty"),
        (weighted_vote(lambda answers, scores, sums: answers.index(max(
            zip(sums.values(), sums))[1])), "not the larger text"),
        (weighted_vote(lambda answers, scores, sums: answers.index(sorted(
            sums, key=sums.get)[-1])), "not the last"),
        (leader, "the first to reach the top"),
        (of_each_answer(lambda own: len(own) * max(own)), "with its best score"),
        (of_each_answer(lambda own: len(own) * own[0]), "with its first score"),
        (of_each_answer(lambda own: len(own) * own[-1]), "with its last score"),
        (of_each_answer(lambda own: sum(s * s for s in own)), "diagnosis: these are sums of squ"),
        (of_each_answer(lambda own: sum(s - 0.5 for s in own)), "diagnosis: nothing is subtracted"),
        (of_each_answer(lambda own: sum(own) / len(own)), "diagnosis: this is the MEAN"),
        (of_each_answer(max), "diagnosis: this keeps the best score"),
        (lambda answers, scores: max(range(len(answers)), key=lambda i:
                                     answers.count(answers[i]) * scores[i]),
         "diagnosis: this weighs each sample with its answer's count"),
        (lambda answers, scores: answers.index(max(
            set(answers) - {None}, key=lambda a: max(
                s for b, s in set(zip(answers, scores)) if a == b), default=answers[0])),
         "this keeps the best score"),
        (of_each_answer(lambda own: sum({*own})), "with the same answer and the same score"),
        (of_each_answer(lambda own: max(own) + sum(own) / len(own)), "perhaps: "),
    ],
    "auc": [
        (lambda scores, right: sum(
            scores[i] > scores[j] for i, r in enumerate(right) for j, q in enumerate(right)
            if r and not q) / (sum(right) * (len(right) - sum(right))), "a tie counts half"),
        (lambda scores, right: torch.tensor([
            [a >= b for b, q in zip(scores, right) if not q]
            for a, r in zip(scores, right) if r]).float().mean().item(), "half, not one"),
        (lambda scores, right: 1 - nb08.auc(scores, right), "upside down"),
        (lambda scores, right: nb08.auc([-s for s in scores], right), "upside down"),
        (lambda scores, right: 2 * nb08.auc(scores, right) - 1, "from -1 to 1"),
        (lambda scores, right: nb08.auc([s > 0.5 for s in scores], right), "perhaps: "),
        (lambda scores, right: sum(
            (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i, r in enumerate(right)
            for j, q in enumerate(right) if r and not q), "the number of pairs in the right"),
    ],
    "end_states": [
        (at_the_place(lambda row: len(row) - 1), "the last place may be padding"),
        (at_the_place(lambda row: sum(row) - 1), "where the padding stands on the right"),
        (at_the_place(lambda row: row.index(1)), "FIRST token"),
        (at_the_place(lambda row: row.index(0) - 1 if 0 in row else -1), "the first 0"),
        (at_the_place(lambda row: min(sum(row), len(row) - 1)), "one too far"),
        (lambda hidden, mask: hidden[:, mask.sum(1) - 1], "takes all places of every row"),
        (lambda hidden, mask: torch.einsum("bt,btw->bw", mask / mask.sum(1, True), hidden),
         "the mean of all tokens"),
    ],
    "head_step": [
        (by_autograd(lambda z, y: bce(z, y, reduction="sum")), "the SUM over the solutions"),
        (by_autograd(bce, (1, 1)), "uphill"),
        (by_autograd(bce, (-1, 1)), "the bias goes uphill"),
        (by_autograd(lambda z, y: (z.sigmoid() - y).square().mean()), "squared error"),
        (by_autograd(lambda z, y: (z - y).square().mean() / 2), "the sigmoid is missing"),
        (by_autograd(bce, (-1, 0)), "the bias stays as it is"),
        (by_autograd(lambda z, y: -(y * z.sigmoid().log()).mean()), "right solutions alone"),
        (by_autograd(lambda z, y: bce(z, 1 - y)), "perhaps: "),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
