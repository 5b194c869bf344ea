"""Wrong answers to the exercises of notebook 07, as learners write them."""

from itertools import product

import torch

from course.nb07.exercises import update_of
from tests.support.wrong_answers import assert_told, each


def place_of_the_base(x, weight, adapters, names):
    y = x @ weight.T
    for name, (a, b, scale) in adapters.items():
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        y[rows] = scale * (x[rows] @ a.T) @ b.T
    return y


def into_a_copy(x, weight, adapters, names):
    y = x @ weight.T
    for name, (a, b, scale) in adapters.items():
        part = y[[i for i, chosen in enumerate(names) if chosen == name]]
        part += 0 * part
    return y


def shared_factor(adapters, weights):
    root = [abs(w * s) ** 0.5 for w, (_, _, s) in zip(weights, adapters)]
    sign = [1 if w > 0 else -1 for w in weights]
    return (torch.cat([r * b for r, (_, b, _) in zip(root, adapters)], 1),
            torch.cat([m * r * a for m, r, (a, _, _) in zip(sign, root, adapters)]))


def knapsack(values, costs, budget):
    fits = [ranks for ranks in product(*(range(len(own) + 1) for own in values))
            if sum(r * c for r, c in zip(ranks, costs)) <= budget]
    return list(max(fits, key=lambda ranks: sum(
        s * s for own, n in zip(values, ranks) for s in own[:n])))


WRONG = {
    "mixed_batch": [
        (place_of_the_base, "took the base's place"),
        (into_a_copy, "y[rows] alone is a copy"),
        (lambda x, weight, adapters, names: torch.stack([
            x[i] @ weight.T + adapters[name][2] * (x[i] @ adapters[name][0].T)
            @ adapters[name][1].T for i, name in enumerate(names)]), "None is no adapter's name"),
    ],
    "combine": [
        (lambda adapters, weights: (
            torch.cat([w * s * b for (_, b, s), w in zip(adapters, weights)], 1),
            torch.cat([a for a, _, _ in adapters])), "let A carry them"),
        (shared_factor, "its product is right"),
        (lambda adapters, weights: (
            torch.cat([s * b for _, b, s in adapters], 1),
            torch.cat([w * a for w, (a, _, _) in zip(weights, adapters)])), "B carries the scales"),
    ],
    "share_ranks": [(knapsack, "rank by rank, the best offer first")],
    "cut_adapter": [
        (update_of(lambda b, a, rank: (b[:, :rank], a[:rank])), "are not its best ones"),
        (update_of(lambda b, a, rank: (b, a)), "shapes do not fit"),
        (update_of(lambda b, a, rank: (lambda u, s, vh: (b @ u[:, :rank] * s[:rank], vh[:rank] @ a))(
            *torch.linalg.svd(torch.linalg.qr(b)[1] @ torch.linalg.qr(a.T)[1].T))),
         "U and V belong to the core"),
    ],
    "kept_energy": [
        (lambda b, a, rank: ((s := torch.linalg.svdvals(b @ a))[:rank].sum() / s.sum()).item()**2,
         "you sum first"),
        (lambda b, a, rank: torch.linalg.svdvals(b @ a)[:rank].square().sum().item(),
         "asked is its share"),
        (lambda b, a, rank: torch.linalg.svdvals(a @ b)[:rank].sum().item(), "B A, (out, r)"),
    ],
}


@each(WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(name, mine, told, capsys):
    assert_told(name, mine, told, capsys)
