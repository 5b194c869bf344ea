"""Right answers of notebook 08's exercises in unusual words are accepted; the references mean what
the library does."""

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict

import pytest
import torch
from torch import nn

from course.kit import check
from course.nb08 import exercises as nb08
from experiments import ranking
from tests.support.tensors import normal


def by_a_loop(logits, temperature, top_p):
    p = torch.softmax(logits / temperature, 0)
    kept, so_far = torch.zeros_like(p), 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        kept[i] = p[i]
        so_far += p[i].item()
        if so_far >= top_p:
            break
    return kept / kept.sum()


def by_infinities(logits, temperature, top_p):
    z, order = (logits / temperature).sort(descending=True)
    p = z.softmax(-1)
    before = torch.cat([torch.zeros(1), p.cumsum(-1)[:-1]])
    z = z.masked_fill(before >= top_p, -torch.inf)
    return z.softmax(-1)[order.argsort()]


def by_assignment(logits, temperature, top_p):
    p = (logits / temperature).exp()
    p = p / p.sum()
    order = p.argsort(descending=True)
    sums = p[order].cumsum(0)
    last = int((sums < top_p).sum())
    p[order[last + 1:]] = 0
    return p / p.sum()


def by_products(n, right, k):
    return 1 - math.prod((n - right - i) / (n - i) for i in range(k))


def by_places(scores, right):
    ordered, total = sorted(scores), 0
    for score, ok in zip(scores, right):
        if ok:
            total += (bisect_left(ordered, score) + 1 + bisect_right(ordered, score)) / 2
    n = sum(right)
    return (total - n * (n + 1) / 2) / (n * (len(right) - n))


def by_the_curve(scores, right):
    hits, false, points = 0, 0, [(0, 0)]
    for _, own in itertools.groupby(sorted(zip(scores, right), reverse=True), lambda pair: pair[0]):
        for _, ok in own:
            hits, false = hits + ok, false + (not ok)
        points.append((false, hits))
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    return area / (hits * false)


def by_a_matrix(scores, right):
    s, ok = torch.tensor(scores), torch.tensor(right)
    apart = s[ok][:, None] - s[~ok]
    return ((apart.sign() + 1) / 2).mean()


def by_flipping(hidden, mask):
    from_the_end = mask.flip(1).argmax(1)
    places = (mask.shape[1] - 1 - from_the_end)[:, None, None]
    return hidden.gather(1, places.expand(-1, 1, hidden.shape[2])).squeeze(1)


def by_sums(hidden, mask):
    own = (mask.cumsum(1) == mask.sum(1, keepdim=True)) & mask.bool()
    return (hidden * own[..., None]).sum(1)


def by_autograd(h, right, w, b, lr):
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    loss = nn.functional.binary_cross_entropy_with_logits(h @ w + b, right)
    dw, db = torch.autograd.grad(loss, (w, b))
    return (w - lr * dw).detach(), (b - lr * db).detach()


def by_an_optimizer(h, right, w, b, lr):
    w, b = nn.Parameter(w.clone()), nn.Parameter(b.clone())
    optimizer = torch.optim.SGD([w, b], lr=lr)
    nn.BCELoss()(torch.sigmoid(h @ w + b), right).backward()
    optimizer.step()
    return w.data, b.data


def by_solutions(h, right, w, b, lr):
    off = [(1 / (1 + math.exp(-float(x @ w + b))) - float(y), x) for x, y in zip(h, right)]
    dw = sum(e * x for e, x in off) / len(off)
    return w - lr * dw, b - lr * sum(e for e, _ in off) / len(off)


def votes_by_a_loop(answers):
    best, most = 0, 0
    for i, answer in enumerate(answers):
        if answer is not None and answers.count(answer) > most:
            best, most = i, answers.count(answer)
    return best


def votes_by_order(answers):
    named = [a for a in answers if a is not None]
    return min((-n, answers.index(a)) for a, n in Counter(named).items())[1] if named else 0


def weights_by_index(answers, scores):
    sums = [sum(s for b, s in zip(answers, scores) if b == a) if a is not None else -1
            for a in answers]
    return sums.index(max(sums)) if max(sums) >= 0 else 0


def weights_by_dictionary(answers, scores):
    sums, first = defaultdict(float), {}
    for i, (answer, score) in enumerate(zip(answers, scores)):
        if answer is None:
            continue
        sums[answer] += score
        first.setdefault(answer, i)
    return first[max(sums, key=sums.__getitem__)] if sums else 0


RIGHT = {
    "next_token": [by_a_loop, by_infinities, by_assignment],
    "vote": [votes_by_a_loop, votes_by_order],
    "pass_at_k": [by_products, lambda n, right, k: sum(
        math.comb(right, i) * math.comb(n - right, k - i) for i in range(1, min(k, right) + 1)
    ) / math.comb(n, k)],
    "auc": [by_places, by_the_curve, by_a_matrix],
    "end_states": [by_flipping, by_sums],
    "head_step": [by_autograd, by_an_optimizer, by_solutions],
    "weighted_vote": [weights_by_index, weights_by_dictionary],
}


@pytest.mark.parametrize("name, mine", [
    pytest.param(name, mine, id=f"{name}-{i}")
    for name, answers in RIGHT.items() for i, mine in enumerate(answers, 1)])
def test_a_right_answer_in_other_words_is_accepted(name, mine, capsys):
    assert check(name, mine) is mine, capsys.readouterr().out


def test_the_auc_is_the_experiments():
    scores, right = normal(6, 5, seed=1).double(), normal(6, 5, seed=2) > 0
    flat = nb08.auc(scores.flatten().tolist(), right.flatten().tolist())
    assert ranking.auc(scores, right).item() == pytest.approx(flat)


def test_a_step_goes_down_as_autograd_says():
    h, right = normal(20, 6, seed=3), (normal(20, seed=4) > 0).float()
    w, b = normal(6, seed=5), torch.tensor(0.3)
    for mine, wanted in zip(nb08.head_step(h, right, w, b, 0.2), by_autograd(h, right, w, b, 0.2)):
        torch.testing.assert_close(mine, wanted)
